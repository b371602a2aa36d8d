"""Compressed models as files: a safetensors file that holds masks, kept values and packed codes, read back by name.

The file is a plain safetensors file. Its metadata has two entries. "compress" is JSON: the version of the format; under
"tensors" how each parameter and buffer is written; and under "origin" the space and architecture, for a network of our
spaces. "sha256" is the checksum of that text and of all arrays. Nothing is pickled and no import path is read.

How a tensor `name` is written is one entry, `encoding`, with fields of its own:

- "dense": the array `name` is the tensor.
- "bitmask", "gaps": `name/values` are the kept values, and `name/mask` or `name/gaps` says where in a tensor of `shape`
  they are (`compress.encodings`). With `masked` they are kept by a mask, without it the other entries are just zero.
- "codes": `name/codes` are codes packed to `bits` each (`compress.packing`), of a weight of `shape` whose values are on
  a grid of this `kind` (`compress.low_bit`). What else there is to the grid is in `grid`, and in arrays such as
  `name/scale`. Behind a mask, `kept` says which entries that keeps: "all"; "nonzero", those that are not zero; or
  "bitmask" and "gaps", where there are codes of kept entries only.

With `channels_last` a tensor lies in memory that way. The weight of a grouped convolution also has `groups`. A tensor
that another entry has already is ``{"same": name}``. Version 2 is version 1 and "codes"; a file without them is still
of version 1.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from compress.deployed import Deployed
from compress.entries import decode, encode, whole
from compress.errors import CompressionError
from compress.filling import Stored, blank_copy, fill, slots_of
from nasbench.errors import SettingError
from nasbench.files import atomic_write
from nasbench.origin import Origin, origin_of

VERSION = 2
_ZIP = b"PK\x03\x04"  # how the files of torch.save begin


def save(model: nn.Module, path: str | Path) -> Path:
    """Write a model's parameters and buffers to a safetensors file in the fewest bytes; return its path.

    Each tensor takes the fewest bytes of three ways: all its values; or its kept values and one bit for every entry; or
    its kept values and a byte for each of them. Kept are the entries that a mask keeps, or those that are not zero
    where there is no mask (a dropped zero loses its sign). The kept values are bit for bit the model's. Of a weight of
    b bits, as `dense_shift` and `quantize` make them, each value takes b bits: N of them are ceil(N * b / 8) bytes, and
    the scales beside them. The file is written whole or not at all.

    Args:
        model: any module. What a mask has dropped is not written, also where an optimizer has moved it, and of a weight
            of few bits only its values, not what trains them: it is stored as `compress.freeze` would leave it. Of a
            model that torch.compile, DataParallel or DistributedDataParallel wraps, the network inside is written.
        path: the file, such as "model.safetensors".

    Raises:
        CompressionError: the model is no module, or has something that is no tensor with numbers: an extra state, a
            lazy or meta tensor; or a weight of few bits is not float32, or was trained away from its grid.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> from search_spaces.masks import attach
        >>> layer = nn.Linear(1000, 100, bias=False)
        >>> attach(layer, "weight", torch.arange(100_000).view(100, 1000) % 20 == 0)
        >>> path = save(layer, Path(tempfile.mkdtemp()) / "layer.safetensors")
        >>> path.stat().st_size  # 5,000 values and gaps, and the header; dense it has 400,000 bytes
        25376
        >>> torch.equal(load(path, nn.Linear(1000, 100, bias=False)).weight, layer.weight)
        True
    """
    if not isinstance(model, nn.Module):
        raise CompressionError(f"save(model, path) takes the model first, got a {type(model).__name__}.")
    if not isinstance(path, str | os.PathLike):
        raise CompressionError(f"save(model, path) takes the file second, got a {type(path).__name__}.")
    if isinstance(model, Deployed):
        raise CompressionError("a deployed network is an ONNX file of its own: write it with deployed.save(path).")
    model = unwrapped(model)
    entries: dict[str, dict[str, Any]] = {}
    arrays: dict[str, Tensor] = {}
    names: dict[tuple[int, ...], str] = {}
    for name, slot in slots_of(model).items():
        first = names.setdefault((id(slot.tensor), id(slot.mask), id(slot.low_bit)), name)
        if first == name:
            entries[name], parts = encode(name, slot)
            if clash := arrays.keys() & parts.keys():
                raise CompressionError(f"two tensors of the model would both be stored as {clash.pop()!r}; rename one.")
            arrays |= parts
        else:
            entries[name] = {"same": first}
        if slot.attribute == "weight" and (groups := getattr(slot.module, "groups", 1)) != 1:
            entries[name]["groups"] = groups
    coded = any(entry.get("encoding") == "codes" for entry in entries.values())
    header: dict[str, Any] = {"version": VERSION if coded else 1, "tensors": entries}
    if (origin := origin_of(model)) is not None:
        header["origin"] = json.loads(origin.to_json())
    text = json.dumps(header)
    with atomic_write(path) as temporary:
        save_file(arrays, temporary, metadata={"compress": text, "sha256": checksum(text, arrays)})
        _sort_metadata(temporary)
    return Path(path)


def load(path: str | Path, module: nn.Module | None = None) -> nn.Module:
    """Return a copy of `module` with the stored tensors in it, by name; masks are on it as they were when saved.

    Weights of few bits have their values, frozen: with ``requires_grad=False``, and saved in few bits again. To train
    them as floats, `compress.finalize` the model. Convolutions, linear layers, norms, PReLU and embeddings that have
    other sizes in the file are given those.

    Args:
        path: a file that `save` wrote.
        module: the network that was saved, compressed or not; its own masks, bits and values do not matter. A network
            of our spaces needs none: the file names space and architecture. It is then returned in eval mode, on the
            CPU. Of a wrapped one, as `save` takes it, the network inside is copied.

    Raises:
        CompressionError: the file cannot be read, is damaged, of another kind or a newer version, or does not fit the
            module; or a module is needed. The module stays as it is.

    Example:
        >>> import tempfile
        >>> from nasbench.origin import mark
        >>> from search_spaces import ResNet
        >>> space = ResNet(classes=10, in_channels=1)
        >>> model = mark(space.build(space.at(0)), space, space.at(0)).eval()
        >>> twin = load(save(model, Path(tempfile.mkdtemp()) / "model.safetensors"))
        >>> x = torch.rand(2, 1, 8, 8)
        >>> torch.equal(twin(x), model(x))
        True
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(module, nn.Module | None):
        raise CompressionError(
            "load(path, module) takes the file first, then the network, "
            f"got {type(path).__name__} and {type(module).__name__}."
        )
    contents = read(path)
    stored, origin = contents.stored, contents.origin
    if module is not None:
        twin = blank_copy(unwrapped(module))
        fill(twin, stored, path)
        return twin
    if origin is None:
        raise CompressionError(f"{path} names no network of our spaces: load(path, module) needs the network, too.")
    twin = _built(origin, "meta", path)  # all numbers come from the file
    fill(twin, stored, path)
    if any(tensor.is_meta for tensor in (*twin.parameters(), *twin.buffers())):  # but for those no file has
        twin = _built(origin, "cpu", path)
        fill(twin, stored, path)
    return twin.eval()


