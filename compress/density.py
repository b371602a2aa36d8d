"""How dense each layer of a sparse network is: the rules of the literature, exact to the weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from compress import scores
from compress.counts import apportion, largest
from compress.errors import CompressionError
from compress.tables import aligned
from compress.weights import Weight, prunable, weights
from search_spaces.arch import nearest
from search_spaces.masks import keep_count

RULES = ("uniform", "uniform+", "er", "erk", "erk+", "balanced", "snip", "grasp")


@dataclass(frozen=True, eq=False, repr=False)
class Densities(Mapping[str, float]):
    """The density of every layer by its name, as the rule says; `counts` makes them whole weights.

    Attributes:
        distribution: the rule.
        density: kept weights to all weights that may be pruned.
        shares: what the mapping holds.
        counts: how many weights each layer keeps; their sum is ``round(density * total)``.
        shapes: of the weights.
    """

    distribution: str
    density: float
    shares: dict[str, float]
    counts: dict[str, int]
    shapes: dict[str, tuple[int, ...]]

    @property
    def sizes(self) -> dict[str, int]:
        """How many weights each layer has."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    def __getitem__(self, name: str) -> float:
        return self.shares[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shares)

    def __len__(self) -> int:
        return len(self.shares)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.distribution} at {self.density:g}, {len(self)} layers>"

    def __str__(self) -> str:
        """Return a table: layer, shape, density, weights kept, weights."""
        kept, size = sum(self.counts.values()), sum(self.sizes.values())
        rows = [("layer", "shape", "density", "kept", "size")]
        for name, share in self.items():
            shape = "x".join(map(str, self.shapes[name]))
            rows.append((name, shape, f"{share:.4f}", f"{self.counts[name]:,}", f"{self.sizes[name]:,}"))
        rows.append(("total", self.distribution, f"{kept / size:.4f}", f"{kept:,}", f"{size:,}"))
        return aligned(rows, left=(0, 1))


