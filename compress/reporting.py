"""What a compressed model is, read back from its file: sizes, multiply-adds, measured time, and its outputs."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.errors import CompressionError
from compress.layer_macs import macs
from compress.models import copy_of, outputs_of
from compress.pruning import finalize
from compress.storage import load, read, save, unwrapped
from compress.tables import aligned
from compress.weights import weights
from nasbench.devices import pick_device
from nasbench.profile import Latency

Example = Tensor | tuple[Tensor, ...]

_NO_FASTER = "smaller when packed, no faster on this device"
_COUNTS = ("params", "weights", "nonzeros", "bytes", "macs", "kept_macs")
_ROUNDS = 7  # of which each times every model once


@dataclass(frozen=True)
class Report:
    """What a model is, as its file has it; made by `report`. Prints as a table.

    The ratio of two latencies is "noisy" where the spread of one is more than half of its median.

    Attributes:
        params: parameters, dropped ones included, those that layers share once.
        weights: those of convolutions, linear layers and attention: what can be pruned.
        nonzeros: how many of these a mask keeps, or are not zero where there is no mask.
        bytes: size of the file that `compress.save` writes.
        macs: multiply-adds of one input as the kernels do them, which multiply with zeros like with other numbers;
            None without an example.
        kept_macs: those of kept weights.
        latency: of the example's batch, with dense kernels, which are all that is used here.
        note: what must be said of masks, or of weights most of which are zero; else nothing.
        baseline: the same of the model it is compared with, if one was given.
        max_difference: largest absolute difference of an output from the baseline's.
    """

    params: int
    weights: int
    nonzeros: int
    bytes: int
    macs: int | None = None
    kept_macs: int | None = None
    latency: Latency | None = None
    note: str = ""
    baseline: Report | None = None
    max_difference: float | None = None

    @property
    def density(self) -> float:
        """Share of the weights that is kept."""
        return self.nonzeros / self.weights

    def to_dict(self) -> dict[str, int | float | str]:
        """Return the numbers by name; those of the baseline begin with ``baseline_``."""
        named = {name: getattr(self, name) for name in (*_COUNTS, "density")} | {"note": self.note}
        if self.latency is not None:
            named |= {"latency_ms": self.latency.median_ms, "latency_iqr_ms": self.latency.iqr_ms}
        own = {name: value for name, value in named.items() if value is not None}
        if self.baseline is None:
            return own
        own |= {f"baseline_{name}": value for name, value in self.baseline.to_dict().items() if name != "note"}
        return own | ({} if self.max_difference is None else {"max_difference": self.max_difference})

    def __str__(self) -> str:
        rows = [["", "model"], *([name, text] for name, (text, _) in _figures(self).items())]
        if self.baseline is not None:
            old = _figures(self.baseline)
            rows[0] += ["baseline", "ratio"]
            for row, (_, number) in zip(rows[1:], _figures(self).values(), strict=True):
                text, before = old[row[0]]
                row += [text, f"{number / before:.4f}" if before else ""]
            if self.latency is not None and self.baseline.latency is not None:
                rows[-1][-1] = _latency_ratio(self.latency, self.baseline.latency)
        lines = [aligned(rows)]
        if self.max_difference is not None:
            lines.append(f"largest difference of an output: {self.max_difference:.3g}")
        if (took := self.latency) is not None:
            lines.append(
                f"latency: dense kernels, batch {took.batch}, {took.device}, {took.threads} "
                f"thread{'s' if took.threads > 1 else ''}, median of {took.repeats} timings, the middle half "
                "within so many ms"
            )
        return "\n".join([*lines, *([self.note] if self.note else [])])


def report(
    source: str | Path | nn.Module,
    *,
    example: Example | None = None,
    baseline: nn.Module | None = None,
    device: str | torch.device = "cpu",
    min_seconds: float = 0.2,
) -> Report:
    """Return what a compressed model is: read from its file, run on an example, and compared with the original.

    A module is saved to a temporary file first, and so is the baseline: all sizes are those of files. Both models are
    timed in turns, in evaluation mode, on as many threads as torch now uses.

    Args:
        source: a file that `compress.save` wrote, or a module, which torch.compile or data parallelism may wrap.
        example: a batch, (N, ...); a tuple for a model that takes several inputs. Without one nothing is run, and only
            the sizes are reported.
        baseline: the original network. A file that names no network of our spaces needs it, to be loaded into.
        device: where the models are timed.
        min_seconds: for how long each is timed.

    Raises:
        CompressionError: the file cannot be loaded, the model does not take the example, has no weights, or gives
            outputs of other shapes than the baseline.
        SettingError: there is no such device.

    Example:
        >>> from compress.pruning import prune
        >>> net = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))
        >>> result = report(prune(net, 0.1), example=torch.rand(8, 64), baseline=net, min_seconds=0.01)
        >>> result.weights, result.nonzeros, result.kept_macs
        (14800, 1480, 1480)
        >>> result.note
        'masks only: smaller when packed, no faster on this device'
    """
    inputs: tuple[Tensor, ...] = () if example is None else example if isinstance(example, tuple) else (example,)
    if example is not None and not (inputs and all(isinstance(x, Tensor) and x.ndim and len(x) for x in inputs)):
        raise CompressionError(f"example is a batch of inputs, (N, ...), or a tuple of such, got {example!r}.")
    if not min_seconds > 0:
        raise CompressionError(f"latency is measured for more than 0 seconds, got min_seconds={min_seconds!r}.")
    place = pick_device(device)
    with tempfile.TemporaryDirectory() as folder:
        path = save(source, Path(folder) / "model.safetensors") if isinstance(source, nn.Module) else Path(source)
        stored, origin = read(path)
        home = source if isinstance(source, nn.Module) else baseline
        if home is None and origin is None:
            raise CompressionError(
                f"{path} names no network of our spaces: compress.report(path, baseline=network) needs the original."
            )
        models = [load(path, home).cpu().eval()]
        masked = any(one.mask is not None and not one.mask.all() for one in stored.values())
        sizes = [path.stat().st_size]
        if baseline is not None:
            models.append(copy_of(unwrapped(baseline)).cpu().eval())
            sizes.append(save(baseline, Path(folder) / "baseline.safetensors").stat().st_size)
    figures = [_sizes(model) | {"bytes": size} for model, size in zip(models, sizes, strict=True)]
    difference = None
    if example is not None:
        inputs = tuple(x.detach().cpu() for x in inputs)
        outputs = [outputs_of(model, inputs) for model in models]
        if baseline is not None:
            difference = _difference(*outputs)
        for own, model, latency in zip(figures, models, _times(models, inputs, place, min_seconds), strict=True):
            counted = macs(model, inputs)
            own |= {"macs": counted.dense, "kept_macs": counted.sparse, "latency": latency}
    other = Report(**figures[1]) if baseline is not None else None
    kind = "masks" if masked else "zeros" if 2 * figures[0]["nonzeros"] <= figures[0]["weights"] else ""
    note = f"{kind} only: {_NO_FASTER}" if kind else ""
    if kind and other is not None and figures[0]["params"] < other.params:
        note = f"{kind}: {_NO_FASTER}; what is faster is so for its smaller layers"
    return Report(**figures[0], note=note, baseline=other, max_difference=difference)


def _sizes(model: nn.Module) -> dict[str, Any]:
    found = {id(weight.parameter): weight for weight in weights(model).values()}.values()
    if not found:
        raise CompressionError(f"{type(model).__name__} has no convolution, linear layer or attention to report on.")
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "weights": sum(weight.size for weight in found),
        "nonzeros": sum(int((w.parameter if w.mask is None else w.mask).count_nonzero()) for w in found),
    }


def _difference(outputs: list[Tensor], wanted: list[Tensor]) -> float:
    shapes = [tuple(x.shape) for x in outputs], [tuple(x.shape) for x in wanted]
    if shapes[0] != shapes[1]:
        raise CompressionError(f"the model gives outputs of shapes {shapes[0]}, the baseline {shapes[1]}.")
    flat = [torch.cat([x.double().flatten() for x in xs]) if xs else torch.zeros(0) for xs in (outputs, wanted)]
    return float((flat[0] - flat[1]).abs().max()) if flat[0].numel() else 0.0


def _times(
    models: list[nn.Module], inputs: tuple[Tensor, ...], device: torch.device, min_seconds: float
) -> list[Latency]:
    """Time the models in turns, so that what else the machine does is the same for all; masks are multiplied in before.

    Images and image models are in the channels-last layout that our data and training have.
    """
    placed = tuple(_channels_last(x.to(device)) for x in inputs)
    twins = [finalize(model).to(device) for model in models]
    if any(x.ndim == 4 for x in inputs):
        twins = [twin.to(memory_format=torch.channels_last) for twin in twins]
    for twin in twins:  # warms up
        _seconds(twin, placed, 1)
    calls = [max(1, round(min_seconds / _ROUNDS / _seconds(twin, placed, 1))) for twin in twins]
    rounds = [[_seconds(twin, placed, count) for twin, count in zip(twins, calls, strict=True)] for _ in range(_ROUNDS)]
    low, median, high = np.percentile(rounds, (25, 50, 75), axis=0) * 1e3
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return [
        Latency(float(median[i]), float(high[i] - low[i]), _ROUNDS, torch.get_num_threads(), name, len(inputs[0]))
        for i in range(len(models))
    ]


@torch.inference_mode()
def _seconds(model: nn.Module, inputs: tuple[Tensor, ...], calls: int) -> float:
    """Return the mean time of so many calls; on a GPU each is waited for."""
    kind = inputs[0].device.type
    start = time.perf_counter()
    for _ in range(calls):
        model(*inputs)
        if kind != "cpu":
            torch.accelerator.synchronize()
    return (time.perf_counter() - start) / calls


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def _latency_ratio(own: Latency, other: Latency) -> str:
    noisy = any(took.iqr_ms > took.median_ms / 2 for took in (own, other))
    return "noisy" if noisy else f"{own.median_ms / other.median_ms:.2f}"


def _figures(report: Report) -> dict[str, tuple[str, float]]:
    """Return a report's rows, as text and as numbers."""
    numbers = {name: getattr(report, name) for name in _COUNTS}
    rows = {name: (f"{number:,}", float(number)) for name, number in numbers.items() if number is not None}
    rows["density"] = f"{report.density:.4f}", report.density
    if (took := report.latency) is not None:
        rows["latency"] = f"{took.median_ms:.3g} ms within {took.iqr_ms:.2g}", took.median_ms
    return rows
