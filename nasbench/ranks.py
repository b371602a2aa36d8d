"""Where an architecture really stands, as a table of results tells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nasbench.errors import SettingError
from nasbench.objective import DIRECTIONS
from search_spaces.base import Arch, SearchSpace, nearest

if TYPE_CHECKING:
    from nasbench.table import Table


_WORDS = {"loss": "minimize", "error": "minimize", "seconds": "minimize", "latency": "minimize", "acc": "maximize"} | {
    f"{data}_{split}": "maximize"  # the accuracies of NAS-Bench-201, such as cifar10_test_200
    for data in ("cifar10", "cifar100", "imagenet16_120")
    for split in ("val", "test")
}
"""What in a metric's name tells which way is better; the first that is found counts."""


class Ranks:
    """The architectures of a table in the order of one of its metrics.

    Args:
        space: what the architectures are of.
        table: a table of this space.
        metric: one of its metrics, whose name tells which way is better.

    Raises:
        TableError: the table is of another space.
        SettingError: it has no such metric, or the name does not tell.

    Example:
        >>> import nasbench as nb
        >>> from search_spaces import NASBench201
        >>> table = nb.Table.load("nasbench201-digits")
        >>> best, _ = table.best("test_accuracy")
        >>> Ranks(NASBench201(), table, "test_accuracy").look_up(best)["rank"]
        1
    """

    def __init__(self, space: SearchSpace, table: Table, metric: str) -> None:
        table.check(space)
        if metric not in table.metrics:
            raise SettingError(f"the table has no metric {metric!r}; {nearest(metric, table.metrics)}")
        better = DIRECTIONS.get(metric) or next((d for word, d in _WORDS.items() if word in metric), None)
        if better is None:
            known = ", ".join(name for name in table.metrics if name != metric)
            raise SettingError(
                f"is more {metric!r} better? Architectures are ranked by a metric whose name tells, such as an "
                f"accuracy. The table also has {known or 'no other'}."
            )
        self.table, self.metric = table, metric
        self.sign = 1.0 if better == "maximize" else -1.0
        self.values = self.sign * table.values(metric)

    def look_up(self, arch: Arch) -> dict[str, Any]:
        """Return value and rank (1: the best) of an architecture, and of how many."""
        value = float(self.table.query(arch, self.metric))
        better = int((self.values > self.sign * value).sum())
        return {"table_value": value, "rank": better + 1, "rank_of": len(self.values)}
