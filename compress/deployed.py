"""Networks as they are shipped: one ONNX file that onnxruntime runs, called like the model.

The file is an ordinary ONNX file. Its metadata has two entries. "compress" is JSON: the version of the format, the
option of every layer, and which layers stayed float and why. The last bytes of the file are the other, "sha256": the
checksum of all bytes before. Nothing is pickled.
"""

from __future__ import annotations

import builtins
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from compress.errors import CompressionError
from compress.exporting import require_onnx
from nasbench.files import atomic_write
from nasbench.profile import Latency

VERSION = 1
_SEAL = b"\x72\x4a\x0a\x06sha256\x12\x40"  # an entry of an ONNX file's metadata, up to the 64 digits that are its value
_TIMINGS = 5  # fewest: the spread of fewer says nothing


class Deployed(nn.Module):
    """A network in an ONNX file, run by onnxruntime; made by `to_int8`, `Deployer.deploy` and `Deployed.load`.

    It is called like the model, in evaluation, and also where one is measured: ``nasbench.validate(deployed, data)``.
    It has no parameters, and its outputs no gradients.

    Args:
        content: of the file.
        threads: that it runs on; default: as many as torch now uses.

    Attributes:
        policy: the option of every layer.
        kept_float: layers that are float though something else was asked for, and why.
        threads: that it runs on.

    Raises:
        ImportError: onnxruntime is not installed.
        CompressionError: the content is not that of such a file, or damaged.
    """

    def __init__(self, content: builtins.bytes, threads: int | None = None) -> None:
        super().__init__()
        check_threads(threads)
        _check(content)
        self.threads = torch.get_num_threads() if threads is None else threads
        self._content = content
        self._session = _session(content, self.threads)
        self._inputs = [put.name for put in self._session.get_inputs()]
        if (text := self._session.get_modelmeta().custom_metadata_map.get("compress")) is None:
            raise CompressionError("the file does not say what its layers are; it is none that Deployed.save wrote.")
        header = json.loads(text)
        if header["version"] > VERSION:
            raise CompressionError(
                f"the file has format {header['version']}, this version of compress reads up to {VERSION}; update it."
            )
        self.policy: dict[str, str] = header["policy"]
        self.kept_float: dict[str, str] = header["kept_float"]

    @classmethod
    def load(cls, path: str | Path, *, threads: int | None = None) -> Self:
        """Open a file that `save` wrote.

        Raises:
            ImportError: onnxruntime is not installed.
            CompressionError: there is no such file, it is another one, of a newer format, damaged or changed.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise CompressionError(f"cannot read {path}: {error.strerror}.") from error
        try:
            return cls(content, threads)
        except CompressionError as error:
            raise CompressionError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all, and return its path. onnxruntime alone runs it, without torch.

        Where int8 is run by x86 processors without VNNI, give its session what this class gives its own, or sums
        overflow: ``options.add_session_config_entry("session.x64quantprecision", "1")``.

        Raises:
            OSError: it cannot be written.
        """
        with atomic_write(path) as temporary:
            temporary.write_bytes(self._content)
        return Path(path)

    @property
    def bytes(self) -> int:
        """The size of the file."""
        return len(self._content)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return what the network gives for a batch, on the CPU; a tuple if it gives several tensors.

        Raises:
            CompressionError: the network does not take it.
        """
        found = tuple(torch.from_numpy(y) for y in self._run(self._feed(inputs)))
        return found[0] if len(found) == 1 else found

    def latency(self, example: Tensor | tuple[Tensor, ...], *, min_seconds: float = 0.2) -> Latency:
        """Return how long onnxruntime takes for a batch, after a warm-up, measured for so long and five times at least.

        Args:
            example: a batch; a tuple if the network takes several inputs.

        Raises:
            CompressionError: the network does not take it.
        """
        from torch.utils.benchmark import Measurement, Timer  # which load torch's C++ compiler driver

        feed = self._feed(example if isinstance(example, tuple) else (example,))
        self._run(feed)
        timer = Timer("run(None, feed)", globals={"run": self._session.run, "feed": feed}, num_threads=self.threads)
        first = timer.blocked_autorange(min_run_time=min_seconds)
        more = [timer.timeit(first.number_per_run) for _ in range(len(first.times), _TIMINGS)]
        (timings,) = Measurement.merge([first, *more])
        return Latency(
            median_ms=timings.median * 1e3,
            iqr_ms=timings.iqr * 1e3,
            repeats=len(timings.times),
            threads=self.threads,
            device="cpu",
            batch=len(next(iter(feed.values()))),
        )

    def extra_repr(self) -> str:
        options = ", ".join(f"{count} {option}" for option, count in Counter(self.policy.values()).items())
        return f"{options}; {self.bytes:,} bytes, threads={self.threads}"

    def __deepcopy__(self, memo: Any) -> Deployed:
        return Deployed(self._content, self.threads)

    def _feed(self, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
        if len(inputs) != len(self._inputs) or not all(isinstance(x, Tensor) for x in inputs):
            given = ", ".join(type(x).__name__ for x in inputs)
            raise CompressionError(f"the network takes {len(self._inputs)} tensors, got {given or 'nothing'}.")
        if any(x.dtype == torch.bfloat16 for x in inputs):
            raise CompressionError("the network takes no bfloat16 tensors; give x.float().")
        return {name: x.detach().cpu().contiguous().numpy() for name, x in zip(self._inputs, inputs, strict=True)}

    def _run(self, feed: dict[str, Any]) -> list[Any]:
        try:
            return self._session.run(None, feed)  # type: ignore[no-any-return]
        except Exception as error:  # onnxruntime has a class for each code, and no common one
            wanted = ", ".join(f"{put.type} {put.shape}" for put in self._session.get_inputs())
            given = ", ".join(f"{x.dtype} {[*x.shape]}" for x in feed.values())
            raise CompressionError(
                f"the network takes {wanted}, got {given}. Images are float tensors: x.float()."
            ) from error


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads that makes no sense.

    Raises:
        CompressionError: it is no whole number of 1 at least.
    """
    if threads is not None and (type(threads) is not int or threads < 1):
        raise CompressionError(f"threads={threads!r}: give a whole number, 1 at least.")


def sealed(content: bytes) -> bytes:
    """Return an ONNX file's content with its checksum behind it, as one more entry of its metadata."""
    return content + _SEAL + hashlib.sha256(content).hexdigest().encode()


def _check(content: bytes) -> None:
    end = len(content) - len(_SEAL) - 64
    if end < 0 or content[end : end + len(_SEAL)] != _SEAL:
        raise CompressionError("this is no file that Deployed.save wrote, or its end is missing.")
    if sealed(content[:end]) != content:
        raise CompressionError("the file is damaged or was changed: its checksum is another. Make it again.")


def _session(content: bytes, threads: int) -> Any:
    require_onnx("Deployed", ("onnxruntime",))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Without VNNI, x86 processors add products of eight bits in sums that overflow; this keeps them exact, and slower.
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class for each code, and no common one
        raise CompressionError(f"onnxruntime {onnxruntime.__version__} cannot run it: {error}") from error
