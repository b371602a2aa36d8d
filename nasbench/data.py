"""Data to search on, by name or from files: `load`; from numpy arrays: `from_arrays`.

Both check everything, so that what they return never has to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nasbench.batches import Batch, Data, keyed_generator
from nasbench.errors import DataError, SettingError
from nasbench.images import FolderData, ImageData, TensorData, from_arrays
from nasbench.sources import NAMES, cifar, digits, read_npz, svhn
from nasbench.text import CONTEXT, PYDOC, TextData, pydoc, read_text
from search_spaces.base import nearest

__all__ = [
    "Batch",
    "Data",
    "FolderData",
    "ImageData",
    "TensorData",
    "TextData",
    "from_arrays",
    "keyed_generator",
    "load",
]

_ROOT = "~/.cache/nasbench"


def load(
    source: str | Path,
    *,
    root: str | Path = _ROOT,
    download: bool = False,
    val_fraction: float = 0.2,
    seed: int = 0,
    size: int | None = None,
    train_images: int | None = None,
    crop: int | None = None,
    flip: bool | None = None,
    workers: int | None = None,
    context: int | None = None,
    characters: int | None = None,
) -> Data:
    """Load images by name, from an .npz file, or from folders of files; or a text, by name or from a file.

    Args:
        source: ``"digits"`` (1,797 scanned digits, 8x8, part of scikit-learn: no download), ``"cifar10"``,
            ``"cifar100"``, ``"svhn"``; the path of an .npz file with arrays x_train, y_train and perhaps x_test, y_test
            as in `from_arrays`; or a folder with one folder of image files per class, or two such folders, train and
            test. A text is ``"pydoc"`` (the help texts that come with Python, some 460,000 characters: no download), or
            the path of a UTF-8 file: one called .txt, or any if `context` is given.
        root: the folder of downloaded files.
        download: fetch the named set if it is not there.
        val_fraction: share of the training images set aside for validation, equally from every class. Of a text, share
            of what comes before its test split, the last tenth.
        seed: decides which. The test images are the same for every seed. A text is split in order, so it has no seed.
        size: resize images to this many pixels a side. Files of different sizes need it: they are scaled, and cropped
            around their centre.
        train_images: use only so many of the training images (validation included), equally from every class.
        crop, flip: augmentation in training: the largest shift in pixels (default: an eighth of the width), and
            mirroring (default: yes, except for the digits of "digits" and "svhn").
        workers: processes that read files of a folder (default: one per processor, at most 4; 0 reads in this process).
        context: characters of a text that a network sees (default: 64).
        characters: use only so many characters from the start of a text.

    Raises:
        DataError: there is no such data set, its files are absent or unusable, or a split would miss a class or be
            shorter than a window.
        SettingError: a setting is out of range, or is about images and the data are a text, or the other way round.

    Example:
        >>> load("digits")
        TensorData('digits': 1150 train, 287 val, 360 test images 1x8x8, 10 classes, on cpu)
        >>> load("pydoc", characters=100_000, context=128).shape
        (128,)
    """
    if _is_text(source, context, characters):
        _refuse(source, "a text", "images", seed=seed or None, root=None if str(root) == _ROOT else root)
        _refuse(source, "a text", "images", download=download or None, size=size, train_images=train_images)
        _refuse(source, "a text", "images", crop=crop, flip=flip, workers=workers)
        context = CONTEXT if context is None else context
        return _text(source, {"context": context, "val_fraction": val_fraction, "characters": characters})
    _refuse(source, "images", "texts", context=context, characters=characters)
    settings: dict[str, Any] = {"val_fraction": val_fraction, "seed": seed, "train_images": train_images, "crop": crop}
    settings |= {"flip": flip, "size": size}
    data = _named(source, Path(root).expanduser(), download, workers, settings)
    data.spec = {"source": str(source), "root": str(root), "workers": workers, **settings}
    return data


def _is_text(source: str | Path, *settings_of_texts: int | None) -> bool:
    path = Path(source).expanduser()
    if source == PYDOC or source in NAMES or path.is_dir() or path.suffix == ".npz":
        return source == PYDOC
    return path.suffix == ".txt" or any(value is not None for value in settings_of_texts)


def _refuse(source: str | Path, kind: str, other: str, **settings: Any) -> None:
    """Say that a setting is about the other kind of data, if one is given."""
    for name, value in settings.items():
        if value is not None:
            raise SettingError(f"{name}={value!r} is about {other}, but {source} holds {kind}. Leave {name} out.")


def _text(source: str | Path, settings: dict[str, Any]) -> TextData:
    path = Path(source).expanduser()
    name, text = (PYDOC, pydoc()) if source == PYDOC else (path.stem, read_text(path))
    data = TextData(name, text, **settings)
    data.spec = {"source": str(source), **settings}
    return data


def _named(source: str | Path, folder: Path, download: bool, workers: int | None, settings: dict[str, Any]) -> Data:
    if source in ("digits", "svhn"):
        settings["flip"] = bool(settings["flip"])  # a mirrored digit is none
    if source == "digits":
        return from_arrays(*digits(), name="digits", **settings)
    if source == "svhn":
        return from_arrays(*svhn(folder, download), name="svhn", **settings)
    if source in ("cifar10", "cifar100"):
        arrays, class_names = cifar(str(source), folder, download)
        return from_arrays(*arrays, name=str(source), class_names=class_names, **settings)
    path, names = Path(source).expanduser(), [*NAMES, PYDOC]
    if path.is_dir():
        return FolderData(path, workers=workers, **settings)
    if path.suffix == ".npz":
        return from_arrays(*read_npz(path), name=path.stem, **settings)
    if path.exists():
        raise DataError(
            f"{path} is neither a folder nor an .npz file. Save arrays with np.savez(path, x_train=..., y_train=...). "
            f"If it is a text, pass context={CONTEXT}, or call it .txt."
        )
    if isinstance(source, Path) or len(path.parts) > 1:
        raise DataError(f"there is no {path}. Give a folder, an .npz file, or one of {', '.join(names)}.")
    raise DataError(f"no data set {source!r}, and no such folder or .npz file; {nearest(source, names)}")
