"""Convolutions and linear layers whose weights are pruned by learned scores: the sparse operations of DASS.

A sparse layer lives through three states. It is made *dense* and is then an ordinary layer. `learn_scores` gives every
entry of its weight a score: those of largest score count, and the scores alone learn. `fix_masks` keeps these entries
for good under a boolean mask (`search_spaces.masks`), drops the scores and lets the weights learn again.

The layers are torch's own, with a parametrization on the weight. So whatever reads ``layer.weight`` reads the masked
weight: both forms of `RelaxedCell`, a sub-network that is extracted, any training loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from search_spaces.arch import ArchError, nearest
from search_spaces.masks import attach, detach, keep_count, mask_of, straight_through, top_k_mask

BUDGETS = ("layer", "global")
_Network = TypeVar("_Network", bound=nn.Module)


class _Sparse(nn.Module):
    """Is given a mask when a state with one is loaded."""

    weight: Tensor

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}parametrizations.weight.0.mask" in state_dict and not parametrize.is_parametrized(self, "weight"):
            attach(self, "weight", torch.ones_like(self.weight, dtype=torch.bool))
        super()._load_from_state_dict(state_dict, prefix, *args)


class SparseConv2d(_Sparse, nn.Conv2d):
    """A convolution that `learn_scores` and `fix_masks` prune; until then it is dense.

    A state with a mask can be loaded into a dense one, which has the mask from then on.

    Example:
        >>> conv = fix_masks(learn_scores(SparseConv2d(3, 8, 3), density=0.1))
        >>> int((conv.weight != 0).sum()), conv.weight.numel()
        (22, 216)

    Source: Mousavi et al., DASS: Differentiable Architecture Search for Sparse Neural Networks, ACM TECS 2023.
    """


class SparseLinear(_Sparse, nn.Linear):
    """A linear layer that `learn_scores` and `fix_masks` prune; until then it is dense. See `SparseConv2d`."""


SparseLayer = SparseConv2d | SparseLinear


class Scores(nn.Module):
    """A parametrization that lets the `keep` entries of largest absolute score count, and learns the scores.

    Attributes:
        scores: of the weight's shape; see `straight_through` for their gradient.
    """

    def __init__(self, scores: Tensor, keep: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)
        self.keep = keep

    def forward(self, weight: Tensor) -> Tensor:
        return straight_through(weight, self.scores, self.keep)

    def extra_repr(self) -> str:
        return f"{self.keep:,} of {self.scores.numel():,} kept"


def sparsified(network: _Network, leave: tuple[type[nn.Module], ...] = ()) -> _Network:
    """Make every `nn.Conv2d` and `nn.Linear` of a network a `SparseConv2d` or `SparseLinear`, in place, and return it.

    Parameters and outputs stay what they are. Layers of other classes, subclasses too, are left alone.

    Args:
        network: any module.
        leave: classes of modules that are left as they are, with all that is in them.

    Example:
        >>> sparsified(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()))
        Sequential(
          (0): SparseConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Flatten(start_dim=1, end_dim=-1)
        )
    """
    module: nn.Module = network
    if isinstance(module, leave):
        return network
    if type(module) is nn.Conv2d:
        module.__class__ = SparseConv2d  # as torch's parametrizations do: the layer keeps its Parameters
    elif type(module) is nn.Linear:
        module.__class__ = SparseLinear
    for child in module.children():
        sparsified(child, leave)
    return network


def sparse_layers(network: nn.Module) -> dict[str, SparseLayer]:
    """Return the sparse layers of a network by name, in the order of its modules; that of a mere layer is "weight".

    Example:
        >>> list(sparse_layers(nn.Sequential(SparseConv2d(3, 8, 3), nn.Conv2d(8, 8, 3), SparseLinear(8, 2))))
        ['0', '2']
    """
    return {name or "weight": m for name, m in network.named_modules() if isinstance(m, SparseLayer)}


def kept(
    network: nn.Module,
    density: float | Mapping[str, float],
    *,
    budget: str = "layer",
    spare_depthwise: bool = False,
) -> dict[str, int]:
    """Return how many entries each sparse layer will keep; of those not named, all. See `learn_scores`.

    Raises:
        ArchError: as `learn_scores`.

    Example:
        >>> net = nn.Sequential(SparseConv2d(3, 8, 3), SparseLinear(8, 2))
        >>> kept(net, 0.1), kept(net, {"0": 0.5})
        ({'0': 22, '1': 2}, {'0': 108})
    """
    layers = sparse_layers(network)
    if not layers:
        raise ArchError(
            f"{type(network).__name__} has no sparse layers to prune. Use DARTS(ops='sparse'), or make its layers "
            "sparse: search_spaces.sparse_operations.sparsified(network)."
        )
    if masked := [name for name, layer in layers.items() if parametrize.is_parametrized(layer, "weight")]:
        raise ArchError(f"the weight of {masked[0]!r} is masked or parametrized already: begin with dense layers.")
    if budget not in BUDGETS:
        raise ArchError(f"budget={budget!r}; choices are {', '.join(BUDGETS)}.")
    if isinstance(density, Mapping):
        if budget == "global" or spare_depthwise:
            raise ArchError(
                "a density for each layer says all: leave budget and spare_depthwise out, or give one number."
            )
        if unknown := [name for name in density if name not in layers]:
            raise ArchError(f"density names {unknown[0]!r}, which is no sparse layer; {nearest(unknown[0], layers)}")
        if not density:
            raise ArchError("density names no layer; give one number, or a number for each layer to prune.")
        shares: dict[str, Any] = dict(density)
    else:
        shares = {name: density for name, m in layers.items() if not (spare_depthwise and is_depthwise(m))}
        if not shares:
            raise ArchError("all sparse layers are depthwise and spared: leave spare_depthwise out.")
    for name, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            of = f" of {name!r}" if isinstance(density, Mapping) else ""
            raise ArchError(f"density{of} is {share!r}; it is the share of weights that are kept, above 0, at most 1.")
    counts = {name: keep_count(share, layers[name].weight.numel()) for name, share in shares.items()}
    if budget == "global":
        total = sum(layers[name].weight.numel() for name in shares)
        if keep_count(next(iter(shares.values())), total) < len(shares):
            raise ArchError(f"density={density!r} of {total:,} weights leaves less than one for each of {len(shares)}.")
    return counts


def learn_scores(
    network: _Network,
    density: float | Mapping[str, float],
    *,
    budget: str = "layer",
    spare_depthwise: bool = False,
) -> _Network:
    """Give the weights of sparse layers scores and let these alone learn, in place; return the network.

    A score begins as ``sqrt(6 / fan_in) * w / max|w|``: at first the mask is that of layerwise magnitude pruning. All
    other parameters ask for no gradient from now on, so neither momentum nor weight decay moves them in an optimizer
    made of those that do.

    Args:
        network: its layers are dense. Those that are not sparse stay so.
        density: the share of entries to keep, of every sparse layer; or by layer name, and the others stay dense. A
            layer of n entries keeps ``keep_count(density, n)``.
        budget: "layer", or "global": the share is that of all sparse layers together, each keeping one entry at least.
            Then the layers' counts follow the scores: call `share_out` after every step.
        spare_depthwise: depthwise convolutions stay dense, and are not counted. At a density of 0.01 a depthwise 3x3
            convolution of 16 channels keeps 1 of 144 entries, so nearly all of its channels are dead.

    Raises:
        ArchError: there are no sparse layers, one has a mask already, a density is not above 0 and at most 1, or names
            no sparse layer.

    Example:
        >>> net = learn_scores(nn.Sequential(SparseLinear(8, 2)), density=0.25)
        >>> [name for name, p in net.named_parameters() if p.requires_grad]
        ['0.parametrizations.weight.0.scores']
        >>> int((net[0].weight != 0).sum())
        4

    Source: Mousavi et al., DASS, ACM TECS 2023; scores as in Sehwag et al., HYDRA, NeurIPS 2020, arXiv:2002.10509. The
    global budget and the spared layers are ours.
    """
    counts = kept(network, density, budget=budget, spare_depthwise=spare_depthwise)
    network.requires_grad_(False)
    layers = sparse_layers(network)
    for name, keep in counts.items():
        weight = layers[name].weight.detach()
        bound = math.sqrt(6 / weight[0].numel())
        scores = weight * (bound / weight.abs().max().clamp(min=torch.finfo(weight.dtype).tiny))
        parametrize.register_parametrization(layers[name], "weight", Scores(scores, keep), unsafe=True)
    if budget == "global":
        share_out(network, float(density))  # type: ignore[arg-type]
    return network


@torch.no_grad()
def share_out(network: nn.Module, density: float) -> None:
    """Share a global budget out: let the entries of largest score of all layers together count.

    A layer's scores are divided by their mean size first: layers differ in the scale of their scores, and so a layer
    keeps more than its share only if its scores are less equal than those of others. Its largest is always kept.

    Args:
        network: of `learn_scores`.
        density: kept entries, as a share of all that have scores.
    """
    found = [step for _, step in _scored(network)]
    ranked = []
    for step in found:
        flat = step.scores.abs().flatten()
        flat = flat / flat.mean().clamp(min=torch.finfo(flat.dtype).tiny)
        flat[flat.argmax()] = math.inf
        ranked.append(flat)
    sizes = [len(flat) for flat in ranked]
    mask = top_k_mask(torch.cat(ranked), keep_count(density, sum(sizes)))
    counts = torch.stack([part.sum() for part in mask.split(sizes)]).tolist()
    for step, count in zip(found, counts, strict=True):
        step.keep = count


def fix_masks(network: _Network) -> _Network:
    """Keep the entries that count now for good, under boolean masks, and drop the scores; return the network.

    The others become zero, and stay zero: they have no gradient. All parameters ask for gradients again.

    Args:
        network: of `learn_scores`; changed in place.
    """
    for layer, step in list(_scored(network)):
        mask = top_k_mask(step.scores.abs(), step.keep)
        detach(layer, "weight")
        attach(layer, "weight", mask)
    return network.requires_grad_(True)


def masks(network: nn.Module) -> dict[str, Tensor]:
    """Return the fixed masks of sparse layers by the layers' names, boolean and of the weights' shapes."""
    found = {name: mask_of(layer, "weight") for name, layer in sparse_layers(network).items()}
    return {name: mask for name, mask in found.items() if mask is not None}


def is_depthwise(layer: nn.Module) -> bool:
    """Return whether a layer is a convolution whose every output reads one channel of several."""
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1


def _scored(network: nn.Module) -> Iterator[tuple[SparseLayer, Scores]]:
    for layer in sparse_layers(network).values():
        if parametrize.is_parametrized(layer, "weight"):
            step = layer.parametrizations["weight"][0]  # type: ignore[index]
            if isinstance(step, Scores):
                yield layer, step
