"""Models as ONNX files, checked against the model itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.errors import CompressionError
from compress.models import outputs_of
from compress.pruning import finalize
from nasbench.files import atomic_write

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

Example = Tensor | tuple[Tensor, ...]

_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_LIMIT = 2**31  # bytes of an ONNX file without others beside it
_TOLERANCE = 1e-3  # of the largest output; another order of additions gives about 1e-6


def export(model: nn.Module, path: str | Path, *, example: Example) -> float:
    """Write the model in evaluation mode to an ONNX file and check it; return the largest difference of an output.

    Masks become zeros of ordinary weights. The first axis of every input is the batch, of any size. The file is run by
    onnxruntime, on the example and on a batch of another size, before it takes its place: it is written whole or not at
    all. The model stays as it is.

    Args:
        model: any module that torch.export can trace.
        path: the file, such as "model.onnx".
        example: a batch of inputs, (N, ...); a tuple for a model that takes several.

    Returns:
        The largest absolute difference of any output from the model's own, over both batches.

    Raises:
        ImportError: the packages of the extra `deploy` are not installed.
        CompressionError: the model cannot be exported with a free batch size, has 2 GiB or more, or onnxruntime cannot
            run the file, or computes something else than the model.
        OSError: the file cannot be written.

    Example:
        >>> export(model, "model.onnx", example=torch.rand(1, 3, 32, 32))  # doctest: +SKIP
        2.4e-07
    """
    require_onnx("export")
    inputs = example if isinstance(example, tuple) else (example,)
    if not all(isinstance(x, Tensor) and x.ndim > 0 and len(x) > 0 for x in inputs) or not inputs:
        raise CompressionError(
            f"example is a batch of inputs, (N, ...), or a tuple of such, got {type(example).__name__}."
        )
    twin = finalize(model).cpu().eval()
    with atomic_write(path) as temporary:
        _, difference = write(twin, temporary, tuple(x.detach().cpu() for x in inputs))
    return difference


def require_onnx(user: str, needed: Sequence[str] = _NEEDED) -> None:
    """Refuse where the packages of the extra `deploy` are not installed.

    Raises:
        ImportError: names those that are missing, and the extra.
    """
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ImportError(f'{user} needs {" and ".join(missing)}: pip install "nasbench-toolkit[deploy]"')


def write(model: nn.Module, path: Path, inputs: tuple[Tensor, ...]) -> tuple[ONNXProgram, float]:
    """Write a plain model in evaluation mode, on the CPU, to an ONNX file, and run it on two sizes of a batch.

    Returns:
        What torch has made of the model, and the largest difference of an output.

    Raises:
        CompressionError: see `export`. The file may be there all the same.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size >= _LIMIT:
        raise CompressionError(f"the model has {size:,} bytes; an ONNX file holds less than {_LIMIT:,}.")
    # A batch of one would be taken for a constant.
    inputs = tuple(torch.cat([x, x]) if len(x) == 1 else x for x in inputs)
    more = tuple(torch.cat([x, x[:1]]) for x in inputs)
    wanted = [outputs_of(model, batch) for batch in (inputs, more)]
    program = _traced(model, inputs)
    program.save(path, external_data=False)
    found = [_run(path, batch) for batch in (inputs, more)]
    return program, max(_difference(a, b) for a, b in zip(wanted, found, strict=True))


def _traced(model: nn.Module, inputs: tuple[Tensor, ...]) -> ONNXProgram:
    batch = torch.export.Dim("batch")
    names = [f"input{i}" for i in range(len(inputs))] if len(inputs) > 1 else ["input"]
    try:
        program = torch.onnx.export(
            model,
            inputs,
            input_names=names,
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            dynamo=True,
            verbose=False,
        )
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise CompressionError(
            f"{type(model).__name__} cannot be exported with a free batch size: {reason} torch.export must be able to "
            "trace it: no Python branches on values, no fixed batch."
        ) from error
    assert program is not None
    return program


def _run(path: Path, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        given: dict[str, Any] = {put.name: x.numpy() for put, x in zip(session.get_inputs(), inputs, strict=True)}
        return [torch.from_numpy(y) for y in session.run(None, given)]
    except Exception as error:  # onnxruntime has a class for each code, and no common one
        raise CompressionError(
            f"onnxruntime {onnxruntime.__version__} cannot run the exported model: {error} It needs float32 weights "
            "and inputs for most operators."
        ) from error


def _difference(wanted: list[Tensor], found: list[Tensor]) -> float:
    if [x.shape for x in wanted] != [x.shape for x in found]:
        raise CompressionError("the exported file gives outputs of other shapes than the model, so it was not written.")
    largest = 0.0
    for a, b in zip(wanted, found, strict=True):
        if not a.numel():
            continue
        difference = float((a.double() - b.double()).abs().max())
        if not difference <= _TOLERANCE * max(1.0, float(a.double().abs().max())):  # also where it is not a number
            raise CompressionError(
                f"an output of the exported file differs from the model's by {difference:.3g}, so it was not written."
            )
        largest = max(largest, difference)
    return largest
