"""Masks that change while a model trains: RigL, SET and gradual magnitude pruning, hooked to the optimizer."""

from __future__ import annotations

import gc
import hashlib
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from compress.dense_gradients import DenseGradients
from compress.density import Densities, check_density
from compress.errors import CompressionError
from compress.schedule import Schedule
from compress.weights import Weight, weights
from search_spaces.arch import nearest
from search_spaces.masks import keep_count

_ACTIVE: weakref.WeakSet[DynamicSparsity] = weakref.WeakSet()


class DynamicSparsity:
    """Moves the masks of a pruned model while any training loop trains it; only ``optimizer.step()`` has to be called.

    After every `interval` steps, counted from `begin`, the masks change; a step that a GradScaler skips does not count.

    - "rigl": each layer drops the share ``fraction / 2 * (1 + cos(pi * t / end))`` of its kept weights that is smallest
      in size and grows as many where the gradient of the loss, taken without the mask in the step just made, is
      largest in size. What was just dropped may grow again, and then stays as it was. The last change is before `end`.
    - "set": the same, but weights grow at random.
    - "gradual": the smallest weights are dropped and none grows, until `density` is met at the last change, which is at
      `end` at the latest. The share still to be dropped falls with the cube of the time left. Every layer keeps at
      least one weight.

    Grown weights start at zero. Where a mask is zero, and where a weight has just grown, the stored weight and the
    optimizer's state are zero. With "rigl" and "set" each layer has the same number of weights at all times.

    With "rigl", the step before a change costs a little more, and compiled functions run uncompiled in it. Where
    several processes train one model, gradients are summed over them, so that all have the same masks.

    Args:
        model: a model with masks (`compress.prune`); for "gradual" those of ``prune(model, 1.0)`` will do.
        optimizer: the optimizer of all its masked weights.
        method: "rigl", "set" or "gradual".
        steps: how many optimizer steps the whole training has.
        interval: steps from one change to the next.
        begin, end: when masks may change, as shares of `steps`.
        fraction: of "rigl" and "set", the share of weights dropped at first.
        density: of "gradual", what is kept in the end: a share of the masked weights of all layers together, smallest
            dropped first wherever they are, or a share for each layer, by name (such as `compress.densities`).
        seed: of "set", for the random draws; those of a step depend on nothing else.
        group: the processes that train the model together, by default all if there are several.

    Attributes:
        step: optimizer steps made.
        updates: how often the masks changed.

    Raises:
        CompressionError: the model has no masks, the optimizer lacks a masked weight, a setting is out of range, or
            another one still moves masks of the optimizer or of a weight: call its `remove` first. While training with
            "rigl", if no gradient of any masked weight was seen.

    Example:
        >>> from search_spaces.masks import attach
        >>> model = nn.Linear(8, 4)
        >>> attach(model, "weight", torch.arange(32).view(4, 8) % 4 == 0)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> sparsity = DynamicSparsity(model, optimizer, "rigl", steps=10, interval=2)
        >>> for _ in range(10):
        ...     loss = model(torch.randn(16, 8)).square().mean()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> print(sparsity)
        rigl after step 10 of 10: 3 updates, 8 of 32 weights kept (density 0.25)

    Source: Evci et al., Rigging the Lottery, ICML 2020, arXiv:1911.11134; Mocanu et al., Scalable Training of
    Artificial Neural Networks with Adaptive Sparse Connectivity, Nature Communications 2018, arXiv:1707.04780; Zhu and
    Gupta, To Prune, or Not to Prune, 2017, arXiv:1710.01878. RigL changes the masks instead of an optimizer step, ours
    after it, so that no step of a learning rate schedule is lost. SET drops the smallest positive and the largest
    negative weights at a constant rate, ours the smallest in size at RigL's.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        method: str = "rigl",
        *,
        steps: int,
        interval: int = 100,
        begin: float = 0.0,
        end: float = 0.75,
        fraction: float = 0.3,
        density: float | Mapping[str, float] | None = None,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._weights = _masked(model, optimizer)
        self._schedule = Schedule(method, steps, interval, begin, end, fraction)
        if method == "gradual" and density is None:
            raise CompressionError("method 'gradual' needs density=, the share of weights that is kept in the end.")
        if method != "gradual" and density is not None:
            raise CompressionError(
                f"method {method!r} keeps the density that the model was pruned to; leave out density={density!r}."
            )
        _refuse_second(self._weights, optimizer)
        self._optimizer = optimizer
        self._seed = seed
        self._group = group
        self.step = 0
        self.updates = 0
        kept = self._kept()
        if method != "gradual" and sum(kept.values()) == self._total:
            raise CompressionError(
                f"all {self._total:,} masked weights are kept, so none can grow; prune to a density under 1."
            )
        # What gradual pruning ranks together, and how many weights of it are kept at first and in the end.
        self._final = {} if density is None else _final_counts(self._weights, density)
        self._start = {name: kept[name] if name else sum(kept.values()) for name in self._final}
        for name, final in self._final.items():
            if final > self._start[name]:
                raise CompressionError(
                    f"density asks for {final:,} weights {f'of {name!r} ' if name else ''}in the end, but only "
                    f"{self._start[name]:,} are kept now; give a lower density, or start from prune(model, 1.0)."
                )
        self._gradients = DenseGradients(list(self._weights.values())) if method == "rigl" else None
        self._hook = optimizer.register_step_post_hook(torch.compiler.disable(self._after_step))
        self._watch()
        _ACTIVE.add(self)

    @property
    def density(self) -> float:
        """The share of the masked layers' weights that is kept now."""
        return sum(self._kept().values()) / self._total

    def remove(self) -> None:
        """Let go of the optimizer: masks stay as they are from now on."""
        _ACTIVE.discard(self)
        self._hook.remove()
        if self._gradients is not None:
            self._gradients.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what has to be saved beside the states of the model, which has the masks, and of the optimizer."""
        return {"settings": self._settings(), "step": self.step, "updates": self.updates, "start": dict(self._start)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the states of the model and of the optimizer are loaded as ever.

        Raises:
            CompressionError: it was saved with another setting.
        """
        for name, own in self._settings().items():
            if (saved := state["settings"].get(name)) != own:
                raise CompressionError(f"the state was saved with another {name}: {saved!r}, here it is {own!r}.")
        self.step, self.updates, self._start = state["step"], state["updates"], dict(state["start"])
        self._watch()

    def __repr__(self) -> str:
        kept = sum(self._kept().values())
        return (
            f"{self._schedule.method} after step {self.step:,} of {self._schedule.steps:,}: {self.updates:,} updates, "
            f"{kept:,} of {self._total:,} weights kept (density {kept / self._total:.4g})"
        )

    @property
    def _total(self) -> int:
        return sum(weight.size for weight in self._weights.values())

    def _settings(self) -> dict[str, Any]:
        return {**asdict(self._schedule), "seed": self._seed, "density": dict(self._final)}

    def _kept(self) -> dict[str, int]:
        return {name: int(_mask(weight).count_nonzero()) for name, weight in self._weights.items()}

    def _watch(self) -> None:
        if self._gradients is not None:
            if self._schedule.due(self.step + 1):
                self._gradients.open()
            else:
                self._gradients.close()

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        overflow = getattr(self._optimizer, "found_inf", None)  # fused optimizers skip a GradScaler's step themselves
        if overflow is not None and bool(overflow):
            return
        self.step += 1
        if self._schedule.due(self.step):
            if self._schedule.method == "gradual":
                self._prune()
            else:
                self._rewire()
            self.updates += 1
        self._watch()

    def _prune(self) -> None:
        """Drop the smallest weights down to what the cubic schedule keeps now."""
        kept = self._kept()
        for name, final in self._final.items():
            group = [self._weights[name]] if name else list(self._weights.values())
            now = kept[name] if name else sum(kept.values())
            surplus = max(0, now - self._schedule.kept(self.step, self._start[name], final))
            for weight, mask in zip(group, _drop(group, surplus), strict=True):
                self._set(weight, mask)

    def _rewire(self) -> None:
        """Drop the smallest weights of each layer and grow as many."""
        share = self._schedule.dropped(self.step)
        kept = self._kept()
        scores = self._gradient_sizes() if self._gradients is not None else self._random()
        for (name, weight), score in zip(self._weights.items(), scores, strict=True):
            count = int(share * kept[name])
            if count == 0 or not score.any():  # without any gradient, as in a layer that was not used, none is largest
                continue
            (mask,) = _drop([weight], count)
            mask.view(-1)[_largest(score.masked_fill_(mask, -1).reshape(-1), count)] = True
            self._set(weight, mask)

    def _random(self) -> Iterator[Tensor]:
        for index, weight in enumerate(self._weights.values()):
            digest = hashlib.sha256(f"{self._seed} {self.step} {index}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            yield torch.rand(weight.shape, generator=generator).to(weight.parameter.device)

    def _gradient_sizes(self) -> Iterator[Tensor]:
        assert self._gradients is not None
        gradients = self._gradients.take()
        owned = [weight.parameter.grad for weight in self._weights.values()]
        if all(gradient is None for gradient in gradients) and any(own is not None and own.any() for own in owned):
            raise CompressionError(
                f"no gradient of a masked weight was seen before step {self.step:,}: RigL watches the modules of the "
                "model it was given, in this process. Train that model (not through DataParallel), or use method='set'."
            )
        shared = dist.is_available() and dist.is_initialized() and dist.get_world_size(self._group) > 1
        for weight, gradient in zip(self._weights.values(), gradients, strict=True):
            total = (torch.zeros_like(weight.parameter) if gradient is None else gradient).contiguous()
            if shared:
                dist.all_reduce(total, group=self._group)
            yield torch.nan_to_num(total, nan=0.0, posinf=0.0, neginf=0.0).abs_()

    def _set(self, weight: Weight, mask: Tensor) -> None:
        """Change a mask; whatever is stored for masked or new entries becomes zero."""
        old = _mask(weight)
        unused = ~(mask & old)
        parameter = weight.parameter
        parameter.masked_fill_(unused, 0)
        for state in self._optimizer.state.get(parameter, {}).values():
            if isinstance(state, Tensor) and state.shape == parameter.shape:
                state.masked_fill_(unused, 0)
        old.copy_(mask)


def _largest(values: Tensor, count: int) -> Tensor:
    """Return where the `count` largest of many values are: `topk`, of which a sample first sorts out most values."""
    sample = values[::64]
    bound = sample.topk(min(len(sample), count // 50 + 16)).values[-1]  # a quarter more than its share
    likely = (values >= bound).nonzero().squeeze(1)
    if len(likely) < count:
        return values.topk(count, sorted=False).indices
    return likely[values[likely].topk(count, sorted=False).indices]


def _drop(group: Sequence[Weight], count: int) -> list[Tensor]:
    """Return the masks of layers without the `count` smallest weights kept now; the largest of each layer stays."""
    active = [_mask(weight).reshape(-1).nonzero().squeeze(1) for weight in group]
    sizes = [weight.parameter.detach().reshape(-1)[kept].abs() for weight, kept in zip(group, active, strict=True)]
    for size in sizes:
        if len(size):
            size[size.argmax()] = math.inf
    stays = torch.ones(sum(map(len, sizes)), dtype=torch.bool, device=sizes[0].device)
    stays[torch.cat(sizes).topk(count, largest=False, sorted=False).indices] = False
    masks = []
    for weight, kept, stay in zip(group, active, stays.split([len(size) for size in sizes]), strict=True):
        mask = torch.zeros(weight.size, dtype=torch.bool, device=kept.device)
        mask[kept[stay]] = True
        masks.append(mask.view(weight.shape))
    return masks


def _mask(weight: Weight) -> Tensor:
    mask = weight.mask
    if mask is None:
        raise CompressionError(
            f"{weight.name!r} has lost its mask; call remove() of DynamicSparsity before compress.finalize."
        )
    return mask


def _masked(model: nn.Module, optimizer: Optimizer) -> dict[str, Weight]:
    """Return the masked weights of a model, all of which the optimizer must have."""
    if not isinstance(optimizer, Optimizer):
        raise CompressionError(f"optimizer is a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):  # or torch.compile's
        model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model._orig_mod  # type: ignore[assignment]
    found = {name: weight for name, weight in weights(model).items() if weight.mask is not None}
    if not found:
        raise CompressionError(
            f"{type(model).__name__} has no masked weights; compress.prune(model, density) masks them, "
            "compress.prune(model, 1.0) without dropping any."
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, weight in found.items() if id(weight.parameter) not in held]
    if missing:
        raise CompressionError(
            f"the optimizer lacks {len(missing)} of {len(found)} masked weights, such as {missing[0]!r}; make it from "
            "the parameters of this very model (prune returns a copy unless inplace=True), or leave the layers that "
            "it does not train unmasked: prune(..., exclude=[...])."
        )
    return found


def _refuse_second(found: Mapping[str, Weight], optimizer: Optimizer) -> None:
    """Refuse an optimizer or weights whose masks another one still moves."""
    own = {id(weight.parameter) for weight in found.values()}

    def others() -> list[DynamicSparsity]:
        return [
            other
            for other in _ACTIVE
            if other.step < other._schedule.last
            and (other._optimizer is optimizer or any(id(w.parameter) in own for w in other._weights.values()))
        ]

    if others():
        gc.collect()  # one that nothing but its own optimizer holds is no more
    if left := others():
        shared = "of this optimizer" if left[0]._optimizer is optimizer else "over these masked weights"
        raise CompressionError(
            f"there is a DynamicSparsity {shared} already ({left[0]}); call .remove() on it before you make another."
        )


def _final_counts(layers: Mapping[str, Weight], density: float | Mapping[str, float]) -> dict[str, int]:
    """Return how many weights are kept in the end, by layer, or under "" of all together."""
    if not isinstance(density, Mapping):
        check_density(density)
        final = keep_count(density, total := sum(weight.size for weight in layers.values()))
        if final < len(layers):
            raise CompressionError(
                f"density={density} keeps {final} of {total:,} weights, which is less than one for each of "
                f"{len(layers)} layers; give a higher one."
            )
        return {"": final}
    for name in density:
        if name not in layers:
            raise CompressionError(f"density names {name!r}, which is no masked layer; {nearest(name, layers)}")
    if missing := [name for name in layers if name not in density]:
        raise CompressionError(f"density has no entry for {len(missing)} masked layers, such as {missing[0]!r}.")
    if isinstance(density, Densities):
        return {name: density.counts[name] for name in layers}  # exact in sum
    for name, share in density.items():
        check_density(share, f"density[{name!r}]")
    return {name: keep_count(density[name], weight.size) for name, weight in layers.items()}
