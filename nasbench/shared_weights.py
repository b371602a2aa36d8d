"""The objective of one-shot searches: an architecture's score with the weights it shares in one supernet."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from nasbench import profile
from nasbench.data import Data
from nasbench.devices import pick_device
from nasbench.errors import SettingError
from nasbench.objective import WEIGHTS, Objective, TrialRun, announced, check_kind, save_weights
from nasbench.ranks import Ranks
from nasbench.recipe import Recipe
from nasbench.strategies.one_shot import OneShot
from nasbench.supernets import CHECKPOINT, SupernetTraining
from search_spaces.base import Arch, SearchSpace

if TYPE_CHECKING:
    from nasbench.table import Table


class SupernetObjective(Objective):
    """Score an architecture with the weights it inherits from one trained supernet.

    The sub-network is extracted, its batch norms are recalibrated on training images, and it is validated.

    Args:
        space: bound to the data.
        data: a training and a validation split.
        strategy: how the supernet is trained.
        recipe: how its weights are trained.
        seed: of everything random.
        device: where to train.
        table: a table and the name of a metric in it: they tell true ranks, and the search learns nothing from them.

    Raises:
        SettingError, ArchError, DataError: the settings, the space and the data do not fit each other.
    """

    default = "val_accuracy"
    trains = True

    def __init__(
        self,
        space: SearchSpace,
        data: Data,
        strategy: OneShot,
        recipe: Recipe,
        *,
        seed: int = 0,
        device: str = "auto",
        table: tuple[Table, str] | None = None,
    ) -> None:
        if recipe.amp:
            raise SettingError("amp=True: supernets are trained in float32. Leave amp out, or use amp=False.")
        for name in ("drop_path", "auxiliary"):
            if getattr(recipe, name) != getattr(Recipe(), name):
                raise SettingError(
                    f"{name}={getattr(recipe, name)}: a supernet has no such thing. Leave it out, and set it when the "
                    "network that is found is trained alone."
                )
        plain = recipe.optimizer == "sgd" and not recipe.nesterov and not recipe.label_smoothing
        if getattr(strategy, "second_order", False) and not plain:
            raise SettingError(
                "second_order=True looks ahead by a step of plain SGD with momentum on cross-entropy, but the recipe "
                f"has optimizer={recipe.optimizer!r}, nesterov={recipe.nesterov}, "
                f"label_smoothing={recipe.label_smoothing:g}. Use optimizer='sgd', nesterov=False, label_smoothing=0."
            )
        world = dist.get_world_size() if dist.is_initialized() else 1
        if recipe.batch_size % world:
            raise SettingError(
                f"batch_size={recipe.batch_size}, but {world} processes share every batch equally: give a multiple of "
                f"{world}, {world} at least, or start fewer processes."
            )
        self.space, self.strategy, self.recipe, self.seed, self.table = space, strategy, recipe, seed, table
        self.data = data.to(pick_device(device))
        self.names = ("val_accuracy", "val_loss", "params", "macs", "bytes", "peak_bytes", "latency_ms")
        self.ranks = None if table is None else Ranks(space, *table)
        self.training: SupernetTraining | None = None
        # What does not fit is said here, before anything is written.
        check_kind(space, data)
        sites = strategy.sites(space)
        _check_supernet(space, strategy)
        strategy.phases(recipe)
        with torch.device("meta"):
            self._shapes = space.supernet(**strategy.supernet())  # sub-networks are counted without copying weights
        strategy.check(self._shapes)
        if sites:
            self.data.halves(seed)
        self.data.train_batches(recipe.batch_size, seed=seed, epoch=0, cutout=recipe.cutout)

    def settings(self) -> dict[str, Any]:
        """Return data, recipe, metrics and table; the strategy is the study's."""
        return {
            "kind": "supernet",
            "data": {"name": self.data.name, "fingerprint": self.data.fingerprint, "load": self.data.spec},
            "recipe": json.loads(self.recipe.to_json()),
            "extra": list(self.extra),
            "table": [self.table[0].fingerprint, self.table[1]] if self.table else None,
        }

    def prepare(self, folder: Path | None, check: Callable[[], None] = lambda: None, progress: bool = True) -> None:
        """Train the supernet, or continue it from its checkpoint in this folder.

        Another process that prepares the same study is waited for. `check` is called after every step, and now and
        then while waiting; it may raise to stop.
        """
        main = not dist.is_initialized() or dist.get_rank() == 0
        with _turn(folder / "supernet.lock" if folder and main else None, check):
            if dist.is_initialized() and main:
                dist.broadcast_object_list([str(folder) if folder else ""])
            self.training = self._training(folder / CHECKPOINT if folder else None)
            self.training.run(check, progress)

    def check_memory(self) -> None:
        """Raise `SettingError` if a step of training the supernet would not fit into memory."""
        self._training(None).check_memory()

    def _training(self, file: Path | None) -> SupernetTraining:
        return SupernetTraining(
            self.space, self.data, self.strategy, self.recipe, seed=self.seed, file=file, ranks=self.ranks
        )

    def follow(self) -> None:
        """On ranks above 0 of a data-parallel search: take part in the training that rank 0 announces."""
        for folder in announced():
            self.prepare(Path(folder) if folder else None, progress=False)

    def decoded(self) -> Arch:
        """Return the architecture that the supernet has learned."""
        return self._trained().arch

    def _trained(self) -> SupernetTraining:
        if self.training is None:
            self.prepare(None, progress=False)
        assert self.training is not None
        return self.training

    def preview(self, arch: Arch, names: Sequence[str]) -> dict[str, float]:
        """Return params, macs and whatever else an untrained sub-network tells."""
        if not names:
            return {}
        found: dict[str, float] = {}
        if {"params", "macs"} & {*names}:
            found |= profile.count(lambda: self._shapes.extract(arch), self.data.shape)
        if {"bytes", "peak_bytes"} & {*names}:
            found |= profile.measure(self._trained().supernet.extract(arch), self.data.shape).to_dict()
        if "latency_ms" in names:
            network = self._trained().supernet.extract(arch)
            found["latency_ms"] = profile.latency(network, self.data.shape, device=str(self.data.device)).median_ms
        return {name: value for name, value in found.items() if name in names}

    def __call__(self, arch: Arch, run: TrialRun) -> dict[str, float]:
        """Extract, recalibrate, validate (`SupernetTraining.inherit`)."""
        network, metrics = self._trained().inherit(arch)
        if run.folder is not None:
            save_weights(network, run.folder / WEIGHTS)
        run.supernet = self.strategy.supernet()
        truth = {} if self.ranks is None else self.ranks.look_up(arch)
        truth.pop("rank_of", None)
        return metrics | self.preview(arch, ["params", "macs", *self.extra]) | truth


def _check_supernet(space: SearchSpace, strategy: OneShot) -> None:
    """Raise `SettingError` if the strategy sets what the space's supernet does not take."""
    taken = inspect.signature(space.supernet).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return
    for name, value in strategy.supernet().items():
        if name not in taken:
            default = getattr(type(strategy), name, None)  # where a named strategy has another
            raise SettingError(
                f"strategy {strategy.name!r} sets {name}={value!r}, which the supernet of {type(space).__name__} does "
                f"not take: it takes {', '.join(taken) or 'no settings'}. Leave it out"
                f"{'' if default is None else f', or use {name}={default!r}'}."
            )


@contextmanager
def _turn(file: Path | None, check: Callable[[], None]) -> Iterator[None]:
    """Wait until no other process holds this lock, and hold it meanwhile; None: there are no others."""
    if file is None:
        yield
        return
    lock, said = FileLock(file), False
    while True:
        try:
            lock.acquire(timeout=0.5)
            break
        except Timeout:
            check()
            if not said:
                tqdm.write(f"another process trains this supernet: waiting for it ({file})")
                said = True
    try:
        yield
    finally:
        lock.release()
