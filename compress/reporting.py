"""What compressed models are, read back from their files: sizes, multiply-adds, measured time, accuracy, outputs."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor, nn

from compress.errors import CompressionError
from compress.subjects import Source, Subject, compare_outputs, measure, score, subject_of
from compress.tables import aligned
from nasbench.data import Data
from nasbench.devices import pick_device
from nasbench.profile import Latency

if TYPE_CHECKING:
    from compress.comparison import Comparison

Example = Tensor | tuple[Tensor, ...]

BASELINE = "baseline"
"""The name of the original among many."""
_COUNTS = ("params", "weights", "nonzeros", "bytes", "macs", "kept_macs")
_SHARES = ("density", "bits_per_weight", "val_accuracy")


@dataclass(frozen=True)
class Report:
    """What a model is, as its file has it; made by `report`. Prints as a table.

    The ratio of two latencies is "noisy" where the spread of one is more than half of its median.

    Attributes:
        params: parameters, dropped ones included, those that layers share once; like all counts but bytes, None of a
            deployed network.
        weights: those of convolutions, linear layers and attention: what can be compressed.
        nonzeros: how many of these a mask keeps, or are not zero where there is no mask.
        bytes: size of the file that `compress.save` writes, or of the deployed network's.
        macs: multiply-adds of one input as the kernels do them, which multiply with zeros like with other numbers;
            None without an example.
        kept_macs: those of kept weights.
        latency: of the example's batch, in the runtime, with dense kernels, which are all that is used here.
        note: what must be said of masks, of weights most of which are zero, and of few bits; else nothing.
        baseline: the same of the model it is compared with, if one was given.
        max_difference: largest absolute difference of an output from the baseline's.
        bits_per_weight: of the file, for each of the weights: values or codes, masks and scales, not the header.
        val_accuracy: on validation images, if data were given.
        runtime: what ran it: "torch" or "onnxruntime".
    """

    params: int | None
    weights: int | None
    nonzeros: int | None
    bytes: int
    macs: int | None = None
    kept_macs: int | None = None
    latency: Latency | None = None
    note: str = ""
    baseline: Report | None = None
    max_difference: float | None = None
    bits_per_weight: float | None = None
    val_accuracy: float | None = None
    runtime: str = "torch"

    @property
    def density(self) -> float | None:
        """Share of the weights that is kept."""
        return self.nonzeros / self.weights if self.nonzeros is not None and self.weights else None

    def to_dict(self) -> dict[str, int | float | str]:
        """Return the numbers by name; those of the baseline begin with ``baseline_``."""
        named = {name: getattr(self, name) for name in (*_COUNTS, *_SHARES)}
        named |= {"note": self.note, "runtime": self.runtime}
        if self.latency is not None:
            named |= {"latency_ms": self.latency.median_ms, "latency_iqr_ms": self.latency.iqr_ms}
        named["max_difference"] = self.max_difference
        own = {name: value for name, value in named.items() if value is not None}
        old = {} if self.baseline is None else self.baseline.to_dict()
        return own | {f"baseline_{name}": value for name, value in old.items() if name not in ("note", "runtime")}

    def __str__(self) -> str:
        rows = [["", "model"], *([name, text] for name, (text, _) in _figures(self).items())]
        if self.baseline is not None:
            rows[0] += ["baseline", "ratio"]
            old = _figures(self.baseline)
            for row, (_, number) in zip(rows[1:], _figures(self).values(), strict=True):
                text, before = old.get(row[0], ("", 0.0))
                row += [text, f"{number / before:.4f}" if before else ""]
            if self.latency is not None and self.baseline.latency is not None:
                rows[-1][-1] = _latency_ratio(self.latency, self.baseline.latency)
        lines = [aligned(rows)]
        if self.max_difference is not None:
            lines.append(f"largest difference of an output: {self.max_difference:.3g}")
        if self.latency is not None:
            lines.append(conditions(self.latency, self.runtime))
        return "\n".join([*lines, *([self.note] if self.note else [])])


def conditions(took: Latency, runtime: str) -> str:
    """Return under what conditions latencies were taken."""
    kernels = "dense kernels" if runtime == "torch" else f"{runtime}, as deployed"
    return (
        f"latency: {kernels}, batch {took.batch}, {took.device}, {took.threads} "
        f"thread{'s' if took.threads > 1 else ''}, median of {took.repeats} timings, the middle half within so many ms"
    )


@overload
def report(
    source: Source,
    *,
    example: Example | None = None,
    baseline: nn.Module | None = None,
    data: Data | None = None,
    device: str | torch.device = "cpu",
    min_seconds: float = 0.2,
) -> Report: ...
@overload
def report(
    source: list[Source] | tuple[Source, ...] | Mapping[str, Source],
    *,
    example: Example | None = None,
    baseline: nn.Module | None = None,
    data: Data | None = None,
    device: str | torch.device = "cpu",
    min_seconds: float = 0.2,
) -> Comparison: ...
def report(
    source: Source | list[Source] | tuple[Source, ...] | Mapping[str, Source],
    *,
    example: Example | None = None,
    baseline: nn.Module | None = None,
    data: Data | None = None,
    device: str | torch.device = "cpu",
    min_seconds: float = 0.2,
) -> Report | Comparison:
    """Return what compressed models are: read from their files, run on an example, and compared with the original.

    A module is saved to a temporary file first, and so is the baseline: all sizes are those of files. All models are
    timed in turns, in evaluation mode, on as many threads as torch now uses. Deployed networks are timed as deployed:
    by onnxruntime, on the CPU, on as many threads as it was given.

    Args:
        source: a file that `compress.save` wrote; a module, which torch.compile or data parallelism may wrap; or a
            network that `compress.to_int8` deployed, or its ".onnx" file. Several of them, as a sequence or by name,
            give one table of all.
        example: a batch, (N, ...); a tuple for a model that takes several inputs. Without one nothing is timed, and the
            sizes are reported.
        baseline: the original network. A file that names no network of our spaces needs it, to be loaded into.
        data: whose validation images all are scored on, on the CPU.
        device: where torch's models are timed.
        min_seconds: for how long each is timed.

    Raises:
        CompressionError: an argument is of another kind, there is no source, a file cannot be loaded, a model does not
            take the example, has no weights, or gives outputs of other shapes than the baseline.
        SettingError: there is no such device.
        ImportError: a deployed network needs the packages of the extra `deploy`.

    Example:
        >>> from compress.pruning import prune
        >>> net = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))
        >>> result = report(prune(net, 0.1), example=torch.rand(8, 64), baseline=net, min_seconds=0.01)
        >>> result.weights, result.nonzeros, result.kept_macs
        (14800, 1480, 1480)
        >>> result.note
        'masks only: smaller when packed, no faster on this device'
        >>> both = report([prune(net, 0.1), prune(net, 0.5)], baseline=net)
        >>> [(name, found.nonzeros) for name, found in both.reports.items()]
        [('baseline', 14800), ('Sequential', 1480), ('Sequential 2', 7400)]
    """
    inputs: tuple[Tensor, ...] = () if example is None else example if isinstance(example, tuple) else (example,)
    if example is not None and not (inputs and all(isinstance(x, Tensor) and x.ndim and len(x) for x in inputs)):
        given = ", ".join(
            f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__ for x in inputs
        )
        raise CompressionError(
            f"example is a batch of inputs, a tensor (N, ...), or a tuple of such, got {given or 'an empty tuple'}."
        )
    if not isinstance(baseline, nn.Module | None):
        raise CompressionError(
            f"baseline is the original network, a module, got {type(baseline).__name__}. Build it; a file of "
            "compress.save is read by compress.load."
        )
    if not isinstance(data, Data | None):
        raise CompressionError(f"data is what nasbench.data.load returns, got {type(data).__name__}.")
    if not min_seconds > 0:
        raise CompressionError(f"latency is measured for more than 0 seconds, got min_seconds={min_seconds!r}.")
    place = pick_device(device)
    many = isinstance(source, Mapping | list | tuple)
    sources = _named(source) if isinstance(source, Mapping | list | tuple) else {"the model": source}
    with tempfile.TemporaryDirectory() as folder:
        subjects = {name: subject_of(name, one, baseline, Path(folder)) for name, one in sources.items()}
        original = None if baseline is None else subject_of("the baseline", baseline, None, Path(folder))
    everything = [*([] if original is None else [original]), *subjects.values()]
    if example is not None:
        measure(everything, inputs, place, min_seconds)
    for subject in subjects.values():
        if original is not None and example is not None:
            compare_outputs(subject, original)
    if data is not None:
        for subject in everything:
            score(subject, data)
    old = None if original is None else Report(**original.figures, runtime=original.runtime)
    if not many:
        (subject,) = subjects.values()
        return _reported(subject, original, old)
    from compress.comparison import Comparison

    reports = {} if old is None else {BASELINE: old}
    return Comparison(reports | {name: _reported(one, original, None) for name, one in subjects.items()})


def _reported(subject: Subject, original: Subject | None, baseline: Report | None) -> Report:
    note = ""
    if subject.savings:
        what = " and ".join(subject.savings)
        said = "smaller when packed, no faster on this device"
        if "few bits" in subject.savings:
            said = "smaller when packed, computed in float32, no faster on this device"
        note = f"{what} only: {said}"
        before = None if original is None else original.figures["params"]
        if before is not None and subject.figures["params"] < before:
            note = f"{what}: {said}; what is faster is so for its smaller layers"
    return Report(**subject.figures, note=note, baseline=baseline, runtime=subject.runtime)


def _named(sources: list[Source] | tuple[Source, ...] | Mapping[str, Source]) -> dict[str, Source]:
    """Return several sources by names: their own, or those of files and classes, numbered where they are the same.

    Files of the same name are told apart by their folders.

    Raises:
        CompressionError: there are none, one has the baseline's name, or a name is no text.
    """
    if not sources:
        raise CompressionError("there is nothing to report on: give a model, a file, or several of them.")
    if isinstance(sources, Mapping):
        if BASELINE in sources:
            raise CompressionError(f"{BASELINE!r} is the name of the original: give it as baseline=, or another name.")
        if wrong := [name for name in sources if not isinstance(name, str)]:
            raise CompressionError(f"sources by name have texts as names, got {wrong[0]!r}.")
        return dict(sources)
    files = Counter(Path(source).name for source in sources if isinstance(source, str | Path))
    found: dict[str, Source] = {BASELINE: ""}
    for source in sources:
        if not isinstance(source, str | Path):
            name = type(source).__name__
        else:
            name = Path(source).name if files[Path(source).name] == 1 else str(source)
        number, own = 2, name
        while own in found:
            number, own = number + 1, f"{name} {number}"
        found[own] = source
    del found[BASELINE]
    return found


def _latency_ratio(own: Latency, other: Latency) -> str:
    noisy = any(took.iqr_ms > took.median_ms / 2 for took in (own, other))
    return "noisy" if noisy else f"{own.median_ms / other.median_ms:.2f}"


def _figures(report: Report) -> dict[str, tuple[str, float]]:
    """Return a report's rows, as text and as numbers."""
    numbers = {name: getattr(report, name) for name in _COUNTS}
    rows = {name: (f"{number:,}", float(number)) for name, number in numbers.items() if number is not None}
    shares = {name: getattr(report, name) for name in _SHARES}
    rows |= {name: (f"{number:.4f}", float(number)) for name, number in shares.items() if number is not None}
    if (took := report.latency) is not None:
        rows["latency"] = f"{took.median_ms:.3g} ms within {took.iqr_ms:.2g}", took.median_ms
    return rows
