"""Which nodes of an exported graph are which layers of the model, and what stands for their weights."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.exporting import write
from compress.weights import weights

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto
    from torch.onnx import ONNXProgram

_LINEAR = re.compile(r"aten\.linear\.default\]\(args = \(%\w+, %(\w+)")
_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True, eq=False)
class GraphLayer:
    """A layer in a graph.

    Attributes:
        nodes: the names of its nodes: as many as the layer is called.
        operator: "Conv", "ConvTranspose", "Gemm" or "MatMul".
        initializer: the name of its weight.
        weight: as it is in the graph, where a batch norm behind the layer is a part of it, in the shape of the layer's;
            the initializer of a "MatMul" is its transpose.
    """

    nodes: tuple[str, ...]
    operator: str
    initializer: str
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Graph:
    """A model as an ONNX graph.

    Attributes:
        model: with weights and the shapes of all tensors.
        layers: by their names in `compress.weights`.
        missing: those of `compress.weights` that are not among them, and why.
    """

    model: ModelProto
    layers: dict[str, GraphLayer] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def graph_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> Graph:
    """Return the graph of a plain model in evaluation mode; the export is checked as in `compress.export`.

    Args:
        model: on the CPU, without masks or low-bit steps.
        inputs: a batch that it takes.

    Raises:
        CompressionError: see `compress.export`.
    """
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        program, _ = write(model, path, inputs)
        graph = Graph(load_model_with_shape_infer(path))
    _find_layers(graph, model, program)
    strip(graph.model)
    return graph


def strip(model: ModelProto) -> None:
    """Delete what only people read: where in the Python code nodes come from, most of all."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.doc_string = ""


def _find_layers(graph: Graph, model: nn.Module, program: ONNXProgram) -> None:
    from onnx import numpy_helper

    readers = _readers(graph.model.graph, model, program)
    arrays = {one.name: one for one in graph.model.graph.initializer}
    taken: dict[int, str] = {}
    for name, weight in weights(model).items():
        if parametrize.is_parametrized(weight.module, weight.attribute):
            graph.missing[name] = "its weight is computed from other parameters"
            continue
        key = id(weight.parameter)
        nodes = readers.get(key, [])
        kinds = {(node.op_type, node.input[1]) for node in nodes}
        if key in taken:
            graph.missing[name] = f"its weight is that of {taken[key]!r}, whose option holds for both"
        elif len(kinds) != 1 or any(not _is_product(node) for node in nodes):
            graph.missing[name] = "the exported graph has no convolution or matrix product of its own with its weight"
        else:
            ((operator, initializer),) = kinds
            value = torch.from_numpy(numpy_helper.to_array(arrays[initializer]).copy())
            value = value.T.contiguous() if operator == "MatMul" else value
            own = weight.parameter.detach()
            if value.shape != own.shape or (operator == "MatMul" and not torch.equal(value, own)):
                graph.missing[name] = "the exported graph computes with another weight"
                continue
            taken[key] = name
            graph.layers[name] = GraphLayer(tuple(node.name for node in nodes), operator, initializer, value)


def _readers(graph: GraphProto, model: nn.Module, program: ONNXProgram) -> dict[int, list[NodeProto]]:
    """Return the nodes that read each parameter, by its id."""
    exported = program.exported_program
    assert exported is not None
    inputs = exported.graph_signature.inputs_to_parameters
    parameters = {path: id(model.get_parameter(path)) for path in inputs.values()}
    constants = {one.name for one in graph.initializer}
    readers: dict[int, list[NodeProto]] = {}
    for node in graph.node:
        for name in parameters.keys() & {*node.input}:
            readers.setdefault(parameters[name], []).append(node)
        # The transpose of a linear layer's weight is computed on export, and gets a name of its own.
        if node.op_type == "MatMul" and node.input[1] in constants - parameters.keys():
            text = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.fx_node"), "")
            if (found := _LINEAR.search(text)) and found[1] in inputs:
                readers.setdefault(parameters[inputs[found[1]]], []).append(node)
    return readers


def _is_product(node: NodeProto) -> bool:
    transposed = any(one.name == "transB" and one.i for one in node.attribute)
    return node.op_type in _OPERATORS and (node.op_type != "Gemm" or transposed)
