"""Training one network: recipe, loop, checkpoints, scores.

Everything random in a run is a pure function of (seed, step): the data draw their batches from it, and torch's global
generator (dropout, drop-path) is set anew before every step. So a run that was killed and continued is the unbroken
run, bit for bit, on one kind of processor with one number of threads; on a GPU as far as its kernels repeat.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import numbers
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from nasbench.checkpoint import Saver, check_identity, check_writable, identity_of, read, restore
from nasbench.devices import pick_device
from nasbench.errors import SettingError, TrainingDiverged
from nasbench.profile import zeros
from nasbench.recipe import Recipe, is_number
from search_spaces.layouts import laid_out, lay_out, layout_for
from search_spaces.operations import DropPath

if TYPE_CHECKING:
    from nasbench.data import Data

Network = TypeVar("Network", bound=nn.Module)

_CHECK = 50  # steps between two looks at the loss where a look makes the device wait


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
        """Return a scalar in place of the cross-entropy, or None.

        x: (B, C, H, W), y: (B,), logits: (B, classes); of a text (B, T), (B, T) and (B, classes, T).
        """
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
    _layout: torch.memory_format = torch.channels_last

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
        SettingError: a bad recipe, device or argument, or a model that does not map images (B, C, H, W) to
            (B, classes), or a text (B, T) to (B, classes, T).
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
    if not is_number(seed, numbers.Integral) or seed < 0:
        raise SettingError(f"seed={seed!r}, but a seed is a whole number, 0 or more")
    if not is_number(checkpoint_every) or checkpoint_every < 0:
        raise SettingError(f"checkpoint_every={checkpoint_every!r}, but it must be a number of seconds, 0 or more")
    place = pick_device(device)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    file = Path(checkpoint).expanduser() if checkpoint is not None else None
    if file is not None and rank == 0:
        check_writable(file)
    stored = read(file) if file is not None and file.exists() else None

    with torch.random.fork_rng([place.index] if place.type == "cuda" else []):
        _reseed(place, seed, rank, "start")
        layout = layout_for(model, place) if recipe.channels_last else torch.contiguous_format
        _prepare(model, data, recipe, place, layout)
        drops = _drop_paths(model) if recipe.drop_path else []
        run = Run(
            model=model,
            data=data.to(place),
            recipe=recipe,
            optimizer=make_optimizer(model, recipe, place),
            device=place,
            seed=int(seed),
            split=split,
            steps_per_epoch=data.steps(recipe.batch_size, split),
            rank=rank,
            world=world,
            _loss_sum=torch.zeros((), device=place),
            _hit_sum=torch.zeros((), device=place),
            _layout=layout,
        )
        identity = identity_of(run) if file is not None else {}
        if stored is not None and file is not None:
            check_identity(file, stored["identity"], identity)
        for callback in callbacks:
            callback.on_start(run)
        todo = restore(file, stored, run, callbacks) if stored is not None and file is not None else []
        saver = Saver(file if rank == 0 else None, checkpoint_every, identity, run, callbacks)
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
    saver: Saver,
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
                    module.p = module.depth * recipe.drop_path * epoch / max(1, recipe.epochs - 1)
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
    x = laid_out(x, run._layout)
    for parameter in parameters:
        parameter.grad = None
    with torch.autocast(run.device.type, torch.bfloat16) if _autocast(recipe, run.device) else nullcontext():
        out = forward(x)
        logits, auxiliary = out if isinstance(out, tuple) else (out, None)  # in training, a network may have two heads
        loss: Tensor | None = None
        for callback in callbacks:
            if (loss := callback.loss(run, x, y, logits)) is not None:
                break
        if loss is None:
            loss = functional.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
        if auxiliary is not None:
            loss = loss + recipe.auxiliary * functional.cross_entropy(
                auxiliary, y, label_smoothing=recipe.label_smoothing
            )
    run._loss = loss.detach()
    if run.step % run.steps_per_epoch == 0:
        run._seen = 0
        run._loss_sum.zero_()
        run._hit_sum.zero_()
    run._seen += 1
    run._loss_sum += run._loss
    run._hit_sum += (logits.detach().argmax(1) == y).sum() / y.numel()
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
    recipe = run.recipe
    return TrainingDiverged(
        f"training diverged: the {what} not finite at epoch {run.epoch}, step {run.step} "
        f"(last finite loss: {finite:.4g}). Lower lr (it is {recipe.lr:g}) or clip ({recipe.clip}), "
        f"or raise warmup ({recipe.warmup:g} epochs)"
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


def _prepare(model: nn.Module, data: Data, recipe: Recipe, device: torch.device, layout: torch.memory_format) -> None:
    """Move the model where it trains, and see that it and the recipe fit the data."""
    data.train_batches(recipe.batch_size, seed=0, epoch=0, cutout=recipe.cutout)
    model.to(device)
    lay_out(model, layout)
    x = zeros(2, data.shape, device)
    expected = (2, data.classes, *data.shape) if len(data.shape) == 1 else (2, data.classes)
    try:
        with evaluating(model):
            logits = model(x)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise SettingError(f"the model cannot take a batch {tuple(x.shape)} of {data.name!r}: {error}") from error
    if not isinstance(logits, Tensor) or logits.shape != expected:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise SettingError(
            f"the model maps a batch {tuple(x.shape)} to {found}, but {data.name!r} has {data.classes} classes: "
            f"it must give {expected}"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SettingError("the model has no parameter that requires a gradient: there is nothing to train")


def _drop_paths(model: nn.Module) -> list[DropPath]:
    found = [module for module in model.modules() if isinstance(module, DropPath)]
    if not found:
        raise SettingError("recipe: drop_path is above 0, but the model has no DropPath: set drop_path=0, or add one")
    return found


def make_optimizer(
    model: nn.Module, recipe: Recipe, device: torch.device, *, all_used: bool = True
) -> torch.optim.Optimizer:
    """Return the recipe's optimizer of a model that is on its device already.

    Args:
        all_used: whether every step has gradients for all parameters; torch's fused optimizers need them.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # One fused kernel instead of a Python loop: 4 to 5 times faster for a small network's 60 tensors.
    real = all(parameter.is_floating_point() for parameter in trained)
    fused = device.type in ("cpu", "cuda") and real and all_used
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.momentum, 0.999), fused=fused)
    nesterov = recipe.nesterov and recipe.momentum > 0
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov, fused=fused)


