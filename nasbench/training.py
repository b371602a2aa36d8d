"""Training one network: recipe, loop, checkpoints, scores.

Everything random in a run is a pure function of (seed, step): the data draw their batches from it, and torch's global
generator (dropout, drop-path) is set anew before every step. So a run that was killed and continued is the unbroken
run, bit for bit, on one kind of processor with one number of threads; on a GPU as far as its kernels repeat.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import numbers
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from nasbench.errors import CheckpointError, SettingError, TrainingDiverged
from nasbench.files import atomic_write
from search_spaces.base import nearest
from search_spaces.operations import DropPath

if TYPE_CHECKING:
    from nasbench.data import Data

Network = TypeVar("Network", bound=nn.Module)

_FORMAT = 1  # of checkpoint files
_FIELDS = {"identity", "step", "todo", "seconds", "sums", "loss", "model", "optimizer", "callbacks"}
_CHECK = 50  # steps between two looks at the loss where a look makes the device wait


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    The learning rate rises linearly over `warmup` epochs, then falls to zero along a cosine, step by step. Weight decay
    spares norms and biases (parameters of at most one dimension). `momentum` is the first beta of AdamW, which wants an
    `lr` near 0.001.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per step, over all processes.
        optimizer: ``"sgd"`` or ``"adamw"``.
        warmup: epochs, may be a fraction.
        cutout: side in pixels of a square of zeros put on every image; 0 for none.
        drop_path: probability with which a ``DropPath`` drops in the last epoch; it grows linearly from zero.
        clip: largest norm of the whole gradient, or None.
        amp: bfloat16 autocast; None means on CUDA devices that have it.

    Raises:
        SettingError: a value that cannot be trained with.

    Example:
        >>> Recipe(epochs=3, lr=0.05).lr
        0.05
        >>> Recipe(lr=-1)
        Traceback (most recent call last):
        nasbench.errors.SettingError: recipe: lr=-1, but it must be a number above 0
    """

    epochs: int = 10
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    warmup: float = 0.0
    label_smoothing: float = 0.0
    augment: bool = True
    cutout: int = 0
    drop_path: float = 0.0
    clip: float | None = 5.0
    amp: bool | None = None
    channels_last: bool = True

    def __post_init__(self) -> None:
        def check(name: str, good: bool, rule: str) -> None:
            if not good:
                raise SettingError(f"recipe: {name}={getattr(self, name)!r}, but it must be {rule}")

        for name, least in (("epochs", 1), ("batch_size", 1), ("cutout", 0)):
            value = getattr(self, name)
            check(name, _is_number(value, numbers.Integral) and value >= least, f"a whole number, {least} or more")
        if self.optimizer not in ("sgd", "adamw"):
            known = nearest(self.optimizer, ("sgd", "adamw"))
            raise SettingError(f"recipe: unknown optimizer {self.optimizer!r}; {known}")
        check("lr", _is_number(self.lr) and self.lr > 0, "a number above 0")
        check("weight_decay", _is_number(self.weight_decay) and self.weight_decay >= 0, "a number, 0 or more")
        for name in ("momentum", "label_smoothing", "drop_path"):
            value = getattr(self, name)
            check(name, _is_number(value) and 0 <= value < 1, "a number from 0 to below 1")
        in_reach = _is_number(self.warmup) and 0 <= self.warmup <= self.epochs
        check("warmup", in_reach, f"a number of epochs from 0 to epochs={self.epochs}")
        check("clip", self.clip is None or (_is_number(self.clip) and self.clip > 0), "a number above 0, or None")
        for name in ("nesterov", "augment", "channels_last"):
            check(name, isinstance(getattr(self, name), bool), "True or False")
        check("amp", self.amp is None or isinstance(self.amp, bool), "True, False or None")
        for field in dataclasses.fields(self):  # plain numbers, so that JSON and checkpoints can hold numpy's too
            value = getattr(self, field.name)
            if _is_number(value):
                object.__setattr__(self, field.name, int(value) if field.type == "int" else float(value))

    def replace(self, **changes: Any) -> Self:
        """Return this recipe with some fields changed.

        Raises:
            SettingError: no such field, or a bad value.

        Example:
            >>> Recipe().replace(epochs=2).epochs
            2
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise SettingError(f"a recipe has no field {name!r}; {nearest(name, known)}")
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """Return the recipe as one line of JSON.

        Example:
            >>> Recipe.from_json(Recipe(clip=None).to_json()) == Recipe(clip=None)
            True
        """
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the recipe that `text` describes; fields it leaves out have their defaults.

        Raises:
            SettingError: not a JSON object, an unknown field, or a bad value.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise SettingError(f"a recipe's JSON cannot be read ({error}): {text!r}") from error
        if not isinstance(fields, dict):
            raise SettingError(f"a recipe's JSON must be an object such as {cls(epochs=2).to_json()}, not {text!r}")
        return cls().replace(**fields)

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of global step `step`, counted from 0.

        Example:
            >>> [round(Recipe(epochs=4, lr=1.0, warmup=2).learning_rate(step, 1), 3) for step in range(4)]
            [0.5, 1.0, 1.0, 0.5]
        """
        warm, total = round(self.warmup * steps_per_epoch), self.epochs * steps_per_epoch
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))


