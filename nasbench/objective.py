"""Objectives: how an architecture becomes metrics. Trained on data, looked up in a table, or the user's function."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nasbench import profile, training
from nasbench.data import Data, load
from nasbench.devices import pick_device
from nasbench.errors import SettingError, TrainingDiverged, WeightsError
from nasbench.files import atomic_write
from nasbench.recipe import Recipe
from search_spaces.base import Arch, ArchError, SearchSpace, nearest
from search_spaces.growth import GrowingSpace

if TYPE_CHECKING:
    from nasbench.table import Table

DIRECTIONS = {
    "val_accuracy": "maximize",
    "val_loss": "minimize",
    "test_accuracy": "maximize",
    "test_loss": "minimize",
    "params": "minimize",
    "macs": "minimize",
    "bytes": "minimize",
    "file_bytes": "minimize",
    "peak_bytes": "minimize",
    "latency_ms": "minimize",
    "seconds": "minimize",
}
"""Which way is better, for every metric whose name is enough to tell."""

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Parent:
    """The finished trial whose network a trial starts from; `weights` is where its weights should lie, if anywhere."""

    number: int
    arch: Arch
    weights: Path | None


class TrialRun:
    """What an objective may use of the trial it evaluates. This one belongs to no study and keeps nothing."""

    folder: Path | None = None

    parent: Parent | None = None
    """What the trial inherits from, if anything."""

    def check(self) -> None:
        """Raise if the search has to stop now; called after every training step."""

    def show(self, text: str) -> None:
        """Show a few words about what is going on beside the search's bar."""

    def report(self, epoch: int, value: float) -> None:
        """Tell the pruner a value after an epoch; raises `optuna.TrialPruned` if the trial is not worth finishing."""

    watched: bool = False
    """Whether `report` wants a validation accuracy after every epoch."""

    runs: Sequence[Mapping[str, float]] = ()
    """The metrics of single training runs, where the trial's are means over several seeds; the objective sets it."""

    supernet: Mapping[str, Any] | None = None
    """Settings of the supernet that the trial's weights were taken from, if they were; the objective sets it."""


class Objective(ABC):
    """Turns an architecture into metrics, all finite numbers."""

    names: tuple[str, ...] | None = None
    """The metrics it can report; None: not known beforehand."""
    default: str | None = None
    """The metric that is optimised when none is named."""
    wanted: tuple[str, ...] = ()
    """The metrics the search asked for."""
    trains: bool = False
    """Whether its trials take long and leave weights: such a study gets a folder."""
    reports: bool = False
    """Whether a trial reports its validation accuracy after every epoch, as a pruner needs it."""
    keeps: tuple[str, ...] = (WEIGHTS,)
    """The files in a trial's folder that stay there while the trial is among the best."""

    @abstractmethod
    def __call__(self, arch: Arch, run: TrialRun) -> dict[str, float]:
        """Return the metrics of an architecture."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return JSON-able settings that a study is checked against when it is continued."""

    def prepare(  # noqa: B027 - a hook
        self, folder: Path | None, check: Callable[[], None] = lambda: None, progress: bool = True
    ) -> None:
        """Do what all trials need, before the first that this call evaluates; an error ends the search.

        Args:
            folder: the study's.
            check: to be called now and then; it may raise to stop.
            progress: show bars.
        """

    def want(self, names: Sequence[str]) -> None:
        """Say which metrics the search needs, before the first trial; others need not be measured."""
        self.wanted = tuple(names)

    @property
    def extra(self) -> tuple[str, ...]:
        """Those of the wanted metrics of a trained network that are not measured in every trial anyway."""
        return tuple(name for name in ("bytes", "peak_bytes", "latency_ms") if name in self.wanted)

    def key(self, arch: Arch) -> Arch:
        """Return what a result is filed under: architectures with equal keys are evaluated once."""
        return arch

    def preview(self, arch: Arch, names: Sequence[str]) -> dict[str, float]:
        """Return those of the metrics that are known before the expensive part."""
        return {}

    def direction(self, name: str) -> str | None:
        """Return "maximize" or "minimize", or None where the metric's name does not tell."""
        known = DIRECTIONS.get(name)
        if known is None and "acc" in name:
            return "maximize"
        return known


_MOMENTS = 64  # images whose statistics a new batch norm starts from, as published


