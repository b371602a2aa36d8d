"""Graphs whose chosen layers compute in int8: onnxruntime's static quantization, calibrated once for many choices."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.onnx_layers import Graph

METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
"""How ranges of activations are found: the least and largest value seen; the range of the least Kullback-Leibler
divergence from what was seen; all but a 100,000th of it."""


def operators() -> list[str]:
    """Return the types of the nodes that onnxruntime quantizes by default."""
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return sorted({*QLinearOpsRegistry, *QDQRegistry})


def ranges_of(graph: Graph, batches: Sequence[tuple[Tensor, ...]], method: str) -> Any:
    """Return the range of every tensor of a graph on these batches, as onnxruntime has them."""
    import onnx
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    if method != "minmax":  # its histograms are of batches of one size
        size = math.gcd(*(len(batch[0]) for batch in batches))
        batches = [part for batch in batches for part in zip(*(x.split(size) for x in batch), strict=True)]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder) / "model.onnx"
        onnx.save(graph.model, path)
        calibrator = create_calibrator(
            path,
            operators(),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=CalibrationMethod[METHODS[method]],
        )
        calibrator.collect_data(_reader([put.name for put in graph.model.graph.input], batches))
        return calibrator.compute_data()


def quantized(
    graph: Graph, layers: Iterable[str], asymmetric: Collection[str], ranges: Any, per_channel: bool, reduce_range: bool
) -> Any:
    """Return a copy of a graph's ONNX model with these layers in int8, and what is only between such layers.

    Args:
        graph: stays as it is.
        layers: names, one at least.
        asymmetric: those of them whose weights have one range that need not be symmetric, as uint8.
        ranges: from `ranges_of`.
        per_channel: a scale of the weights for each output channel; else one for a layer.
        reduce_range: only 7 bits of weights.
    """
    from onnx import ModelProto
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    model = ModelProto()
    model.CopyFrom(graph.model)
    nodes = int8_nodes(graph, layers)
    weights = _own_weights(model, {*nodes})
    own = {"quant_type": QuantType.QUInt8, "symmetric": False, "reduce_range": reduce_range}
    overrides = {weights[node]: [own] for name in asymmetric for node in graph.layers[name].nodes}
    quantizer = QDQQuantizer(
        model,
        per_channel,
        reduce_range,
        QuantType.QInt8,
        QuantType.QUInt8,
        ranges,
        nodes,
        [],
        operators(),
        {"TensorQuantOverrides": overrides} if overrides else {},
    )
    with _without_warnings():  # that the weight of a norm has one axis only, for each norm
        quantizer.quantize_model()
    quantizer.model.topological_sort()
    return quantizer.model.model


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _own_weights(model: Any, nodes: Collection[str]) -> dict[str, str]:
    """Give each of these nodes a weight that nothing else reads, and return their names, by those of the nodes.

    Layers that are called several times share one, and so do norms of equal numbers, as new ones have. Without VNNI,
    onnxruntime replaces int8 weights when it opens a file, and fails where they are shared.
    """
    constants = {one.name: one for one in model.graph.initializer}
    readers = Counter(name for node in model.graph.node for name in node.input)
    found: dict[str, str] = {}
    for node in model.graph.node:
        if node.name not in nodes or len(node.input) < 2 or node.input[1] not in constants:
            continue
        name = found[node.name] = node.input[1]
        if readers[name] > 1:
            readers[name] -= 1
            node.input[1] = found[node.name] = f"{name}.{node.name}"
            model.graph.initializer.add().CopyFrom(constants[name])
            model.graph.initializer[-1].name = node.input[1]
    return found


def int8_nodes(graph: Graph, layers: Iterable[str]) -> list[str]:
    """Return the nodes of these layers, and those without weights that compute only with what such layers gave.

    An addition of an int8 and a float layer's outputs is float, as is what an int8 layer reads from a float one: it is
    rounded to eight bits where it goes in. Nodes in front of all layers are among them if every layer is.
    """
    chosen = {node for name in layers for node in graph.layers[name].nodes}
    constants = {one.name for one in graph.model.graph.initializer}
    every = {node for layer in graph.layers.values() for node in layer.nodes}
    behind: dict[str, set[bool]] = {}  # of a tensor: whether the layers that it comes from are int8
    found, first, types = [], [], {*operators()}
    for node in graph.model.graph.node:
        weighted = node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") and node.input[1] in constants
        if weighted or node.name in every:
            every.add(node.name)
            sources = {node.name in chosen}
        else:
            sources = set().union(*(behind.get(name, set()) for name in node.input))
        behind |= dict.fromkeys(node.output, sources)
        if node.op_type in types and sources == {True}:
            found.append(node.name)
        elif node.op_type in types and not sources:
            first.append(node.name)
    return [*first, *found] if chosen == every else found


def _reader(names: Sequence[str], batches: Sequence[tuple[Tensor, ...]]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.rest, None)
            return None if batch is None else {name: x.numpy() for name, x in zip(names, batch, strict=True)}

    return Reader()
