"""Where images come from: files and packages, read and checked; nothing here knows of splits or batches."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nasbench.errors import DataError, SettingError
from nasbench.splits import Array, stratified

NAMES = ("digits", "cifar10", "cifar100", "svhn")


def as_images(what: str, x: Any, size: int | None = None) -> Tensor:
    """Return the images as a uint8 tensor (N, H, W, C), or say what is wrong with them."""
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8:
        kind = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
        raise DataError(
            f"{what} has type {kind}; images are numpy arrays of uint8, 0 to 255. Convert them: x.astype(np.uint8)."
        )
    shape = x.shape
    if x.ndim == 3:
        x = x[..., None]
    elif x.ndim == 4 and shape[3] not in (1, 3) and shape[1] in (1, 3):
        x = x.transpose(0, 2, 3, 1)
    if x.ndim != 4 or x.shape[3] not in (1, 3):
        raise DataError(
            f"{what} has shape {shape}; images are (N, H, W), or (N, H, W, C) or (N, C, H, W) with 1 or 3 channels."
        )
    if not x.size:
        raise DataError(f"{what} is empty: its shape is {shape}. Give at least one image of one pixel.")
    images = torch.from_numpy(np.ascontiguousarray(x))
    return images if size is None else _resized(images, size)


def _resized(images: Tensor, size: int) -> Tensor:
    if size < 1:
        raise SettingError(f"size={size}: images are one pixel wide at least.")
    parts = [
        functional.interpolate(part.permute(0, 3, 1, 2).float(), (size, size), mode="bilinear", antialias=True)
        for part in torch.split(images, 1024)
    ]
    return torch.cat([part.round().clamp(0, 255).byte().permute(0, 2, 3, 1) for part in parts]).contiguous()


def as_labels(what: str, y: Any, count: int) -> Array:
    """Return the labels as int64 (N,), or say what is wrong with them."""
    if not isinstance(y, np.ndarray) or not np.issubdtype(y.dtype, np.integer):
        kind = y.dtype if isinstance(y, np.ndarray) else type(y).__name__
        raise DataError(
            f"{what} has type {kind}; labels are numpy arrays of integers. Convert them: y.astype(np.int64)."
        )
    if y.shape != (count,):
        raise DataError(
            f"{what} has shape {y.shape}, but there are {count} images: one label for each, shape ({count},)."
        )
    if y.min() < 0:
        raise DataError(f"{what} has label {y.min()}; labels are 0 to classes - 1.")
    return y.astype(np.int64)


def digits() -> list[Array]:
    """Return scikit-learn's 1,797 scanned digits, 8x8; the test split is fixed, whatever the seed."""
    digits = import_module("sklearn.datasets").load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # grey levels 0..16, kept apart
    test = stratified(digits.target, 360, np.random.default_rng(0))
    return [np.delete(images, test, 0), np.delete(digits.target, test), images[test], digits.target[test]]


def read_npz(path: Path) -> list[Any]:
    if not path.exists():
        raise DataError(
            f"there is no {path}. Write it with np.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)."
        )
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is no .npz file, or it was cut short. Write or copy it again.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("x_train", "y_train", "x_test", "y_test") if key in file}
            found = ", ".join(file.files) or "nothing"
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        hint = "Save plain arrays: pickles are not opened." if "pickle" in str(error) else "Write or copy it again."
        raise DataError(f"{path} cannot be read: {error}. {hint}") from error
    if missing := [key for key in ("x_train", "y_train") if key not in arrays]:
        raise DataError(
            f"{path} has no array {missing[0]!r}, but {found}. Needed: x_train, y_train; optional: x_test, y_test."
        )
    return [arrays.get(key) for key in ("x_train", "y_train", "x_test", "y_test")]


def cifar(name: str, root: Path, download: bool) -> tuple[list[Array], list[str]]:
    dataset = getattr(import_module("torchvision.datasets"), name.upper())
    try:
        train, test = (dataset(root, train=train, download=download) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise _absent(
            name, root, download, f"{root / dataset.base_folder} (unpack {dataset.filename})", error
        ) from error
    return [train.data, np.array(train.targets), test.data, np.array(test.targets)], train.classes


def svhn(root: Path, download: bool) -> list[Array]:
    arrays: list[Array] = []
    for split in ("train", "test"):
        url, filename, checksum = import_module("torchvision.datasets").SVHN.split_list[split]
        path = root / filename
        try:
            if download and not path.exists():
                import_module("torchvision.datasets.utils").download_url(url, root, filename, checksum)
            if not path.exists():
                raise FileNotFoundError(f"no {filename} in {root}")
        except (OSError, RuntimeError) as error:
            raise _absent("svhn", root, download, str(path), error) from error
        try:
            file = import_module("scipy.io").loadmat(path, variable_names=["X", "y"])
            images, labels = file["X"].transpose(3, 0, 1, 2), file["y"].reshape(-1) % 10  # the digit 0 is labelled 10
        except (OSError, ValueError, KeyError, TypeError, NotImplementedError, zlib.error) as error:
            raise DataError(
                f"{path} is no SVHN file, or it was cut short ({error}). Remove it and fetch it again."
            ) from error
        arrays += [images, labels]
    return arrays


def _absent(name: str, root: Path, download: bool, place: str, error: Exception) -> DataError:
    if download:
        return DataError(
            f"{name} could not be downloaded to {root} ({error}). Check the connection, or put the files at {place}."
        )
    return DataError(f"the files of {name} are not in {root}, or damaged. Pass download=True, or put them at {place}.")


def subfolders(folder: Path) -> list[Path]:
    """Return the folder of the training classes, then that of the test classes if there is one."""
    names = {path.name for path in folder.iterdir() if path.is_dir()}
    if "train" not in names:
        return [folder]
    if others := sorted(names - {"train", "test"}):
        raise DataError(
            f"{folder} has {others[0]!r} beside 'train'. Give it train and test alone (validation images come from "
            "train), or one folder per class."
        )
    return [folder / name for name in ("train", "test") if name in names]


def image_folder(folder: Path) -> Any:
    try:
        return import_module("torchvision.datasets").ImageFolder(str(folder), loader=_colours)
    except FileNotFoundError as error:
        raise DataError(f"{folder} holds no images by class ({error}). Put them in one folder per class.") from error


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    try:
        with import_module("PIL.Image").open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}). Remove or replace it.") from error


def _colours(path: str) -> Any:
    with _opened(path) as image:
        return image.convert("RGB")


def fitted(height: int, width: int, image: Any) -> Tensor:
    """Return the image as bytes (H, W, C), scaled to cover this size and cropped around its centre."""
    if image.size != (width, height):
        scale = max(width / image.width, height / image.height)
        x, y = (image.width - width / scale) / 2, (image.height - height / scale) / 2
        box = (x, y, image.width - x, image.height - y)
        image = image.resize((width, height), import_module("PIL.Image").Resampling.BILINEAR, box=box)
    return torch.from_numpy(np.array(image))


def common_size(paths: Sequence[str]) -> tuple[int, int]:
    """Return the height and width that all these images have, or say that they differ."""
    found: dict[tuple[int, int], str] = {}
    for path in paths:
        with _opened(path) as image:
            found.setdefault((image.height, image.width), path)
        if len(found) > 1:
            sizes = ", ".join(f"{first} {height}x{width}" for (height, width), first in found.items())
            raise DataError(f"images differ in size: {sizes}. Pass size= to scale and crop them to one.")
    return next(iter(found))