class TrainObjective(Objective):
    """Train the canonical form of the architecture, then validate it.

    It is trained from scratch, unless the trial has a parent: then its network is the parent's, grown, with new states
    of the optimizer. Metrics are a pure function of the canonical architecture, the parent's weights, the recipe and
    the seeds. Equal architectures share the result of the first, whatever its parent.

    Args:
        space: bound to the data.
        data: training and validation splits; the test split only with ``test=True``, which table builders alone use.
        recipe: how to train.
        seeds: one training run each; metrics are means, and each run's own are kept in the trial's `runs`.
        device: where to train.

    Raises:
        SettingError: the space or the recipe is for other data: images, or a text.
    """

    default = "val_accuracy"
    trains = True
    reports = True
    checkpoint_every = 10.0
    """Seconds of training that a killed search loses at most."""

    def __init__(
        self,
        space: SearchSpace,
        data: Data,
        recipe: Recipe,
        *,
        seeds: Sequence[int] = (0,),
        device: str = "auto",
        test: bool = False,
    ) -> None:
        check_kind(space, data)
        self.space, self.recipe, self.seeds, self.test = space, recipe, tuple(seeds), test
        self.device = pick_device(device)
        self.data = data.to(self.device)
        data.train_batches(recipe.batch_size, seed=0, epoch=0, cutout=recipe.cutout)  # says what does not fit
        self._counts: dict[Arch, dict[str, int]] = {}
        self.names = ("val_accuracy", "val_loss", "params", "macs", "bytes", "peak_bytes", "latency_ms")

    def settings(self) -> dict[str, Any]:
        """Return data, recipe, seeds and metrics."""
        return {
            "kind": "train",
            "data": {"name": self.data.name, "fingerprint": self.data.fingerprint, "load": self.data.spec},
            "recipe": json.loads(self.recipe.to_json()),
            "seeds": list(self.seeds),
            "extra": list(self.extra),
            "test": self.test,
        }

    @classmethod
    def from_settings(cls, space: SearchSpace, settings: Mapping[str, Any], *, device: str = "auto") -> TrainObjective:
        """Return the objective that `settings` describes, its data loaded again by name."""
        data = load(**settings["data"]["load"])
        recipe = Recipe(**settings["recipe"])
        return cls(space.bind(data), data, recipe, seeds=settings["seeds"], device=device, test=settings["test"])

    def key(self, arch: Arch) -> Arch:
        """Return the canonical architecture."""
        return self.space.canonical(arch)

    def preview(self, arch: Arch, names: Sequence[str]) -> dict[str, float]:
        """Return params and macs, and what else can be told from an untrained network."""
        if not names:
            return {}
        build, canonical = self._builder(arch), self.space.canonical(arch)
        if canonical not in self._counts:
            self._counts[canonical] = dict(profile.count(build, self.data.shape))
        found: dict[str, float] = dict(self._counts[canonical])
        if {"bytes", "peak_bytes"} & {*names}:
            found |= {k: float(v) for k, v in profile.measure(build(), self.data.shape).to_dict().items() if k in names}
        if "latency_ms" in names:
            found["latency_ms"] = profile.latency(build(), self.data.shape, device=str(self.device)).median_ms
        return {name: value for name, value in found.items() if name in names}

    def __call__(self, arch: Arch, run: TrialRun) -> dict[str, float]:
        """Train once for every seed and return the mean metrics, with params and macs.

        Raises:
            SettingError: the trial has a parent, and the space's networks cannot grow.
            WeightsError: the parent's weights are not there. Nothing is trained from scratch in their place.
        """
        if run.parent is not None:
            self._check_parent(run.parent)
        if dist.is_initialized() and dist.get_rank() == 0:
            dist.broadcast_object_list([(arch, run.folder, run.parent)])
        run.runs = [self._train(arch, seed, run) for seed in self.seeds]
        names = [name for name in run.runs[0] if name != "seconds"]
        means = {name: sum(r[name] for r in run.runs) / len(run.runs) for name in names}
        return means | self.preview(arch, ("params", "macs", *self.extra))

    def follow(self) -> None:
        """On ranks above 0 of a data-parallel search: train what rank 0 announces until it announces the end."""
        for arch, folder, parent in announced():
            run = TrialRun()
            run.folder, run.parent = folder, parent
            with suppress(TrainingDiverged, ArchError):  # all ranks see it; rank 0 stores the reason
                for seed in self.seeds:
                    self._train(arch, seed, run)

    def _builder(self, arch: Arch) -> Callable[[], torch.nn.Module]:
        canonical = self.space.canonical(arch)
        return lambda: self.space.build(canonical)

    def _network(self, arch: Arch, seed: int, parent: Parent | None) -> torch.nn.Module:
        """Return the network to train: a fresh one, or the parent's, grown."""
        if parent is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return self._builder(arch)()
        from safetensors.torch import load_file

        assert isinstance(self.space, GrowingSpace) and parent.weights is not None
        with torch.device("meta"):
            model = self._builder(parent.arch)()
        model.load_state_dict(load_file(parent.weights), assign=True)
        images, _ = next(self.data.train_batches(_MOMENTS, seed=seed, epoch=0, augment=False))
        return self.space.inherit(
            model.to(self.device),
            parent.arch,
            arch,
            example=images,
            generator=torch.Generator().manual_seed(seed),
        )

    def _check_parent(self, parent: Parent) -> None:
        if not isinstance(self.space, GrowingSpace):
            raise SettingError(
                f"the trial inherits from trial {parent.number}, but networks of {type(self.space).__name__} cannot "
                "grow. Use PlainCNN or DenseNet, or a strategy that names no parents."
            )
        if parent.weights is None or not parent.weights.exists():
            raise WeightsError(
                f"the trial inherits from trial {parent.number}, which has no weights"
                f"{'' if parent.weights is None else f' at {parent.weights}'}: there is none of this number, it "
                "failed, it was trained on another host, or its strategy did not say that it keeps it."
            )

    def _train(self, arch: Arch, seed: int, run: TrialRun) -> dict[str, float]:
        done = run.folder / f"run-{seed}.json" if run.folder and len(self.seeds) > 1 else None
        if done and done.exists():
            return {str(k): float(v) for k, v in json.loads(done.read_text()).items()}
        model, seconds = self.trained(arch, seed, run)
        metrics = training.validate(model, self.data)
        if self.test:
            metrics |= training.evaluate(model, self.data)
        main = not dist.is_initialized() or dist.get_rank() == 0
        if run.folder and main:
            if seed == self.seeds[0]:
                save_weights(model, run.folder / WEIGHTS)
            if done:
                with atomic_write(done) as temporary:
                    temporary.write_text(json.dumps(metrics | {"seconds": seconds}))
        return metrics | {"seconds": seconds}

    def trained(self, arch: Arch, seed: int, run: TrialRun) -> tuple[torch.nn.Module, float]:
        """Return the trained network and the seconds that took; goes on from a checkpoint in the trial's folder."""
        model = self._network(arch, seed, run.parent)
        watch = _Watch(run, self.data, f"seed {seed}, " if len(self.seeds) > 1 else "")
        checkpoint = run.folder / f"checkpoint-{seed}.pt" if run.folder else None
        training.fit(
            model,
            self.data,
            self.recipe,
            seed=seed,
            device=self.device,
            callbacks=[watch],
            checkpoint=checkpoint,
            checkpoint_every=self.checkpoint_every,
            progress=False,
        )
        return model, watch.seconds


