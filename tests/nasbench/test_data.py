"""Data: what is loaded, how it is split, what a batch is made of, and what is refused."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nasbench.images
from nasbench.data import Data, FolderData, TensorData, from_arrays, load
from nasbench.errors import DataError, SettingError
from nasbench.splits import Array


def pixels(count: int, height: int = 8, width: int = 8, channels: int = 3, seed: int = 0) -> Array:
    """Random bytes, no two images alike."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def labels(count: int, classes: int = 3) -> Array:
    return np.arange(count) % classes


def small(count: int = 60, **settings: Any) -> TensorData:
    return from_arrays(pixels(count), labels(count), **settings)


def joined(batches: Any) -> tuple[Tensor, Tensor]:
    x, y = zip(*batches, strict=True)
    return torch.cat(x), torch.cat(y)


def unscaled(data: Data, x: Tensor) -> Array:
    """Turn a batch back into bytes (B, H, W, C), by mean and deviation computed here, of the training split."""
    assert isinstance(data, TensorData)
    train = data._images.numpy()[data._rows["train"]].reshape(-1, data.channels).astype(np.float64)
    values = x.permute(0, 2, 3, 1).numpy() * train.std(0) + train.mean(0)
    assert np.abs(values - values.round()).max() < 1e-3
    return values.round().astype(np.uint8)


# Sources --------------------------------------------------------------------------------------------------------------


def test_digits() -> None:
    data = load("digits")
    assert data.shape == (1, 8, 8) and data.classes == 10 and (data.crop, data.flip) == (1, False)
    # 1,797 digits: 360 to test, and a fifth of the other 1,437 to validate.
    assert [data.count(split) for split in ("train", "val", "train+val", "test")] == [1150, 287, 1437, 360]
    assert "1150 train, 287 val, 360 test images 1x8x8" in repr(data)


def test_the_test_digits_are_the_same_for_every_seed() -> None:
    first, second = (joined(load("digits", seed=seed)._test_batches())[1] for seed in (0, 1))
    assert torch.equal(first, second)
    assert first.bincount().min() >= 34  # a fifth of 174 to 183 digits of each kind


@pytest.mark.parametrize("form", ["NHWC", "NCHW", "grey NHWC", "grey NHW"])
def test_npz_in_every_form(form: str, tmp_path: Path) -> None:
    x, y = pixels(30, 6, 8), labels(30)
    if "grey" in form:
        x = x[..., :1]
    written = {"NCHW": x.transpose(0, 3, 1, 2), "grey NHW": x[..., 0]}.get(form, x)
    np.savez(tmp_path / "set.npz", x_train=written, y_train=y, x_test=written[:6], y_test=y[:6].astype(np.uint8))
    data = load(tmp_path / "set.npz")
    assert data.name == "set" and data.shape == (x.shape[3], 6, 8) and data.count("test") == 6
    assert data.fingerprint == from_arrays(x, y, x[:6], y[:6]).fingerprint
    assert load(str(tmp_path / "set.npz"), crop=2).crop == 2


def test_size_resizes() -> None:
    x = np.repeat(np.repeat(pixels(30, 4, 4), 2, 1), 2, 2)
    data = from_arrays(x, labels(30), x[:5], labels(5), size=4)
    assert data.shape == (3, 4, 4) and next(data._test_batches())[0].shape == (5, 3, 4, 4)
    flat = from_arrays(np.full((30, 8, 8), 77, np.uint8), labels(30), size=5)
    assert unscaled(flat, next(flat.eval_batches("val"))[0] * 0).tolist() == np.full((6, 5, 5, 1), 77).tolist()


def test_train_images_keeps_an_equal_share_of_every_class() -> None:
    y = np.repeat([0, 1], [60, 30])
    data = from_arrays(pixels(90), y, train_images=30, seed=3)
    # 30 of 90 images are 20 and 10; a fifth of these, 4 and 2, to validate.
    assert np.bincount(y[data._rows["train"]]).tolist() == [16, 8]
    assert np.bincount(y[data._rows["val"]]).tolist() == [4, 2]


