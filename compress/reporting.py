"""What a compressed model is, read back from its file: sizes, multiply-adds, measured time, and its outputs."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from compress.errors import CompressionError
from compress.layer_macs import macs
from compress.pruning import finalize
from compress.storage import load, read, save
from compress.weights import weights
from nasbench.devices import pick_device
from nasbench.profile import Latency

Example = Tensor | tuple[Tensor, ...]

MASKS_ONLY = "masks only: smaller when packed, no faster on this device"
_COUNTS = ("params", "weights", "nonzeros", "macs", "kept_macs", "bytes")
_ROUNDS = 7  # of which each times every model once


@dataclass(frozen=True)
class Report:
    """What a model is, as its file has it; made by `report`. Prints as a table.

    Attributes:
        params: parameters, dropped ones included, those that layers share once.
        weights: those of convolutions, linear layers and attention: what can be pruned.
        nonzeros: how many of these a mask keeps, or are not zero where there is no mask.
        macs: multiply-adds of one input as the kernels do them, which multiply with zeros like with other numbers.
        kept_macs: those of kept weights.
        bytes: size of the file that `compress.save` writes.
        latency: of the example's batch, with dense kernels, which are all that is used here.
        note: what must be said of these numbers, or nothing.
        baseline: the same of the model it is compared with, if one was given.
        max_difference: largest absolute difference of an output from the baseline's.
    """

    params: int
    weights: int
    nonzeros: int
    macs: int
    kept_macs: int
    bytes: int
    latency: Latency
    note: str = ""
    baseline: Report | None = None
    max_difference: float | None = None

    @property
    def density(self) -> float:
        """Share of the weights that is kept."""
        return self.nonzeros / self.weights

    def to_dict(self) -> dict[str, int | float | str]:
        """Return the numbers by name; those of the baseline begin with ``baseline_``."""
        own: dict[str, int | float | str] = {name: getattr(self, name) for name in (*_COUNTS, "density")}
        own |= {"latency_ms": self.latency.median_ms, "latency_iqr_ms": self.latency.iqr_ms, "note": self.note}
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
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        if self.max_difference is not None:
            lines.append(f"largest difference of an output: {self.max_difference:.3g}")
        time = self.latency
        lines.append(
            f"latency: dense kernels, batch {time.batch}, {time.device}, {time.threads} "
            f"thread{'s' if time.threads > 1 else ''}, median of {time.repeats} timings, the middle half "
            "within so many ms"
        )
        return "\n".join([*lines, *([self.note] if self.note else [])])


def report(
    source: str | Path | nn.Module,
    *,
    example: Example,
    baseline: nn.Module | None = None,
    device: str | torch.device = "cpu",
    min_seconds: float = 0.2,
) -> Report:
    """Return what a compressed model is: read from its file, run on an example, and compared with the original.

    A module is saved to a temporary file first, and so is the baseline: all sizes are those of files. Both models are
    timed in turns, in evaluation mode, on as many threads as torch now uses.

    Args:
        source: a file that `compress.save` wrote, or a module.
        example: a batch, (N, ...); a tuple for a model that takes several inputs.
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
    inputs = example if isinstance(example, tuple) else (example,)
    if not inputs or not all(isinstance(x, Tensor) and x.ndim > 0 and len(x) > 0 for x in inputs):
        raise CompressionError(f"example is a batch of inputs, (N, ...), or a tuple of such, got {example!r}.")
    if not min_seconds > 0:
        raise CompressionError(f"latency is measured for more than 0 seconds, got min_seconds={min_seconds!r}.")
    place = pick_device(device)
    with tempfile.TemporaryDirectory() as folder:
        path = save(source, Path(folder) / "model.safetensors") if isinstance(source, nn.Module) else Path(source)
        model = load(path, source if isinstance(source, nn.Module) else baseline).eval()
        packed = any(stored.mask is not None or stored.encoding != "dense" for stored in read(path)[0].values())
        models, sizes = [model], [path.stat().st_size]
        if baseline is not None:
            models.append(copy.deepcopy(baseline).eval())
            sizes.append(save(baseline, Path(folder) / "baseline.safetensors").stat().st_size)
    difference = _difference(*(_outputs(one, inputs) for one in models)) if baseline is not None else None
    times = _times(models, inputs, place, min_seconds)
    parts = [_counted(*each, inputs) for each in zip(models, sizes, times, strict=True)]
    other = Report(**parts[1]) if baseline is not None else None
    note = MASKS_ONLY if packed else ""
    if packed and other is not None and parts[0]["macs"] < other.macs:
        note = "masks: smaller when packed, no faster on this device; what is faster is so for its smaller layers"
    return Report(**parts[0], note=note, baseline=other, max_difference=difference)