def check_kind(space: SearchSpace, data: Data) -> None:
    """Raise `SettingError` if a space is for other data: for images or a text, or for square images."""
    name = type(space).__name__
    for own, theirs, others in (("in_channels", "channels", "GPT"), ("context", "context", "ConvMacro or NASBench201")):
        if hasattr(space, own) and not hasattr(data, theirs):
            raise SettingError(f"{name} has {own}, but {data!r} has none. Use a space for such data, such as {others}.")
    if hasattr(space, "image_size") and getattr(data, "height", 0) != getattr(data, "width", 0):
        raise SettingError(f"{name} is for square images, but {data!r} is not. Load it with size=, which crops them.")


class _Watch(training.Callback):
    """Asks after every step whether the search goes on, and reports accuracies to a pruner that wants them."""

    def __init__(self, run: TrialRun, data: Data, which: str) -> None:
        self._run, self._data, self._which = run, data, which
        self.seconds = 0.0

    def on_step(self, run: training.Run) -> None:
        self._run.check()
        done = run.step / run.steps_per_epoch
        self._run.show(f"{self._which}epoch {done:.1f} of {run.recipe.epochs}")

    def on_epoch(self, run: training.Run) -> None:
        if self._run.watched and run.epoch < run.recipe.epochs:
            accuracy = training.validate(run.model, self._data)["val_accuracy"]
            self._run.report(run.epoch, accuracy)

    def on_end(self, run: training.Run) -> None:
        self.seconds = run.seconds


def announced() -> Iterator[Any]:
    """Yield, on ranks above 0 of a data-parallel search, what rank 0 broadcasts, until it broadcasts None: the end."""
    while True:
        message: list[Any] = [None]
        dist.broadcast_object_list(message)
        if message[0] is None:
            return
        yield message[0]


class TableObjective(Objective):
    """Look the architecture up in a tabular benchmark: always the very one, never an equal one."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.names = tuple(table.metrics)
        self.default = "val_accuracy" if "val_accuracy" in table.metrics else None

    def settings(self) -> dict[str, Any]:
        """Return the table's identity."""
        return {"kind": "table", "table": self.table.fingerprint}

    def __call__(self, arch: Arch, run: TrialRun) -> dict[str, float]:
        """Return the wanted metrics of the row, means over its seeds: no test metric unless the search asks for it."""
        return {name: self.table.query(arch, name) for name in self.wanted}


