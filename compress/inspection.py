"""What a compressed file holds, tensor by tensor, without a network to load it into."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from compress.deployed import Deployed
from compress.errors import CompressionError
from compress.exporting import require_onnx
from compress.filling import Stored
from compress.storage import read
from compress.subjects import is_deployed
from compress.tables import aligned
from nasbench.origin import Origin


@dataclass(frozen=True)
class StoredTensor:
    """A parameter or buffer as a file has it.

    Attributes:
        name: its own.
        encoding: "dense", "bitmask" or "gaps", as `compress.storage` describes them; of few bits "shift" or "affine",
            the kind of their grid; "same" where its values are another tensor's.
        bits: of each value that is written.
        shape: its own.
        masked: whether a mask is over it.
        density: share of the entries that the mask keeps, or, without one, that are not zero.
        bytes: of all its arrays in the file: values or codes, mask, scales.
    """

    name: str
    encoding: str
    bits: int
    shape: tuple[int, ...]
    masked: bool
    density: float
    bytes: int

    @property
    def size(self) -> int:
        """How many entries it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Inspection:
    """What a file holds; made by `inspect`. Prints as a table, in which small dense tensors are one line.

    Attributes:
        path: the file.
        format: which it is, of which version; of a deployed network, how many layers have which option.
        origin: the network of our spaces that it is, or None.
        layers: its tensors, in the order of the modules.
        bytes: of the file.
    """

    path: Path
    format: str
    origin: Origin | None
    layers: tuple[StoredTensor, ...]
    bytes: int

    @property
    def bits_per_entry(self) -> float:
        """Bits of the file, header included, for each entry of a tensor."""
        return 8 * self.bytes / max(1, self._entries)

    @property
    def _entries(self) -> int:
        return sum(layer.size for layer in self.layers if layer.encoding != "same")

    def __str__(self) -> str:
        named = [layer for layer in self.layers if layer.encoding != "dense" or len(layer.shape) > 1]
        others = [layer for layer in self.layers if layer.encoding == "dense" and len(layer.shape) <= 1]
        rows = [("tensor", "encoding", "bits", "shape", "entries", "density", "bytes")]
        for layer in named:
            shape = " x ".join(map(str, layer.shape))
            encoding = layer.encoding + (" behind a mask" if layer.masked else "")
            figures = str(layer.bits), shape, f"{layer.size:,}", f"{layer.density:.4f}", f"{layer.bytes:,}"
            rows.append((layer.name, encoding, *figures))
        if others:
            sums = f"{sum(layer.size for layer in others):,}", "", f"{sum(layer.bytes for layer in others):,}"
            rows.append((f"{len(others)} of one axis", "dense", "", "", *sums))
        rest = self.bytes - sum(layer.bytes for layer in self.layers)
        rows.append(("header", "", "", "", "", "", f"{rest:,}"))
        rows.append(("all", "", f"{self.bits_per_entry:.3g}", "", f"{self._entries:,}", "", f"{self.bytes:,}"))
        origin = "no network of our spaces"
        if self.origin is not None:
            origin = f"{type(self.origin.space).__name__}, {self.origin.arch}"
        return f"{self.path}: {self.format}; {origin}\n" + aligned(rows, left=(0, 1))


def inspect(path: str | Path) -> Inspection:
    """Return what a file holds, checked like in `compress.load`, with no network to load it into.

    Args:
        path: a file of `compress.save`; or the ".onnx" file of a deployed network, whose tensors are the arrays of its
            graph: int8 weights, scales, and packed codes, each under the name that it has there.

    Raises:
        CompressionError: it cannot be read, is damaged, of another kind, or of a newer version.
        ImportError: a deployed network needs the packages of the extra `deploy`.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from compress.quantization import quantize
        >>> from compress.storage import save
        >>> net = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
        >>> found = inspect(save(quantize(net, {"0": 3}), Path(tempfile.mkdtemp()) / "net.safetensors"))
        >>> found.layers[0]  # 5,000 codes of 3 bits and a scale of 4 bytes for each of 50 channels
        StoredTensor(name='0.weight', encoding='affine', bits=3, shape=(50, 100), masked=False, density=..., bytes=2075)
        >>> print(str(found).split(maxsplit=1)[1])  # doctest: +NORMALIZE_WHITESPACE, +ELLIPSIS
        format 2 of compress.save; no network of our spaces
        tensor         encoding  bits     shape  entries  density   bytes
        0.weight       affine       3  50 x 100    5,000  ...       2,075
        2.weight       dense       32   10 x 50      500   1.0000   2,000
        2 of one axis  dense                          60              240
        header                                                        ...
        all                      ...               5,560              ...
    """
    if not isinstance(path, str | os.PathLike):
        raise CompressionError(
            f"inspect takes a file, got a {type(path).__name__}; compress.report describes networks."
        )
    if is_deployed(path):
        return _deployed(Path(path))
    contents = read(path)
    layers = tuple(_described(name, stored) for name, stored in contents.stored.items())
    form = f"format {contents.version} of compress.save"
    return Inspection(Path(path), form, contents.origin, layers, Path(path).stat().st_size)


def _deployed(path: Path) -> Inspection:
    require_onnx("inspect", ("onnx", "onnxruntime"))
    import onnx

    deployed = Deployed.load(path, threads=1)
    options = ", ".join(f"{count} {option}" for option, count in Counter(deployed.policy.values()).items())
    layers = []
    for array in onnx.load(path).graph.initializer:
        values = onnx.numpy_helper.to_array(array)
        size = len(array.raw_data) or values.nbytes
        density = int((values != 0).sum()) / max(1, values.size)
        bits = round(8 * size / max(1, values.size))
        layers.append(StoredTensor(array.name, "dense", bits, tuple(array.dims), False, density, size))
    return Inspection(path, f"deployed ONNX, layers: {options}", None, tuple(layers), deployed.bytes)


def _described(name: str, stored: Stored) -> StoredTensor:
    kept = stored.tensor if stored.mask is None else stored.mask
    density = int(kept.count_nonzero()) / max(1, kept.numel())
    bits, encoding = 8 * stored.tensor.element_size(), stored.encoding
    if stored.low_bit is not None:
        bits, encoding = stored.low_bit.bits, stored.low_bit.kind
    encoding = encoding if stored.root == name else "same"
    return StoredTensor(
        name, encoding, bits, tuple(stored.tensor.shape), stored.mask is not None, density, stored.bytes
    )
