"""What reports are about: models and deployed networks as their files have them, measured in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from compress.deployed import Deployed
from compress.errors import CompressionError
from compress.filling import Stored, slots_of
from compress.layer_macs import macs
from compress.models import outputs_of
from compress.pruning import finalize
from compress.storage import load, read, save
from compress.weights import weights
from nasbench.data import Data
from nasbench.profile import Latency
from nasbench.training import validate

Source = str | Path | nn.Module
"""A file, a model, or a deployed network, which is a module, too."""

_ROUNDS = 7  # of which each times every model once


@dataclass(eq=False)
class Subject:
    """One model, and what is known of it.

    Attributes:
        name: for messages.
        model: in evaluation mode, on the CPU.
        runtime: what runs it, "torch" or "onnxruntime".
        figures: the numbers of a `Report`, as they are found.
        savings: what makes its file smaller and no forward faster: "masks", "zeros", "few bits".
        outputs: of the example.
    """

    name: str
    model: nn.Module
    runtime: str
    figures: dict[str, Any]
    savings: list[str]
    outputs: list[Tensor] = field(default_factory=list)


def subject_of(name: str, source: Source, home: nn.Module | None, folder: Path) -> Subject:
    """Return a model as its file has it.

    Args:
        name: for messages.
        source: a file of `compress.save`, a deployed network or its ".onnx" file, or a module, which is saved first.
        home: the network to load a file into that names none of our spaces.
        folder: for files that are needed for a moment.

    Raises:
        CompressionError: the file cannot be loaded, or the model has no weights.
    """
    if not isinstance(source, str | Path | nn.Module):
        raise CompressionError(
            f"a source is a module, a file of compress.save, or a deployed network (compress.to_int8) or its .onnx "
            f"file, got {type(source).__name__}."
        )
    source = Deployed.load(source) if is_deployed(source) else source
    if isinstance(source, Deployed):
        figures = dict.fromkeys(("params", "weights", "nonzeros")) | {"bytes": source.bytes}
        return Subject(name, source, "onnxruntime", figures, [])
    if isinstance(source, nn.Module):
        path, home = save(source, folder / "model.safetensors"), source
    else:
        path = Path(source)
    contents = read(path)
    if home is None and contents.origin is None:
        raise CompressionError(
            f"{path} names no network of our spaces: compress.report(path, baseline=network) needs the original; on "
            "the command line --baseline, if that can name it."
        )
    model = load(path, home).cpu().eval()
    found = {id(weight.parameter): weight for weight in weights(model).values()}.values()
    if not found:
        raise CompressionError(f"{type(model).__name__} has no convolution, linear layer or attention to report on.")
    own = {(id(weight.module), weight.attribute) for weight in found}
    named = {name for name, slot in slots_of(model).items() if (id(slot.module), slot.attribute) in own}
    total = sum(weight.size for weight in found)
    nonzeros = sum(int((w.parameter if w.mask is None else w.mask).count_nonzero()) for w in found)
    figures = {
        "params": sum(p.numel() for p in model.parameters()),
        "weights": total,
        "nonzeros": nonzeros,
        "bytes": path.stat().st_size,
        "bits_per_weight": 8 * sum(contents.stored[name].bytes for name in named) / total,
    }
    savings = _savings([*contents.stored.values()], 2 * nonzeros <= total)
    return Subject(name, model, "torch", figures, savings)


def is_deployed(source: Source) -> TypeGuard[str | Path]:
    """Say whether a source is the file of a deployed network, by its ending."""
    return isinstance(source, str | Path) and Path(source).suffix.lower() == ".onnx"


def _savings(stored: Sequence[Stored], mostly_zero: bool) -> list[str]:
    masked = any(one.mask is not None and not one.mask.all() for one in stored)
    found = ["masks"] if masked else ["zeros"] if mostly_zero else []
    return found + (["few bits"] if any(one.low_bit is not None for one in stored) else [])


def measure(subjects: Sequence[Subject], inputs: tuple[Tensor, ...], device: torch.device, min_seconds: float) -> None:
    """Run all on the example, count their multiply-adds, and time them in turns.

    Raises:
        CompressionError: one does not take the example.
    """
    inputs = tuple(x.detach().cpu() for x in inputs)
    for subject in subjects:
        try:
            subject.outputs = outputs_of(subject.model, inputs)
        except CompressionError as error:
            raise CompressionError(str(error).replace("the model", subject.name, 1)) from error
    for subject, latency in zip(subjects, _times(subjects, inputs, device, min_seconds), strict=True):
        subject.figures["latency"] = latency
        if not isinstance(subject.model, Deployed):
            counted = macs(subject.model, inputs)
            subject.figures |= {"macs": counted.dense, "kept_macs": counted.sparse}


def compare_outputs(subject: Subject, baseline: Subject) -> None:
    """Note the largest difference of an output.

    Raises:
        CompressionError: the outputs have other shapes.
    """
    shapes = [[tuple(x.shape) for x in one.outputs] for one in (subject, baseline)]
    if shapes[0] != shapes[1]:
        raise CompressionError(f"{subject.name} gives outputs of shapes {shapes[0]}, the baseline {shapes[1]}.")
    flat = [torch.cat([torch.zeros(0), *(x.double().flatten() for x in one.outputs)]) for one in (subject, baseline)]
    subject.figures["max_difference"] = float((flat[0] - flat[1]).abs().max()) if flat[0].numel() else 0.0


def score(subject: Subject, data: Data) -> None:
    """Note the accuracy on validation images."""
    subject.figures["val_accuracy"] = validate(subject.model, data.to("cpu"))["val_accuracy"]


def _times(
    subjects: Sequence[Subject], inputs: tuple[Tensor, ...], device: torch.device, min_seconds: float
) -> list[Latency]:
    """Time the models in turns, so that what else the machine does is the same for all; masks are multiplied in before.

    Images and image models are in the channels-last layout that our data and training have; onnxruntime has its own.
    """
    placed = tuple(_channels_last(x.to(device)) for x in inputs)
    runs: list[tuple[nn.Module, tuple[Tensor, ...]]] = []
    for subject in subjects:
        if isinstance(subject.model, Deployed):
            runs.append((subject.model, inputs))
            continue
        twin = finalize(subject.model).to(device)
        if any(x.ndim == 4 for x in inputs):
            twin = twin.to(memory_format=torch.channels_last)
        runs.append((twin, placed))
    for run in runs:  # warms up
        _seconds(*run, 1)
    calls = [max(1, round(min_seconds / _ROUNDS / _seconds(*run, 1))) for run in runs]
    rounds = [[_seconds(*run, count) for run, count in zip(runs, calls, strict=True)] for _ in range(_ROUNDS)]
    low, median, high = np.percentile(rounds, (25, 50, 75), axis=0) * 1e3
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return [
        Latency(
            median_ms=float(median[i]),
            iqr_ms=float(high[i] - low[i]),
            repeats=_ROUNDS,
            threads=subject.model.threads if isinstance(subject.model, Deployed) else torch.get_num_threads(),
            device="cpu" if isinstance(subject.model, Deployed) else name,
            batch=len(inputs[0]),
        )
        for i, subject in enumerate(subjects)
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