class FunctionObjective(Objective):
    """The user's own function from an architecture to a mapping of metrics."""

    def __init__(self, function: Callable[[Arch], Mapping[str, float]]) -> None:
        self.function = function

    def settings(self) -> dict[str, Any]:
        """Return the function's name: that is all that can be checked of it."""
        name = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        return {"kind": "function", "function": f"{getattr(self.function, '__module__', '?')}.{name}"}

    def __call__(self, arch: Arch, run: TrialRun) -> dict[str, float]:
        """Call the function.

        Raises:
            SettingError: it returned no mapping.
        """
        metrics = self.function(arch)
        if not isinstance(metrics, Mapping):
            raise SettingError(
                f"the objective returned {type(metrics).__name__} {metrics!r:.60}, not a mapping of metrics. "
                'Return a dictionary such as {"score": 0.9}.'
            )
        return dict(metrics)


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """Write a network's state as safetensors, whole or not at all."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(path) as temporary:
        save_file(state, temporary)


def checked(metrics: Mapping[str, Any], needed: Sequence[str]) -> dict[str, float]:
    """Return the metrics if every needed one is there and every number is finite.

    Raises:
        SettingError: a metric is missing, no number, NaN or infinite.

    Example:
        >>> checked({"score": 0.5}, ["score"])
        {'score': 0.5}
        >>> checked({"score": float("nan")}, ["score"])
        Traceback (most recent call last):
        nasbench.errors.SettingError: metric 'score' is nan; a metric must be a finite number. The trial is failed.
    """
    for name in needed:
        if name not in metrics:
            raise SettingError(f"the objective did not report {name!r}; it reported {', '.join(map(repr, metrics))}.")
    for name, value in metrics.items():
        try:
            finite = math.isfinite(value)
        except TypeError:
            raise SettingError(f"metric {name!r} is {value!r:.60}; a metric must be a finite number.") from None
        if not finite:
            raise SettingError(f"metric {name!r} is {value}; a metric must be a finite number. The trial is failed.")
    return {name: _plain(value) for name, value in metrics.items()}


def _plain(value: Any) -> float | int:
    return int(value) if isinstance(value, int) else float(value)


@dataclass(frozen=True)
class Constraint:
    """A bound on a metric.

    Example:
        >>> limit = Constraint.parse("params<1e6")
        >>> limit.holds(999_999), limit.holds(1_000_000)
        (True, False)
    """

    metric: str
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Constraint:
        """Read "metric<number"; the signs are <, <=, > and >=.

        Raises:
            SettingError: the text has another form.
        """
        match = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>)\s*([^\s<>=]+)\s*", text) if isinstance(text, str) else None
        try:
            constraint = cls(match[1], match[2], float(match[3]))  # type: ignore[index]
            if math.isnan(constraint.bound):
                raise ValueError(text)
            return constraint
        except (TypeError, ValueError):
            raise SettingError(
                f'{text!r} is no constraint. Write a metric, a sign and a number: "params<1e6".'
            ) from None

    def holds(self, value: float) -> bool:
        """Whether a value keeps the bound."""
        return {
            "<": value < self.bound,
            "<=": value <= self.bound,
            ">": value > self.bound,
            ">=": value >= self.bound,
        }[self.sign]

    def __str__(self) -> str:
        short = f"{self.bound:g}"
        return f"{self.metric}{self.sign}{short if float(short) == self.bound else repr(self.bound)}"


def resolve(objectives: str | Sequence[str] | Mapping[str, str | None] | None, objective: Objective) -> dict[str, str]:
    """Return {metric: direction} for what a user asked to optimise.

    Raises:
        SettingError: an unknown metric, or a direction that is not known or none.
    """
    if objectives is None:
        if objective.default is None:
            options = f" It reports {', '.join(objective.names)}." if objective.names else ""
            raise SettingError(f'name what to optimise: objectives={{"score": "maximize"}}.{options}')
        objectives = objective.default
    asked: dict[str, str | None]
    if isinstance(objectives, Mapping):
        asked = dict(objectives)
    else:
        asked = dict.fromkeys([objectives] if isinstance(objectives, str) else objectives)
    if not asked:
        raise SettingError('objectives is empty: name at least one metric, such as "val_accuracy".')
    chosen = {}
    for name, direction in asked.items():
        if objective.names is not None and name not in objective.names:
            raise SettingError(f"the objective does not report {name!r}; {nearest(name, objective.names)}")
        direction = direction or objective.direction(name)
        if direction is None:
            raise SettingError(f'is more {name!r} better? Say objectives={{"{name}": "maximize"}} or "minimize".')
        if direction not in ("maximize", "minimize"):
            raise SettingError(f'objective {name!r} has direction {direction!r}; choose "maximize" or "minimize".')
        chosen[name] = direction
    return chosen
