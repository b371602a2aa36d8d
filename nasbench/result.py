"""What a search leaves behind: its trials, the best of them, and how they are shown and kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import torch
from optuna.trial import TrialState

import search_spaces
from nasbench.errors import SettingError, StudyError, WeightsError
from nasbench.files import atomic_write
from nasbench.objective import DIRECTIONS, WEIGHTS
from nasbench.origin import mark
from nasbench.pareto import front, hypervolume
from nasbench.strategies.base import arch_of, proposal_of
from search_spaces.base import Arch, ArchError, SearchSpace, nearest

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

FORMAT = 1
RESULT = "result.json"


@dataclass(frozen=True)
class Trial:
    """One evaluated architecture.

    Args:
        number: place in the study, from 0.
        arch: the architecture as proposed; `space.canonical(arch)` is what was trained.
        state: "complete", "pruned" or "failed".
        metrics: what was measured; empty unless complete.
        runs: metrics of the single training runs (one per seed) that `metrics` are the means of, with their seconds.
        seconds: how long it took; None where that is not known.
        reason: why it was pruned or failed.
        copied_from: number of the trial with an equal architecture whose metrics these are.
        finished: place in order of completion, from 0.
        parent: number of the trial whose trained network it started from, if any.
        note: what the strategy wanted remembered.
        supernet: settings of the supernet that its weights were taken from, if they were.
    """

    number: int
    arch: Arch
    state: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    runs: Sequence[Mapping[str, float]] = ()
    seconds: float | None = None
    reason: str | None = None
    copied_from: int | None = None
    finished: int = 0
    parent: int | None = None
    note: Mapping[str, Any] | None = None
    supernet: Mapping[str, Any] | None = None
    space: SearchSpace | None = field(default=None, repr=False, compare=False)
    folder: Path | None = field(default=None, repr=False, compare=False)

    def build(self, weights: bool = True) -> torch.nn.Module:
        """Return the network with its trained weights, or a fresh one with ``weights=False``; in eval mode if trained.

        The weights of a one-shot search are a sub-network's, which has the supernet's own size and form; a fresh
        network is the space's.

        Raises:
            WeightsError: there are no weights: the trial was looked up in a table, was not among the best, did not
                complete, or was trained on another host.
        """
        assert self.space is not None
        canonical = self.space.canonical(self.arch)
        if not weights:
            return mark(self.space.build(canonical), self.space, canonical)
        advice = "Use build(weights=False) and nasbench.fit(model, data)."
        if self.state != "complete":
            raise WeightsError(
                f"trial {self.number} is {self.state} ({self.reason}): it has no trained weights. {advice}"
            )
        if self.folder is None:
            raise WeightsError(
                f"trial {self.number} was not trained here, its metrics were looked up or computed. {advice}"
            )
        path = self.file(WEIGHTS)
        assert path is not None
        if not path.exists():
            raise WeightsError(
                f"trial {self.number} has no weights at {path}: only the best trials keep theirs, on the host that "
                f"trained them. {advice}"
            )
        from safetensors.torch import load_file

        if self.supernet is None:
            model = mark(self.space.build(canonical), self.space, canonical)
        else:
            with torch.device("meta"):  # only the sub-network's own numbers are needed, and they come from the file
                model = self.space.supernet(**self.supernet).extract(self.arch)
            mark(model, self.space, self.arch, self.supernet)
        try:
            model.load_state_dict(load_file(path), assign=self.supernet is not None)
        except Exception as error:
            raise WeightsError(f"the weights at {path} do not fit the network: {error}. {advice}") from error
        return model.eval()

    def file(self, name: str) -> Path | None:
        """Return where a file that the objective keeps of this trial lies, such as "weights.safetensors".

        Only the best trials keep theirs. None: the study has no folder.
        """
        if self.folder is None:
            return None
        return self.folder / "trials" / str(self.number if self.copied_from is None else self.copied_from) / name

    def draw(self) -> Figure:
        """Draw the architecture as a graph; return the figure."""
        from nasbench.graphs import draw

        assert self.space is not None
        return draw(self.space, self.arch)


class SearchResult:
    """The trials of a study.

    Attributes:
        epochs: of a one-shot search, what was recorded of every epoch of its supernet: losses, the phase where training
            has several, the probabilities of all options, the architecture they decode to, the number of its skip
            connections, its true rank where a table was given, the largest eigenvalue where the strategy watches it,
            and the seconds since the beginning. Also its validation accuracy and loss with the weights it then shared,
            and the part of the seconds since the beginning that went into these scores, unless the strategy's `anytime`
            is off; where nothing is decoded ("spos"), the architecture is the best of those that were scored.

    Example:
        >>> import nasbench as nb
        >>> from search_spaces import NASBench201
        >>> def score(arch):
        ...     return {"score": list(arch.values()).count("nor_conv_3x3")}
        >>> better = {"score": "maximize"}
        >>> result = nb.search(NASBench201(), score, objectives=better, trials=20, seed=1, progress=False)
        >>> len(result.trials), result.best.metrics["score"] >= 2
        (20, True)
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Mapping[str, str],
        trials: Sequence[Trial],
        *,
        folder: Path | None = None,
        conditions: Mapping[str, Any] | None = None,
        epochs: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.space = space
        self.objectives = dict(objectives)
        self.trials = list(trials)
        self.folder = folder
        self.conditions = dict(conditions or {})
        self.epochs = [dict(epoch) for epoch in epochs]

    @property
    def complete(self) -> list[Trial]:
        """The trials that have metrics, in order of completion."""
        return sorted((t for t in self.trials if t.state == "complete"), key=lambda t: t.finished)

    @property
    def best(self) -> Trial:
        """The best trial; of equal ones the first.

        Raises:
            StudyError: no trial completed, or there are several objectives (use `pareto`).
        """
        if len(self.objectives) > 1:
            raise StudyError(f"there is no single best for {', '.join(self.objectives)}. Use result.pareto().")
        if not self.complete:
            reasons = {t.reason for t in self.trials if t.reason}
            raise StudyError(f"no trial completed. {'They said: ' + '; '.join(sorted(reasons)) if reasons else ''}")
        (name,) = self.objectives
        return max(self.complete, key=lambda t: (self.sign(name) * t.metrics[name], -t.finished))

    def pareto(self, *metrics: str) -> list[Trial]:
        """Return the complete trials that no other beats in all of these metrics (default: the objectives).

        Raises:
            SettingError: a metric that was not measured, or whose better direction is not known.
        """
        names = metrics or tuple(self.objectives)
        trials = self.complete
        measured = set[str]().union(*(t.metrics for t in trials))
        for name in names:
            if trials and name not in measured:
                raise SettingError(f"metric {name!r} was not measured; {nearest(name, measured)}")
        signs = [self.sign(name) for name in names]
        trials = [t for t in trials if all(name in t.metrics for name in names)]
        scores = [[s * t.metrics[n] for s, n in zip(signs, names, strict=True)] for t in trials]
        return [trials[i] for i in front(scores)]

    def hypervolume(self, reference: Mapping[str, float]) -> float:
        """Return the volume that the complete trials dominate, down to a reference: how good a front is, in one number.

        Fix the reference before you search, and compare only volumes with the same: it decides how much each objective
        counts, so one that is chosen afterwards can make any of two fronts win. Volumes have the product of the
        objectives' units.

        Args:
            reference: for every objective the worst value of use: {"val_accuracy": 0.5, "bytes": 1e6}. A trial that is
                not better everywhere adds nothing.

        Raises:
            SettingError: an objective has no reference, the reference names another metric, or a number is not finite.

        Example:
            >>> import nasbench as nb
            >>> from search_spaces import ResNet
            >>> def measure(arch):
            ...     return {"score": sum(arch.values()), "cost": arch["width0"]}
            >>> better = {"score": "maximize", "cost": "minimize"}
            >>> result = nb.search(ResNet(widths=(4, 8)), measure, objectives=better, strategy="random", trials=9,
            ...                    progress=False)
            >>> result.hypervolume({"score": 10, "cost": 16}) == result.hypervolumes({"score": 10, "cost": 16})[-1]
            True
        """
        signs, point = self._reference(reference)
        return hypervolume([self._scores(trial, signs) for trial in self.complete], point)

    def hypervolumes(self, reference: Mapping[str, float]) -> list[float]:
        """Return `hypervolume` as it was after each complete trial, in order of completion: it never falls."""
        signs, point = self._reference(reference)
        scores: list[list[float]] = []
        volumes: list[float] = []
        for trial in self.complete:
            scores.append(self._scores(trial, signs))
            kept = front(scores)
            scores = [scores[i] for i in kept]
            volumes.append(hypervolume(scores, point))
        return volumes

    def _reference(self, reference: Mapping[str, float]) -> tuple[dict[str, float], list[float]]:
        """Return the sign of every objective, and the reference as scores of which higher is better."""
        if lacking := [name for name in self.objectives if name not in reference]:
            raise SettingError(
                f"the reference has no {lacking[0]!r}: give the worst value of use for each of "
                f"{', '.join(self.objectives)}."
            )
        if unknown := [name for name in reference if name not in self.objectives]:
            raise SettingError(f"the reference names {unknown[0]!r}; {nearest(unknown[0], self.objectives)}")
        signs = {name: self.sign(name) for name in self.objectives}
        return signs, [sign * reference[name] for name, sign in signs.items()]

    @staticmethod
    def _scores(trial: Trial, signs: Mapping[str, float]) -> list[float]:
        return [sign * trial.metrics[name] for name, sign in signs.items()]

    def sign(self, name: str) -> float:
        """Return 1.0 if more of a metric is better, -1.0 if less is.

        Raises:
            SettingError: neither the objectives nor the metric's name tell.
        """
        direction = self.objectives.get(name) or DIRECTIONS.get(name)
        if direction is None:
            raise SettingError(
                f"is more {name!r} better? Only objectives and {', '.join(DIRECTIONS)} have a known direction."
            )
        return 1.0 if direction == "maximize" else -1.0

    def to_frame(self) -> pd.DataFrame:
        """Return a pandas table, one row a trial: number, state, decisions, metrics, seconds, reason; perhaps parent.

        Raises:
            ImportError: pandas is not installed; `result.rows()` gives the same as dictionaries.
        """
        try:
            import pandas as pd
        except ImportError:
            raise ImportError(
                "to_frame needs pandas: pip install pandas. Or use result.rows(), a list of dicts."
            ) from None
        return pd.DataFrame(self.rows())

    def rows(self) -> list[dict[str, Any]]:
        """Return one dictionary a trial: number, state, decisions, metrics, seconds, reason.

        Where trials inherit from others, also the parent.
        """
        inherited = any(t.parent is not None for t in self.trials)
        return [
            {"number": t.number, "state": t.state, **t.arch}
            | dict(t.metrics)
            | {"seconds": t.seconds, "copied_from": t.copied_from, "reason": t.reason}
            | ({"parent": t.parent} if inherited else {})
            for t in self.trials
        ]

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the search (best so far over trials; the Pareto front for several objectives); return the figure.

        Args:
            path: also save it there, as PNG, PDF or SVG by its ending.
        """
        from nasbench.drawing import draw_search
        from nasbench.style import save_figure

        figure = draw_search(self)
        save_figure(figure, path)
        return figure

    def report(self, path: str | Path | None = None) -> Path:
        """Write one self-contained HTML page (default: report.html in the study's folder) and return its path."""
        from nasbench.report import write_report

        return write_report(self, Path(path) if path is not None else None)

    def to_json(self) -> str:
        """Return everything but the weights as JSON."""
        trials = [
            {
                "number": t.number,
                "arch": dict(t.arch),
                "state": t.state,
                "metrics": dict(t.metrics),
                "runs": [dict(run) for run in t.runs],
                "seconds": t.seconds,
                "reason": t.reason,
                "copied_from": t.copied_from,
                "finished": t.finished,
                "parent": t.parent,
                "note": t.note,
                "supernet": t.supernet,
            }
            for t in self.trials
        ]
        entry = {
            "format": FORMAT,
            "space": json.loads(self.space.to_json()),
            "objectives": self.objectives,
            "conditions": self.conditions,
            "folder": str(self.folder) if self.folder else None,
            "trials": trials,
            "epochs": self.epochs,
        }
        return json.dumps(entry, indent=1)

    def save(self, path: str | Path) -> Path:
        """Write `to_json` to a file, whole or not at all."""
        path = Path(path)
        with atomic_write(path) as temporary:
            temporary.write_text(self.to_json())
        return path

    @classmethod
    def from_json(
        cls, text: str, space: SearchSpace | None = None, *, folder: str | Path | None = None
    ) -> SearchResult:
        """Read what `to_json` wrote. A space of your own must be given; no import path is read from the text.

        Args:
            folder: where the study lies now, if it was moved.

        Raises:
            StudyError: the text is no result, is of a newer format, or belongs to another space than the one given.
        """
        try:
            entry = json.loads(text)
            settings = {**entry["space"]}
            if entry["format"] > FORMAT:
                raise StudyError(
                    f"the result has format {entry['format']}, this version reads up to {FORMAT}. Update nasbench."
                )
            if space is None:
                space = _named_space(settings.pop("space"), settings)
            elif json.loads(space.to_json()) != settings:
                raise StudyError(
                    f"the result belongs to {settings}, not to {space!r}. Give the space it was searched in."
                )
            home = Path(folder or entry["folder"]) if entry["folder"] else None
            trials = [
                Trial(**{**t, "arch": space.check(t["arch"]), "runs": tuple(t["runs"])}, space=space, folder=home)
                for t in entry["trials"]
            ]
            epochs = entry.get("epochs", ())
            return cls(space, entry["objectives"], trials, folder=home, conditions=entry["conditions"], epochs=epochs)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise StudyError(
                f"this is no saved search result ({type(error).__name__}: {error}). Write one with save()."
            ) from None

    @classmethod
    def load(
        cls, path: str | Path, space: SearchSpace | None = None, *, folder: str | Path | None = None
    ) -> SearchResult:
        """Read a file that `save` wrote. A study's own result.json names the folder it lies in, also after a move."""
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise StudyError(
                f"cannot read a search result from {path}: {error}. Name a file that save() wrote."
            ) from None
        home = Path(path).parent
        own = Path(path).name == RESULT and (home / "trials").is_dir()
        return cls.from_json(text, space, folder=folder or (home if own else None))

    def __repr__(self) -> str:
        states = [t.state for t in self.trials]
        counts = ", ".join(f"{states.count(s)} {s}" for s in ("complete", "pruned", "failed") if s in states)
        head = f"SearchResult of {type(self.space).__name__}: {counts or 'no trials'}"
        if len(self.objectives) == 1 and self.complete:
            (name,) = self.objectives
            head += f"; best {name} {self.best.metrics[name]:.4g} in trial {self.best.number}"
        return head + (f"; in {self.folder}" if self.folder else "")


def collect(
    study: optuna.Study,
    space: SearchSpace,
    objectives: Mapping[str, str],
    folder: Path | None,
    conditions: Mapping[str, Any],
    epochs: Sequence[Mapping[str, Any]] = (),
) -> SearchResult:
    """Read the finished trials of an Optuna study that a search wrote."""
    states = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    done = [t for t in study.get_trials(deepcopy=False) if t.state in states]
    order = {t.number: i for i, t in enumerate(sorted(done, key=lambda t: (t.datetime_complete, t.number)))}
    trials = []
    for t in done:
        arch = arch_of(t, space)
        if arch is None:
            continue
        attrs = t.user_attrs
        trials.append(
            Trial(
                number=t.number,
                arch=arch,
                state=states[t.state],
                metrics=attrs.get("metrics", {}) if t.state == TrialState.COMPLETE else {},
                runs=tuple(attrs.get("runs", ())),
                seconds=attrs.get("seconds"),
                reason=attrs.get("violation") or attrs.get("reason") or attrs.get("error"),
                copied_from=attrs.get("copied_from"),
                supernet=attrs.get("supernet"),
                finished=order[t.number],
                **proposal_of(t),
                space=space,
                folder=folder,
            )
        )
    return SearchResult(space, objectives, trials, folder=folder, conditions=conditions, epochs=epochs)


def _named_space(name: str, settings: dict[str, Any]) -> SearchSpace:
    if search_spaces.home_of(name) is None:
        known = nearest(name.lower(), search_spaces.SPACES)
        raise ArchError(
            f"there is no search space {name!r}; {known} Give the space that was searched, if it is another, bound to "
            "its data: SearchResult.load(path, space.bind(data))."
        )
    return search_spaces.space(name, **settings)
