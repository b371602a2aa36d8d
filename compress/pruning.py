"""Sparse networks: masks over the weights, once and for all, that hold in any training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress import scores
from compress.counts import largest
from compress.density import Densities, check_density, densities
from compress.errors import CompressionError
from compress.low_bit import freeze_low_bit
from compress.models import copy_of
from compress.weights import named, prunable, weights
from search_spaces.arch import nearest
from search_spaces.masks import attach, detach, keep_count, top_k_mask

METHODS = ("random", "magnitude", "snip", "grasp", "synflow")


def prune(
    model: nn.Module,
    density: float | Mapping[str, float],
    *,
    distribution: str | None = None,
    method: str | None = None,
    exclude: Sequence[str] = (),
    batch: tuple[Any, Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    seed: int = 0,
    inplace: bool = False,
    structured: bool = False,
    example: Any = None,
) -> nn.Module:
    """Return the model with a mask over its weights: those that are off stay zero, whatever trains the model.

    The weights of convolutions, linear layers and attention are pruned, exactly ``round(density * total)`` are kept,
    and every layer keeps at least one. Without a method they are kept at random, which suits networks that will be
    trained from scratch; take "magnitude" for trained ones. A masked network is pruned further by
    ``compress.prune(compress.finalize(model), ...)``.

    The mask is a parametrization: it works with any optimizer, weight decay, gradient clipping, averaging, mixed
    precision, DistributedDataParallel, `copy.deepcopy` and `torch.compile`, and it is in ``state_dict``. A
    ``state_dict`` of the model without masks can be loaded too.

    Masks make a network no faster, and until `finalize` a little slower, as every forward multiplies them. A
    parametrization also changes two things. ``nn.init`` on a masked weight does nothing (it fills a temporary copy):
    initialise before you prune. And torch refuses to pickle the model: use `compress.save` instead of
    ``torch.save(model)``, or save ``model.state_dict()``.

    Args:
        model: any module; it stays as it is unless `inplace`.
        density: share of the weights that are kept, in (0, 1]; or a mapping of layers to densities, such as `densities`
            returns, where layers it does not name get no mask.
        distribution: one of `compress.density.RULES`: how many weights each layer keeps. If None, that is "erk" for
            "random"; the others keep the best weights of all layers together.
        method: which weights are kept: "random" ones, the default, for networks that will be trained from scratch; the
            largest by "magnitude", for trained ones; or the best for "snip",
            "grasp" or "synflow".
        exclude: names of layers, of modules that hold layers, or of parameters, that get no mask.
        batch: (x, y), inputs and targets: "snip", "grasp" and "synflow" need it, the last only for the shape of x.
        loss: of outputs and targets, for "snip" and "grasp"; cross-entropy if None.
        seed: of random choices.
        inplace: mask the model itself. Its Parameter objects stay, so an optimizer made before works on; momentum that
            it has of weights that are off fades behind the mask.
        structured: remove whole channels instead: really smaller tensors, and faster. `density` is then a share of
            channels, and distributions and methods are those of `compress.structured.prune_channels`, by default
            "uniform" and "magnitude".
        example: with `structured`, a batch that the model takes.

    Raises:
        CompressionError: the model is no module, a density is not in (0, 1] or the distribution cannot meet it, a name
            is unknown, a batch or example is missing or does not fit the model, or a weight is tied, parametrized or
            masked already. The model is unchanged then.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> sparse = prune(net, 0.1)
        >>> {name: int(mask.sum()) for name, mask in masks(sparse).items()}
        {'0': 17, '3': 293}
        >>> sparse(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])

    Source: Liu et al., The Unreasonable Effectiveness of Random Pruning, ICLR 2022, arXiv:2202.02643, whose code masks
    the weights after each step, so that momentum of dead ones remains; here their gradient, and so their state, is
    zero. For the other methods see `compress.scores`.
    """
    if structured:
        asked = {"distribution": distribution, "method": method}
        settings: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        settings |= {"exclude": exclude, "batch": batch, "loss": loss, "seed": seed}
        return _channels(model, density, inplace, example, settings)
    if example is not None:
        raise CompressionError("example is for structured=True; masks need none.")
    method = "random" if method is None else method
    if method not in METHODS:
        raise CompressionError(f"there is no pruning method {method!r}; {nearest(method, METHODS)}")
    by_scores = distribution is None and method != "random"
    if isinstance(density, Mapping):
        if distribution is not None:
            raise CompressionError(f"density names the layers itself, so distribution={distribution!r} has no meaning.")
        counts, by_scores = _counts(model, density, exclude), False
    else:
        # Where scores share out the weights, only the number of them is used: the same with every rule.
        rule = "uniform" if by_scores else "erk" if distribution is None else distribution
        counts = densities(model, density, rule, exclude=exclude, batch=batch, loss=loss, seed=seed).counts
    if method == "random":
        chosen = _random(model, counts, seed)
    else:
        chosen = _best(model, counts, by_scores, method, batch, loss, seed)
    target = model if inplace else copy_of(model)
    own = weights(target)
    for name, mask in chosen.items():
        attach(own[name].module, own[name].attribute, mask)
    return target


def masks(model: nn.Module) -> dict[str, Tensor]:
    """Return the masks of a model by the names of their weights: boolean, True where a weight is kept.

    Example:
        >>> masks(prune(nn.Linear(2, 2), 0.5, method="magnitude"))["weight"].sum()
        tensor(2)
        >>> masks(nn.Linear(2, 2))
        {}
    """
    found = {name: weight.mask for name, weight in weights(model).items()}
    return {name: mask for name, mask in found.items() if mask is not None}


def finalize(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Return the model with ordinary weights in place of masked ones and of those of few bits, free to change.

    They have the same values: zero where a mask was off, and those of few bits exactly theirs. All of them are trained
    from then on, those of a frozen grid too.

    Args:
        model: any module; one without masks and few-bit weights is only copied.
        inplace: change the model itself. Its Parameter objects stay; those of `dense_shift` become smaller, so that an
            optimizer which has state of them cannot go on.

    Raises:
        CompressionError: it is no module, or cannot be copied.

    Example:
        >>> layer = finalize(prune(nn.Linear(10, 10), 0.2))
        >>> type(layer).__name__, int((layer.weight != 0).sum())
        ('Linear', 20)
    """
    target = model if inplace else copy_of(model)
    for weight in weights(target).values():
        if weight.low_bit is not None:
            freeze_low_bit(weight.module, weight.attribute)
            weight.parameter.requires_grad_(True)
        elif weight.mask is None:
            continue
        detach(weight.module, weight.attribute)
    return target