def write_svhn(root: Path, count: int = 50) -> tuple[Array, Array]:
    from scipy.io import savemat

    x, y = pixels(count, 32, 32), np.arange(count) % 10
    for split in ("train", "test"):
        official = np.where(y == 0, 10, y).astype(np.uint8)[:, None]  # the digit 0 is labelled 10
        savemat(root / f"{split}_32x32.mat", {"X": x.transpose(1, 2, 3, 0), "y": official})
    return x, y


def test_svhn_reads_the_official_layout(tmp_path: Path) -> None:
    x, y = write_svhn(tmp_path)
    data = load("svhn", root=tmp_path)
    assert (data.name, data.crop, data.flip) == ("svhn", 4, False)
    assert data.fingerprint == from_arrays(x, y, x, y, flip=False).fingerprint


def test_svhn_is_downloaded_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(url: str, root: Path, filename: str, md5: str) -> None:
        asked.append(filename)
        write_svhn(root)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    with pytest.raises(DataError, match=r"files of svhn are not in .*download=True, or put them at .*train_32x32\.mat"):
        load("svhn", root=tmp_path)
    assert not asked
    assert load("svhn", root=tmp_path, download=True).count("test") == 50
    assert asked == ["train_32x32.mat"]  # the stand-in writes both files


def test_cifar_comes_from_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = pixels(40, 32, 32), labels(40, 2)

    def dataset(root: Path, train: bool, download: bool) -> SimpleNamespace:
        assert root == tmp_path and download
        return SimpleNamespace(data=x if train else x[:6], targets=(y if train else y[:6]).tolist(), classes=["a", "b"])

    monkeypatch.setattr("torchvision.datasets.CIFAR10", dataset)
    data = load("cifar10", root=tmp_path, download=True)
    assert (data.class_names, data.crop, data.flip, data.count("test")) == (("a", "b"), 4, True, 6)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_absent_or_damaged_cifar_says_what_to_do(name: str, tmp_path: Path) -> None:
    folder = tmp_path / ("cifar-10-batches-py" if name == "cifar10" else "cifar-100-python")
    for _ in ("absent", "damaged"):
        with pytest.raises(DataError, match=rf"files of {name} are not in .*damaged.*download=True.*{folder.name}"):
            load(name, root=tmp_path)
        folder.mkdir(exist_ok=True)
        for file in ("data_batch_1", "train"):
            (folder / file).write_bytes(b"cos\nsystem\n(S'false'\ntR.")  # a pickle that is never opened


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_a_failed_download_says_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fail)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    with pytest.raises(DataError, match=f"{name} could not be downloaded .*no route to host.*Check the connection"):
        load(name, root=tmp_path, download=True)


# Folders --------------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, x: Array, y: Array) -> None:
    from PIL import Image

    for number, (image, label) in enumerate(zip(x, y, strict=True)):
        path = folder / f"class{label}" / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    y = np.repeat([0, 1, 2], 10)
    write_folder(tmp_path / "set" / "train", pixels(30), y)
    write_folder(tmp_path / "set" / "test", pixels(6, seed=1), labels(6))
    return tmp_path / "set"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_gives_the_same_batches_as_its_images_in_memory(folder: Path, workers: int) -> None:
    streamed, held = load(folder, workers=workers), from_arrays(pixels(30), np.repeat([0, 1, 2], 10))
    assert isinstance(streamed, FolderData) and streamed.class_names == ("class0", "class1", "class2")
    for draw in (
        lambda data: data.train_batches(8, seed=1, epoch=2, start=1, cutout=3),
        lambda data: data.train_batches(8, seed=1, epoch=2, augment=False),
        lambda data: data.eval_batches("val", 4),
    ):
        (x, y), (expected_x, expected_y) = joined(draw(streamed)), joined(draw(held))
        assert torch.equal(x, expected_x) and torch.equal(y, expected_y)
    x, y = joined(streamed._test_batches())
    assert len(x) == 6 and y.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_folder_of_classes_without_train_and_test(folder: Path) -> None:
    data = load(folder / "train", workers=0)
    assert (data.count("train"), data.count("val"), data.count("test")) == (24, 6, 0)
    assert data.fingerprint != load(folder, workers=0).fingerprint


