"""Models as deployed networks: each layer computed in int8, computed in float from few bits, or left float."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from compress.calibration import Calibration, batches_of
from compress.deployed import VERSION, Deployed, check_threads, sealed
from compress.errors import CompressionError
from compress.exporting import require_onnx
from compress.int8_graph import METHODS, quantized, ranges_of
from compress.low_bit import LowBit
from compress.low_bit_models import freeze, low_bits
from compress.models import copy_of, outputs_of, require_values
from compress.onnx_layers import graph_of, strip
from compress.onnx_weights import CodedWeight, own_codes, put, rounded
from compress.policy import FLOAT, MODES, check_policy, parse
from compress.pruning import finalize
from compress.quantization import AffineGrid
from compress.weights import weights
from search_spaces.arch import nearest

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["Deployed", "Deployer", "to_int8"]

_INT8 = "int8"


def to_int8(
    model: nn.Module,
    calibration: Calibration,
    *,
    policy: Mapping[str, str] | None = None,
    method: str = "minmax",
    per_channel: bool = True,
    reduce_range: bool = False,
    threads: int | None = None,
) -> Deployed:
    """Return a model as a network that onnxruntime runs, with layers that really compute in int8.

    Weights of int8 layers are stored in a byte each, their inputs and outputs rounded to one of 256 values, in ranges
    that are measured on the calibration's inputs. Additions, poolings and the like between int8 layers are int8, too.
    How much faster that is depends on the processor: convolutions of many channels gain most where it has VNNI.

    Options of layers, beside "int8" and "float32": "weights2" to "weights8" and "shift2" to "shift4" store a weight in
    so many bits, evenly spaced values or signed powers of two, with a float scale for each output channel. The file is
    smaller; onnxruntime unpacks them when it opens it, and the layer computes in float. A model that has low-bit layers
    already keeps exactly their values. Masks become zeros, which are stored. "int8 asymmetric" and "weights4
    asymmetric" have values that need not be symmetric around zero.

    For many policies of one model take `Deployer`, which exports and calibrates once.

    Args:
        model: any module that torch.export can trace; it is used in evaluation mode, and stays as it is.
        calibration: inputs from the training data, 8 at least: batches (N, ...), or pairs of them and labels, which are
            ignored; for a model of several inputs pairs of a tuple of batches and anything. Or data, of which 256
            training inputs are taken; never validation or test inputs.
        policy: options by names of layers, as in `compress.policy`. A layer that it does not name stays as it is:
            float, or of few bits. Default: "int8" for all layers but those of few bits.
        method: how ranges are found: "minmax", "entropy" or "percentile".
        per_channel: int8 weights have a scale for each output channel, else one for the layer.
        reduce_range: use 7 bits of int8 weights. Sums of their products do not overflow on x86 processors without VNNI,
            which else compute them in a slower way.
        threads: that the network runs on; default: as many as torch now uses.

    Raises:
        ImportError: the packages of the extra `deploy` are not installed.
        CompressionError: the calibration is missing, too small, not finite or not what the model takes; the policy
            names an unknown layer or option; the model cannot be exported (see `export`).

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> deployed = to_int8(net, torch.rand(16, 3, 8, 8), policy={"0": "int8", "3": "weights4"}, threads=1)
        >>> deployed.policy, deployed.kept_float
        ({'0': 'int8', '3': 'weights4'}, {})
        >>> deployed(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 10])
        >>> print(deployed.latency(torch.rand(1, 3, 8, 8)))  # doctest: +SKIP
        0.0142 ms, middle half within 0.0032 ms (batch 1, cpu, 1 thread, 5 repeats)

    Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
    CVPR 2018, arXiv:1712.05877, as onnxruntime's static quantization has it.
    """
    check_threads(threads)
    if policy is not None:
        check_policy(policy, model)
    deployer = Deployer(model, calibration, method=method, per_channel=per_channel, reduce_range=reduce_range)
    return deployer.deploy(policy, threads=threads)


class Deployer:
    """Deploys one model under many policies: it is exported once and calibrated once. Arguments are as of `to_int8`.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> deployer = Deployer(net, torch.rand(16, 3, 8, 8))
        >>> sizes = [deployer.deploy({"3": option}).bytes for option in ("float32", "int8", "weights2")]
        >>> sizes[0] > sizes[1] > sizes[2]
        True
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        *,
        method: str = "minmax",
        per_channel: bool = True,
        reduce_range: bool = False,
    ) -> None:
        require_values(model)
        if method not in METHODS:
            raise CompressionError(f"there is no way {method!r} to find ranges; {nearest(method, METHODS)}")
        require_onnx("deployment")
        self._batches = batches_of(calibration)
        frozen = freeze(copy_of(model).cpu().eval(), inplace=True)
        self._grids: dict[str, LowBit] = low_bits(frozen)
        self._model = finalize(frozen)
        outputs_of(self._model, self._batches[0])
        self._graph = graph_of(self._model, tuple(x[:2] for x in self._batches[0]))
        self._settings = {"per_channel": per_channel, "reduce_range": reduce_range}
        self._method = method
        self._coded: dict[tuple[str, str], CodedWeight] = {}

    def deploy(self, policy: Mapping[str, str] | None = None, *, threads: int | None = None) -> Deployed:
        """Return the model under a policy; arguments are those of `to_int8`.

        Raises:
            CompressionError: the policy names an unknown layer or option, or the threads are no number of them.
        """
        from onnx import ModelProto, helper

        check_threads(threads)
        chosen, kept = self._options(policy)
        parsed = {name: parse(option) for name, option in chosen.items() if option != FLOAT}
        int8 = {name: mode for name, (kind, _, mode) in parsed.items() if kind == _INT8}
        if int8:
            asymmetric = [name for name, mode in int8.items() if mode != MODES[0]]
            file: ModelProto = quantized(self._graph, int8, asymmetric, self._ranges, **self._settings)
        else:
            file = ModelProto()
            file.CopyFrom(self._graph.model)
        for name in (name for name in parsed if name not in int8):  # in one order, for one file
            put(file, self._graph.layers[name], self._code(name, chosen[name]))
        strip(file)
        del file.graph.value_info[:]
        header = {"version": VERSION, "policy": chosen, "kept_float": kept}
        helper.set_model_props(file, {"compress": json.dumps(header)})
        return Deployed(sealed(file.SerializeToString(deterministic=True)), threads)

    @cached_property
    def _ranges(self) -> Any:
        return ranges_of(self._graph, self._batches, self._method)

    def _options(self, policy: Mapping[str, str] | None) -> tuple[dict[str, str], dict[str, str]]:
        """Return the option of each layer, and why layers are float though they should not be."""
        own = {name: _option(grid) for name, grid in self._grids.items()}
        if policy is None:
            chosen = {name: own.get(name, _INT8) for name in weights(self._model)}
        else:
            chosen = dict.fromkeys(weights(self._model), FLOAT) | own | check_policy(policy, self._model)
        kept = {}
        for name, option in chosen.items():
            if option == FLOAT:
                continue
            if name in self._graph.missing:
                kept[name] = self._graph.missing[name]
            elif parse(option)[0] == _INT8 and self._graph.layers[name].operator == "ConvTranspose":
                kept[name] = "onnxruntime has no transposed convolution in int8"
        return chosen | dict.fromkeys(kept, FLOAT), kept

    def _code(self, name: str, option: str) -> CodedWeight:
        """Return a layer's weight in few bits: its own codes, if the option is what it has."""
        if (name, option) not in self._coded:
            layer, weight = self._graph.layers[name], weights(self._model)[name]
            transposed = weight.module.groups if isinstance(weight.module, _ConvTransposeNd) else 0
            grid = self._grids.get(name)
            if grid is not None and _option(grid) == option:
                coded = own_codes(layer, weight.parameter.detach(), grid, transposed)
            else:
                kind, bits, mode = parse(option)
                coded = rounded(layer.weight, kind, bits, mode == MODES[0], transposed)
            self._coded[name, option] = coded
        return self._coded[name, option]


def _option(grid: LowBit) -> str:
    """Return the option that a low-bit layer has already."""
    if not isinstance(grid, AffineGrid):
        return f"shift{grid.bits}"
    mode = "" if bool((grid.zero == 2 ** (grid.bits - 1)).all()) else f" {MODES[1]}"
    return f"weights{grid.bits}{mode}"
