"""Compression while `nasbench.fit` trains."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

from compress.dynamic import DynamicSparsity
from compress.errors import CompressionError
from compress.schedule import METHODS
from nasbench.training import Callback, Run
from search_spaces.arch import nearest

_STARTED: weakref.WeakSet[DynamicSparsity] = weakref.WeakSet()


class DynamicCallback(Callback):
    """Moves the masks of a pruned model while `nasbench.fit` trains it, which knows optimizer and steps.

    Args:
        method: "rigl", "set" or "gradual".
        settings: those of `DynamicSparsity`, without model, optimizer and steps.

    Attributes:
        sparsity: the `DynamicSparsity` of the training, once it has begun.

    Raises:
        CompressionError: the method or a setting is unknown; and, when the training begins, as `DynamicSparsity` does.

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
        if method not in METHODS:
            raise CompressionError(f"no method {method!r}; {nearest(method, METHODS)}")
        known = inspect.signature(DynamicSparsity).parameters.keys() - {"method", "model", "optimizer", "steps"}
        for name in settings:
            if name not in known:
                fit = "nasbench.fit knows it; leave it out." if name in ("model", "optimizer", "steps") else ""
                raise CompressionError(f"DynamicCallback has no setting {name!r}; {fit or nearest(name, known)}")
        self._settings = {"method": method} | settings

    def on_start(self, run: Run) -> None:
        owned = {id(parameter) for parameter in run.model.parameters()}
        for former in list(_STARTED):  # of a training that was interrupted: every training makes an optimizer
            if former._optimizer is not run.optimizer and any(
                id(weight.parameter) in owned for weight in former._weights.values()
            ):
                former.remove()
        steps = run.recipe.epochs * run.steps_per_epoch
        self.sparsity = DynamicSparsity(run.model, run.optimizer, steps=steps, **self._settings)
        _STARTED.add(self.sparsity)

    def on_end(self, run: Run) -> None:
        self.sparsity.remove()

    def state_dict(self) -> dict[str, Any]:
        return self.sparsity.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sparsity.load_state_dict(state)