def test_files_of_different_sizes_are_scaled_and_cropped_around_the_centre(tmp_path: Path) -> None:
    # White bars at either end of the long side, wide enough that a central square is black.
    wide, tall = np.zeros((8, 24, 3), np.uint8), np.zeros((40, 12, 3), np.uint8)
    wide[:, [*range(6), *range(18, 24)]] = tall[[*range(12), *range(28, 40)]] = 255
    write_folder(tmp_path, [wide, tall] * 10, np.repeat([0, 1], 10))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"images differ in size: .*8x24.*40x12.*Pass size="):
        load(tmp_path)
    data = load(tmp_path, size=4, workers=0)
    assert data.shape == (3, 4, 4)
    assert joined(data.eval_batches("train"))[0].eq(0).all()  # all black: nothing to scale


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named(folder: Path, workers: int) -> None:
    broken = folder / "train" / "class1" / "0012.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(DataError, match=r"0012\.png cannot be read as an image .*Remove or replace it"):
        list(load(folder, size=8, workers=workers).train_batches(8, seed=0, epoch=0, split="train+val"))
    broken.write_text("no image")
    with pytest.raises(DataError, match=r"0012\.png cannot be read as an image"):
        load(folder)


# Splits ---------------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_complete_and_stratified() -> None:
    y = np.repeat([0, 1, 2], [50, 30, 10])
    data = from_arrays(pixels(90), y, val_fraction=0.3)
    train, val = data._rows["train"], data._rows["val"]
    assert sorted([*train, *val]) == list(range(90))
    assert np.bincount(y[val]).tolist() == [15, 9, 3]  # 30 % of 50, 30 and 10
    assert sorted(data._rows["train+val"]) == list(range(90))


def test_a_split_depends_on_its_seed_alone() -> None:
    first = small(seed=1)
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    assert first.fingerprint == small(seed=1).fingerprint != small(seed=2).fingerprint


def test_fingerprint_follows_content_and_settings() -> None:
    x, y = pixels(60), labels(60)
    changed_pixel, changed_labels = x.copy(), y.copy()
    changed_pixel[59, 7, 7, 2] ^= 1
    changed_labels[[0, 1]] = [1, 0]
    variants = [
        from_arrays(x, y),
        from_arrays(changed_pixel, y),
        from_arrays(x, changed_labels),
        from_arrays(x, y, x[:3], y[:3]),
        from_arrays(x, y, crop=2),
        from_arrays(x, y, flip=False),
        from_arrays(x, y, val_fraction=0.3),
        from_arrays(x, y, train_images=30),
    ]
    prints = [data.fingerprint for data in variants]
    assert len(set(prints)) == len(variants) and all(len(text) == 12 for text in prints)
    assert from_arrays(x.copy(), y.copy(), name="other").fingerprint == prints[0]


def test_test_images_are_not_for_searches() -> None:
    data = load("digits")
    for ask in (lambda: data.eval_batches("test"), lambda: data.train_batches(8, seed=0, epoch=0, split="test")):
        with pytest.raises(DataError, match="only nasbench.evaluate reads the test images of digits"):
            ask()
    with pytest.raises(DataError, match="arrays has no test images"):
        small()._test_batches()


# Batches --------------------------------------------------------------------------------------------------------------


def test_batches_are_scaled_and_channels_last() -> None:
    data = small()
    x, y = joined(data.eval_batches("train", 7))
    assert x.shape == (48, 3, 8, 8) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-6)
    assert torch.allclose(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-6)
    x, _ = next(data.train_batches(8, seed=0, epoch=0))
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_eval_batches_are_the_images_in_order() -> None:
    data = small()
    x, y = joined(data.eval_batches("val", 5))
    rows = data._rows["val"]
    assert (unscaled(data, x) == pixels(60)[rows]).all() and (y.numpy() == labels(60)[rows]).all()


def numbered(count: int) -> TensorData:
    """Images that all show their own number, never shifted or mirrored."""
    x = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 4, 4, 1))
    return from_arrays(x, labels(count), crop=0, flip=False)


def shown(data: Data, **settings: Any) -> list[int]:
    x, y = joined(data.train_batches(**settings))
    numbers = unscaled(data, x)[:, 0, 0, 0]
    assert (labels(len(data._labels))[numbers] == y.numpy()).all()
    return [int(n) for n in numbers]