def _is_number(value: object, kind: type = numbers.Real) -> bool:
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    return isinstance(value, numbers.Integral) or math.isfinite(value)  # type: ignore[arg-type]


class Callback:
    """What else should happen during training. Override what you need; every method here does nothing.

    Hooks run in the order of the callbacks. An `on_step` or `on_epoch` that raises ends the training; a checkpoint is
    written first, and when the run is continued, that hook and those after it are called (again) for that step.

    Example:
        >>> class Halve(Callback):
        ...     def on_backward(self, run: Run) -> None:
        ...         for parameter in run.model.parameters():
        ...             if parameter.grad is not None:
        ...                 parameter.grad.mul_(0.5)
    """

    def on_start(self, run: Run) -> None:
        """Model and optimizer are ready. When a run is continued, this comes before its state is loaded."""

    def loss(self, run: Run, x: Tensor, y: Tensor, logits: Tensor) -> Tensor | None:
        """Return a scalar in place of the cross-entropy, or None. x: (B, C, H, W), y: (B,), logits: (B, classes)."""
        return None

    def on_backward(self, run: Run) -> None:
        """Gradients are ready: averaged over processes, not yet clipped."""

    def on_step(self, run: Run) -> None:
        """The optimizer has made a step; `run.step` counts it."""

    def on_epoch(self, run: Run) -> None:
        """An epoch has ended, after its last `on_step`; `run.epoch` counts it."""

    def on_end(self, run: Run) -> None:
        """All epochs are done. A finished run that is called up again calls this again."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint should keep: tensors, numbers, strings, and lists, tuples or dicts of these."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""


@dataclass
class Run:
    """A training run in progress, as callbacks see it.

    Attributes:
        model: the network itself, also where data-parallel training wraps it.
        step: steps made, over all epochs.
    """

    model: nn.Module
    data: Data
    recipe: Recipe
    optimizer: torch.optim.Optimizer
    device: torch.device
    seed: int
    split: str
    steps_per_epoch: int
    rank: int = 0
    world: int = 1
    step: int = 0
    _started: float = dataclasses.field(default_factory=time.monotonic)
    _loss: Tensor | float = math.nan
    _seen: int = 0  # batches summed up below, all of one epoch
    _loss_sum: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(()))
    _hit_sum: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(()))

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return self.step // self.steps_per_epoch

    @property
    def last_loss(self) -> float:
        """Loss of the last batch."""
        return float(self._loss)

    @property
    def train_loss(self) -> float:
        """Mean loss over the batches of this epoch so far, as this process saw them while the weights changed."""
        return float(self._loss_sum) / self._seen if self._seen else math.nan

    @property
    def train_accuracy(self) -> float:
        """Mean accuracy, 0 to 1, over the same batches."""
        return float(self._hit_sum) / self._seen if self._seen else math.nan

    @property
    def seconds(self) -> float:
        """Seconds of training, those before an interruption included."""
        return time.monotonic() - self._started


def fit(
    model: Network,
    data: Data,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "auto",
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 10.0,
    split: str = "train",
    progress: bool = True,
    **changes: Any,
) -> Network:
    """Train `model` in place and return it, on `device` and in eval mode.

    Where torch.distributed is initialised (see `init_distributed`), every process calls this and each step's batch is
    divided among them; batch norms then see one process's share, and rank 0 alone shows a bar and writes files.

    Args:
        recipe: how to train; `changes` replace its fields: ``fit(model, data, epochs=100)``.
        seed: of batches, augmentation, dropout and drop-path. The model's initial weights are its builder's.
        callbacks: see `Callback`.
        checkpoint: a file that keeps everything needed to go on. If it exists, the run in it is continued.
            Every process must see it.
        checkpoint_every: seconds between two writes of that file; 0 writes it after every step.
        split: ``"train"``, or ``"train+val"`` for a final model.

    Raises:
        SettingError: a bad recipe, device or argument, or a model that does not map (B, C, H, W) to (B, classes).
        CheckpointError: the checkpoint is corrupt, of another run, or cannot be written.
        TrainingDiverged: the loss or the gradient is no longer finite.

    Example:
        >>> from nasbench.data import load
        >>> data = load("digits")
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> _ = fit(model, data, epochs=2, device="cpu", progress=False)
        >>> validate(model, data)["val_accuracy"] > 0.7
        True
    """
    recipe = (recipe or Recipe()).replace(**changes)
    if not _is_number(seed, numbers.Integral) or seed < 0:
        raise SettingError(f"seed={seed!r}, but a seed is a whole number, 0 or more")
    if not _is_number(checkpoint_every) or checkpoint_every < 0:
        raise SettingError(f"checkpoint_every={checkpoint_every!r}, but it must be a number of seconds, 0 or more")
    place = pick_device(device)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    file = Path(checkpoint).expanduser() if checkpoint is not None else None
    if file is not None and rank == 0:
        _check_writable(file)
    stored = _read(file) if file is not None and file.exists() else None

    with torch.random.fork_rng([place.index] if place.type == "cuda" else []):
        _reseed(place, seed, rank, "start")
        _prepare(model, data, recipe, place)
        drops = _drop_paths(model) if recipe.drop_path else []
        run = Run(
            model=model,
            data=data.to(place),
            recipe=recipe,
            optimizer=_optimizer(model, recipe, place),
            device=place,
            seed=int(seed),
            split=split,
            steps_per_epoch=data.steps(recipe.batch_size, split),
            rank=rank,
            world=world,
            _loss_sum=torch.zeros((), device=place),
            _hit_sum=torch.zeros((), device=place),
        )
        identity = _identity(run) if file is not None else {}
        if stored is not None and file is not None:
            _check_identity(file, stored["identity"], identity)
        for callback in callbacks:
            callback.on_start(run)
        todo = _restore(file, stored, run, callbacks) if stored is not None and file is not None else []
        saver = _Saver(file if rank == 0 else None, checkpoint_every, identity, run, callbacks)
        if stored is not None and not todo:
            saver.saved_step = run.step
        _train(run, callbacks, todo, saver, drops, progress and rank == 0)
        model.zero_grad()
        _reseed(place, seed, rank, "end")
        for callback in callbacks:
            callback.on_end(run)
    return model.eval()


def _train(
    run: Run,
    callbacks: Sequence[Callback],
    todo: list[tuple[Callback, str]],
    saver: _Saver,
    drops: list[DropPath],
    progress: bool,
) -> None:
    """Make every step that is left. `todo` holds the hooks that the last step still owes, in their order."""
    recipe, total = run.recipe, run.recipe.epochs * run.steps_per_epoch
    run.model.train()
    forward = _parallel(run) if run.world > 1 else run.model
    finite = math.nan  # the last finite loss
    between = True  # no step has begun whose effects are not all in the weights and the optimizer
    with tqdm(total=total, initial=run.step, desc="training", unit="step", disable=not progress) as bar:
        try:
            _call(todo, run)
            for epoch in range(run.epoch, recipe.epochs):
                for module in drops:
                    module.p = recipe.drop_path * epoch / max(1, recipe.epochs - 1)
                batches = run.data.train_batches(
                    recipe.batch_size,
                    seed=run.seed,
                    epoch=epoch,
                    start=run.step % run.steps_per_epoch,
                    augment=recipe.augment,
                    cutout=recipe.cutout,
                    split=run.split,
                    rank=run.rank,
                    world=run.world,
                )
                for x, y in batches:
                    between = False
                    finite = _one_step(run, forward, callbacks, x, y, finite)
                    todo += [(callback, "on_step") for callback in callbacks]
                    if run.step % run.steps_per_epoch == 0:
                        todo += [(callback, "on_epoch") for callback in callbacks]
                        bar.set_postfix_str(
                            f"loss {run.train_loss:.3f}, accuracy {run.train_accuracy:.3f}", refresh=False
                        )
                    between = True
                    _call(todo, run)
                    bar.update()
                    saver.save_if_due()
            weights = [parameter.detach() for parameter in run.model.parameters()]
            if not math.isfinite(nn.utils.get_total_norm(weights)):
                raise _diverged(run, finite, "weights are")
        except TrainingDiverged:
            raise
        except BaseException as error:
            if between:
                saver.save_before(error, todo)
            raise
    saver.save()


def _one_step(
    run: Run,
    forward: nn.Module,
    callbacks: Sequence[Callback],
    x: Tensor,
    y: Tensor,
    finite: float,
) -> float:
    """Forward, backward, optimizer. Return the last loss known to be finite."""
    recipe, optimizer = run.recipe, run.optimizer
    # A float read off a CPU tensor costs nothing; a GPU would have to be waited for, and processes have to agree.
    cheap = run.device.type == "cpu" and run.world == 1
    _reseed(run.device, run.seed, run.rank, run.step)
    rate = recipe.learning_rate(run.step, run.steps_per_epoch)
    parameters: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        group["lr"] = rate
        parameters += group["params"]
    x, y = x.to(run.device, non_blocking=True), y.to(run.device, non_blocking=True)
    if not recipe.channels_last:
        x = x.contiguous()
    for parameter in parameters:
        parameter.grad = None
    with torch.autocast(run.device.type, torch.bfloat16) if _autocast(recipe, run.device) else nullcontext():
        logits = forward(x)
        loss: Tensor | None = None
        for callback in callbacks:
            if (loss := callback.loss(run, x, y, logits)) is not None:
                break
        if loss is None:
            loss = functional.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
    run._loss = loss.detach()
    if run.step % run.steps_per_epoch == 0:
        run._seen = 0
        run._loss_sum.zero_()
        run._hit_sum.zero_()
    run._seen += 1
    run._loss_sum += run._loss
    run._hit_sum += (logits.detach().argmax(1) == y).sum() / len(y)
    if cheap:
        if not math.isfinite(value := run.last_loss):
            raise _diverged(run, finite, "loss is")
        finite = value
    loss.backward()
    for callback in callbacks:
        callback.on_backward(run)
    if recipe.clip is not None:
        _clip(run, parameters, recipe.clip, finite)
    optimizer.step()
    run.step += 1
    if not cheap and (run.step % _CHECK == 0 or run.step % run.steps_per_epoch == 0):
        summed = run._loss_sum.clone()
        if run.world > 1:
            dist.all_reduce(summed)
        if not math.isfinite(float(summed)):
            raise _diverged(run, finite, "loss is")
        finite = run.last_loss
    return finite


def _clip(run: Run, parameters: list[nn.Parameter], limit: float, finite: float) -> None:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if run.device.type == "cpu":
        # For many small tensors one copy and one norm take half the time of a norm each.
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        if not math.isfinite(value := norm.item()):
            raise _diverged(run, finite, "gradient is")
        if value <= limit:
            return
    else:
        norm = nn.utils.get_total_norm(gradients)
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)


def _diverged(run: Run, finite: float, what: str) -> TrainingDiverged:
    return TrainingDiverged(
        f"training diverged: the {what} not finite at epoch {run.step // run.steps_per_epoch}, step {run.step} "
        f"(last finite loss: {finite:.4g}). Lower lr={run.recipe.lr:g}, add warmup={run.recipe.warmup:g} "
        f"or lower clip={run.recipe.clip}"
    )


def _call(todo: list[tuple[Callback, str]], run: Run) -> None:
    while todo:
        callback, hook = todo[0]
        getattr(callback, hook)(run)
        todo.pop(0)


def _reseed(device: torch.device, seed: int, rank: int, step: int | str) -> None:
    digest = hashlib.blake2b(f"{seed}/{rank}/{step}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little")
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(value)


def _autocast(recipe: Recipe, device: torch.device) -> bool:
    if recipe.amp is not None:
        return recipe.amp
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _prepare(model: nn.Module, data: Data, recipe: Recipe, device: torch.device) -> None:
    """Move the model where it trains, and see that it fits the data."""
    model.to(device)
    if recipe.channels_last:
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    x = torch.zeros((2, *data.shape), device=device)
    try:
        with _evaluating(model):
            logits = model(x)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise SettingError(f"the model cannot take a batch {tuple(x.shape)} of {data.name!r}: {error}") from error
    if not isinstance(logits, Tensor) or logits.shape != (2, data.classes):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise SettingError(
            f"the model maps a batch {tuple(x.shape)} to {found}, but {data.name!r} has {data.classes} classes: "
            f"it must give {(2, data.classes)}"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SettingError("the model has no parameter that requires a gradient: there is nothing to train")


def _drop_paths(model: nn.Module) -> list[DropPath]:
    found = [module for module in model.modules() if isinstance(module, DropPath)]
    if not found:
        raise SettingError("recipe: drop_path is above 0, but the model has no DropPath: set drop_path=0, or add one")
    return found


def _optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # One fused kernel instead of a Python loop: 4 to 5 times faster for a small network's 60 tensors.
    fused = device.type in ("cpu", "cuda") and all(parameter.is_floating_point() for parameter in trained)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.momentum, 0.999), fused=fused)
    nesterov = recipe.nesterov and recipe.momentum > 0
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov, fused=fused)


def validate(model: nn.Module, data: Data, batch_size: int = 512, split: str = "val") -> dict[str, float]:
    """Return ``{"val_accuracy": 0 to 1, "val_loss": mean cross-entropy}``, without augmentation, where the model is.

    Args:
        split: ``"val"`` or ``"train"``; it names the keys.

    Example:
        >>> from nasbench.data import load
        >>> sorted(validate(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), load("digits")))
        ['val_accuracy', 'val_loss']
    """
    return _score(model, data.to(_device_of(model)).eval_batches(split, batch_size), split)


def evaluate(model: nn.Module, data: Data, batch_size: int = 512) -> dict[str, float]:
    """Return ``{"test_accuracy": 0 to 1, "test_loss": mean cross-entropy}``: once, of the model you have settled on.

    Nothing else reads test images.

    Example:
        >>> from nasbench.data import load
        >>> sorted(evaluate(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), load("digits")))
        ['test_accuracy', 'test_loss']
    """
    return _score(model, data.to(_device_of(model))._test_batches(batch_size), "test")


def _score(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], split: str) -> dict[str, float]:
    device = _device_of(model)
    losses, hits, count = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device), 0
    with _evaluating(model):
        for x, y in batches:
            x, y = x.to(device), y.to(device)
            logits = model(x)
            losses += functional.cross_entropy(logits, y, reduction="sum")
            hits += (logits.argmax(1) == y).sum()
            count += len(y)
    return {f"{split}_accuracy": int(hits) / count, f"{split}_loss": float(losses) / count}


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class _Saver:
    """Writes a run's checkpoint: now and then, at the end, before an error leaves. Without a file, does nothing."""

    def __init__(
        self,
        file: Path | None,
        every: float,
        identity: dict[str, Any],
        run: Run,
        callbacks: Sequence[Callback],
    ) -> None:
        self.file, self.every, self.identity, self.run, self.callbacks = file, every, identity, run, callbacks
        self.saved_step, self.saved_at = -1, time.monotonic()

    def sound(self) -> bool:
        """On a GPU the loss may have left the finite numbers since it was last looked at."""
        return self.run.step == 0 or math.isfinite(self.run.train_loss)

    def save_if_due(self) -> None:
        if self.file is not None and time.monotonic() - self.saved_at >= self.every and self.sound():
            self.save()

    def save_before(self, error: BaseException, todo: list[tuple[Callback, str]]) -> None:
        try:
            if self.sound():
                self.save(todo)
        except (OSError, SettingError) as failure:
            error.add_note(f"The checkpoint could not be written: {failure}")

    def save(self, todo: Sequence[tuple[Callback, str]] = ()) -> None:
        run = self.run
        if self.file is None or (run.step == self.saved_step and not todo):
            return
        states = [[type(callback).__qualname__, callback.state_dict()] for callback in self.callbacks]
        for name, state in states:
            if not _is_plain(state):
                raise SettingError(
                    f"the state of callback {name} cannot be kept in a checkpoint: {state!r:.200}. "
                    "Return tensors, numbers, strings, and lists, tuples or dicts of these"
                )
        content = {
            "format": _FORMAT,
            "identity": self.identity,
            "step": run.step,
            "todo": [[type(callback).__qualname__, hook] for callback, hook in todo],
            "seconds": run.seconds,
            "sums": [run._seen, run._loss_sum, run._hit_sum],
            "loss": run.last_loss,
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "callbacks": [entry for entry in states if entry[1]],
        }
        with atomic_write(self.file) as temporary:
            torch.save(content, temporary)
        self.saved_step, self.saved_at = run.step, time.monotonic()


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return type(value) is dict and all(_is_plain(item) for pair in value.items() for item in pair)
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))  # type: ignore[call-overload]
    return value is None or type(value) in (bool, int, float, str, Tensor, nn.Parameter)