def _counts(model: nn.Module, density: Mapping[str, float], exclude: Sequence[str]) -> dict[str, int]:
    """Return how many weights are kept in each layer that the mapping names."""
    for name, share in density.items():
        check_density(share, f"density[{name!r}]")
    left = named(model, density, exclude, "density", prunable)
    if isinstance(density, Densities) and density.sizes == {name: weight.size for name, weight in left.items()}:
        return dict(density.counts)  # whose sum is exact
    return {name: keep_count(density[name], weight.size) for name, weight in left.items()}


def _random(model: nn.Module, counts: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    generator, known = torch.Generator().manual_seed(seed), weights(model)
    chosen = {}
    for name, kept in counts.items():
        flat = torch.zeros(known[name].size, dtype=torch.bool)
        flat[torch.randperm(len(flat), generator=generator, dtype=torch.int32)[:kept]] = True
        chosen[name] = flat.view(known[name].shape)
    return chosen


def _best(
    model: nn.Module,
    counts: Mapping[str, int],
    by_scores: bool,
    method: str,
    batch: tuple[Any, Any] | None,
    loss: Callable[[Any, Any], Tensor] | None,
    seed: int,
) -> dict[str, Tensor]:
    """Return masks of the best scores: of as many in each layer, or, `by_scores`, of as many in all."""
    names = list(counts)

    def choose(values: scores.Scores, part: float = 1.0) -> dict[str, Tensor]:
        """Keep ``density ** part`` of the weights."""
        sizes = {name: value.numel() for name, value in values.items()}
        if by_scores:
            total, kept = sum(sizes.values()), sum(counts.values())
            return largest(values, round(total * (kept / total) ** part))
        own = {name: round(size * (counts[name] / size) ** part) for name, size in sizes.items()}
        return {name: top_k_mask(value, own[name]) for name, value in values.items()}

    if method == "synflow":
        return scores.synflow(model, names, batch, choose)
    if method == "snip":
        return choose(scores.snip(model, names, batch, loss, seed=seed))
    if method == "grasp":
        return choose(scores.grasp(model, names, batch, loss, seed=seed))
    return choose(scores.magnitude(model, names))


def _channels(model: nn.Module, density: Any, inplace: bool, example: Any, settings: dict[str, Any]) -> nn.Module:
    if inplace:
        raise CompressionError("structured=True makes smaller tensors, so it returns a new model; leave out inplace.")
    if example is None:
        raise CompressionError("structured=True follows the channels of a batch through the model: give example=x.")
    from compress.structured import prune_channels

    return prune_channels(model, density, example=example, **settings)
