"""Students that learn from teachers instead of labels: MEAL V2, and the losses of its relatives for any loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.cached_labels import SoftLabels, check_teachers, for_teachers, require_data, require_temperature
from compress.discriminators import MODES, Adversary
from compress.errors import CompressionError
from compress.models import copy_of, require_values
from compress.stages import Stage, as_stages, given, outputs
from compress.teachers import Teacher, Teachers, mean_probabilities
from nasbench.batches import Data, keyed_generator
from nasbench.devices import pick_device
from nasbench.recipe import Recipe, is_number
from nasbench.training import Callback, Run, fit
from search_spaces.arch import nearest

RECIPE = Recipe(lr=0.01, nesterov=False, weight_decay=0.0, auxiliary=0.0)
"""How students are trained: gently, as they are trained already, and without weight decay."""

ENSEMBLES = ("mean", "random")


class DistillationLoss:
    """The loss of a student that learns from teachers, for any training loop.

    ``(1 - hard) * T^2 * cross_entropy(student / T, mean of softmax(teacher / T)) + hard * cross_entropy(student, y)``

    As it stands, labels are not used, so images without labels will do. It is no module: its teachers are in no
    ``state_dict`` and are never trained, whatever mode they are in.

    Args:
        teachers: modules, or functions of a batch that return logits; one, or several whose probabilities are averaged.
            They work where they are.
        temperature: T, which makes probabilities softer if it is above 1.
        hard: weight of the labels, 0 to below 1.

    Raises:
        CompressionError: there are no teachers, or a setting is out of range; and, when called, student and teachers
            have different numbers of classes, or labels are missing.

    Example:
        >>> teachers = [nn.Linear(8, 3), nn.Linear(8, 3)]
        >>> student, x = nn.Linear(8, 3), torch.randn(16, 8)
        >>> loss = DistillationLoss(teachers, temperature=2.0)
        >>> loss(x, student(x)).backward()
        >>> student.weight.grad.shape, teachers[0].weight.grad
        (torch.Size([3, 8]), None)

    Source: Shen and Savvides, MEAL V2, 2020, arXiv:2009.08453 (T = 1, hard = 0); Hinton et al., Distilling the
    Knowledge in a Neural Network, 2015, arXiv:1503.02531; Chen et al., Big Self-Supervised Models are Strong
    Semi-Supervised Learners (SimCLRv2), NeurIPS 2020, arXiv:2006.10029 (one teacher, images without labels). Where a
    paper has a divergence, it is this cross-entropy less a constant.
    """

    def __init__(self, teachers: Teacher | Iterable[Teacher], *, temperature: float = 1.0, hard: float = 0.0) -> None:
        _check_loss(temperature, hard)
        self.teachers, self.temperature, self.hard = Teachers(teachers), temperature, hard

    def __call__(self, x: Tensor, logits: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the mean loss of a batch.

        Args:
            x: what teachers see: the same crops that the student saw.
            logits: of the student, (B, classes), or (B, classes, T) of a text.
            y: labels, (B,) or (B, T); only used if `hard` is above 0.
        """
        probabilities = mean_probabilities(self.teachers.logits(x), self.temperature)
        return distillation_loss(logits, probabilities, self.temperature, self.hard, y)


