"""Outputs of layers inside a student and its teachers, compared while the student learns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from compress.errors import CompressionError
from nasbench.recipe import is_number
from search_spaces.arch import nearest

SIMILARITIES = ("cross_entropy", "l1", "l2")


@dataclass(frozen=True)
class Stage:
    """How the output of one layer of the student is compared with that of a teacher's layer.

    Both outputs are flattened and pooled (adaptive mean) to `length` numbers per image, so they may differ in shape.

    Args:
        teacher: the layer's name in every teacher, or a tuple of names, one for each teacher.
        weight: of this stage in the loss. The logits have weight 1.
        length: what outputs are pooled to.
        similarity: "cross_entropy" of their softmax, or the mean "l1" or "l2" distance.

    Raises:
        CompressionError: a weight or length is out of range, or the similarity is unknown.

    Example:
        >>> Stage("layer1", length=500)
        Stage(teacher='layer1', weight=0.1, length=500, similarity='cross_entropy')

    Source: Shen et al., MEAL, AAAI 2019, arXiv:1812.02425, with weights 0.001, 0.01, 0.05, 0.1 and, for the last stage,
    the logits, 1; and lengths 10000, 5000, 1000, 500 and, again for the last, 10.
    """

    teacher: str | tuple[str, ...]
    weight: float = 0.1
    length: int = 1000
    similarity: str = "cross_entropy"

    def __post_init__(self) -> None:
        if not is_number(self.weight) or self.weight <= 0:
            raise CompressionError(f"a stage has weight={self.weight!r}; it must be a number above 0.")
        if type(self.length) is not int or self.length < 1:
            raise CompressionError(f"a stage has length={self.length!r}; it must be a whole number, 1 or more.")
        names = (self.teacher,) if isinstance(self.teacher, str) else self.teacher
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise CompressionError(
                f"a stage names a layer of the teachers, or a tuple of one for each, got {self.teacher!r}."
            )
        if self.similarity not in SIMILARITIES:
            known = nearest(str(self.similarity), SIMILARITIES)
            raise CompressionError(f"there is no similarity {self.similarity!r}; {known}")

    def pooled(self, x: Tensor) -> Tensor:
        """Return (B, length) of an output (B, ...)."""
        return functional.adaptive_avg_pool1d(x.float().flatten(1), self.length)

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return how much two pooled outputs differ, times the weight."""
        if self.similarity == "l1":
            return self.weight * functional.l1_loss(student, teacher)
        if self.similarity == "l2":
            return self.weight * functional.mse_loss(student, teacher)
        return self.weight * functional.cross_entropy(student, teacher.softmax(1))


def as_stages(stages: Mapping[str, Stage | str], student: nn.Module, teachers: Sequence[Any]) -> dict[str, Stage]:
    """Return the stages by the names of the student's layers, each with a tuple of teachers' layers.

    Raises:
        CompressionError: a network is no module or has no such layer, or there are too few or too many names.
    """
    if not isinstance(stages, Mapping):
        raise CompressionError(
            f'stages map layers of the student to those of teachers, {{"layer1": "layer1"}}, got {stages!r:.60}.'
        )
    found = {}
    for layer, value in stages.items():
        stage = value if isinstance(value, Stage) else Stage(value)
        names = (stage.teacher,) * len(teachers) if isinstance(stage.teacher, str) else stage.teacher
        if len(names) != len(teachers):
            raise CompressionError(
                f"stage {layer!r} names {len(names)} layers of teachers, but there are {len(teachers)} teachers."
            )
        _require_layer(student, layer, "the student")
        for number, (teacher, name) in enumerate(zip(teachers, names, strict=True), 1):
            _require_layer(teacher, name, f"teacher {number}")
        found[layer] = Stage(names, stage.weight, stage.length, stage.similarity)
    return found


def _require_layer(model: object, name: str, who: str) -> None:
    if not isinstance(model, nn.Module):
        raise CompressionError(f"{who} is no torch.nn.Module, so its layers cannot be seen; leave out stages.")
    known = [layer for layer, _ in model.named_modules() if layer]
    if name not in known:
        raise CompressionError(f"{who} ({type(model).__name__}) has no layer {name!r}; {nearest(str(name), known)}")


def given(found: Mapping[str, Tensor], name: str, who: str) -> Tensor:
    """Return what a layer gave in the last forward pass.

    Raises:
        CompressionError: it was not called.
    """
    if name not in found:
        raise CompressionError(f"layer {name!r} of {who} is not called in a forward pass; name another layer.")
    return found[name]


@contextmanager
def outputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within the block, keep what these layers of a model gave in its last forward pass, by name."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise CompressionError(f"layer {name!r} gives {type(output).__name__}, no tensor; name another layer.")
            found[name] = output.clone()  # what comes behind, such as nn.ReLU(inplace=True), may change it

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in dict.fromkeys(names)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
