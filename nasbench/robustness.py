"""What accuracy does not tell of a network: is its confidence honest, does it see strangers, do attacks fool it."""

from __future__ import annotations

import numbers
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from nasbench.batches import Batch, Data, keyed_generator
from nasbench.errors import SettingError
from nasbench.images import ImageData
from nasbench.recipe import is_number
from nasbench.training import device_of, evaluating

NOISE = "noise"


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Return by how much confidence and accuracy differ: 0 is honest, 1 is certain and always wrong.

    Predictions go into bins of equal width by their largest probability, a border to the bin below it; the result is
    the mean over all predictions of ``abs(accuracy - confidence)`` of their bin.

    Args:
        probabilities: (N, classes), each row a distribution.
        labels: (N,), the true classes.
        bins: how many.

    Raises:
        SettingError: `bins` is not a number of bins, or the tensors do not fit each other.

    Example:
        >>> probabilities = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8]], dtype=torch.float64)
        >>> round(expected_calibration_error(probabilities, torch.tensor([0, 1, 1]), bins=2), 6)
        0.133333

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv:1706.04599.
    """
    _check_bins(bins)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not labels.numel():
        raise SettingError(
            f"probabilities have shape {tuple(probabilities.shape)} and labels {tuple(labels.shape)}; give "
            "(N, classes) and (N,), N at least 1."
        )
    confidence, predicted = probabilities.max(1)
    if not bool(((confidence >= 0) & (confidence <= 1 + 1e-4)).all()):  # NaN is neither
        raise SettingError(
            f"the largest probabilities lie in {confidence.min():.4g} to {confidence.max():.4g}, not in 0 to 1; give "
            "the softmax of finite logits."
        )
    borders = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)[1:-1]
    gap = torch.zeros(bins, dtype=confidence.dtype, device=confidence.device)
    gap.index_add_(0, torch.bucketize(confidence, borders), (predicted == labels).to(confidence.dtype) - confidence)
    return float(gap.abs().sum()) / len(labels)


def auroc(scores_in: Tensor, scores_out: Tensor) -> float:
    """Return how often a score from the first set is larger than one from the second, over all pairs; ties count half.

    This is the area under the ROC curve: 1 if a threshold parts the sets, 0.5 if the scores say nothing.

    Args:
        scores_in, scores_out: (N,) and (M,).

    Raises:
        SettingError: a set is empty, not a vector, or has a score that is not a number.

    Example:
        >>> auroc(torch.tensor([0.9, 0.8, 0.5]), torch.tensor([0.5, 0.1]))
        0.9166666666666666
    """
    for scores in (scores_in, scores_out):
        if scores.ndim != 1 or not scores.numel() or bool(scores.isnan().any()):
            raise SettingError(
                f"scores of shape {tuple(scores.shape)} with {int(scores.isnan().sum())} that are not a number cannot "
                "be ranked; give two vectors of numbers, neither of them empty."
            )
    _, place, counts = torch.unique(torch.cat([scores_in, scores_out]), return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0).double() - (counts - 1) / 2  # from 1; equal scores share the mean of theirs
    count, others = len(scores_in), len(scores_out)
    return float(ranks[place[:count]].sum() - count * (count + 1) / 2) / (count * others)


def calibration(
    model: nn.Module, data: Data, bins: int = 15, *, batch_size: int = 512, split: str = "val"
) -> dict[str, float]:
    """Return ``{"ece": ..., "nll": ...}``: expected calibration error, and mean negative log-likelihood in nats.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes). It is left as it was, its mode included.
        data: images, with the scaling that the model was trained on.
        bins: see `expected_calibration_error`.
        batch_size: images at a time.
        split: ``"val"``, ``"train"``, or ``"test"`` for the network that you have settled on.

    Raises:
        SettingError: a bad argument, a text, or a model that gives no such logits.
        DataError: there is no such split.

    Example:
        >>> from nasbench.data import load
        >>> sorted(calibration(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), load("digits")))
        ['ece', 'nll']
    """
    _check_bins(bins)
    images = _images(data, model)
    return _calibration(*_outputs(model, images, _batches(images, split, batch_size)), bins)


def ood_auroc(
    model: nn.Module,
    data: Data,
    other: Data | str = NOISE,
    *,
    seed: int = 0,
    batch_size: int = 512,
    split: str = "val",
) -> float:
    """Return how well the model's confidence tells its own images from others: the AUROC of the largest probability.

    Args:
        other: images of the same shape from elsewhere, of which the same split is read and which the model sees with
            the scaling of `data`; or ``"noise"``: as many images as `data` has, of Gaussian pixels with the mean and
            deviation of the training images in each channel, clipped to what a pixel can be.
        seed: of the noise.
        batch_size: images at a time.
        split: as in `calibration`.

    Raises:
        SettingError: a bad argument, a text, images of another shape, or a model that gives no such logits.
        DataError: there is no such split.

    Example:
        >>> from nasbench.data import load
        >>> 0 <= ood_auroc(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), load("digits"), "noise") <= 1
        True

    Source: Hendrycks and Gimpel, A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural
    Networks, ICLR 2017, arXiv:1610.02136; their noise is uniform or has one mean and deviation for all channels.
    """
    images = _images(data, model)
    strangers = _strangers(images, other, seed, split, batch_size)
    logits, _ = _outputs(model, images, _batches(images, split, batch_size))
    return _ood_auroc(model, images, logits, strangers)


def fgsm_accuracy(
    model: nn.Module, data: Data, epsilon: float = 8 / 255, *, batch_size: int = 512, split: str = "val"
) -> float:
    """Return the accuracy, 0 to 1, on images whose every pixel was moved by `epsilon` in the direction that hurts.

    Args:
        epsilon: of pixels from 0 (black) to 1 (white); what leaves this range is clipped. 0 leaves the images alone.
        batch_size: images at a time.
        split: as in `calibration`.

    Raises:
        SettingError: a bad argument, a text, or a model that gives no such logits or has no gradient by its input.
        DataError: there is no such split.

    Example:
        >>> from nasbench.data import load
        >>> data = load("digits")
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> fgsm_accuracy(model, data) <= fgsm_accuracy(model, data, epsilon=0)
        True

    Source: Goodfellow et al., Explaining and Harnessing Adversarial Examples, ICLR 2015, arXiv:1412.6572: one step
    along the sign of the gradient of the cross-entropy with the true class.
    """
    _check_epsilon(epsilon)
    images = _images(data, model)
    return _fgsm_accuracy(model, images, _batches(images, split, batch_size), epsilon)


def robustness(
    model: nn.Module,
    data: Data,
    other: Data | str = NOISE,
    *,
    bins: int = 15,
    epsilon: float = 8 / 255,
    seed: int = 0,
    batch_size: int = 512,
    split: str = "val",
) -> dict[str, float]:
    """Return accuracy and all metrics of this module: ``accuracy``, ``ece``, ``nll``, ``ood_auroc``, ``fgsm_accuracy``.

    The arguments are those of `calibration`, `ood_auroc` and `fgsm_accuracy`. With ``split="test"``, this module and
    `nasbench.evaluate` alone read test images: look once, at the network that you have settled on.

    Example:
        >>> from nasbench.data import load
        >>> list(robustness(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), load("digits")))
        ['accuracy', 'ece', 'nll', 'ood_auroc', 'fgsm_accuracy']

    Source: the metrics are those by which Liu et al., The Unreasonable Effectiveness of Random Pruning, ICLR 2022,
    arXiv:2202.02643, compare sparse networks with dense ones.
    """
    _check_bins(bins)
    _check_epsilon(epsilon)
    images = _images(data, model)
    strangers = _strangers(images, other, seed, split, batch_size)
    logits, labels = _outputs(model, images, _batches(images, split, batch_size))
    return {
        "accuracy": int((logits.argmax(1) == labels).sum()) / len(labels),
        **_calibration(logits, labels, bins),
        "ood_auroc": _ood_auroc(model, images, logits, strangers),
        "fgsm_accuracy": _fgsm_accuracy(model, images, _batches(images, split, batch_size), epsilon),
    }


def _calibration(logits: Tensor, labels: Tensor, bins: int) -> dict[str, float]:
    ece = expected_calibration_error(logits.softmax(1), labels, bins)
    return {"ece": ece, "nll": float(functional.cross_entropy(logits, labels))}


def _ood_auroc(model: nn.Module, images: ImageData, logits: Tensor, strangers: Iterator[Batch]) -> float:
    others, _ = _outputs(model, images, strangers)
    return auroc(logits.softmax(1).amax(1), others.softmax(1).amax(1))


def _fgsm_accuracy(model: nn.Module, images: ImageData, batches: Iterator[Batch], epsilon: float) -> float:
    black, white = _pixel_range(images)
    hits = count = 0
    with evaluating(model):
        for x, y in batches:
            with torch.enable_grad():
                x.requires_grad_()
                loss = functional.cross_entropy(_logits(model, images, x), y, reduction="sum")
                if not loss.requires_grad:
                    raise SettingError(
                        f"{type(model).__name__} has no gradient by its input, so FGSM cannot attack it; give the "
                        "network that it was made from."
                    )
                (gradient,) = torch.autograd.grad(loss, x)
            # A pixel is scaled by a positive factor, so the sign is the same before and after.
            attacked = x.detach() + epsilon * (white - black) * gradient.sign()
            hits += int((_logits(model, images, attacked.clamp(black, white)).argmax(1) == y).sum())
            count += len(y)
    return hits / count


def _outputs(model: nn.Module, images: ImageData, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
    """Return all logits (N, classes), as doubles, and labels (N,), both on the CPU."""
    found: list[Batch] = []
    with evaluating(model):
        for x, y in batches:
            # In single precision many sure predictions round to probability 1, and cannot be ranked.
            found.append((_logits(model, images, x).cpu().double(), y.cpu()))
    logits, labels = zip(*found, strict=True)
    return torch.cat(logits), torch.cat(labels)


def _logits(model: nn.Module, images: ImageData, x: Tensor) -> Tensor:
    logits = model(x)
    if not isinstance(logits, Tensor) or logits.shape != (len(x), images.classes):
        found = f"{tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise SettingError(
            f"{type(model).__name__} gives {found} for {len(x)} images of {images.name}; logits are (batch, classes), "
            f"here {(len(x), images.classes)}."
        )
    return logits


def _images(data: Data, model: nn.Module) -> ImageData:
    """Return the data where the model is."""
    if not isinstance(data, ImageData):
        raise SettingError(f"{getattr(data, 'name', data)!r} holds no images; these metrics are of classified images.")
    return data.to(device_of(model))


def _batches(images: ImageData, split: str, batch_size: int) -> Iterator[Batch]:
    return images._test_batches(batch_size) if split == "test" else images.eval_batches(split, batch_size)


def _strangers(images: ImageData, other: Data | str, seed: int, split: str, batch_size: int) -> Iterator[Batch]:
    """Check what is not of the data; return batches of it, as the model sees them."""
    if isinstance(other, str):
        if other != NOISE:
            raise SettingError(f"other={other!r}: give data from nasbench.data.load, or {NOISE!r}.")
        if not is_number(seed, numbers.Integral) or seed < 0:
            raise SettingError(f"seed={seed!r}, but a seed is a whole number, 0 or more")
        return _noise(images, int(seed), images.count(split), batch_size)
    if not isinstance(other, ImageData):
        raise SettingError(f"{getattr(other, 'name', other)!r} holds no images; give some, or {NOISE!r}.")
    if other.shape != images.shape:
        raise SettingError(
            f"{other.name} has images {other._size}, {images.name} {images._size}: a network takes one size. Load "
            f"images with {images.channels} channels, with size={images.height} if theirs is another."
        )
    moved = other.to(images.device)
    return _rescaled(images, moved, _batches(moved, split, batch_size))


def _noise(images: ImageData, seed: int, count: int, batch_size: int) -> Iterator[Batch]:
    black, white = _pixel_range(images)
    for first in range(0, count, batch_size):
        rows = range(first, min(count, first + batch_size))  # one key an image: the same in batches of any size
        x = torch.stack([torch.randn(images.shape, generator=keyed_generator(seed, number)) for number in rows])
        yield x.to(images.device).clamp(black, white), torch.zeros(len(x), dtype=torch.int64)


def _rescaled(images: ImageData, other: ImageData, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Scale other images as if they were these: the network must see the same pixel as the same number."""
    black, white = _pixel_range(images)
    other_black, other_white = _pixel_range(other)
    for x, y in batches:
        yield black + (x - other_black) * ((white - black) / (other_white - other_black)), y


def _pixel_range(images: ImageData) -> tuple[Tensor, Tensor]:
    """Return what a network sees of the pixels 0 and 1, both (1, C, 1, 1)."""
    size = (1, images.height, images.width, images.channels)
    ends = (torch.full(size, byte, dtype=torch.uint8, device=images.device) for byte in (0, 255))
    black, white = (images._scaled(end).permute(0, 3, 1, 2)[:, :, :1, :1] for end in ends)
    return black, white


def _check_bins(bins: int) -> None:
    if not is_number(bins, numbers.Integral) or bins < 1:
        raise SettingError(f"bins={bins!r}, but it is a whole number, 1 or more")


def _check_epsilon(epsilon: float) -> None:
    if not is_number(epsilon) or not 0 <= epsilon <= 1:
        raise SettingError(f"epsilon={epsilon!r}, but pixels go from 0 to 1: give 0 to 1, such as 8 / 255")
