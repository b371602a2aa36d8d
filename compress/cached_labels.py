"""Soft labels kept in a file: what teachers say of every crop that a training will see, asked once.

The file is a plain safetensors file with the array "probabilities", float32 (epochs, steps, B, k), of a text
(epochs, steps, B, k, T). If k is smaller than the number of classes, "classes" of the same shape says which classes
they are of. The metadata has two entries: "soft_labels" is JSON, the version of the format and what the labels are for;
"sha256" is the checksum of that text and of the arrays.
"""

from __future__ import annotations

import json
import numbers
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from compress.errors import CompressionError
from compress.storage import checksum
from compress.teachers import Teacher, Teachers, mean_probabilities
from nasbench.batches import Batch, Data
from nasbench.files import atomic_write
from nasbench.recipe import Recipe, is_number
from nasbench.training import device_of
from search_spaces.layouts import laid_out

VERSION = 1
_FOR = ("data", "split", "seed", "batch_size", "augment", "cutout", "temperature")  # must be the same in training


class SoftLabels:
    """Probabilities of classes for every crop of some epochs of training, read from a file; see `soft_labels`.

    Batches are functions of seed, epoch and step, so that a training sees the very crops that the teachers saw. After
    the last epoch in the file, the crops and labels of the first come again.

    Args:
        path: a file that `soft_labels` wrote. It is mapped into memory, and read once to verify its checksum.

    Attributes:
        settings: what the labels are for and of: data (its fingerprint), classes, split, seed, batch size, ...
        epochs: how many are in the file.
        k: how many classes of each crop are in the file.

    Raises:
        CompressionError: the file cannot be read, is damaged, of another kind or a newer version.

    Source: the fast variant of Shen and Savvides, MEAL V2, 2020, arXiv:2009.08453, which keeps five of 1,000 classes of
    eight crops of each image, and spreads what is left evenly over the others.
    """

    def __init__(self, path: str | Path) -> None:
        if not isinstance(path, str | Path):
            raise CompressionError(
                f"soft labels are in a file that compress.soft_labels wrote, got {type(path).__name__}."
            )
        self.path = Path(path).expanduser()
        self.settings, arrays, self.checksum = _read(self.path)
        self._probabilities, self._classes = arrays["probabilities"], arrays.get("classes")
        self.epochs, self.steps, _, self.k = self._probabilities.shape[:4]

    def __repr__(self) -> str:
        return (
            f"SoftLabels({str(self.path)!r}: {self.k} of {self.settings['classes']} classes, {self.epochs} epochs of "
            f"{self.steps} steps, batches of {self._probabilities.shape[2]})"
        )

    def at(self, epoch: int, step: int, rank: int = 0, world: int = 1) -> Tensor:
        """Return the probabilities for the batch of one step of an epoch: (B, classes), of a text (B, classes, T).

        Args:
            rank, world: of the batch, return each `world`-th row, from row `rank` on.
        """
        place = epoch % self.epochs, step, slice(rank, None, world)
        kept: Tensor = self._probabilities[place]
        if self._classes is None:
            return kept
        classes: int = self.settings["classes"]
        rest = (1 - kept.sum(1, keepdim=True)).clamp_(min=0) / (classes - self.k)
        return rest.expand(-1, classes, *kept.shape[2:]).scatter(1, self._classes[place].long(), kept)

    def check(self, data: Data, recipe: Recipe, seed: int, split: str, temperature: float) -> None:
        """Refuse a training that would see other crops than the teachers did, or want another temperature.

        Raises:
            CompressionError: it would.
        """
        here = _purpose(data, recipe, seed, split, temperature)
        differ = [f"{name} was {self.settings.get(name)!r}, here it is {here[name]!r}" for name in _FOR]
        differ = [line for line, name in zip(differ, _FOR, strict=True) if self.settings.get(name) != here[name]]
        if differ:
            raise CompressionError(
                f"{self.path} has labels for other crops: {'; '.join(differ)}. Train with the settings that they were "
                "made with, or make labels for these with compress.soft_labels."
            )

    def repeated(self, data: Data) -> Data:
        """Return the data with epochs that come again as those in the file do."""
        return cast("Data", _Repeated(data, self.epochs))


