from __future__ import annotations

from typing import Any

import pytest

from compress.errors import CompressionError
from compress.schedule import Schedule


def test_rigl_drops_less_and_less() -> None:
    schedule = Schedule("rigl", steps=400, interval=75)
    shares = [schedule.dropped(schedule.last * quarter // 4) for quarter in range(4)]
    assert shares == pytest.approx([0.30, 0.256, 0.15, 0.044], abs=5e-4)


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_masks_change_every_interval_before_the_end(method: str) -> None:
    schedule = Schedule(method, steps=1000, interval=150, begin=0.1)
    assert [step for step in range(1001) if schedule.due(step)] == [250, 400, 550, 700]
    edge = Schedule(method, steps=400, interval=100, end=0.75)
    assert [step for step in range(401) if edge.due(step)] == [100, 200], "not at the end itself"


def test_shares_of_steps_are_not_off_by_one() -> None:
    assert not Schedule("rigl", steps=10, interval=1, end=0.7).due(7), "0.7 * 10 is 7.000000000000001"


def test_gradual_meets_its_density_at_its_last_change() -> None:
    schedule = Schedule("gradual", steps=1000, interval=200, end=0.75)
    due = [step for step in range(1001) if schedule.due(step)]
    assert due == [200, 400, 600], "750 is no multiple of the interval"
    assert [schedule.kept(step, 1000, 100) for step in due] == [100 + round(900 * 8 / 27), 100 + round(900 / 27), 100]
    assert Schedule("gradual", steps=1000, interval=250, end=0.75).due(750), "the end itself"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"method": "rigle"}, "no method 'rigle'; did you mean 'rigl'"),
        ({"steps": 0}, "steps is a number of optimizer steps, 1 or more, got 0"),
        ({"steps": 1e4}, "got 10000.0"),
        ({"interval": True}, "interval is a number of optimizer steps, 1 or more, got True"),
        ({"begin": 0.8}, "0 <= begin < end <= 1; got 0.8 and 0.75"),
        ({"end": 1.5}, "got 0.0 and 1.5"),
        ({"fraction": 0.0}, "fraction is a share of weights, above 0 and at most 1; got 0.0"),
        ({"interval": 75}, "the first change is after step 75, and the last one has to be before step 75 of 100"),
        ({"method": "gradual", "interval": 76}, "after step 76, and the last one has to be at step 75 at the latest"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(CompressionError, match=text):
        Schedule(**({"method": "rigl", "steps": 100, "interval": 10} | change))