def _check_writable(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise IsADirectoryError("it is a folder")
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {file} could not be written ({error.strerror or error}): name a file where you can write"
        ) from error


def _read(file: Path) -> dict[str, Any]:
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken zip, pickle or tensor raises half a dozen kinds of error
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"the checkpoint {file} is corrupt, or none ({reason}): delete it to train anew, or name another file"
        ) from error
    if not isinstance(stored, dict) or stored.get("format") != _FORMAT or not stored.keys() >= _FIELDS:
        raise CheckpointError(f"{file} is not a checkpoint of nasbench.fit, version {_FORMAT}: name another file")
    return stored


def _identity(run: Run) -> dict[str, Any]:
    """Return what two runs must have in common for one to continue the other."""
    modules = [f"{name}:{type(module).__qualname__}" for name, module in run.model.named_modules()]
    tensors = [f"{name}:{tuple(tensor.shape)}" for name, tensor in run.model.named_parameters()]
    layers = hashlib.sha256("\n".join(modules + tensors).encode()).hexdigest()[:12]
    recipe = dataclasses.asdict(run.recipe)
    return {"model": layers, "data": run.data.fingerprint, "split": run.split, "seed": run.seed, **recipe}


def _check_identity(file: Path, stored: dict[str, Any], here: dict[str, Any]) -> None:
    differ = [
        f"{name} is {stored.get(name)!r} there and {here[name]!r} here"
        for name in here
        if stored.get(name) != here[name]
    ]
    if differ:
        raise CheckpointError(
            f"the checkpoint {file} belongs to another run: {'; '.join(differ)}. Continue it with its own settings, "
            "name another file, or delete it to train anew"
        )