def soft_labels(
    teachers: Teacher | Iterable[Teacher],
    data: Data,
    path: str | Path,
    *,
    k: int | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    split: str = "train",
    temperature: float = 1.0,
    progress: bool = True,
    **changes: Any,
) -> SoftLabels:
    """Ask the teachers once about every crop of some epochs, and write their mean probabilities into a file.

    ``compress.distill(student, labels=...)`` then trains any number of students without teachers. With all classes kept
    each comes out exactly as from live teachers, on one kind of processor with one number of threads.

    Teachers work where they are and in float32, unless this is called under ``torch.autocast``.

    Args:
        teachers: see `compress.distillation.distill`.
        data: whose training batches they are asked about.
        path: of the file, which is written as a whole at the end, or not at all.
        k: how many of the likeliest classes to keep of each crop; None keeps all. What the others had together is
            spread evenly over them. A crop takes 4 bytes for each kept class, and 1, 2 or 4 for its number if k is
            smaller than the number of classes.
        recipe: of the students' training: epochs, batch size and augmentation count; `changes` replace fields of it. A
            longer training gets the crops and labels of the first epochs again.
        seed, split: of the students' training.
        temperature: logits are divided by it.

    Raises:
        CompressionError: there are no teachers, they do not fit the data, or k or the temperature is out of range.
        SettingError, DataError: a bad recipe, or no such split.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> import nasbench as nb
        >>> data = nb.data.load("digits", train_images=200)
        >>> teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> path = Path(tempfile.mkdtemp()) / "labels.safetensors"
        >>> labels = soft_labels(teacher, data, path, k=3, epochs=2, batch_size=32, progress=False)
        >>> labels.at(epoch=0, step=4).shape, labels.epochs, labels.steps
        (torch.Size([32, 10]), 2, 5)

    Source: see `SoftLabels`. The released files keep the coordinates of each crop; here they follow from the seed.
    """
    recipe = (recipe or Recipe()).replace(**changes)
    require_data(data)
    require_temperature(temperature)
    if not is_number(seed, numbers.Integral) or seed < 0:
        raise CompressionError(f"seed={seed!r}, but a seed is a whole number, 0 or more.")
    ensemble = Teachers(teachers)
    if k is not None and (type(k) is not int or not 1 <= k <= data.classes):
        raise CompressionError(
            f"k={k!r}, but {data.name} has {data.classes} classes; keep 1 to {data.classes} of them."
        )
    kept = data.classes if k is None else k
    modules = [teacher for teacher in ensemble.all if isinstance(teacher, nn.Module)]
    data = data.to(device_of(modules[0])) if modules else data
    check_teachers(ensemble, data, recipe, seed, split, data.device)

    steps = data.steps(recipe.batch_size, split)
    probabilities, classes = torch.empty(0), torch.empty(0)
    with (
        atomic_write(Path(path).expanduser()) as temporary,
        tqdm(total=recipe.epochs * steps, desc="soft labels", unit="step", disable=not progress) as bar,
    ):
        for epoch in range(recipe.epochs):
            for step, x in enumerate(_inputs(data, recipe, seed, split, epoch)):
                found = mean_probabilities(ensemble.logits(x), temperature).cpu()
                if not len(probabilities):
                    shape = (recipe.epochs, steps, len(found), kept, *found.shape[2:])
                    probabilities, classes = torch.empty(shape), torch.empty(shape, dtype=_smallest(data.classes))
                if kept < data.classes:
                    probabilities[epoch, step], classes[epoch, step] = found.topk(kept, dim=1)
                else:
                    probabilities[epoch, step] = found
                bar.update()
        arrays = {"probabilities": probabilities} | ({"classes": classes} if kept < data.classes else {})
        purpose = _purpose(data, recipe, seed, split, temperature)
        text = json.dumps({"version": VERSION, "classes": data.classes, **purpose})
        save_file(arrays, temporary, {"soft_labels": text, "sha256": checksum(text, arrays)})
    return SoftLabels(path)