def validate(model: nn.Module, data: Data, batch_size: int = 512, split: str = "val") -> dict[str, float]:
    """Return ``{"val_accuracy": 0 to 1, "val_loss": mean cross-entropy}``, without augmentation, where the model is.

    Means are over images, or over all predicted characters of a text.

    Args:
        batch_size: images or windows at a time.
        split: ``"val"`` or ``"train"``; it names the keys.

    Example:
        >>> from nasbench.data import load
        >>> sorted(validate(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), load("digits")))
        ['val_accuracy', 'val_loss']
    """
    return _score(model, data.to(device_of(model)).eval_batches(split, batch_size), split)


def evaluate(model: nn.Module, data: Data, batch_size: int = 512) -> dict[str, float]:
    """Return ``{"test_accuracy": 0 to 1, "test_loss": mean cross-entropy}``: once, of the model you have settled on.

    Nothing else reads test images, or the test part of a text, but `nasbench.robustness` if asked for split="test".

    Example:
        >>> from nasbench.data import load
        >>> sorted(evaluate(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), load("digits")))
        ['test_accuracy', 'test_loss']
    """
    return _score(model, data.to(device_of(model))._test_batches(batch_size), "test")


def recalibrate(model: Network, data: Data, *, images: int = 2048, batch_size: int = 128, seed: int = 0) -> Network:
    """Replace the running statistics of all batch norms by those of training images, in place, and return the model.

    A network whose weights were trained inside a supernet needs it: the supernet's statistics are of mixed paths. One
    without batch norms is returned as it is.

    Args:
        images: how many training images (windows of a text) to look at, at most; drawn at random, without augmentation.
        seed: decides which.

    Raises:
        DataError, SettingError: the data cannot give such batches.

    Example:
        >>> from nasbench.data import load
        >>> model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10))
        >>> recalibrate(model, load("digits"))[0].num_batches_tracked
        tensor(8)

    Source: Guo et al., Single Path One-Shot Neural Architecture Search with Uniform Sampling, ECCV 2020,
    arXiv:1904.00420; statistics are plain means over the batches.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return model
    momenta = [norm.momentum for norm in norms]
    training = [module for module in model.modules() if module.training]
    device = device_of(model)
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean
            norm.train()
        batches = data.to(device).train_batches(batch_size, seed=seed, epoch=0, augment=False)
        with torch.no_grad():
            for _, (x, _) in zip(range(max(1, images // batch_size)), batches, strict=False):
                model(x)
    finally:
        model.eval()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module in training:
            module.training = True
    return model


def _score(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], split: str) -> dict[str, float]:
    device = device_of(model)
    losses, hits, count = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device), 0
    with evaluating(model):
        for x, y in batches:
            x, y = x.to(device), y.to(device)
            logits = model(x)
            losses += functional.cross_entropy(logits, y, reduction="sum")
            hits += (logits.argmax(1) == y).sum()
            count += y.numel()
    return {f"{split}_accuracy": int(hits) / count, f"{split}_loss": float(losses) / count}


def device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _parallel(run: Run) -> nn.Module:
    # A sampled architecture may leave parameters unused, so DDP has to look for them.
    devices = [run.device.index] if run.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(run.model, device_ids=devices, find_unused_parameters=True)