def _restore(file: Path, stored: dict[str, Any], run: Run, callbacks: Sequence[Callback]) -> list[tuple[Callback, str]]:
    """Put the stored state into run and callbacks; return the hooks that the last step still owes."""
    waiting = list(callbacks)
    for name, state in stored["callbacks"]:
        owner = next((callback for callback in waiting if type(callback).__qualname__ == name), None)
        if owner is None:
            raise CheckpointError(f"the checkpoint {file} holds the state of a callback {name}: pass one again")
        waiting.remove(owner)
        owner.load_state_dict(state)
    try:
        run.model.load_state_dict(stored["model"])
        run.optimizer.load_state_dict(stored["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"the checkpoint {file} does not fit model or optimizer: {error}. Do callbacks change them as before?"
        ) from error
    run.step, run._loss, run._started = stored["step"], stored["loss"], time.monotonic() - stored["seconds"]
    run._seen = stored["sums"][0]
    run._loss_sum.copy_(stored["sums"][1])
    run._hit_sum.copy_(stored["sums"][2])
    hooks = [(callback, hook) for hook in ("on_step", "on_epoch") for callback in callbacks]
    owed = [tuple(entry) for entry in stored["todo"]]
    todo = []
    for callback, hook in reversed(hooks):  # what was left is the end of the list, so look from there
        if (entry := (type(callback).__qualname__, hook)) in owed:
            owed.remove(entry)
            todo.append((callback, hook))
    return todo[::-1]


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device to compute on; ``"auto"`` is a CUDA GPU where there is one, else the CPU.

    Processes that torchrun has started get a GPU each.

    Raises:
        SettingError: no such device here.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        known = nearest(device, ("auto", "cpu", "cuda", "cuda:0", "mps"))
        raise SettingError(f"there is no device {device!r}; {known}") from error
    if place.type == "cuda":
        index = place.index if place.index is not None else int(os.environ.get("LOCAL_RANK", 0)) % max(gpus, 1)
        if index >= gpus:
            raise SettingError(f"device {str(device)!r} was asked for, but torch sees {gpus} CUDA GPUs: use 'auto'")
        return torch.device("cuda", index)
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise SettingError("device 'mps' was asked for, but torch sees no Apple GPU: use 'auto' or 'cpu'")
    if place.type not in ("cpu", "mps"):
        raise SettingError(f"device {str(device)!r} cannot train here: use 'auto', 'cpu', 'cuda' or 'mps'")
    return place


def init_distributed() -> tuple[int, int]:
    """Join the processes that torchrun has started, and return (rank, world); (0, 1) where it has not.

    Processes talk through NCCL where each has a GPU of its own, else through gloo. Calling it again changes nothing.

    Raises:
        SettingError: the environment is not what torchrun sets.

    Example:
        >>> init_distributed()
        (0, 1)
    """
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    numeric = [name for name in names if name != "MASTER_ADDR" and not os.environ.get(name, "0").isdecimal()]
    if missing or numeric:
        wrong = [f"{name} is missing" for name in missing] + [f"{name}={os.environ[name]!r}" for name in numeric]
        raise SettingError(
            f"WORLD_SIZE is set, but the rest is not as torchrun sets it ({', '.join(wrong)}): start with torchrun, "
            "or unset WORLD_SIZE"
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    own_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= local
    if own_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if own_gpu else "gloo")
    return dist.get_rank(), dist.get_world_size()


def _parallel(run: Run) -> nn.Module:
    # A sampled architecture may leave parameters unused, so DDP has to look for them.
    devices = [run.device.index] if run.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(run.model, device_ids=devices, find_unused_parameters=True)