def test_an_epoch_shows_every_image_once_in_a_new_order() -> None:
    data = numbered(75)
    epochs = [shown(data, batch_size=12, seed=0, epoch=epoch) for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == data._rows["train"].tolist()
    assert epochs[0] != epochs[1] != shown(data, batch_size=12, seed=1, epoch=1)
    assert sorted(shown(data, batch_size=25, seed=0, epoch=0, split="train+val")) == list(range(75))


def test_the_last_incomplete_batch_is_dropped_unless_it_is_the_only_one() -> None:
    data = numbered(75)  # 60 to train on
    assert [data.steps(size) for size in (7, 60, 61)] == [8, 1, 1]
    assert len(shown(data, batch_size=7, seed=0, epoch=0)) == 56
    assert len(shown(data, batch_size=1000, seed=0, epoch=0)) == 60


def test_start_continues_an_epoch_exactly() -> None:
    data = small()
    whole = list(data.train_batches(8, seed=5, epoch=3, cutout=4))
    rest = list(data.train_batches(8, seed=5, epoch=3, cutout=4, start=4))
    assert len(whole) == 6 and len(rest) == 2
    assert all(
        torch.equal(a, b) for old, new in zip(whole[4:], rest, strict=True) for a, b in zip(old, new, strict=True)
    )
    assert list(data.train_batches(8, seed=5, epoch=3, start=6)) == []


def test_batches_neither_read_nor_move_global_random_states(folder: Path) -> None:
    data, epochs = load(folder, workers=0), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # type: ignore[index]  # noqa: NPY002
        epochs.append(joined(data.train_batches(8, seed=0, epoch=0, cutout=3))[0])
        assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
        assert (states[2] == np.random.get_state()[1]).all()  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(*epochs)


def test_ranks_share_the_batch_of_one_process() -> None:
    data = small()
    settings: dict[str, Any] = {"seed": 1, "epoch": 2, "cutout": 3, "start": 1}
    whole = data.train_batches(12, **settings)
    parts = [data.train_batches(12, rank=rank, world=3, **settings) for rank in range(3)]
    for (x, y), *shares in zip(whole, *parts, strict=True):
        for rank, (part_x, part_y) in enumerate(shares):
            assert torch.equal(part_x, x[rank::3]) and torch.equal(part_y, y[rank::3])


def test_every_augmented_image_is_a_window_of_its_own_and_all_windows_occur() -> None:
    data = small(crop=2)
    bordered = np.pad(pixels(60), ((0, 0), (2, 2), (2, 2), (0, 0)))
    windows = {
        bordered[n, top : top + 8, left : left + 8][:, :: -1 if mirrored else 1].tobytes(): (n, top, left, mirrored)
        for n in data._rows["train"]
        for top in range(5)
        for left in range(5)
        for mirrored in (False, True)
    }
    found = []
    for epoch in range(20):
        x, y = joined(data.train_batches(16, seed=0, epoch=epoch))
        found += [windows[image.tobytes()] for image in unscaled(data, x)]  # KeyError: no window of any image
        assert [n % 3 for n, *_ in found[-48:]] == y.tolist()
    # 960 draws of 50 kinds of window, 19.2 of each on average: to miss one has a chance of 50 exp(-19.2) < 1e-6.
    assert len({window[1:] for window in found}) == 5 * 5 * 2


@pytest.mark.parametrize("settings", [{"crop": 0}, {"flip": False}, {"crop": 0, "flip": False}])
def test_crop_and_flip_can_be_left_out(settings: dict[str, Any]) -> None:
    data = small(**settings)
    x, _ = joined(data.train_batches(48, seed=0, epoch=0))
    originals = {image.tobytes() for image in pixels(60)}
    mirrored = {image[:, ::-1].tobytes() for image in pixels(60)}
    kept = [image.tobytes() in originals for image in unscaled(data, x)]
    turned = [image.tobytes() in mirrored for image in unscaled(data, x)]
    if "flip" in settings and "crop" in settings:
        assert all(kept)
    elif "crop" in settings:
        assert any(kept) and any(turned) and all(k or t for k, t in zip(kept, turned, strict=True))
    else:
        assert any(kept) and not all(kept) and not any(turned)  # a shift of 0 is one of nine


def test_without_augment_only_the_order_is_random() -> None:
    data = small()
    x, _ = joined(data.train_batches(48, seed=0, epoch=0, augment=False))
    train = {image.tobytes() for image in pixels(60)[data._rows["train"]]}
    assert {image.tobytes() for image in unscaled(data, x)} == train


@pytest.mark.parametrize("side", range(1, 7))
def test_cutout_is_one_clipped_square_of_zeros(side: int) -> None:
    x = pixels(400, 6, 9, 1)  # nothing in it is zero after scaling
    data = from_arrays(x, labels(400))
    plain, cut = (joined(data.train_batches(64, seed=0, epoch=1, cutout=c))[0][:, 0] for c in (0, side))
    assert not plain.eq(0).any()
    hole = cut.eq(0)
    assert torch.equal(cut, plain.masked_fill(hole, 0))
    places = set()
    for mask in hole:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        box = [int(v) for v in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)]
        assert mask.sum() == (box[1] - box[0]) * (box[3] - box[2])  # a full rectangle ...
        for low, high, end in ((*box[:2], 6), (*box[2:], 9)):
            assert high - low == side or (high - low < side and (low == 0 or high == end))  # ... clipped at borders
            assert high - low >= min(side // 2 + side % 2, end)
        places.add(tuple(box))
    assert len(places) > 30  # of 54 centres


def test_large_sets_are_padded_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = joined(small().train_batches(8, seed=0, epoch=0, cutout=3))[0]
    monkeypatch.setattr(nasbench.images, "_STORE_BYTES", 1000)
    data = small()
    assert torch.equal(stored, joined(data.train_batches(8, seed=0, epoch=0, cutout=3))[0])
    assert data._store is None


def test_a_channel_without_contrast_stays_finite() -> None:
    x = pixels(30)
    x[..., 1] = 200
    batch, _ = next(from_arrays(x, labels(30)).eval_batches("train"))
    assert batch.isfinite().all() and batch[:, 1].abs().max() < 1e-4


def test_to_the_same_device_is_the_same_data() -> None:
    data = small()
    assert data.to("cpu") is data and data.device == torch.device("cpu")


@pytest.mark.gpu
def test_a_gpu_gives_the_same_batches() -> None:
    data = small()
    moved = data.to("cuda")
    assert moved.to("cuda") is moved and moved.fingerprint == data.fingerprint
    for (x, y), (x_cuda, y_cuda) in zip(
        data.train_batches(8, seed=0, epoch=0, cutout=3), moved.train_batches(8, seed=0, epoch=0, cutout=3), strict=True
    ):
        assert x_cuda.is_cuda and torch.allclose(x, x_cuda.cpu(), atol=1e-6) and torch.equal(y, y_cuda.cpu())


# Bad input ------------------------------------------------------------------------------------------------------------

X, Y = pixels(30), labels(30)
BAD_ARRAYS: dict[str, tuple[Callable[[], Any], str]] = {
    "floats": (lambda: from_arrays(X / 255, Y), r"x_train has type float64; images are .* uint8.*astype\(np.uint8\)"),
    "lists": (lambda: from_arrays(X.tolist(), Y), "x_train has type list; images are numpy arrays"),
    "two dimensions": (lambda: from_arrays(X[:, :, 0, 0], Y), r"x_train has shape \(30, 8\); images are \(N, H, W\)"),
    "five channels": (lambda: from_arrays(pixels(30, channels=5), Y), r"shape \(30, 8, 8, 5\).* with 1 or 3 channels"),
    "no images": (lambda: from_arrays(X[:0], Y[:0]), r"x_train is empty: its shape is \(0, 8, 8, 3\)"),
    "no pixels": (lambda: from_arrays(X[:, :0], Y), r"x_train is empty: its shape is \(30, 0, 8, 3\)"),
    "float labels": (lambda: from_arrays(X, Y / 1), r"y_train has type float64; labels are .* integers"),
    "label lists": (lambda: from_arrays(X, Y.tolist()), "y_train has type list; labels are numpy arrays"),
    "too few labels": (lambda: from_arrays(X, Y[:-1]), r"y_train has shape \(29,\), but there are 30 images"),
    "one-hot labels": (
        lambda: from_arrays(X, np.eye(3, dtype=int)[Y]),
        r"y_train has shape \(30, 3\), but there are 30",
    ),
    "negative labels": (lambda: from_arrays(X, Y - 1), "y_train has label -1; labels are 0 to classes - 1"),
    "a gap": (lambda: from_arrays(X, Y * 2), "class 1 of arrays has no training image, but labels go up to 4"),
    "one class": (lambda: from_arrays(X, Y * 0), "all labels of arrays are 0: there is nothing to tell apart"),
    "names": (lambda: from_arrays(X, Y, class_names=["a", "b"]), "arrays has 3 classes, but 2 class names: a, b"),
    "half a test set": (lambda: from_arrays(X, Y, X), "arrays has x_test without y_test. Give both or none"),
    "other half": (lambda: from_arrays(X, Y, None, Y), "arrays has y_test without x_test. Give both or none"),
    "other test size": (
        lambda: from_arrays(X, Y, X[:, :4], Y),
        r"x_test has shape \(30, 4, 8, 3\), x_train \(30, 8, 8, 3\): images must be of one size",
    ),
    "unknown test label": (lambda: from_arrays(X, Y, X, Y + 1), "y_test has label 3, y_train ends at 2"),
    "empty validation class": (
        lambda: from_arrays(X, np.repeat([0, 1], [29, 1])),
        "the validation split of arrays would have no image of class 1: 30 images of 2 classes are too few",
    ),
    "empty training class": (
        lambda: from_arrays(X[:6], np.repeat([0, 1], 3), val_fraction=0.9),
        "the training split of arrays would have no image of class .* too few for val_fraction=0.9",
    ),
    "unknown split": (lambda: small().eval_batches("valid"), "arrays has no split 'valid'; did you mean 'val'"),
    "unknown count": (lambda: small().count("all"), "arrays has no split 'all'; .*Known: train, train.val, val"),
    "unknown name": (lambda: load("cifar11"), "no data set 'cifar11'.*did you mean 'cifar10'.*Known: cifar10"),
    "unknown path": (
        lambda: load("some/where"),
        "there is no some/where. Give a folder, an .npz file, or one of digits",
    ),
    "unknown file": (lambda: load("nowhere.npz"), r"there is no nowhere.npz. Write it with np.savez"),
}
BAD_SETTINGS: dict[str, tuple[Callable[[], Any], str]] = {
    "val_fraction 0": (lambda: small(val_fraction=0), r"val_fraction=0 is outside 0..1"),
    "val_fraction 1": (lambda: small(val_fraction=1.0), r"val_fraction=1.0 is outside 0..1"),
    "too many": (lambda: small(train_images=61), r"train_images=61, but arrays has 60 of them. Ask for 1..60"),
    "none": (lambda: small(train_images=0), r"train_images=0, but arrays has 60"),
    "seed": (lambda: small(seed=-1), "seed=-1: a seed is 0 or more"),
    "size": (lambda: small(size=0), "size=0: images are one pixel wide at least"),
    "crop": (lambda: small(crop=9), r"crop=9 is outside 0..8: arrays is 8x8 pixels"),
    "cutout": (lambda: small().train_batches(8, seed=0, epoch=0, cutout=9), r"cutout=9 is outside 0..8"),
    "batch": (lambda: small().train_batches(0, seed=0, epoch=0), "batch_size=0: a batch is a whole number of images"),
    "half a batch": (lambda: small().eval_batches("val", 0.5), "batch_size=0.5: a batch is"),  # type: ignore[arg-type]
    "start": (lambda: small().train_batches(8, seed=0, epoch=0, start=7), r"start=7 is outside 0..6, the steps"),
    "rank": (lambda: small().train_batches(8, seed=0, epoch=0, rank=2, world=2), "rank 2 of 2 processes"),
    "world": (lambda: small().train_batches(8, seed=0, epoch=0, world=3), "batches of 8: .* must be a multiple of 3"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_data(case: str) -> None:
    call, message = BAD_ARRAYS[case]
    with pytest.raises(DataError, match=message):
        call()


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings(case: str) -> None:
    call, message = BAD_SETTINGS[case]
    with pytest.raises(SettingError, match=message):
        call()


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no .npz file, or it was cut short"),
    "text": (b"x_train,y_train", "is no .npz file, or it was cut short"),
    "truncated": (npz(x_train=X, y_train=Y)[:-30], "is no .npz file, or it was cut short"),
    "no labels": (npz(x_train=X, labels=Y), "has no array 'y_train', but x_train, labels. Needed: x_train, y_train"),
    "nothing": (npz(), "has no array 'x_train', but nothing"),
    "pickles": (
        npz(x_train=X, y_train=Y.astype(object)),
        "cannot be read: .*allow_pickle=False.*pickles are not opened",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_npz(case: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[case]
    (tmp_path / "set.npz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "set.npz")


def test_a_damaged_npz_is_refused_or_unharmed(tmp_path: Path) -> None:
    good, path = npz(x_train=X, y_train=Y), tmp_path / "set.npz"
    expected, refused = from_arrays(X, Y).fingerprint, 0
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(good), 200):
        content = bytearray(good)
        content[place] ^= int(rng.integers(1, 256))
        path.write_bytes(content)
        try:
            assert load(path).fingerprint == expected  # a byte that nobody reads, a time stamp say
        except DataError:
            refused += 1
    assert refused > 150


def test_other_files_and_folders_are_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "set.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"set\.csv is neither a folder nor an \.npz file. Save arrays with np\.savez"):
        load(tmp_path / "set.csv")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match=r"void holds no images by class \(.*\). Put them in one folder per class"):
        load(tmp_path / "void")
    with pytest.raises(SettingError, match="size=-4: images are one pixel wide at least"):
        load(folder, size=-4)
    (folder / "train" / "class3").mkdir()
    with pytest.raises(DataError, match=r"train holds no images by class \(.*class3"):
        load(folder)
    (folder / "train" / "class3").rmdir()
    (folder / "test" / "class2").rename(folder / "test" / "other")
    with pytest.raises(DataError, match="class 'class2' is in only one of train and test"):
        load(folder)
    (folder / "val").mkdir()
    with pytest.raises(DataError, match="set has 'val' beside 'train'. Give it train and test alone"):
        load(folder)


@pytest.mark.parametrize("damage", ["cut short", "other arrays", "no mat"])
def test_damaged_svhn_is_refused(damage: str, tmp_path: Path) -> None:
    from scipy.io import savemat

    write_svhn(tmp_path)
    path = tmp_path / "train_32x32.mat"
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:3000])
    elif damage == "other arrays":
        savemat(path, {"images": X})
    else:
        path.write_text("<html>not found</html>" * 20)
    with pytest.raises(DataError, match=r"train_32x32\.mat is no SVHN file, or it was cut short"):
        load("svhn", root=tmp_path)


# Halves --------------------------------------------------------------------------------------------------------------


def test_halves_share_all_but_the_training_images() -> None:
    whole = load("digits")
    first, second = whole.halves(seed=3)
    rows = [set(half._rows["train"].tolist()) for half in (first, second)]
    assert rows[0].isdisjoint(rows[1])
    assert rows[0] | rows[1] == set(whole._rows["train"].tolist())
    counts = [np.bincount(half._labels.numpy()[half._rows["train"]]) for half in (first, second)]
    assert abs(counts[0] - counts[1]).max() <= 1
    assert all(torch.equal(a, b) for half in (first, second) for a, b in zip(half._scaling, whole._scaling))  # noqa: B905
    for half in (first, second):
        (x, _), (x_whole, _) = next(half.eval_batches("val")), next(whole.eval_batches("val"))
        assert torch.equal(x, x_whole)
    assert len({half.fingerprint for half in (whole, first, second)}) == 3
    assert load("digits").halves(seed=3)[0].fingerprint == first.fingerprint


def test_halves_need_every_class_twice() -> None:
    images, labels = np.zeros((12, 8, 8), np.uint8), np.array([0] * 10 + [1] * 2)
    with pytest.raises(DataError, match="half of the 6 training images of arrays has none of class 1"):
        from_arrays(images, labels, val_fraction=0.5).halves()
