"""What a network costs before anyone trains it: parameters, multiply-adds, bytes, memory, latency."""

from __future__ import annotations

import copy
import traceback
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from nasbench.devices import pick_device
from nasbench.errors import SettingError

_REPEATS = 5  # fewest timings: the spread of fewer says nothing


def _attention_flops(queries: Sequence[int], keys: Sequence[int], values: Sequence[int], *_: Any, **__: Any) -> int:
    """Return two operations for every multiply-add of both matrix products, whatever a mask hides."""
    batch, heads, length, width = queries
    return 2 * batch * heads * length * keys[2] * (width + values[3])


_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}  # which torch lacks


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward, and the conditions without which they mean nothing."""

    median_ms: float
    iqr_ms: float  # spread: the middle half of the timings lies within so many milliseconds
    repeats: int  # timings taken; of a fast network, each is the mean of several forwards
    threads: int
    device: str
    batch: int

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return (
            f"{self.median_ms:.3g} ms, middle half within {self.iqr_ms:.2g} ms "
            f"(batch {self.batch}, {self.device}, {threads}, {self.repeats} repeats)"
        )


@dataclass(frozen=True)
class Profile:
    """What one network costs, for one image or one text but for `latency`, which is of a batch."""

    params: int
    macs: int  # multiply-adds of one forward: a 3x3 convolution of c to k channels on h x w pixels has 9*c*k*h*w
    bytes: int  # parameters and buffers, as they are stored
    peak_bytes: int  # most activation memory alive at once in one forward, the input included and the weights not
    uncounted: tuple[str, ...]  # operators of the forward that `macs` knows no formula for, views left out
    latency: Latency | None = None

    def to_dict(self) -> dict[str, int | float]:
        """Return the numbers by metric name; ``latency_ms`` is among them if it was measured."""
        numbers = {name: getattr(self, name) for name in ("params", "macs", "bytes", "peak_bytes")}
        return numbers | ({"latency_ms": self.latency.median_ms} if self.latency else {})

    def __str__(self) -> str:
        rows = {
            "params": f"{self.params:,}",
            "macs": f"{self.macs:,}",
            "bytes": f"{self.bytes:,}",
            "peak_bytes": f"{self.peak_bytes:,}",
            "latency": str(self.latency) if self.latency else "not measured",
            "uncounted": ", ".join(self.uncounted) or "nothing",
        }
        return "\n".join(f"{name:<12}{value}" for name, value in rows.items())


def measure(
    model: nn.Module,
    shape: Sequence[int],
    *,
    batch: int = 1,
    latency: bool = False,
    device: str | torch.device = "cpu",
    min_seconds: float = 0.2,
) -> Profile:
    """Return what a network costs on inputs of `shape`, in evaluation mode.

    One input goes through a copy of the model on the CPU; the model itself, its mode, its buffers and torch's random
    state stay as they are. Attention counts its two matrix products in full, also where a mask hides a part of them.

    Args:
        shape: (channels, height, width) of images, or (length,) of texts: int64 tokens.
        batch, device, min_seconds: those of `latency`, used only if it is asked for.

    Raises:
        SettingError: the network does not take inputs of this shape, and which layer says so; or no such device.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
        >>> print(measure(net, (3, 4, 4)))
        params      1,514
        macs        4,736
        bytes       6,056
        peak_bytes  1,216
        latency     not measured
        uncounted   relu
    """
    _check_shape(shape)
    timed = _time(model, shape, batch, device, min_seconds) if latency else None
    with _unseen():
        twin = copy.deepcopy(model).cpu().eval()
        x = zeros(1, shape)
        watch = Watch(x)
        with watch:  # entered first, so that it sees the very operators that the counter looks up
            macs = _macs(twin, x)
    stored = {id(t): t for t in twin.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}  # shared ones once
    return Profile(
        params=sum(p.numel() for p in twin.parameters()),
        macs=macs,
        bytes=sum(t.numel() * t.element_size() for t in stored.values()),
        peak_bytes=max(watch.sums),
        uncounted=tuple(sorted(watch.uncounted)),
        latency=timed,
    )


def count(build: Callable[[], nn.Module], shape: Sequence[int]) -> dict[str, int]:
    """Return ``{"params": ..., "macs": ...}`` of the network that `build` makes, without its memory or arithmetic.

    The network is built and run on torch's ``meta`` device, which knows shapes only: one too large for this machine is
    counted like any other. A network that needs real numbers (one that calls ``.item()``, say) is built for real. See
    `measure` for `shape`.

    Raises:
        SettingError: the network does not take inputs of this shape, and which layer says so.

    Example:
        >>> from search_spaces import NASBench201
        >>> space = NASBench201(classes=10, in_channels=3)
        >>> arch = space.parse("|skip_connect~0|+|none~0|nor_conv_3x3~1|+|none~0|none~1|nor_conv_1x1~2|")
        >>> count(lambda: space.build(arch), (3, 32, 32))
        {'params': 344346, 'macs': 47104640}
    """
    _check_shape(shape)
    try:
        with torch.device("meta"):
            return _count(build, shape, "meta")
    except (RuntimeError, TypeError, SettingError):  # numbers were needed, or the error will come again
        return _count(build, shape, "cpu")


def latency(
    model: nn.Module,
    shape: Sequence[int],
    *,
    batch: int = 1,
    device: str | torch.device = "cpu",
    min_seconds: float = 0.2,
) -> Latency:
    """Return how long one forward of `batch` inputs takes, in evaluation mode, on as many threads as torch now uses.

    A copy of the model is timed on `device` after a warm-up, with the channels-last layout that our data and training
    have, for at least `min_seconds` and five times. On a GPU each forward is waited for. See `measure` for `shape`.

    Raises:
        SettingError: the network does not take such a batch, or there is no such device.

    Example:
        >>> result = latency(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), (1, 8, 8), batch=4, min_seconds=0.01)
        >>> result.median_ms > 0, result.device, result.batch
        (True, 'cpu', 4)
    """
    _check_shape(shape)
    return _time(model, shape, batch, device, min_seconds)


def _time(
    model: nn.Module, shape: Sequence[int], batch: int, device: str | torch.device, min_seconds: float
) -> Latency:
    from torch.utils.benchmark import Measurement, Timer  # which load torch's C++ compiler driver

    if not (isinstance(batch, int) and batch > 0):
        raise SettingError(f"latency is measured on batches of 1 image or more, got batch={batch!r}.")
    if not min_seconds > 0:
        raise SettingError(f"latency is measured for more than 0 seconds, got min_seconds={min_seconds!r}.")
    place = pick_device(device)
    threads = torch.get_num_threads()
    with _unseen(place), torch.inference_mode():
        twin = copy.deepcopy(model).to(place).to(memory_format=torch.channels_last).eval()
        x = zeros(batch, shape, place, channels_last=True)
        _forward(twin, x)
        # Timer itself waits for a GPU only after many forwards, and counts them as if they ran one by one.
        wait = {"cuda": "; torch.cuda.synchronize(x.device)", "mps": "; torch.mps.synchronize()"}.get(place.type, "")
        timer = Timer(f"model(x){wait}", globals={"model": twin, "x": x, "torch": torch}, num_threads=threads)
        first = timer.blocked_autorange(min_run_time=min_seconds)
        more = [timer.timeit(first.number_per_run) for _ in range(len(first.times), _REPEATS)]
        (timings,) = Measurement.merge([first, *more])
    return Latency(
        median_ms=timings.median * 1e3,
        iqr_ms=timings.iqr * 1e3,
        repeats=len(timings.times),
        threads=threads,
        device=torch.cuda.get_device_name(place) if place.type == "cuda" else str(place),
        batch=batch,
    )


def _count(build: Callable[[], nn.Module], shape: Sequence[int], device: str) -> dict[str, int]:
    with _unseen():
        model = build().eval()
        with _Remember():
            macs = _macs(model, zeros(1, shape, device))
        return {"params": sum(p.numel() for p in model.parameters()), "macs": macs}


def zeros(
    count: int, shape: Sequence[int], device: str | torch.device = "cpu", *, channels_last: bool = False
) -> Tensor:
    """Return a batch of zeros as a network takes it: images of this shape, or of a text (T,) int64 tokens.

    Args:
        channels_last: the memory format of images.

    Example:
        >>> zeros(2, (3, 8, 8)).shape, zeros(2, (64,)).shape, zeros(2, (64,)).dtype
        (torch.Size([2, 3, 8, 8]), torch.Size([2, 64]), torch.int64)
    """
    if len(shape) == 1:
        return torch.zeros(count, *shape, dtype=torch.int64, device=device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.zeros(count, *shape, device=device).contiguous(memory_format=layout)


def _macs(model: nn.Module, x: Tensor) -> int:
    """Run one input through the model; torch's counter takes a multiply-add for two operations."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention has no formula
    try:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
            _forward(model, x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops()) // 2


