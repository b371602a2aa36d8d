"""Training a supernet: the loop of one-shot searches.

Everything random is a function of (seed, epoch, step), and a checkpoint is written after every epoch, so a search that
was killed and continued is the unbroken search, bit for bit (see `nasbench.training`). Weight decay spares norms and
biases, as everywhere in this library.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from nasbench import memory, training
from nasbench.checkpoint import FORMAT, check_identity, check_writable, layers_of, read
from nasbench.data import Data, keyed_generator
from nasbench.errors import CheckpointError, SettingError, TrainingDiverged
from nasbench.files import atomic_write
from nasbench.ranks import Ranks
from nasbench.recipe import Recipe
from nasbench.strategies import bilevel
from nasbench.strategies.one_shot import SKIPS, Differentiable, OneShot, Phase
from search_spaces.base import Arch, ArchError, Mixture, SearchSpace
from search_spaces.layouts import laid_out, lay_out, layout_for
from search_spaces.memory import free_bytes

CHECKPOINT = "supernet.pt"
_FIELDS = {"identity", "epochs", "chosen", "weights", "optimizer", "architecture", "architecture_optimizer", "seconds"}
_KIND = "a one-shot search"
WINDOW = 5  # epochs over which the dominant eigenvalue is averaged and compared
GROWTH = 0.75  # the eigenvalue a window ago, divided by that of now, below which a search has begun to collapse


class SupernetTraining:
    """One supernet in training, with its architecture weights.

    Args:
        space: bound to the data.
        data: what to train on; a strategy with architecture weights gets a half of the training split for them.
        strategy: how to train.
        recipe: how to train the weights.
        seed: of everything random.
        file: the checkpoint; if it exists, the training in it is continued.
        ranks: tell the true rank of what would be chosen after each epoch.

    Attributes:
        epochs: for every finished epoch its losses, what the architecture weights then said, and how good the
            architecture was that the search would have chosen.
        chosen: the epoch that an alarm went back to, if one has ended the training: its architecture counts, with the
            weights of the last epoch.
    """

    def __init__(
        self,
        space: SearchSpace,
        data: Data,
        strategy: OneShot,
        recipe: Recipe,
        *,
        seed: int = 0,
        file: Path | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.space, self.strategy, self.recipe, self.seed, self.file = space, strategy, recipe, seed, file
        self.device, self.ranks = data.device, ranks
        sites = strategy.sites(space)
        self.whole = self.data = data
        self.held: Data | None = None  # what the architecture weights learn from
        if sites:
            self.data, self.held = data.halves(seed)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.supernet = space.supernet(**strategy.supernet()).to(self.device)
        self._layout = layout_for(self.supernet, self.device) if recipe.channels_last else torch.contiguous_format
        lay_out(self.supernet, self._layout)
        self._layers = layers_of(self.supernet)  # before a phase changes them
        self.phases = strategy.phases(recipe)
        self._enter(self.phases[0])
        self.logits: dict[str, Tensor] = {}
        self.architecture_optimizer: torch.optim.Optimizer | None = None
        if sites:
            assert isinstance(strategy, Differentiable)
            self.logits = strategy.relaxation.initial(sites, keyed_generator(seed))
            for row in self.logits.values():
                row.requires_grad_()
            self.architecture_optimizer = torch.optim.Adam(
                self.logits.values(),
                lr=strategy.arch_lr,
                betas=(0.5, 0.999),
                weight_decay=strategy.arch_decay,
            )
        self.epochs: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.chosen: int | None = None
        if file is not None:
            check_writable(file)
            if file.exists():
                self._restore(file)

    # The loop ------------------------------------------------------------------------------------------------------

    def run(self, check: Callable[[], None] = lambda: None, progress: bool = True) -> None:
        """Train what is left of the epochs. `check` is called after every step and may raise to stop.

        Raises:
            TrainingDiverged: loss, weights or architecture weights are no longer finite.
        """
        recipe, steps = self.recipe, self.data.steps(self.recipe.batch_size)
        if self.done():
            return
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        done = len(self.epochs)
        bar = tqdm(
            total=recipe.epochs * steps,
            initial=done * steps,
            desc=f"{self.strategy.name} supernet",
            unit="step",
            disable=not (progress and rank == 0),
        )
        with bar:
            for epoch in range(done, recipe.epochs):
                self._epoch(epoch, steps, rank, world, check, bar)
                if self.done():
                    break

    def _phase(self, epoch: int) -> tuple[Phase, int]:
        """Return the phase of an epoch, and its first epoch."""
        start = 0
        for phase in self.phases[:-1]:
            if epoch < start + phase.recipe.epochs:
                return phase, start
            start += phase.recipe.epochs
        return self.phases[-1], start

    def _enter(self, phase: Phase) -> None:
        """Prepare the supernet for a phase; none of the moments of the phase before it is kept."""
        self._entered = phase
        phase.enter(self.supernet)
        self.optimizer = training.make_optimizer(self.supernet, phase.recipe, self.device, all_used=False)

    def done(self) -> bool:
        """Return whether all epochs are trained, or an alarm has ended them."""
        return self.chosen is not None or len(self.epochs) >= self.recipe.epochs

    def _epoch(self, epoch: int, steps: int, rank: int, world: int, check: Callable[[], None], bar: tqdm[Any]) -> None:
        started = time.monotonic()
        phase, _ = self._phase(epoch)
        if phase is not self._entered:
            self._enter(phase)
        self.supernet.train()
        settings: dict[str, Any] = {
            "augment": self.recipe.augment,
            "cutout": self.recipe.cutout,
            "rank": rank,
            "world": world,
        }
        size = self.recipe.batch_size
        batches = self.data.train_batches(size, seed=self.seed, epoch=epoch, **settings)
        others = None
        if self.held is not None and phase.architecture and epoch >= self._first_architecture_epoch:
            others = self._laid_out(self.held.train_batches(size, seed=self.seed + 1, epoch=epoch, **settings))
        sums = torch.zeros(3, device=self.device)  # loss, hits, loss on the other half
        for step, train in enumerate(self._laid_out(batches)):
            rng = keyed_generator(self.seed, epoch, step)
            self._set_rate(epoch * steps + step, steps)
            if others is not None:
                sums[2] += self._architecture_step(epoch, train, next(others), rng)
            mixture = self._mix(epoch, rng)()
            loss, logits = bilevel.weight_gradients(self.supernet, mixture, train, self.recipe.label_smoothing)
            if self.recipe.clip is not None:
                weights = [p for p in self.supernet.parameters() if p.grad is not None]
                nn.utils.clip_grad_norm_(weights, self.recipe.clip)
            self.optimizer.step()
            phase.after_step(self.supernet)
            sums[0] += loss
            sums[1] += (logits.argmax(1) == train[1]).float().mean()
            if self.device.type == "cpu" and world == 1 and not math.isfinite(float(loss)):  # processes have to agree
                raise self._diverged("loss is")
            check()
            bar.update()
        for parameter in self.supernet.parameters():
            parameter.grad = None
        bilevel.average([buffer for buffer in self.supernet.buffers() if buffer.is_floating_point()])
        bilevel.average([sums])
        means = (sums / steps).tolist()
        if not all(map(math.isfinite, means)):
            raise self._diverged("loss is")
        entry = self._record(epoch, means, others is not None)
        if rank == 0:  # it alone writes the entries
            entry |= self._score(epoch, entry)
        if self.ranks is not None and "arch" in entry:
            entry |= self.ranks.look_up(self.space.check(entry["arch"]))
        bar.set_postfix_str(_words(entry))
        self.seconds += time.monotonic() - started
        self.epochs.append(entry | {"seconds": round(self.seconds, 3)})
        self._watch_for_collapse()
        if rank == 0:
            self.save()

    def _laid_out(self, batches: Iterator[bilevel.Batch]) -> Iterator[bilevel.Batch]:
        return ((laid_out(x, self._layout), y) for x, y in batches)

    def _mix(self, epoch: int, rng: torch.Generator) -> bilevel.Mix:
        progress = epoch / max(1, self.recipe.epochs - 1)
        return lambda: self.strategy.mix(self.space, self.logits, progress, rng)

    @property
    def _first_architecture_epoch(self) -> int:
        assert isinstance(self.strategy, Differentiable)
        return int(self.strategy.arch_start * self.recipe.epochs + 1e-9)  # 0.3 * 50 is a little below 15

    def _set_rate(self, step: int, steps: int) -> None:
        phase, start = self._phase(step // steps)
        for group in self.optimizer.param_groups:
            group["lr"] = phase.recipe.learning_rate(step - start * steps, steps)

    def _architecture_step(self, epoch: int, train: bilevel.Batch, val: bilevel.Batch, rng: torch.Generator) -> Tensor:
        assert self.architecture_optimizer is not None
        loss, gradients = self._architecture_gradients(epoch, train, val, rng)
        for row, gradient in zip(self.logits.values(), gradients, strict=True):
            row.grad = gradient
        self.architecture_optimizer.step()
        if not torch.cat(list(self.logits.values())).isfinite().all():  # they are on the host: nothing is waited for
            raise self._diverged("architecture weights are")
        return loss

    def _architecture_gradients(
        self, epoch: int, train: bilevel.Batch, val: bilevel.Batch, rng: torch.Generator
    ) -> tuple[Tensor, list[Tensor]]:
        strategy = self.strategy
        assert isinstance(strategy, Differentiable)
        rows, mix, penalty = list(self.logits.values()), self._mix(epoch, rng), strategy.relaxation.penalty(self.logits)
        if strategy.second_order:
            exact = strategy.hessian == "exact"
            return bilevel.second_order(self.supernet, mix, rows, train, val, self.optimizer, penalty, exact=exact)
        return bilevel.first_order(self.supernet, mix, rows, val, penalty)

    # After an epoch ------------------------------------------------------------------------------------------------

    @property
    def probabilities(self) -> Mixture:
        """What the architecture weights now say of every option; empty if there are none."""
        if not self.logits:
            return Mixture({})
        assert isinstance(self.strategy, Differentiable)
        return self.strategy.relaxation.probabilities(self.logits)

    def inherit(self, arch: Arch) -> tuple[nn.Module, dict[str, float]]:
        """Return an architecture's network with the weights it shares now, batch norms recalibrated, and its scores.

        The supernet stays as it is: the network has copies.
        """
        network = self.supernet.extract(arch)
        training.recalibrate(network, self.whole, batch_size=self.recipe.batch_size)
        return network, training.validate(network, self.whole)

    def _score(self, epoch: int, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return the architecture that the search would choose now, and how good it is with the weights it shares."""
        started = time.monotonic()
        last = self.epochs[-1] if self.epochs else {}
        standing = entry.get("arch", last.get("arch"))
        standing = None if standing is None else self.space.check(standing)
        archs = self.strategy.candidates(self.space, standing, Random(f"{self.seed}/anytime/{epoch}"))
        if not archs:
            return {}
        scores = {arch: self.inherit(arch)[1] for arch in archs}
        best = max(archs, key=lambda arch: (scores[arch]["val_accuracy"], -scores[arch]["val_loss"]))
        seconds = last.get("scoring_seconds", 0.0) + time.monotonic() - started
        return {"arch": dict(best), **scores[best], "scoring_seconds": round(seconds, 3)}

    def _record(self, epoch: int, means: Sequence[float], moved: bool) -> dict[str, Any]:
        """Return what is kept of an epoch: losses, probabilities, and the architecture they decode to."""
        entry: dict[str, Any] = {"epoch": epoch + 1, "train_loss": means[0], "train_accuracy": means[1]}
        if len(self.phases) > 1:
            entry["phase"] = self._phase(epoch)[0].name
        entry["arch_loss"] = means[2] if moved else None
        if self.logits:
            probabilities = self.probabilities
            try:
                arch = self.space.decode(probabilities)
            except ArchError:
                raise self._diverged("architecture weights are") from None
            entry["probabilities"] = {site: row.tolist() for site, row in probabilities.items()}
            entry["arch"] = dict(arch)
            entry["skips"] = count_skips(arch)
            if moved and getattr(self.strategy, "stop_eigenvalue", False):
                entry["eigenvalue"] = self._eigenvalue(epoch)
        return entry

    def _eigenvalue(self, epoch: int) -> float:
        assert self.held is not None
        rng = keyed_generator(self.seed, epoch)
        images = self.held.train_batches(self.recipe.batch_size, seed=self.seed, epoch=0, augment=False)
        batch = next(self._laid_out(images))
        return bilevel.dominant_eigenvalue(self.supernet, self._mix(epoch, rng), list(self.logits.values()), batch, rng)

    @property
    def arch(self) -> Arch:
        """The architecture that was learned: that of the last epoch, or of the one an alarm went back to."""
        if not self.logits or not self.epochs:
            raise SettingError(f"strategy {self.strategy.name!r} has decoded no architecture.")
        return self.space.check(self.epochs[(self.chosen or len(self.epochs)) - 1]["arch"])

    def _watch_for_collapse(self) -> None:
        """Warn when skip connections take over; end the search if the strategy says so."""
        strategy, now = self.strategy, self.epochs[-1]
        if not isinstance(strategy, Differentiable) or now["arch_loss"] is None:
            return
        limit = strategy.stop_skips
        if limit is not None and now["skips"] >= limit:
            good = [e["epoch"] for e in self.epochs if e["arch_loss"] is not None and e["skips"] < limit]
            self.chosen = good[-1] if good else None  # too many from the start: they may still become fewer
        values = [entry["eigenvalue"] for entry in self.epochs if entry.get("eigenvalue") is not None]
        if len(values) >= 2 * WINDOW and self.chosen is None:
            after, before = sum(values[-WINDOW:]), sum(values[-2 * WINDOW : -WINDOW])
            if before > 0 and after > 0 and before / after < GROWTH:
                self.chosen = now["epoch"] - WINDOW
        count = count_operations(now["arch"])
        if now["skips"] > count / 2 and not any(entry.get("alarm") for entry in self.epochs):
            now["alarm"] = True
            warnings.warn(
                f"skip connections take over: {now['skips']} of {count} operations after epoch {now['epoch']}. Such "
                "networks often evaluate badly. Fewer epochs, a smaller arch_lr or stop_skips may help.",
                stacklevel=2,
            )

    def _diverged(self, what: str) -> TrainingDiverged:
        rate = getattr(self.strategy, "arch_lr", None)
        also = "" if rate is None else f" or arch_lr ({rate:g})"
        return TrainingDiverged(
            f"the supernet's training diverged: the {what} not finite in epoch {len(self.epochs) + 1}. Lower lr (it is "
            f"{self.recipe.lr:g}), clip ({self.recipe.clip}){also}, in a study of another name: this one would diverge "
            "again."
        )

    # Memory and files ----------------------------------------------------------------------------------------------

    def check_memory(self) -> None:
        """Refuse a step that would not fit into memory, before it is made; of drawn paths the largest of three counts.

        Raises:
            SettingError: it needs more than is free; the message says what to lower.
        """
        strategy = self.strategy
        drawn = not isinstance(strategy, Differentiable) or strategy.relaxation.sampled

        def step(x: Tensor, y: Tensor, seed: int) -> None:
            rng = keyed_generator(self.seed, seed)
            if getattr(strategy, "second_order", False):  # of first order takes less than a step of the weights
                self._architecture_gradients(0, (x, y), (x, y), rng)
            bilevel.weight_gradients(self.supernet, self._mix(0, rng)(), (x, y))
            if getattr(strategy, "stop_eigenvalue", False):
                mix, rows = self._mix(0, rng), list(self.logits.values())
                bilevel.dominant_eigenvalue(self.supernet, mix, rows, (x, y), rng, steps=1)

        self._set_rate(0, 1)
        world = dist.get_world_size() if dist.is_initialized() else 1
        images, buffers = max(1, self.recipe.batch_size // world), 2 if self.recipe.optimizer == "adamw" else 1
        need = max(
            memory.step_bytes(self.supernet, partial(step, seed=seed), self.data.shape, images, buffers)
            for seed in range(3 if drawn else 1)
        )
        free = free_bytes(self.device)
        short = [free is not None and need > free]
        if world > 1:
            dist.all_gather_object(short := [False] * world, free is not None and need > free)
        if any(short):
            assert free is not None
            raise SettingError(
                f"a step of this supernet needs about {need / 1e9:.1f} GB at batch_size={self.recipe.batch_size}, and "
                f"{free / 1e9:.1f} GB are free on {self.device}. Lower batch_size, or what makes the space's "
                "networks large (channels, cells, widths); or set recompute=True, or partial_channels=4 where the "
                "strategy and the space have it."
            )

    def _identity(self) -> dict[str, Any]:
        return {
            "supernet": self._layers,
            "space": self.space.fingerprint,
            "data": self.data.fingerprint,
            "table": self.ranks and [self.ranks.table.fingerprint, self.ranks.metric],
            "seed": self.seed,
            **dataclasses.asdict(self.recipe),
            "strategy": self.strategy.name,
            **self.strategy.settings(),
        }

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        if self.file is None:
            return
        arch_optimizer = self.architecture_optimizer
        content = {
            "format": FORMAT,
            "identity": self._identity(),
            "epochs": json.dumps(self.epochs),
            "chosen": self.chosen,
            "seconds": self.seconds,
            "weights": self.supernet.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "architecture": {site: row.detach() for site, row in self.logits.items()},
            "architecture_optimizer": arch_optimizer.state_dict() if arch_optimizer else {},
        }
        with atomic_write(self.file) as temporary:
            torch.save(content, temporary)

    def _restore(self, file: Path) -> None:
        stored = read(file, _FIELDS, _KIND)
        check_identity(file, stored["identity"], self._identity())
        epochs = json.loads(stored["epochs"])
        phase = self._phase(len(epochs) - 1)[0]
        for entered in self.phases[1 : self.phases.index(phase) + 1]:
            self._enter(entered)
        try:
            self.supernet.load_state_dict(stored["weights"])
            phase.after_step(self.supernet)
            self.optimizer.load_state_dict(stored["optimizer"])
            for site, row in self.logits.items():
                row.detach().copy_(stored["architecture"][site])
            if self.architecture_optimizer is not None:
                self.architecture_optimizer.load_state_dict(stored["architecture_optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"the checkpoint {file} does not fit this supernet: {error}. Delete it to train anew"
            ) from error
        self.epochs, self.chosen = epochs, stored["chosen"]
        self.seconds = stored["seconds"]


def read_epochs(folder: Path | None) -> list[dict[str, Any]]:
    """Return what was recorded of the epochs of the supernet in a study's folder; nothing if there are none yet."""
    file = folder / CHECKPOINT if folder is not None else None
    if file is None or not file.exists():
        return []
    return json.loads(read(file, _FIELDS, _KIND)["epochs"])  # type: ignore[no-any-return]


def _words(entry: Mapping[str, Any]) -> str:
    """Return what a progress bar says of an epoch."""
    words = f"loss {entry['train_loss']:.3f}, accuracy {entry['train_accuracy']:.3f}"
    if "val_accuracy" in entry:
        words += f", validation {entry['val_accuracy']:.3f}"
    if "skips" in entry and count_operations(entry["arch"]):  # else there are no operations among the options
        words += f", {entry['skips']} skips"
    if "rank" in entry:
        words += f", true rank {entry['rank']} of {entry['rank_of']}"
    return words


def count_skips(arch: Mapping[str, Any]) -> int:
    """Return the number of skip connections: in the normal cell, if there are several kinds of cell.

    Example:
        >>> count_skips({"normal2_op0": "skip_connect", "normal2_op1": "sep_conv_3x3", "reduce2_op0": "skip_connect"})
        1
    """
    return sum(option in SKIPS for option in _operations(arch))


def count_operations(arch: Mapping[str, Any]) -> int:
    """Return the number of operations among which `count_skips` counts."""
    return len(_operations(arch))


def _operations(arch: Mapping[str, Any]) -> list[str]:
    named = {name: option for name, option in arch.items() if isinstance(option, str) and option.isidentifier()}
    normal = [option for name, option in named.items() if name.startswith("normal")]
    return normal or list(named.values())