def _built(origin: Origin, device: str, path: str | Path) -> nn.Module:
    try:
        return origin.build(device)
    except (ValueError, TypeError) as error:
        raise CompressionError(f"the network that {path} names cannot be built: {error}") from error


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside torch.compile, DataParallel and DistributedDataParallel, which rename its tensors.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> unwrapped(torch.compile(nn.DataParallel(net))) is net
        True
    """
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        else:
            return model


@dataclass(frozen=True, eq=False)
class Contents:
    """What a file holds.

    Attributes:
        version: of the format.
        stored: the tensors by name.
        origin: the network of our spaces that it is, or None.
    """

    version: int
    stored: Mapping[str, Stored]
    origin: Origin | None


def read(path: str | Path) -> Contents:
    """Return what is in a file that `save` wrote. Its tensors may be the file's own memory: never change them.

    Raises:
        CompressionError: see `load`.
    """
    if Path(path).is_dir():
        raise CompressionError(f"cannot read {path}: it is a folder. Name a file that compress.save wrote.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            header = _header(path, metadata)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except OSError as error:
        raise CompressionError(f"cannot read {path}: {error}. Name a file that compress.save wrote.") from None
    except SafetensorError as error:
        if Path(path).suffix == ".onnx":
            raise CompressionError(
                f"{path} is no safetensors file: a deployed network is Deployed.load({str(path)!r})."
            ) from None
        with Path(path).open("rb") as raw:
            zipped = raw.read(len(_ZIP)) == _ZIP
        if zipped:
            raise CompressionError(
                f"{path} was not written by compress.save but by torch.save: read it with torch.load, put it into the "
                "network with load_state_dict, and write that with compress.save."
            ) from None
        raise CompressionError(
            f"{path} is damaged, or no safetensors file ({error}). Name a file that compress.save wrote."
        ) from None
    if checksum(metadata["compress"], arrays) != metadata.get("sha256"):
        raise _damaged(path, "its checksum is another")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, array in arrays.items():
        parts.setdefault(key if key in header["tensors"] else key.rpartition("/")[0], {})[key] = array
    stored: dict[str, Stored] = {}
    for name, entry in header["tensors"].items():
        try:
            groups = whole(entry.get("groups", 1), 1)
            if "same" in entry:
                stored[name] = replace(stored[entry["same"]], groups=groups, bytes=0)
                continue
            stored[name] = decode(entry, name, parts.pop(name, {}), groups)
        except (CompressionError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            what = error if isinstance(error, CompressionError) else f"its entry makes no sense ({error!r})"
            raise _damaged(path, f"{name!r}: {what}") from None
    if parts:
        raise _damaged(path, f"nothing says what its arrays of {min(parts)!r} are")
    try:
        origin = Origin.from_json(json.dumps(header["origin"])) if "origin" in header else None
    except SettingError as error:
        raise CompressionError(f"the network that {path} names cannot be built: {error}") from None
    return Contents(header["version"], stored, origin)


def _header(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if "compress" not in metadata:
        raise CompressionError(
            f"{path} was not written by compress.save: it is a safetensors file of another kind. Read it with "
            "safetensors.torch.load_file, put it into the network with load_state_dict, and write that with "
            "compress.save."
        )
    try:
        header = json.loads(metadata["compress"])
        version = header["version"]
        if isinstance(version, int) and version > VERSION:
            raise CompressionError(
                f"{path} has format {version}, this version reads up to {VERSION}. Update nasbench-toolkit."
            )
        if version not in range(1, VERSION + 1) or not isinstance(header["tensors"], dict):
            raise _damaged(path, "its header makes no sense")
    except CompressionError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, f"its header makes no sense ({error!r})") from None
    return dict(header)


def _damaged(path: str | Path, what: str) -> CompressionError:
    return CompressionError(
        f"{path} is damaged: {what.rstrip('.')}. Save the model again, or restore the file from a copy."
    )


def _sort_metadata(path: Path) -> None:
    """Put the metadata, which safetensors writes in any order, in order: the same model gives the same file."""
    with path.open("rb+") as file:
        header = file.read(int.from_bytes(file.read(8), "little")).decode()
        start = header.index("{", 1)
        metadata, end = json.JSONDecoder().raw_decode(header, start)
        ordered = json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode()
        assert len(ordered) == end - start
        file.seek(8 + start)  # no text before it, and none in it, is other than ASCII
        file.write(ordered)


def checksum(text: str, arrays: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a header's text and all arrays, with their names, types and shapes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"\n{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