def _forward(model: nn.Module, x: Tensor) -> None:
    try:
        model(x)
    except Exception as error:
        names = {id(module): name for name, module in model.named_modules() if name}
        frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        layers = [f"layer {names[id(m)]!r} ({type(m).__name__})" for m in frames if id(m) in names]
        where = layers[-1] if layers else f"the {type(model).__name__} itself"
        size = " x ".join(map(str, x.shape))
        axes = "batch x length" if x.ndim == 2 else "batch x channels x height x width"
        raise SettingError(
            f"the network does not take a batch of {size} ({axes}): {where} says "
            f"{str(error).strip()!r}. Give the shape of the data it was built for, or build it for this one."
        ) from error


class Watch(TorchDispatchMode):
    """Sees every operator of a pass: which have no formula, and how much memory of activations is alive at most."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uncounted: set[str] = set()
        self._alive: dict[int, int] = {}
        self._sum = 0
        self._count(_storages(x).values())
        self.sums = [self._sum]  # bytes alive at first, and after each operator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func._overloadpacket).removeprefix("aten.")
        counted = func._overloadpacket in flop_registry or func._overloadpacket in _FORMULAS
        if not (counted or func.is_view or name.startswith("empty")):
            self.uncounted.add(name)
        given = _storages(args, kwargs)  # a view or an in-place result is no new memory
        self._count(storage for key, storage in _storages(out).items() if key not in given)
        self.sums.append(self._sum)
        return out

    def _count(self, storages: Iterable[UntypedStorage]) -> None:
        for storage in storages:
            if (key := storage._cdata) not in self._alive:
                self._alive[key] = storage.nbytes()
                self._sum += storage.nbytes()
                weakref.finalize(storage, self._forget, key).atexit = False  # called when its memory is freed

    def _forget(self, key: int) -> None:
        self._sum -= self._alive.pop(key, 0)


def _storages(*values: Any) -> dict[int, UntypedStorage]:
    """Return the memory behind all tensors in these values, by its address."""
    found = (tensor.untyped_storage() for tensor in tree_leaves(values) if isinstance(tensor, Tensor))
    return {storage._cdata: storage for storage in found}


class _Remember(TorchDispatchMode):
    """Asks each operator once per shape on the meta device, where one answer is as good as another.

    Most of torch's shape rules are slow Python; a network repeats few of them many times.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._answers: dict[Any, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        real = any(isinstance(value, Tensor) and not value.is_meta for value in tree_leaves(args))
        if real or kwargs or func.is_view or func._schema.is_mutable:
            return func(*args, **(kwargs or {}))
        question = func, _described(args)
        if question not in self._answers:
            self._answers[question] = func(*args)
        return self._answers[question]


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return type(value), value


def _check_shape(shape: Sequence[int]) -> None:
    if not (isinstance(shape, Sequence) and len(shape) in (1, 3) and all(isinstance(n, int) and n > 0 for n in shape)):
        raise SettingError(
            f"a network is measured on texts of (length,) or images of (channels, height, width), got shape={shape!r}."
        )


def _unseen(device: torch.device | None = None) -> AbstractContextManager[None]:
    """Leave torch's random state as it was, on the CPU and this device."""
    return torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else [])
