from __future__ import annotations

from compress.tables import aligned


def test_columns_are_flush_right_unless_they_are_asked_to_be_left() -> None:
    rows = [("name", "n", "note"), ("a", "1,000", ""), ("bb", "7", "x")]
    assert aligned(rows, left=(0, 2)).splitlines() == ["name      n  note", "a     1,000", "bb        7  x"]
    assert aligned(rows).splitlines()[2] == "bb        7     x"
