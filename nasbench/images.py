"""Images to search on: split once and for all, drawn in augmented batches.

`nasbench.data.load` and `from_arrays` check everything, so that `ImageData` never has to.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from nasbench.batches import Batch, Data, keyed_generator
from nasbench.errors import DataError, SettingError
from nasbench.sources import as_images, as_labels, common_size, fitted, image_folder, subfolders
from nasbench.splits import Array, split_rows, stratified

Store = tuple[Tensor, Tensor, Tensor]

_STORE_BYTES = 2**31  # larger sets of padded images are padded batch by batch instead
_STATISTICS_IMAGES = 2048  # of a folder, this many images tell mean and deviation


class ImageData(Data):
    """Labelled images in a training, a validation and perhaps a test split: what networks are trained and judged on.

    Get one from `nasbench.data.load` or `from_arrays`. Batches are pairs of images x, float32 (B, C, H, W) in
    channels_last memory format, scaled to zero mean and unit deviation per channel of the training split, and labels y,
    int64 (B,). Test images are given to `nasbench.evaluate` alone.

    In a training loop of your own on the CPU, narrow networks need contiguous images, as `nasbench.fit` gives them:
    ``laid_out(x, layout_for(model))`` of `search_spaces.layouts`, which says why.

    Attributes (see `Data` for those of all kinds):
        channels, height, width: the size of an image.
        crop, flip: in training, images shift by up to `crop` pixels over a black border, and are mirrored at random.
    """

    units = "images"
    _cached = ("_scaling", "_here", "_store")

    def __init__(
        self,
        name: str,
        labels: Array,
        test_labels: Array | None,
        class_names: Sequence[str],
        shape: tuple[int, int, int],
        *,
        val_fraction: float,
        seed: int,
        train_images: int | None,
        crop: int | None,
        flip: bool | None,
    ) -> None:
        super().__init__(name, class_names)
        self.channels, self.height, self.width = shape
        self.crop = round(self.width / 8) if crop is None else crop
        self.flip = True if flip is None else flip
        self._within("crop", self.crop)
        train, val = split_rows(name, labels, self.classes, val_fraction, seed, train_images)
        self._rows = {"train": train, "val": val, "train+val": np.sort(np.concatenate([train, val]))}
        self._labels = torch.from_numpy(labels)
        self._test_labels = None if test_labels is None else torch.from_numpy(test_labels)

    @property
    def _size(self) -> str:
        return f"{self.channels}x{self.height}x{self.width}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image as a network sees it: (channels, height, width)."""
        return self.channels, self.height, self.width

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of images, labels, split and settings: equal for equal data, in every process."""
        digest = hashlib.sha256(self._content.encode())
        digest.update(self._rows["train"].tobytes() + self._rows["val"].tobytes())
        digest.update(json.dumps([self.shape, self.class_names, self.crop, self.flip]).encode())
        return digest.hexdigest()[:12]

    def count(self, split: str) -> int:
        """Return the number of images in ``"train"``, ``"val"``, ``"train+val"`` or ``"test"`` (0: no test set)."""
        if split == "test":
            return 0 if self._test_labels is None else len(self._test_labels)
        return len(self._split(split))

    def halves(self, seed: int = 0) -> tuple[Self, Self]:
        """Return the data twice, each with one half of the training images, drawn equally from every class.

        Everything else is the same, the scaling of the images included. For searches that learn weights on one half and
        the architecture on the other.

        Raises:
            DataError: there are too few images for every class to be in both.

        Example:
            >>> from nasbench.data import load
            >>> [half.count("train") for half in load("digits").halves()]
            [575, 575]
        """
        rows = self._rows["train"]
        labels = self._labels.numpy()[rows]
        picks = stratified(labels, len(rows) // 2, np.random.default_rng(seed))
        halves = []
        for part in (rows[picks], np.delete(rows, picks)):
            if len(missing := np.setdiff1d(np.arange(self.classes), self._labels.numpy()[part])):
                raise DataError(
                    f"half of the {len(rows)} training images of {self.name} has none of class {missing[0]}: a search "
                    "that learns weights and architecture on halves needs more images."
                )
            half = copy.copy(self)
            half.__dict__["_scaling"] = self._scaling
            half._rows = self._rows | {"train": part}
            halves.append(half)
        return halves[0], halves[1]

    def train_batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        start: int = 0,
        augment: bool = True,
        cutout: int = 0,
        split: str = "train",
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[Batch]:
        """Yield the shuffled, augmented batches of one epoch; see `Data.train_batches` for the arguments.

        To augment, images are shifted and mirrored, as `crop` and `flip` say.

        Example:
            >>> from nasbench.data import load
            >>> x, y = next(load("digits").train_batches(64, seed=0, epoch=0))
            >>> x.shape, y.shape
            (torch.Size([64, 1, 8, 8]), torch.Size([64]))

        Source: cutout, DeVries and Taylor 2017, arXiv:1708.04552: a square centred anywhere, clipped at the border.
        """
        size, positions = self._shuffled(batch_size, seed, epoch, start, split, rank, world)
        self._within("cutout", cutout)
        rows_of_split = torch.from_numpy(self._split(split))
        batches = [rows_of_split[place] for place in positions]

        def draw() -> Iterator[Batch]:
            for step, (rows, store, where) in enumerate(self._stores(batches, augment), start):
                draws = torch.randint(2**31 - 1, (5, size), generator=keyed_generator(seed, epoch, step))[
                    :, rank::world
                ]
                top, left, mirrored, y, x = draws.to(self.device)
                if augment and self.flip:
                    where = where + (mirrored & 1) * (len(store) // 2)
                if augment and self.crop:
                    shifts = 2 * self.crop + 1
                    images = self._scaled(self._windows(store, where, top % shifts, left % shifts))
                else:
                    images = self._scaled(store.index_select(0, where))
                if cutout:
                    self._cut(images, y % self.height, x % self.width, cutout)
                yield images.permute(0, 3, 1, 2), self._labels[rows].to(self.device)

        return draw()

    def eval_batches(self, split: str, batch_size: int = 512) -> Iterator[Batch]:
        """Yield the images of ``"train"`` or ``"val"`` once, in a fixed order, scaled and otherwise as they are.

        Raises:
            DataError: there is no such split, or it is ``"test"``, which `evaluate` and `robustness` read.

        Example:
            >>> from nasbench.data import load
            >>> sum(len(y) for _, y in load("digits").eval_batches("val"))
            287
        """
        batches = torch.split(torch.from_numpy(self._split(split)), self._checked(batch_size))
        return self._plain(self._stores(batches, False), self._labels)

    def _test_batches(self, batch_size: int = 512) -> Iterator[Batch]:
        """Yield the test images once. For `evaluate`, `robustness` and `Table.build` alone."""
        if self._test_labels is None:
            raise DataError(
                f"{self.name} has no test images. Load it with x_test and y_test, or a folder 'test', or use validate."
            )
        batches = torch.split(torch.arange(len(self._test_labels)), self._checked(batch_size))
        return self._plain(self._stores(batches, False, test=True), self._test_labels)

    def _plain(self, stores: Iterable[Store], labels: Tensor) -> Iterator[Batch]:
        for rows, store, where in stores:
            yield self._scaled(store.index_select(0, where)).permute(0, 3, 1, 2), labels[rows].to(self.device)

    def _split(self, split: str) -> Array:
        self._check_split(split)
        return self._rows[split]

    def _within(self, setting: str, pixels: int) -> None:
        side = min(self.height, self.width)
        if not 0 <= pixels <= side:
            raise SettingError(
                f"{setting}={pixels} is outside 0..{side}: {self.name} is {self.height}x{self.width} pixels."
            )

    # What the two kinds of images do differently ----------------------------------------------------------------------

    @abstractmethod
    def _stores(self, batches: Sequence[Tensor], augment: bool, test: bool = False) -> Iterator[Store]:
        """Yield for each batch its rows, a store of bytes (N, H, W, C) on the device, and where in the store they are.

        To augment, the store has a border of `crop` pixels and, if `flip`, all its images again, mirrored: `_padded`.
        """

    @property
    @abstractmethod
    def _content(self) -> str:
        """A digest of images and labels."""

    @abstractmethod
    def _sample(self) -> Array:
        """The rows of the training split that tell mean and deviation."""

    # Pixels -----------------------------------------------------------------------------------------------------------

    def _padded(self, images: Tensor) -> Tensor:
        if self.crop:
            images = functional.pad(images, (0, 0, self.crop, self.crop, self.crop, self.crop))
        return torch.cat([images, images.flip(2)]) if self.flip else images

    def _windows(self, store: Tensor, where: Tensor, top: Tensor, left: Tensor) -> Tensor:
        """Return (B, H, W, C) bytes: of each of these images in the store, the window at its own shift."""
        # A row of a window is W*C bytes on end. Over all pixels such rows are one overlapping view, numbered by their
        # first pixel, and one index_select copies all rows of all windows.
        _, rows, columns, channels = store.shape
        view = store.as_strided((store.numel() // channels - self.width + 1, self.width * channels), (channels, 1))
        row = (where * rows + top)[:, None] + torch.arange(self.height, device=store.device)
        first = row * columns + left[:, None]
        return view.index_select(0, first.view(-1)).view(-1, self.height, self.width, channels)

    @cached_property
    def _scaling(self) -> tuple[Tensor, Tensor]:
        """Offset and factor of each byte in a row of pixels, both (W*C,)."""
        count, total, squares = 0, torch.zeros(self.channels).double(), torch.zeros(self.channels).double()
        for _, store, where in self._stores(torch.split(torch.from_numpy(self._sample()), 512), False):
            pixels = store.index_select(0, where).view(-1, self.channels).double()  # whole numbers: sums are exact
            count += len(pixels)
            total += pixels.sum(0).cpu()
            squares += pixels.square().sum(0).cpu()
        mean = total / count
        deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
        factor = torch.where(deviation > 0, 1 / deviation, 1.0)
        return tuple(v.float().repeat(self.width).to(self.device) for v in (-mean * factor, factor))  # type: ignore[return-value]

    def _scaled(self, images: Tensor) -> Tensor:
        offset, factor = self._scaling
        scaled = images.view(len(images), self.height, -1).float()
        return torch.addcmul(offset, scaled, factor, out=scaled).view(images.shape)

    def _cut(self, images: Tensor, y: Tensor, x: Tensor, side: int) -> None:
        """Set the square with these centres to zero, in place: images (B, H, W, C)."""
        # Clipped at the border, a square is still half as wide. So two windows of half its width, one from either end,
        # cover what is left of a row of it: again rows of one overlapping view, numbered by their first pixel.
        half = (side + 1) // 2
        low = (x - side // 2).clamp(min=0)
        high = (x - side // 2 + side).clamp(max=self.width) - half
        rows = (y[:, None] - side // 2 + torch.arange(side, device=y.device)).clamp(0, self.height - 1)
        rows = (rows + torch.arange(len(y), device=y.device)[:, None] * self.height) * self.width
        first = torch.cat([rows + low[:, None], rows + high[:, None]])
        view = images.as_strided((images.numel() // self.channels - half + 1, half * self.channels), (self.channels, 1))
        view.index_fill_(0, first.view(-1), 0.0)


class TensorData(ImageData):
    """Images that live in memory, as bytes on the device: batches are cut out of them by tensor operations alone.

    Made by `load` and `from_arrays`, which check what they are given.
    """

    def __init__(
        self,
        name: str,
        images: Tensor,
        labels: Array,
        test_images: Tensor | None,
        test_labels: Array | None,
        class_names: Sequence[str],
        **settings: Any,
    ) -> None:
        height, width, channels = images.shape[1:]
        super().__init__(name, labels, test_labels, class_names, (channels, height, width), **settings)
        self._images, self._test_images = images, test_images

    @cached_property
    def _here(self) -> Tensor:
        return self._images.to(self.device)

    @cached_property
    def _store(self) -> Tensor | None:
        area = (self.height + 2 * self.crop) * (self.width + 2 * self.crop)
        too_large = len(self._images) * area * self.channels * (1 + self.flip) > _STORE_BYTES
        return None if too_large else self._padded(self._here)

    def _stores(self, batches: Sequence[Tensor], augment: bool, test: bool = False) -> Iterator[Store]:
        for rows in batches:
            where = rows.to(self.device)
            if test:  # read once or twice: they stay where they are
                assert self._test_images is not None
                yield rows, self._test_images[rows].to(self.device), torch.arange(len(rows), device=self.device)
            elif not augment:
                yield rows, self._here, where
            elif self._store is not None:
                yield rows, self._store, where
            else:
                images = self._padded(self._here.index_select(0, where))
                yield rows, images, torch.arange(len(rows), device=self.device)

    @cached_property
    def _content(self) -> str:
        digest = hashlib.sha256()
        for part in (self._images, self._labels, self._test_images, self._test_labels):
            if part is not None:
                digest.update(str(tuple(part.shape)).encode())
                digest.update(part.numpy().data)
        return digest.hexdigest()

    def _sample(self) -> Array:
        return self._rows["train"]


class FolderData(ImageData):
    """Images in files, one folder per class, read anew for every batch: torchvision's ImageFolder and a DataLoader.

    Mean and deviation are those of at most 2,048 training images; the fingerprint knows files by name and size. Made by
    `load`, which describes the layouts.
    """

    def __init__(self, folder: Path, *, size: int | None, workers: int | None, **settings: Any) -> None:
        self._files = [image_folder(path) for path in subfolders(folder)]
        names = self._files[0].classes
        if differ := sorted({*names}.symmetric_difference(self._files[-1].classes)):
            raise DataError(
                f"{folder}: class {differ[0]!r} is in only one of train and test. Both need the same folders."
            )
        if size is not None and size < 1:
            raise SettingError(f"size={size}: images are one pixel wide at least.")
        height, width = (
            (size, size) if size else common_size([path for files in self._files for path, _ in files.samples])
        )
        for files in self._files:
            files.transform = partial(fitted, height, width)
        labels = [np.array(files.targets, np.int64) for files in self._files]
        shape = (3, height, width)
        super().__init__(folder.name, labels[0], labels[1] if len(labels) > 1 else None, names, shape, **settings)
        self._folder, self._workers = folder, min(4, os.cpu_count() or 1) if workers is None else workers

    def _stores(self, batches: Sequence[Tensor], augment: bool, test: bool = False) -> Iterator[Store]:
        loader: DataLoader[Any] = DataLoader(
            self._files[test],
            batch_sampler=[rows.tolist() for rows in batches],
            num_workers=self._workers,
            generator=torch.Generator(),  # or it would draw from the global one
        )
        for rows, (images, _) in zip(batches, loader, strict=True):
            images = images.to(self.device)
            yield rows, self._padded(images) if augment else images, torch.arange(len(rows), device=self.device)

    @cached_property
    def _content(self) -> str:
        digest = hashlib.sha256()
        for files in self._files:
            for path, label in files.samples:
                name = Path(path).relative_to(self._folder).as_posix()
                digest.update(f"{name}\0{label}\0{os.path.getsize(path)}\0".encode())
        return digest.hexdigest()

    def _sample(self) -> Array:
        count = self.count("train")
        chosen = np.linspace(0, count - 1, min(count, _STATISTICS_IMAGES)).astype(int)
        return np.take(self._rows["train"], chosen)


def from_arrays(
    x_train: Array,
    y_train: Array,
    x_test: Array | None = None,
    y_test: Array | None = None,
    *,
    name: str = "arrays",
    class_names: Sequence[str] | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    size: int | None = None,
    train_images: int | None = None,
    crop: int | None = None,
    flip: bool | None = None,
) -> TensorData:
    """Return numpy arrays as data.

    Args:
        x_train, x_test: uint8 images (N, H, W, C) or (N, C, H, W) with 1 or 3 channels, or (N, H, W).
        y_train, y_test: integer labels (N,), 0 to classes - 1, every class present in `y_train`.
        name, class_names: how the data and its classes are called.
        val_fraction: share of the training images set aside for validation, equally from every class.
        seed: decides which.
        size: resize the images to this many pixels a side.
        train_images: use only so many of the training images (validation included), equally from every class.
        crop, flip: augmentation: largest shift in pixels (default: an eighth of the width), mirroring (default: yes).

    Raises:
        DataError: the arrays are no labelled images, or a split would miss a class.
        SettingError: a setting is out of range.

    Example:
        >>> data = from_arrays(np.zeros((20, 8, 8, 3), np.uint8), np.arange(20) % 2)
        >>> data.shape, data.count("train"), data.count("val"), data.count("test")
        ((3, 8, 8), 16, 4, 0)
    """
    if (x_test is None) != (y_test is None):
        raise DataError(
            f"{name} has {'y_test without x_test' if x_test is None else 'x_test without y_test'}. Give both or none."
        )
    images, labels = as_images("x_train", x_train, size), as_labels("y_train", y_train, len(x_train))
    classes = int(labels.max()) + 1
    if classes < 2:
        raise DataError(
            f"all labels of {name} are 0: there is nothing to tell apart. Give images of two classes at least."
        )
    if len(present := np.unique(labels)) < classes:
        gap = next(c for c, label in enumerate([*present, -1]) if c != label)
        raise DataError(
            f"class {gap} of {name} has no training image, but labels go up to {classes - 1}. Number them without gaps."
        )
    names = tuple(map(str, range(classes))) if class_names is None else tuple(class_names)
    if len(names) != classes:
        raise DataError(f"{name} has {classes} classes, but {len(names)} class names: {', '.join(names)[:80]}.")
    test_images, test_labels = None, None
    if x_test is not None and y_test is not None:
        test_images, test_labels = as_images("x_test", x_test, size), as_labels("y_test", y_test, len(x_test))
        if test_images.shape[1:] != images.shape[1:]:
            raise DataError(
                f"x_test has shape {x_test.shape}, x_train {x_train.shape}: images must be of one size. Resize them."
            )
        if test_labels.max() >= classes:
            raise DataError(
                f"y_test has label {test_labels.max()}, y_train ends at {classes - 1}. A class needs training images."
            )
    settings = {"crop": crop, "flip": flip, "val_fraction": val_fraction, "seed": seed, "train_images": train_images}
    return TensorData(name, images, labels, test_images, test_labels, names, **settings)