def distillation_loss(
    logits: Tensor, probabilities: Tensor, temperature: float = 1.0, hard: float = 0.0, y: Tensor | None = None
) -> Tensor:
    """Return the loss of `DistillationLoss` where the teachers' mean probabilities are known.

    Example:
        >>> even = torch.full((4, 2), 0.5)
        >>> distillation_loss(torch.zeros(4, 2), even)
        tensor(0.6931)
    """
    if logits.shape != probabilities.shape:
        raise CompressionError(
            f"the student gives {tuple(logits.shape)}, the teachers {tuple(probabilities.shape)}: they need the same "
            "classes, and the same batch."
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    soft = probabilities.to(logits.dtype)
    loss = functional.cross_entropy(logits / temperature if temperature != 1 else logits, soft)
    if temperature != 1:
        loss = loss * temperature**2
    if not hard:
        return loss
    if y is None:
        raise CompressionError(f"hard={hard} gives labels a weight, but there are none: pass loss(x, logits, y).")
    return (1 - hard) * loss + hard * functional.cross_entropy(logits, y)


def distill(
    student: nn.Module,
    teachers: Teacher | Iterable[Teacher] | None = None,
    *,
    data: Data,
    labels: SoftLabels | str | Path | None = None,
    mode: str = "off",
    temperature: float = 1.0,
    hard: float = 0.0,
    ensemble: str = "mean",
    stages: Mapping[str, Stage | str] | None = None,
    discriminator_lr: float = 1e-4,
    recipe: Recipe | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    split: str = "train",
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    progress: bool = True,
    inplace: bool = False,
    **changes: Any,
) -> nn.Module:
    """Return the student trained on by the mean of its teachers' probabilities, on `device` and in eval mode.

    This is MEAL V2: the student should be trained already, it learns from teachers alone (the data's labels change no
    weight, unless `hard` says so), and there is no weight decay. Students of `compress.prune` keep their masks, those
    with few bits their grids. The teachers stay as they are, and are in no ``state_dict`` or checkpoint.

    A discriminator is off by default. In the released code of MEAL V2 it is "joint": student and discriminator lower
    the same loss, which only regularises. "reversed" and "alternate" are adversarial: the student learns to give logits
    that a discriminator cannot tell from the teachers' mean logits. See `compress.discriminators.Adversary`.

    Args:
        student: any module that `nasbench.fit` trains; it stays as it is unless `inplace`.
        teachers: modules, or functions of a batch that return logits, such as a network in another runtime; one or
            several. They see the crops that the student sees, scaled in the same way, and work where they are: move
            them to the device that you want.
        labels: in place of teachers, what `soft_labels` wrote, or the path of it. Settings have to be the same there.
        mode: of the discriminator: "off", "joint", "reversed" or "alternate".
        temperature, hard: see `DistillationLoss`.
        ensemble: "mean" of all teachers, or a "random" one in each step.
        stages: layers of the student, by name, that learn from a teacher's layer, too: the name of that, or a
            `Stage`. With a discriminator, each stage has its own.
        discriminator_lr: of the discriminators, constant.
        recipe: how to train; default: `RECIPE`, SGD from 0.01 along a cosine. `changes` replace its fields.
        seed, device, split, callbacks, checkpoint, progress: see `nasbench.fit`. The checkpoint holds the
            discriminators, too; a run that was killed and continued is the unbroken run.
        inplace: train the student itself.

    Raises:
        CompressionError: there are neither teachers nor labels, or both; they do not fit the data or these settings; a
            setting is unknown or out of range; or a checkpoint is of another distillation.
        SettingError, DataError, CheckpointError, TrainingDiverged: see `nasbench.fit`.

    Example:
        >>> import nasbench as nb
        >>> data = nb.data.load("digits", train_images=200)
        >>> teachers = [nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(2)]
        >>> student = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10))
        >>> distilled = distill(student, teachers, data=data, epochs=2, batch_size=32, device="cpu", progress=False)
        >>> distilled.training, list(distilled.state_dict()) == list(student.state_dict())
        (False, True)

    Source: Shen and Savvides, MEAL V2, 2020, arXiv:2009.08453, whose learning rate falls once, from 0.01 to 0.001 after
    100 of 180 epochs, and overwrites that of the discriminator. With stages, ``ensemble="random"`` and mode "joint",
    Shen et al., MEAL, AAAI 2019, arXiv:1812.02425.
    """
    recipe = (recipe or RECIPE).replace(**changes)
    require_data(data)
    _check_loss(temperature, hard)
    for name, value, known in (("mode", mode, MODES), ("ensemble", ensemble, ENSEMBLES)):
        if value not in known:
            raise CompressionError(f"there is no {name} {value!r}; {nearest(value, known)}")
    if not is_number(discriminator_lr) or discriminator_lr <= 0:
        raise CompressionError(f"discriminator_lr={discriminator_lr!r}; it must be a number above 0.")
    if recipe.label_smoothing:
        raise CompressionError("label_smoothing has no use where teachers give soft labels; leave it 0.")
    if recipe.auxiliary and not hard:
        raise CompressionError("an auxiliary head learns from labels; leave auxiliary=0, or give hard= a value.")
    require_values(student)
    source: Teachers | SoftLabels
    if labels is not None:
        if teachers is not None:
            raise CompressionError("labels are what teachers said before; give either teachers or labels.")
        if mode != "off" or ensemble != "mean" or stages:
            raise CompressionError("cached labels are probabilities only; for mode, ensemble and stages give teachers.")
        source = labels if isinstance(labels, SoftLabels) else SoftLabels(labels)
        source.check(data, recipe, seed, split, temperature)
        if recipe.epochs > source.epochs:
            data = source.repeated(data)
    else:
        source = Teachers(() if teachers is None else teachers)
        _refuse_shared(student, source, inplace)
        check_teachers(source, data, recipe, seed, split, pick_device(device))
    target = student if inplace else copy_of(student)
    teaching = _Distillation(source, target, temperature, hard, mode, ensemble, stages or {}, discriminator_lr)
    settings: dict[str, Any] = {"seed": seed, "device": device, "split": split, "checkpoint": checkpoint}
    try:
        return fit(target, data, recipe, callbacks=[teaching, *callbacks], progress=progress, **settings)
    finally:
        teaching.close()


class _Distillation(Callback):
    """Puts the teachers' loss in place of that of the labels."""

    def __init__(
        self,
        source: Teachers | SoftLabels,
        student: nn.Module,
        temperature: float,
        hard: float,
        mode: str,
        ensemble: str,
        stages: Mapping[str, Stage | str],
        discriminator_lr: float,
    ) -> None:
        self._source, self._temperature, self._hard = source, temperature, hard
        self._mode, self._ensemble, self._lr = mode, ensemble, discriminator_lr
        self._stages = as_stages(stages, student, source.all) if isinstance(source, Teachers) else {}
        self._hooks = ExitStack()
        self._features = self._hooks.enter_context(outputs(student, list(self._stages)))
        self._adversary: Adversary | None = None

    def on_start(self, run: Run) -> None:
        if self._mode != "off":
            shapes = [(run.data.classes, 8), *((stage.length, 2) for stage in self._stages.values())]
            self._adversary = Adversary(self._mode, shapes, self._lr, run.seed, run.device)

    def loss(self, run: Run, x: Tensor, y: Tensor, logits: Tensor) -> Tensor:
        if isinstance(self._source, SoftLabels):
            labels = self._source.at(run.epoch, run.step % run.steps_per_epoch, run.rank, run.world)
            return distillation_loss(logits, labels.to(run.device), self._temperature, self._hard, y)
        chosen = range(len(self._source))
        if self._ensemble == "random":
            draw = torch.randint(len(chosen), (), generator=keyed_generator(run.seed, run.step, 0, 0))
            chosen = chosen[int(draw) : int(draw) + 1]
        said, stage_losses, pairs = self._ask(for_teachers(x, run.recipe), chosen)
        loss = distillation_loss(logits, mean_probabilities(said, self._temperature), self._temperature, self._hard, y)
        for part in stage_losses:
            loss = loss + part
        if self._adversary is not None:
            loss = loss + self._adversary.loss([(logits, _mean(said)), *pairs])
        return loss

    def _ask(self, x: Tensor, chosen: range) -> tuple[list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Return the logits of these teachers; of each stage, the loss, and what student and teachers gave, pooled."""
        assert isinstance(self._source, Teachers)
        said: list[Tensor] = []
        theirs: dict[str, list[Tensor]] = {layer: [] for layer in self._stages}
        for index in chosen:
            if not self._stages:
                said += self._source.logits(x, index)
                continue
            names = {layer: stage.teacher[index] for layer, stage in self._stages.items()}
            with outputs(self._source.all[index], list(names.values())) as found:  # type: ignore[arg-type]
                said += self._source.logits(x, index)
            for layer, name in names.items():
                output = given(found, name, f"teacher {index + 1}")
                theirs[layer].append(self._stages[layer].pooled(output.to(x.device)))
        losses, pairs = [], []
        for layer, stage in self._stages.items():
            own = stage.pooled(given(self._features, layer, "the student"))
            losses.append(torch.stack([stage.loss(own, other) for other in theirs[layer]]).mean())
            pairs.append((own, _mean(theirs[layer])))
        self._features.clear()
        return said, losses, pairs

    def on_backward(self, run: Run) -> None:
        if self._adversary is not None:
            self._adversary.step()

    def close(self) -> None:
        """Take the hooks off the student."""
        self._hooks.close()

    def state_dict(self) -> dict[str, Any]:
        adversary = None if self._adversary is None else self._adversary.state_dict()
        return {"settings": self._settings(), "adversary": adversary}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, own in self._settings().items():
            if (saved := state["settings"].get(name)) != own:
                raise CompressionError(
                    f"the checkpoint is of a distillation with another {name}: {saved!r}, here it is {own!r}. Continue "
                    "it with its own settings, or name another file."
                )
        if self._adversary is not None:
            self._adversary.load_state_dict(state["adversary"])

    def _settings(self) -> dict[str, Any]:
        source = self._source
        return {
            "teachers or labels": source.fingerprint if isinstance(source, Teachers) else source.checksum,
            "temperature": float(self._temperature),
            "hard": float(self._hard),
            "mode": self._mode,
            "ensemble": self._ensemble,
            "stages": {layer: repr(stage) for layer, stage in self._stages.items()},
            "discriminator_lr": float(self._lr),
        }


def _mean(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).mean(0) if len(tensors) > 1 else tensors[0]


def _check_loss(temperature: float, hard: float) -> None:
    require_temperature(temperature)
    if not is_number(hard) or not 0 <= hard < 1:
        raise CompressionError(f"hard={hard!r}; the weight of labels is a number from 0 to below 1.")


def _refuse_shared(student: nn.Module, teachers: Teachers, inplace: bool) -> None:
    """Refuse a student that is a teacher, or would change one while it is trained."""
    own = {id(parameter) for parameter in student.parameters()}
    for number, teacher in enumerate(teachers.all, 1):
        if teacher is student:
            raise CompressionError(
                f"teacher {number} is the student itself; give a copy of it: copy.deepcopy(student)."
            )
        if (
            inplace
            and isinstance(teacher, nn.Module)
            and any(id(parameter) in own for parameter in teacher.parameters())
        ):
            raise CompressionError(f"teacher {number} shares weights with the student; leave out inplace.")