def densities(
    model: nn.Module,
    density: float,
    distribution: str = "erk",
    *,
    exclude: Sequence[str] = (),
    last: float | None = None,
    batch: tuple[Any, Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    seed: int = 0,
) -> Densities:
    """Return how dense each layer is when `density` of all weights that may be pruned are kept.

    Layers are the weights of `compress.weights` but for the excluded ones, which stay dense and count nowhere. The
    first convolution and the last layer are those of the order in which the model defines them. A layer keeps at least
    one weight. "snip" and "grasp" score a copy of the model; the others only read shapes, so the model may be on the
    ``meta`` device.

    - "uniform": the same in each layer.
    - "uniform+": the first convolution, or where there is none the first layer, stays dense, and the last layer keeps
      at least 0.2.
    - "er": proportional to ``(out + in) / (out * in)``, at most 1, whatever the kernel.
    - "erk": proportional to the sum of the weight's sizes over their product, at most 1: of a convolution
      ``(out + in + kh + kw) / (out * in * kh * kw)``. Small layers, depthwise ones and shortcuts become nearly dense,
      so multiply-adds fall less than weights.
    - "erk+": the last layer has a density of its own (1), and the others have ERK.
    - "balanced": as many weights in each layer, as far as its size allows.
    - "snip", "grasp": what those methods keep in each layer ("snip" with fresh Xavier-normal weights).

    Args:
        density: in (0, 1].
        distribution: one of `RULES`.
        exclude: names of layers, of modules that hold layers, or of parameters.
        last: of the last layer: its density in "erk+" (1 if None), its least density in "uniform+" (0.2 if None).
        batch: (x, y), inputs and targets: "snip" and "grasp" need it.
        loss: of outputs and targets; cross-entropy if None. For "snip" and "grasp".
        seed: of the weights and the dropout of "snip" and "grasp".

    Raises:
        CompressionError: the density is not in (0, 1], the distribution is unknown or cannot meet it, no batch was
            given where one is needed, or the model's weights cannot be masked (see `prunable`).

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 10))
        >>> print(densities(net, 0.1, "erk"))
        layer  shape     density  kept   size
        0      8x3x3x3    0.1306    28    216
        1      16x8x3x3   0.0432    50  1,152
        3      10x64      0.1919   123    640
        total  erk        0.1001   201  2,008

    Source: Liu et al., The Unreasonable Effectiveness of Random Pruning, ICLR 2022, arXiv:2202.02643; "balanced" from
    Gadhikar et al., Why Random Pruning Is All We Need to Start Sparse, ICML 2023, arXiv:2210.02412; ERK from Evci et
    al., Rigging the Lottery, ICML 2020, arXiv:1911.11134. The code of the first draws each weight by chance, and its
    uniform+ misses the density; here the number of weights is exact.
    """
    check_density(density)
    if distribution not in RULES:
        raise CompressionError(f"there is no distribution {distribution!r}; {nearest(distribution, RULES)}")
    if last is not None:
        check_density(last, "last")
        if distribution not in ("uniform+", "erk+"):
            raise CompressionError(f"last is for 'uniform+' and 'erk+', got last={last!r} with {distribution!r}.")
    found = prunable(model, exclude)
    sizes = {name: weight.size for name, weight in found.items()}
    kept = keep_count(density, sum(sizes.values()))
    fixed = _fixed(weights(model), sizes, density, distribution, last)
    held = {name: keep_count(share, sizes[name]) for name, share in fixed.items()}
    free = {name: size for name, size in sizes.items() if name not in fixed}
    _check_feasible(density, distribution, kept, sizes, fixed, sum(held.values()))
    if distribution in ("snip", "grasp"):
        if distribution == "snip":
            values = scores.snip(model, list(found), batch, loss, seed=seed, fresh=True)
        else:
            values = scores.grasp(model, list(found), batch, loss, seed=seed)
        counts = {name: int(mask.sum()) for name, mask in largest(values, kept).items()}
        shares = {name: counts[name] / size for name, size in sizes.items()}
    else:
        budget = density * sum(sizes.values()) - sum(share * sizes[name] for name, share in fixed.items())
        raw = {name: _raw(found[name].shape, distribution) for name in free}
        shares = fixed | _fill(raw, free, budget)
        ideal = {name: shares[name] * size for name, size in free.items()}
        counts = held | apportion(ideal, free, kept - sum(held.values()))
    return Densities(
        distribution,
        float(density),
        {name: shares[name] for name in sizes},
        {name: counts[name] for name in sizes},
        {name: weight.shape for name, weight in found.items()},
    )


def check_density(value: object, name: str = "density") -> None:
    """Refuse what is not a number in (0, 1].

    Raises:
        CompressionError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= 1:
        raise CompressionError(f"{name} is the share of the weights that are kept, in (0, 1], got {name}={value!r}.")


def _raw(shape: Sequence[int], distribution: str) -> float:
    """Return a layer's density before it is scaled and capped."""
    if distribution in ("er", "erk", "erk+"):
        used = shape[:2] if distribution == "er" else shape
        return sum(used) / math.prod(used)
    return 1 / math.prod(shape) if distribution == "balanced" else 1.0


def _fill(raw: Mapping[str, float], sizes: Mapping[str, int], budget: float) -> dict[str, float]:
    """Return ``min(1, scale * raw)``, with the scale at which `budget` weights are kept."""
    dense: set[str] = set()
    while len(dense) < len(raw):
        rest = [name for name in raw if name not in dense]
        scale = (budget - sum(sizes[name] for name in dense)) / sum(raw[name] * sizes[name] for name in rest)
        highest = max(raw[name] for name in rest)
        if scale * highest <= 1:
            return {name: 1.0 if name in dense else scale * raw[name] for name in raw}
        dense.update(name for name in rest if raw[name] == highest)
    return dict.fromkeys(raw, 1.0)


def _fixed(
    all_weights: Mapping[str, Weight], sizes: Mapping[str, int], density: float, distribution: str, last: float | None
) -> dict[str, float]:
    """Return the layers whose density the rule itself names."""
    final = list(all_weights)[-1]
    if distribution == "erk+":
        return {name: 1.0 if last is None else last for name in [final] if name in sizes}
    if distribution != "uniform+":
        return {}
    first = next((n for n, own in all_weights.items() if isinstance(own.module, _ConvNd)), next(iter(all_weights)))
    fixed = {name: 1.0 for name in [first] if name in sizes}
    least = 0.2 if last is None else last
    rest = sum(size for name, size in sizes.items() if name not in fixed)
    if final in sizes and final not in fixed and density * sum(sizes.values()) - sizes.get(first, 0) < least * rest:
        fixed[final] = least
    return fixed


def _check_feasible(
    density: float, distribution: str, kept: int, sizes: Mapping[str, int], fixed: Mapping[str, float], held: int
) -> None:
    total, free = sum(sizes.values()), [name for name in sizes if name not in fixed]
    least, most = held + len(free), held + sum(sizes[name] for name in free)
    if least <= kept <= most:
        return
    parts = [f"{name!r} at {share:g}" for name, share in fixed.items()]
    if kept < least:
        parts += [f"one weight or more in each of {len(free)} layers"] * bool(free)
        bound = f"at least {_rounded(least / total, math.ceil):g}"
    else:
        bound = f"at most {_rounded(most / total, math.floor):g}"
    rule, other = (f"{distribution!r}", ", another last, or another distribution") if fixed else ("pruning", "")
    raise CompressionError(
        f"density={density:g} keeps {kept:,} of {total:,} weights, but {rule} keeps {' and '.join(parts)}: give a "
        f"density of {bound}{other}."
    )


def _rounded(value: float, towards: Callable[[float], int]) -> float:
    """Return three significant digits of a number."""
    digits = 2 - math.floor(math.log10(value))
    return towards(value * 10.0**digits) / 10.0**digits