def _counted(model: nn.Module, size: int, latency: Latency, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    found = {id(weight.parameter): weight for weight in weights(model).values()}.values()
    one = tuple(x[:1].cpu() for x in inputs)
    counted = macs(model.cpu(), one)
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "weights": sum(weight.size for weight in found),
        "nonzeros": sum(int((w.parameter if w.mask is None else w.mask).count_nonzero()) for w in found),
        "macs": counted.dense,
        "kept_macs": counted.sparse,
        "bytes": size,
        "latency": latency,
    }


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    twin = copy.deepcopy(model).cpu()
    try:
        with torch.no_grad():
            return [x for x in tree_leaves(twin(*(x.cpu() for x in inputs))) if isinstance(x, Tensor)]
    except Exception as error:
        shapes = ", ".join(" x ".join(map(str, x.shape)) for x in inputs)
        raise CompressionError(f"the model does not take an example of {shapes}: {error}") from error


def _difference(outputs: list[Tensor], wanted: list[Tensor]) -> float:
    shapes = [tuple(x.shape) for x in outputs], [tuple(x.shape) for x in wanted]
    if shapes[0] != shapes[1]:
        raise CompressionError(f"the model gives outputs of shapes {shapes[0]}, the baseline {shapes[1]}.")
    pairs = zip(outputs, wanted, strict=True)
    return max((float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel()), default=0.0)


def _times(
    models: list[nn.Module], inputs: tuple[Tensor, ...], device: torch.device, min_seconds: float
) -> list[Latency]:
    """Time the models in turns, so that what else the machine does is the same for all; masks are multiplied in before.

    Images and image models are in the channels-last layout that our data and training have.
    """
    from torch.utils.benchmark import Measurement, Timer  # which load torch's C++ compiler driver

    wait = {"cuda": "; torch.cuda.synchronize()", "mps": "; torch.mps.synchronize()"}.get(device.type, "")
    threads = torch.get_num_threads()
    placed = tree_map(lambda x: _channels_last(x.to(device)), inputs)
    with torch.inference_mode():
        timers = []
        for model in models:
            twin = finalize(model).to(device)
            twin = twin.to(memory_format=torch.channels_last) if any(x.ndim == 4 for x in inputs) else twin
            names = {"model": twin, "inputs": placed, "torch": torch}
            timers.append(Timer(f"model(*inputs){wait}", globals=names, num_threads=threads))
        # A first call of each warms up; then as many calls a round as fill its share of the time.
        calls = [_calls(timer, min_seconds / _ROUNDS) for timer in timers]
        rounds = [[timer.timeit(number) for timer, number in zip(timers, calls, strict=True)] for _ in range(_ROUNDS)]
    merged = [Measurement.merge(taken)[0] for taken in zip(*rounds, strict=True)]
    return [
        Latency(
            median_ms=taken.median * 1e3,
            iqr_ms=taken.iqr * 1e3,
            repeats=len(taken.times),
            threads=threads,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            batch=len(inputs[0]),
        )
        for taken in merged
    ]


def _calls(timer: Any, seconds: float) -> int:
    timer.timeit(1)
    once: float = timer.timeit(1).median
    return max(1, round(seconds / max(once, 1e-9)))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def _figures(report: Report) -> dict[str, tuple[str, float]]:
    """Return a report's rows, as text and as numbers."""
    time = report.latency
    counts = {name: (f"{getattr(report, name):,}", float(getattr(report, name))) for name in _COUNTS}
    return counts | {
        "density": (f"{report.density:.4f}", report.density),
        "latency": (f"{time.median_ms:.3g} ms within {time.iqr_ms:.2g}", time.median_ms),
    }
