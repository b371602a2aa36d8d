"""Compression while `nasbench.fit` trains."""

from __future__ import annotations

from typing import Any

from compress.dynamic import DynamicSparsity
from nasbench.training import Callback, Run


class DynamicCallback(Callback):
    """Moves the masks of a pruned model while `nasbench.fit` trains it, which knows optimizer and steps.

    Args:
        method: "rigl", "set" or "gradual".
        settings: those of `DynamicSparsity`, without model, optimizer and steps.

    Attributes:
        sparsity: the `DynamicSparsity` of the training, once it has begun.

    Raises:
        CompressionError: when the training begins, as `DynamicSparsity` does.

    Example:
        >>> import nasbench as nb
        >>> from torch import nn
        >>> from compress.pruning import prune
        >>> data = nb.data.load("digits", train_images=200)
        >>> model = prune(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), 0.2)
        >>> callback = DynamicCallback("rigl", interval=2)
        >>> _ = nb.fit(model, data, epochs=5, batch_size=32, callbacks=[callback], device="cpu", progress=False)
        >>> print(callback.sparsity)
        rigl after step 25 of 25: 9 updates, 474 of 2,368 weights kept (density 0.2002)
    """

    sparsity: DynamicSparsity

    def __init__(self, method: str = "rigl", **settings: Any) -> None:
        self._settings = {"method": method} | settings

    def on_start(self, run: Run) -> None:
        steps = run.recipe.epochs * run.steps_per_epoch
        self.sparsity = DynamicSparsity(run.model, run.optimizer, steps=steps, **self._settings)

    def on_end(self, run: Run) -> None:
        self.sparsity.remove()

    def state_dict(self) -> dict[str, Any]:
        return self.sparsity.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sparsity.load_state_dict(state)
