"""The gradients that masked weights would have without their masks, seen only in the steps that need them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from compress.weights import Weight
from search_spaces.masks import Mask


class DenseGradients:
    """Watches the gradients of effective weights, those of masked entries included, while it is open.

    While it is closed, nothing is hooked to the model. While it is open, every masked weight that a forward makes gets
    a hook; the gradients of all backward passes since the parameter's own gradient was last cleared are added up, as
    torch adds up the parameter's. Compiled functions run uncompiled meanwhile, in the whole process: a hook that is
    added to a compiled function has no effect.

    Args:
        weights: masked weights.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        self._taps = [_Tap(weight) for weight in weights]
        self._open = ExitStack()
        weakref.finalize(self, self._open.close)  # a training that ends early leaves no trace

    def open(self) -> None:
        """Watch from now on."""
        self.close()
        for tap in self._taps:
            tap.listen(self._open)
        self._open.enter_context(torch.compiler.set_stance("force_eager"))

    def take(self) -> list[Tensor | None]:
        """Return the sum of the gradients of each weight, or None if none was seen, and stop watching."""
        found = [tap.dense for tap in self._taps]
        self.close()
        return found

    def close(self) -> None:
        """Stop watching and forget what was seen."""
        self._open.close()


class _Tap:
    """One weight's share of it."""

    def __init__(self, weight: Weight) -> None:
        self.parameter = weight.parameter
        steps: Any = weight.module.parametrizations[weight.attribute]  # type: ignore[index]
        self.mask: Mask = next(step for step in steps if isinstance(step, Mask))
        self.dense: Tensor | None = None
        self.listening = False
        self.in_backward = False

    def listen(self, stack: ExitStack) -> None:
        def forward(module: nn.Module, _: Any, effective: Tensor) -> None:
            if module is self.mask and effective.requires_grad:  # a copy of the model brings this hook along
                effective.register_hook(self.add)

        def accumulated(_: Tensor) -> None:
            self.in_backward = False

        self.listening, self.in_backward = True, False
        stack.callback(self.forget)
        stack.callback(self.mask.register_forward_hook(forward).remove)
        stack.callback(self.parameter.register_post_accumulate_grad_hook(accumulated).remove)

    def add(self, gradient: Tensor) -> None:
        if not self.listening:  # the backward of a graph that was kept
            return
        if not self.in_backward:  # the first of this backward, the parameter's own gradient is still that of the last
            self.in_backward = True
            own = self.parameter.grad
            if own is None or not own.any():  # cleared since, as after a step that a GradScaler skipped
                self.dense = None
        self.dense = gradient.detach() if self.dense is None else self.dense + gradient.detach()

    def forget(self) -> None:
        self.listening, self.dense = False, None
