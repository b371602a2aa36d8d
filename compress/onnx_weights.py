"""Weights of few bits in ONNX files: packed codes, and a function of standard operators that computes the weight.

onnxruntime computes it once, when it opens the file: from then on the layer is an ordinary float one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from compress.low_bit import LowBit
from compress.packing import pack
from compress.quantization import AffineGrid, FakeQuantize, Layout
from compress.shift import ShiftGrid
from compress.shift_conversion import fit_channels

if TYPE_CHECKING:
    from onnx import FunctionProto, ModelProto

    from compress.onnx_layers import GraphLayer

DOMAIN = "compress"
"""Of the functions that unpack weights."""


@dataclass(frozen=True, eq=False)
class CodedWeight:
    """A weight of few bits: ``(table[code] - zero) * scale``.

    Attributes:
        codes: (rows, size) uint8, those that share a scale in a row, as in `Layout.gathered`.
        bits: of a code.
        table: (2^bits,) float32.
        zero: (rows, 1) float32, or None: 0.
        scale: (rows, 1) float32.
        layout: where in the weight each row is.
    """

    codes: Tensor
    bits: int
    table: Tensor
    zero: Tensor | None
    scale: Tensor
    layout: Layout


def rounded(weight: Tensor, kind: str, bits: int, symmetric: bool, transposed: int) -> CodedWeight:
    """Return a float weight in few bits, with a scale for each output channel.

    Args:
        weight: of a layer.
        kind: "weights": evenly spaced values, with the scale of the least squared error, as `compress.quantize` has
            them; "dense_shift": signed powers of two, with the scale that fits best in angle, as `compress.dense_shift`
            converts to.
        bits: of a code.
        symmetric: of "weights": values around zero.
        transposed: see `Layout`.
    """
    if kind == "weights":
        step = FakeQuantize.of(weight, bits, symmetric=symmetric, transposed=transposed)
        grid = step.frozen()
        return coded(step(weight), grid, grid.layout)
    layout, shifts = Layout(tuple(weight.shape), None, transposed), ShiftGrid(bits)
    rows = layout.gathered(weight)
    some = rows.any(1, keepdim=True)  # powers of two have no zero, but a scale can be
    rows = torch.where(some, rows, 1.0)
    factor, gain = fit_channels(rows, shifts)
    codes = shifts.codes(shifts.nearest(rows * factor.unsqueeze(1)))
    return CodedWeight(codes, bits, shifts.table(), None, torch.where(some, 1 / gain.unsqueeze(1), 0.0), layout)


def own_codes(layer: GraphLayer, weight: Tensor, grid: LowBit, transposed: int) -> CodedWeight:
    """Return the codes of a low-bit weight, with scales that a batch norm behind the layer has become a part of.

    Args:
        layer: in the graph.
        weight: of the layer in the model, on the grid.
        grid: frozen.
        transposed: see `Layout`.
    """
    layout = Layout(tuple(weight.shape), None, transposed)
    if isinstance(grid, AffineGrid) and (grid.layout.group != "tensor" or torch.equal(weight, layer.weight)):
        layout = grid.layout  # else a batch norm has a factor for each channel, where the layer had one scale for all
    found = coded(weight, grid, layout)
    before, after = layout.gathered(weight), layout.gathered(layer.weight)
    place = before.abs().argmax(1, keepdim=True)
    largest = before.gather(1, place)
    factor = torch.where(largest != 0, after.gather(1, place) / largest, 1.0)
    return CodedWeight(found.codes, found.bits, found.table, found.zero, found.scale * factor, layout)


def coded(weight: Tensor, grid: LowBit, layout: Layout) -> CodedWeight:
    """Return a weight that is on a frozen grid by its codes."""
    codes = layout.gathered(grid.codes(weight))
    if isinstance(grid, ShiftGrid):
        return CodedWeight(codes, grid.bits, grid.table(), None, torch.ones(len(codes), 1), layout)
    assert isinstance(grid, AffineGrid)
    middle = 2 ** (grid.bits - 1)
    symmetric = bool((grid.zero == middle).all())
    table = torch.arange(2**grid.bits, dtype=torch.float32) - (middle if symmetric else 0)
    zero = None if symmetric else grid.zero.float().unsqueeze(1)
    return CodedWeight(codes, grid.bits, table, zero, grid.scale.unsqueeze(1), layout)


def put(model: ModelProto, layer: GraphLayer, weight: CodedWeight) -> None:
    """Put a weight of few bits in the place of a layer's float one."""
    from onnx import helper, numpy_helper

    graph, name = model.graph, layer.initializer
    place = next(i for i, one in enumerate(graph.initializer) if one.name == name)
    del graph.initializer[place]
    known = {one.name for one in graph.initializer}

    def constant(title: str, array: Any) -> str:
        """Add an array, unless another layer has."""
        if title not in known:
            known.add(title)
            graph.initializer.append(numpy_helper.from_array(np.asarray(array), title))
        return title

    def shape(*sizes: int) -> str:
        return constant("compress/" + "x".join(map(str, sizes)), np.array(sizes, np.int64))

    function = f"unpack{weight.bits}"
    if function not in {one.name for one in model.functions}:
        model.functions.append(_function(function, weight.bits, model.opset_import[0].version))
    if DOMAIN not in {one.domain for one in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    flat = F.pad(weight.codes.reshape(-1), (0, -weight.codes.numel() % 8))
    table = ",".join(f"{value:g}" for value in weight.table[[0, -1]])
    zero = np.float32(0) if weight.zero is None else weight.zero.numpy()
    inputs = [
        constant(f"{name}/codes", pack(flat, weight.bits).view(-1, weight.bits).numpy()),
        constant(f"compress/{weight.bits} bits from {table}", weight.table.numpy()),
        constant("compress/no zero" if weight.zero is None else f"{name}/zero", zero),
        constant(f"{name}/scale", weight.scale.numpy()),
        shape(weight.codes.numel()),
        shape(*weight.codes.shape),
    ]
    nodes: list[Any] = []

    def add(operator: str, inputs: list[str], **settings: Any) -> list[str]:
        """Add a node; the last one of all gives the weight."""
        nodes.append(helper.make_node(operator, inputs, [f"{name}/{len(nodes)}"], **settings))
        return list(nodes[-1].output)

    layout = weight.layout
    (value,) = add(function, inputs, domain=DOMAIN)
    row = int(np.prod(layout.shape)) // layout.channels
    if layout.count * layout.size != layout.channels * row:  # the last weights of a channel do not fill a group
        (value,) = add("Reshape", [value, shape(layout.channels, layout.count // layout.channels * layout.size)])
        (value,) = add("Slice", [value, shape(0), shape(row), shape(1)])
    if layout.transposed and layout.group != "tensor":
        groups, (inside, outside, *kernel) = layout.transposed, layout.shape
        (value,) = add("Reshape", [value, shape(groups, outside, inside // groups, *kernel)])
        (value,) = add("Transpose", [value], perm=[0, 2, 1, *range(3, 3 + len(kernel))])
    (value,) = add("Reshape", [value, shape(*layout.shape)])
    if layer.operator == "MatMul":
        add("Transpose", [value], perm=[1, 0])
    nodes[-1].output[0] = name
    everything = [*nodes, *graph.node]
    del graph.node[:]
    graph.node.extend(everything)


def _function(name: str, bits: int, opset: int) -> FunctionProto:
    """Return the function ``(packed, table, zero, scale, [N], [rows, size]) -> weight``, (rows, size).

    ``packed`` has a row of b bytes for 8 codes. Each becomes one integer, of which 8 copies are shifted.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []

    def add(operator: str, *inputs: str, outputs: tuple[str, ...] = (), **settings: Any) -> str:
        outputs = outputs or (f"value{len(nodes)}",)
        nodes.append(helper.make_node(operator, inputs, outputs, **settings))
        return outputs[0]

    def constant(values: Any, dtype: Any = np.uint64) -> str:
        return add("Constant", value=numpy_helper.from_array(np.array(values, dtype)))

    wide = add("Cast", "packed", to=TensorProto.UINT64)
    shifted = add("BitShift", wide, constant([8 * i for i in range(bits)]), direction="LEFT")
    columns = tuple(f"byte{i}" for i in range(bits))
    add("Split", shifted, outputs=columns, axis=1, num_outputs=bits)
    whole = columns[0]
    for column in columns[1:]:
        whole = add("BitwiseOr", whole, column)
    codes = add("BitShift", whole, constant([bits * i for i in range(8)]), direction="RIGHT")
    codes = add("BitwiseAnd", codes, constant([2**bits - 1]))
    codes = add("Reshape", add("Cast", codes, to=TensorProto.INT32), constant([-1], np.int64))
    codes = add("Slice", codes, constant([0], np.int64), "count")
    rows = add("Reshape", add("Gather", "table", codes), "rows")
    add("Mul", add("Sub", rows, "zero"), "scale", outputs=("weight",))
    inputs = ["packed", "table", "zero", "scale", "count", "rows"]
    return helper.make_function(DOMAIN, name, inputs, ["weight"], nodes, [helper.make_opsetid("", opset)])