def require_data(data: object) -> None:
    if not isinstance(data, Data):
        raise CompressionError(
            f"data is what nasbench.data.load returns, got {type(data).__name__}. In a loop of your own, use "
            "compress.DistillationLoss."
        )


def require_temperature(temperature: object) -> None:
    if not is_number(temperature) or temperature <= 0:  # type: ignore[operator]
        raise CompressionError(
            f"temperature={temperature!r}; it must be a number above 0. 1 leaves logits as they are."
        )


def check_teachers(teachers: Teachers, data: Data, recipe: Recipe, seed: int, split: str, device: torch.device) -> None:
    """Ask the teachers about the first batch, which comes from this device.

    Raises:
        CompressionError: they do not fit.
    """
    x = next(iter(_inputs(data, recipe, seed, split, epoch=0)))
    teachers.check(x.to(device), (len(x), data.classes, *(data.shape if len(data.shape) == 1 else ())))


def _inputs(data: Data, recipe: Recipe, seed: int, split: str, epoch: int) -> Iterator[Tensor]:
    """Yield what teachers see in one epoch of `nasbench.fit`."""
    settings: dict[str, Any] = {"augment": recipe.augment, "cutout": recipe.cutout, "split": split}
    for x, _ in data.train_batches(recipe.batch_size, seed=seed, epoch=epoch, **settings):
        yield for_teachers(x, recipe)


def for_teachers(x: Tensor, recipe: Recipe) -> Tensor:
    """Return images in the memory format that the recipe names; the student may have another.

    The last bits of what teachers say depend on it, and cached labels have to be those of live teachers.
    """
    if x.ndim != 4 or not recipe.channels_last:
        return laid_out(x, torch.contiguous_format)
    rows = x.permute(0, 2, 3, 1).contiguous()
    return rows.flatten().view(rows.shape).permute(0, 3, 1, 2)  # the very strides, also of a single channel


def _purpose(data: Data, recipe: Recipe, seed: int, split: str, temperature: float) -> dict[str, Any]:
    crops = {"batch_size": recipe.batch_size, "augment": recipe.augment, "cutout": recipe.cutout}
    return {"data": data.fingerprint, "split": split, "seed": int(seed), **crops, "temperature": float(temperature)}


def _smallest(classes: int) -> torch.dtype:
    return torch.uint8 if classes <= 2**8 else torch.int16 if classes <= 2**15 else torch.int32


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Return the settings, the arrays and the checksum of a file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except OSError as error:
        raise CompressionError(f"cannot read {path}: {error}. Name a file that compress.soft_labels wrote.") from None
    except SafetensorError as error:
        raise CompressionError(
            f"{path} is damaged, or no safetensors file ({error}). Name a file that compress.soft_labels wrote."
        ) from None
    if "soft_labels" not in metadata:
        raise CompressionError(f"{path} has no soft labels. Name a file that compress.soft_labels wrote.")
    damaged = CompressionError(f"{path} is damaged: write it again with compress.soft_labels.")
    try:
        settings = json.loads(metadata["soft_labels"])
        version, _ = settings["version"], settings["classes"]
    except (ValueError, TypeError, KeyError):
        raise damaged from None
    if isinstance(version, int) and version > VERSION:
        raise CompressionError(
            f"{path} has format {version}, this version reads up to {VERSION}. Update nasbench-toolkit."
        )
    found = checksum(metadata["soft_labels"], arrays)
    if found != metadata.get("sha256") or "probabilities" not in arrays or arrays["probabilities"].ndim < 4:
        raise damaged
    return settings, arrays, found


class _Repeated:
    """Data of which epoch e is epoch ``e % epochs``; all else is that of the data."""

    def __init__(self, data: Data, epochs: int) -> None:
        self._data, self._epochs = data, epochs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_data"], name)

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self._data.to(device), self._epochs)

    def train_batches(self, batch_size: int, *, epoch: int, **settings: Any) -> Iterator[Batch]:
        return self._data.train_batches(batch_size, epoch=epoch % self._epochs, **settings)
