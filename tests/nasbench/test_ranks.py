"""True ranks from a table: which way is better, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

import nasbench as nb
from nasbench.errors import SettingError
from nasbench.ranks import Ranks
from search_spaces import ResNet

SPACE = ResNet()


def table(metric: str) -> nb.Table:
    archs = [SPACE.at(i) for i in range(5)]
    return nb.Table(SPACE, {metric: np.array([0.1, 0.5, 0.3, 0.2, 0.4])}, archs=archs)


@pytest.mark.parametrize("metric", ["val_accuracy", "cifar10_test_200", "my_acc"])
def test_more_accuracy_is_better(metric: str) -> None:
    ranks = Ranks(SPACE, table(metric), metric)
    assert ranks.look_up(SPACE.at(1)) == {"table_value": pytest.approx(0.5), "rank": 1, "rank_of": 5}
    assert ranks.look_up(SPACE.at(0))["rank"] == 5


@pytest.mark.parametrize("metric", ["test_loss", "cifar10_test_loss", "val_loss_12", "test_error", "seconds"])
def test_less_loss_is_better(metric: str) -> None:
    ranks = Ranks(SPACE, table(metric), metric)
    assert [ranks.look_up(SPACE.at(i))["rank"] for i in range(5)] == [1, 5, 3, 2, 4]


def test_a_name_that_does_not_tell_is_refused() -> None:
    with pytest.raises(SettingError, match="is more 'score' better"):
        Ranks(SPACE, table("score"), "score")
    with pytest.raises(SettingError, match="the table has no metric 'scores'; did you mean 'score'"):
        Ranks(SPACE, table("score"), "scores")
