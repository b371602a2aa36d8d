"""Strategies side by side: equal budgets, the same seeds, and always random search among them."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from nasbench import strategies as registry
from nasbench.data import Data
from nasbench.devices import pick_device
from nasbench.errors import SettingError, StudyError
from nasbench.files import atomic_write
from nasbench.objective import DIRECTIONS, Objective
from nasbench.recipe import Recipe
from nasbench.result import Trial
from nasbench.strategies import OneShot, OptunaStrategy, Strategy
from nasbench.study import search
from nasbench.style import save_figure
from nasbench.table import Table
from nasbench.training import evaluate
from search_spaces.base import Arch, SearchSpace, nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
StrategyLike = str | Strategy | OptunaStrategy

FORMAT = 1
BASELINE = "random"
_GREY = "#7f7f7f"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#5b3a8c")
_ARRAYS = ("values", "seconds", "reports")
_TESTED = ("test_accuracy", "test_loss")
_SEARCH = ("constraints", "device", "metrics", "pruner", "recipe", "storage", "workers")
_SETTINGS = [*_SEARCH, *(field.name for field in dataclasses.fields(Recipe))]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Every run of every strategy; print it, plot it, save it.

    Attributes:
        names: the strategies; "random" is the first.
        seeds: each strategy has one run with each of them.
        objective, direction: the metric that was optimised, and "maximize" or "minimize".
        values: (strategies, seeds, trials), that metric of every complete trial in order of completion. NaN follows
            where a run has fewer complete trials: some were pruned, or the strategy had no more to propose.
        choices: the best architecture of every run, by strategy and seed.
        seconds: (strategies, seeds), wall time of the searches; of a continued run only the rest.
        report: a metric of the choice that no search saw, or None.
        reports: (strategies, seeds, trials), that metric of what would be chosen after every trial. Measured on test
            images it is known of the final choice alone, and NaN before.
        conditions: space, data, objective and strategies, as JSON values.
    """

    names: tuple[str, ...]
    seeds: tuple[int, ...]
    objective: str
    direction: str
    values: Floats
    choices: tuple[tuple[Arch, ...], ...]
    seconds: Floats
    report: str | None
    reports: Floats | None
    conditions: Mapping[str, Any]

    @property
    def trials(self) -> int:
        """The budget of a run in trials."""
        return int(self.values.shape[2])

    @cached_property
    def curves(self) -> Floats:
        """(strategies, seeds, trials), the best value so far; a run with fewer complete trials keeps its last."""
        better = np.fmax if self.direction == "maximize" else np.fmin  # these pass over NaN
        curves: Floats = better.accumulate(self.values, axis=2)
        return curves

    @property
    def reported(self) -> Floats | None:
        """(strategies, seeds), the report metric of the final choice; None if none was asked for."""
        return None if self.reports is None else self.reports[:, :, -1]

    def summary(self) -> list[dict[str, Any]]:
        """Return one row a strategy.

        `mean`, `std` (n - 1) and `median` are of the final value over seeds. `rank` is 1 for the best strategy of a
        seed, ties shared, averaged over seeds. `p` is of a two-sided Wilcoxon signed-rank test against random search,
        paired by seed; None for random search itself. With a report metric there are `report_mean`, `report_std`,
        `report_median` and `report_p` too. `seconds` is the sum over seeds.
        """
        from scipy.stats import rankdata

        final, reported = self.curves[:, :, -1], self.reported
        ranks = rankdata(-final if self.direction == "maximize" else final, axis=0).mean(axis=1)
        rows = []
        for i, name in enumerate(self.names):
            row = {"strategy": name, **self._figures(final, i), "rank": float(ranks[i])}
            if reported is not None:
                row |= {f"report_{key}": value for key, value in self._figures(reported, i).items()}
            rows.append(row | {"seconds": float(self.seconds[i].sum())})
        return rows

    def _figures(self, values: Floats, i: int) -> dict[str, float | None]:
        """Return mean, std, median and p of strategy `i`; values are (strategies, seeds)."""
        from scipy.stats import wilcoxon

        figures: dict[str, float | None] = {
            "mean": float(values[i].mean()),
            "std": float(values[i].std(ddof=1)),
            "median": float(np.median(values[i])),
            "p": None,
        }
        if self.names[i] != BASELINE:
            difference = values[i] - values[self.names.index(BASELINE)]
            figures["p"] = float(wilcoxon(difference).pvalue) if difference.any() else 1.0
        return figures

    def __str__(self) -> str:
        parts = {"": self.objective} | ({"report_": self.report} if self.report else {})
        columns = [["strategy", *self.names]]
        rows = self.summary()
        for start, metric in parts.items():
            columns.append([metric, *(f"{row[start + 'mean']:#.4g} ± {row[start + 'std']:#.2g}" for row in rows)])
            columns.append(["median", *(f"{row[start + 'median']:#.4g}" for row in rows)])
            columns.append(["p", *("-" if row[start + "p"] is None else f"{row[start + 'p']:.2g}" for row in rows)])
        columns.append(["rank", *(f"{row['rank']:.2f}" for row in rows)])
        columns.append(["seconds", *(f"{row['seconds']:.1f}" for row in rows)])
        widths = [max(map(len, column)) for column in columns]
        padded = [[c.rjust(w) for c in column] for column, w in zip(columns[1:], widths[1:], strict=True)]
        padded.insert(0, [name.ljust(widths[0]) for name in columns[0]])
        lines = ["  ".join(line) for line in zip(*padded, strict=True)]
        smallest = 2.0 ** (1 - len(self.seeds))
        note = f", which cannot fall below {smallest:.2g} with {len(self.seeds)} seeds" if smallest > 0.05 else ""
        foot = f"mean ± std over seeds; p of a two-sided Wilcoxon signed-rank test against random, paired by seed{note}"
        return "\n".join([f"{self._title()}: {self.direction} {self.objective}", *lines, foot])

    def _title(self) -> str:
        subject = f"{self.conditions['space']['space']}, {self.conditions['data']}"
        return f"{subject}, {self.trials} trials, {len(self.seeds)} seeds"

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the mean best value over trials, and beside it the report metric of the choice; return the figure.

        Lines are means over seeds, bands their standard error. Where the report metric is known of the final choices
        only, or there is none, the second panel shows the final values of single seeds with their mean.

        Args:
            path: also save it there, as PNG, PDF or SVG by its ending.
        """
        from nasbench.style import new_figure

        figure = new_figure(10, 4.2, layout="constrained")
        left, right = figure.subplots(1, 2)
        self._draw_curves(left, self.curves, f"best {self.objective} so far")
        if self.reports is not None and not np.isnan(self.reports).any():
            self._draw_curves(right, self.reports, f"{self.report} of the choice so far")
        elif self.reported is not None:
            self._draw_strip(right, self.reported, f"{self.report} of the choice")
        else:
            self._draw_strip(right, self.curves[:, :, -1], f"best {self.objective}")
        left.legend(frameon=False, loc="lower right" if self.direction == "maximize" else "upper right")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, linewidth=0.6)
        figure.suptitle(f"{self._title()}; mean ± standard error over seeds", fontsize=10)
        save_figure(figure, path, dpi=120)
        return figure

    def _colours(self) -> Iterator[tuple[str, str]]:
        others = [name for name in self.names if name != BASELINE]
        colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(others)} | {BASELINE: _GREY}
        return ((name, colours[name]) for name in self.names)

    def _draw_curves(self, axes: Axes, values: Floats, label: str) -> None:
        """Draw (strategies, seeds, trials); the axis is cut to what happens after the first tenth of the budget."""
        trials = np.arange(1, self.trials + 1)
        mean = values.mean(axis=1)
        error = values.std(axis=1, ddof=1) / np.sqrt(len(self.seeds))
        for i, (name, colour) in enumerate(self._colours()):
            axes.plot(trials, mean[i], color=colour, label=name, linewidth=1.6)
            axes.fill_between(trials, mean[i] - error[i], mean[i] + error[i], color=colour, alpha=0.2, linewidth=0)
        late = slice(self.trials // 10, None)
        low, high = (mean - error)[:, late].min(), (mean + error)[:, late].max()
        if high > low:
            axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axes.set(xlabel="trials", ylabel=label, xlim=(0, self.trials))

    def _draw_strip(self, axes: Axes, values: Floats, label: str) -> None:
        """Draw (strategies, seeds) as columns of dots."""
        offsets = np.linspace(-0.15, 0.15, len(self.seeds))
        for i, (_, colour) in enumerate(self._colours()):
            axes.plot(i + offsets, values[i], "o", color=colour, markersize=4, alpha=0.6, markeredgewidth=0)
            error = values[i].std(ddof=1) / np.sqrt(len(self.seeds))
            axes.errorbar(i + 0.3, values[i].mean(), error, fmt="_", color=colour, markersize=12, capsize=3)
        axes.set_xticks(range(len(self.names)), self.names)
        axes.set_ylabel(label)

    # Files ---------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Return everything as JSON."""
        entry = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in _ARRAYS:
            if (array := entry[name]) is not None:
                entry[name] = np.where(
                    np.isnan(array), np.array(None), array.astype(object)
                ).tolist()  # JSON has no NaN
        entry["choices"] = [[dict(arch) for arch in row] for row in self.choices]
        return json.dumps({"format": FORMAT, **entry}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Read what `to_json` wrote.

        Raises:
            StudyError: the text is no comparison, or is of a newer format.
        """
        try:
            entry = dict(json.loads(text))
            if (found := entry.pop("format")) > FORMAT:
                raise ValueError(f"format {found} is newer than {FORMAT}: update nasbench")
            arrays = {n: None if entry[n] is None else np.array(entry[n], np.float64) for n in _ARRAYS}
            choices = tuple(tuple(map(Arch, row)) for row in entry["choices"])
            names, seeds = tuple(entry["names"]), tuple(entry["seeds"])
            read = cls(**entry | arrays | {"choices": choices, "names": names, "seeds": seeds})
            if read.values.shape != (len(names), len(seeds), read.trials) or BASELINE not in names:
                raise ValueError(f"{len(names)} strategies with {len(seeds)} seeds have values {read.values.shape}")
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise StudyError(f"this comparison cannot be read ({what}). Write one with save().") from None
        return read

    def save(self, path: str | Path) -> Path:
        """Write `to_json` to a file, whole or not at all."""
        with atomic_write(path) as temporary:
            temporary.write_text(self.to_json())
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Read a file that `save` wrote.

        Raises:
            StudyError: the file cannot be read, or is no comparison.
        """
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise StudyError(f"cannot read a comparison from {path}: {error}. Name a file that save() wrote.") from None
        return cls.from_json(text)


def compare(
    strategies: Sequence[StrategyLike] | Mapping[str, StrategyLike],
    space: SearchSpace,
    data: Data | Table | Callable[[Arch], Mapping[str, float]] | Objective,
    *,
    trials: int = 100,
    seeds: int | Sequence[int] = 20,
    objectives: str | Sequence[str] | Mapping[str, str | None] | None = None,
    report: str | None = None,
    study: str | None = None,
    folder: str | Path = "runs",
    progress: bool = True,
    **settings: Any,
) -> Comparison:
    """Run every strategy with every seed, and random search at the same budget, asked for or not.

    Args:
        strategies: names or strategies; a mapping gives them names of your own, to compare settings of one strategy.
        space: what to search.
        data: a table, a function from an architecture to metrics, or images to train on (`nasbench.search` says more).
        trials: budget of each run.
        seeds: how many (0, 1, ...), or which; two at least.
        objectives: the one metric to optimise, as for `search`.
        report: a metric of the choice, the run's best architecture, that the search does not see. Of a table: one of
            its metrics. Of images: "test_accuracy" or "test_loss", measured once on the choice's trained weights. Of a
            function: anything it returns.
        study: keep each run as a study of this name, strategy and seed in `folder`, so that the same call goes on
            where it was interrupted. Left out, nothing is kept of tables and functions, and training takes new names.
        folder: where study folders lie.
        progress: show one bar over all runs.
        **settings: `constraints`, `pruner`, `device`, `workers`, ... of `search`, and fields of `Recipe`.

    Raises:
        SettingError: an unknown strategy, metric or setting, equal names, several objectives, fewer than two seeds or
            no budget: before any work.
        StudyError: a run failed.

    Example:
        >>> from search_spaces import NASBench201
        >>> def score(arch):
        ...     return {"score": sum(option == "nor_conv_3x3" for option in arch.values())}
        >>> comparison = compare(["evolution"], NASBench201(), score, objectives={"score": "maximize"}, trials=40,
        ...                      seeds=3, progress=False)
        >>> comparison.names, comparison.curves.shape
        (('random', 'evolution'), (2, 3, 40))
        >>> random, evolution = comparison.summary()
        >>> evolution["mean"] > random["mean"]
        True
    """
    made = _strategies(strategies, study)
    numbers = _seeds(seeds)
    _check(trials, objectives, report, data, settings)
    for strategy in made.values():
        if isinstance(strategy, Strategy):
            reason = strategy.refuses(space) or strategy.refuses_directions([_direction(objectives)])
            if reason is not None:
                raise SettingError(reason)
    shape = len(made), len(numbers), trials
    values, reports, seconds = np.full(shape, np.nan), np.full(shape, np.nan), np.zeros(shape[:2])
    choices: list[list[Arch]] = [[] for _ in made]
    with tqdm(total=len(made) * len(numbers), desc="compare", unit="run", disable=not progress) as bar:
        for (j, seed), (i, (name, strategy)) in product(enumerate(numbers), enumerate(made.items())):
            bar.set_postfix_str(f"{name}, seed {seed}")
            started = time.perf_counter()
            with _interruptible():
                result = search(
                    space,
                    data,
                    strategy,
                    objectives=objectives,
                    trials=trials,
                    study=None if study is None else f"{study}-{name}-{seed}",
                    folder=folder,
                    seed=seed,
                    progress=False,
                    **settings,
                )
            seconds[i, j] = time.perf_counter() - started
            ((objective, direction),) = result.objectives.items()
            complete = result.complete[:trials] or [result.best]  # which says why none completed
            found = [trial.metrics[objective] for trial in complete]
            picks = _picks(found, direction)
            values[i, j, : len(found)] = found
            choices[i].append(complete[picks[-1]].arch)
            if report is not None:
                device = settings.get("device", "auto")
                reports[i, j] = _reported(report, [complete[k] for k in picks], data, trials, device)
            bar.update()
    kept = ("space", "objective", "constraints", "pruner")
    described = {name: registry.describe(strategy) for name, strategy in made.items()}
    conditions = {key: result.conditions[key] for key in kept} | {"data": _label(data), "strategies": described}
    return Comparison(
        names=tuple(made),
        seeds=numbers,
        objective=objective,
        direction=direction,
        values=values,
        choices=tuple(map(tuple, choices)),
        seconds=seconds,
        report=report,
        reports=None if report is None else reports,
        conditions=json.loads(json.dumps(conditions, default=repr)),
    )


# Checks before any work --------------------------------------------------------------------------------------------


def _strategies(
    asked: Sequence[StrategyLike] | Mapping[str, StrategyLike], study: str | None
) -> dict[str, Strategy | OptunaStrategy]:
    """Return the strategies by name, random search first."""
    if isinstance(asked, str) or not isinstance(asked, Mapping | Sequence):
        raise SettingError(
            f'strategies={asked!r:.80}: give a list such as ["evolution", "tpe"], or a mapping of names.'
        )
    pairs = asked.items() if isinstance(asked, Mapping) else ((None, given) for given in asked)
    made: dict[str, Strategy | OptunaStrategy] = {}
    for own, given in pairs:
        strategy = registry.make(given) if isinstance(given, str) else given
        if isinstance(strategy, OneShot):
            raise SettingError(
                f"{strategy.name!r} trains a supernet, and nothing is trained here: compare black-box strategies. A "
                f'one-shot search beside a table: nasbench.search(space, data, "{strategy.name}", table=table).'
            )
        if not isinstance(strategy, Strategy | OptunaStrategy):
            raise SettingError(
                f"{given!r:.80} is no strategy. Give a name, a Strategy, or one of Optuna's as "
                'nasbench.strategies.make("tpe", ...): a sampler of your own cannot be seeded anew for every run.'
            )
        kind = registry.describe(strategy)["name"].rpartition(":")[2]
        name = kind if own is None else own
        if name in made:
            raise SettingError(f'two strategies are called {name!r}. Name them: {{"small": ..., "large": ...}}.')
        if name == BASELINE != kind:
            raise SettingError(f"{name!r} is the name of random search, but was given to {kind!r}. Choose another.")
        if study is not None and Path(f"{study}-{name}").name != f"{study}-{name}":
            raise SettingError(f"study {study!r} of strategy {name!r} cannot be a folder name: leave out the slashes.")
        made[name] = strategy
    if not made:
        raise SettingError('there are no strategies to compare. Name at least one, such as "evolution".')
    return {BASELINE: OptunaStrategy(BASELINE)} | made


def _seeds(seeds: Any) -> tuple[int, ...]:
    chosen = range(seeds) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds
    whole = isinstance(chosen, Sequence) and all(type(seed) is int and seed >= 0 for seed in chosen)
    if not whole or len({*chosen}) < len(chosen):
        raise SettingError(f"seeds={seeds!r}: give how many, or different whole numbers from 0.")
    if len(chosen) < 2:
        raise SettingError(f"{len(chosen)} seed: a comparison needs several, for one run may be luck. Try seeds=20.")
    return tuple(chosen)


def _check(trials: int, objectives: Any, report: str | None, data: Any, settings: Mapping[str, Any]) -> None:
    """Refuse what `search` would not refuse by itself in the first run."""
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise SettingError(f"trials={trials!r}: each run needs a whole number of trials, at least 1.")
    if objectives is not None and not isinstance(objectives, str) and len(objectives) > 1:
        several = ", ".join(objectives)
        raise SettingError(f"strategies are ranked by one objective, not {several}. Make constraints of the others.")
    for name in settings:
        if name not in _SETTINGS:
            raise SettingError(
                f"compare has no setting {name!r}; {nearest(name, _SETTINGS)} "
                'A strategy carries its own settings: nasbench.strategies.make("evolution", population=20).'
            )
    if report is None or not isinstance(data, Data | Table):
        return
    known = data.metrics if isinstance(data, Table) else _TESTED
    if report not in known:
        raise SettingError(f"there is no metric {report!r} to report; {nearest(report, known)}")
    if isinstance(data, Data) and not data.count("test"):
        raise SettingError(f"{data.name} has no test images, so {report!r} cannot be reported. Leave report out.")
    if isinstance(data, Table) and (missing := int(np.isnan(data.values(report)).sum())):
        raise SettingError(f"{report!r} was not measured for {missing} rows of the table. Report another metric.")


def _direction(objectives: Any) -> str:
    """Return "maximize" or "minimize" for the objective, as far as its name tells before it is measured."""
    if isinstance(objectives, Mapping) and (given := next(iter(objectives.values()), None)):
        return str(given)
    names = [objectives] if isinstance(objectives, str) else [*(objectives or ["val_accuracy"])]
    return DIRECTIONS.get(names[0], "maximize") if names else "maximize"


# Runs --------------------------------------------------------------------------------------------------------------


def _picks(values: Sequence[float], direction: str) -> list[int]:
    """Return the position of the best of the first k values for every k; of equal ones the first."""
    picks: list[int] = []
    best = 0
    for k, value in enumerate(values):
        if value > values[best] if direction == "maximize" else value < values[best]:
            best = k
        picks.append(best)
    return picks


def _reported(report: str, picks: Sequence[Trial], data: Any, trials: int, device: str) -> Floats:
    """Return the report metric of the choice after every trial, (trials,)."""
    found: Floats = np.full(trials, np.nan)
    if isinstance(data, Data):
        found[-1] = evaluate(picks[-1].build().to(pick_device(device)), data)[report]
        return found
    if isinstance(data, Table):
        reports = data.values(report)[data.rows(trial.arch for trial in picks)]
    elif missing := [trial for trial in picks if report not in trial.metrics]:
        raise SettingError(f"the objective did not return {report!r} to report; {nearest(report, missing[0].metrics)}")
    else:
        reports = np.array([trial.metrics[report] for trial in picks])
    found[: len(picks)], found[len(picks) :] = reports, reports[-1]
    return found


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end the comparison: `search` would take it for the end of one run, and the next would begin."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed = []

    def note(number: int, frame: Any) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


def _label(data: Any) -> str:
    if isinstance(data, Data):
        return data.name
    if isinstance(data, Table):
        return f"table {data.fingerprint}"
    return f"function {data.__name__}" if hasattr(data, "__name__") else type(data).__name__
