"""Which layers suffer from few bits, by curvature or by trial, and how many bits each gets within a number of bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from compress.errors import CompressionError
from compress.low_bit import check_bits
from compress.models import copy_of, differentiable
from compress.packing import packed_size
from compress.quantization import FakeQuantize, Group, check_settings, fake_quantize, quantizable
from compress.tables import aligned
from compress.weights import weights
from nasbench.batches import Batch, Data
from nasbench.style import INK, LINE, MUTED, PAPER, SERIES, look, new_figure, plain, save_figure
from nasbench.training import device_of, evaluating
from search_spaces.arch import nearest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("hessian", "measured")

Loss = Callable[[Any, Any], Tensor]
Steps = Mapping[str, Mapping[int, FakeQuantize]]

_BATCH = 128  # of the images that are drawn from data


@dataclass(frozen=True)
class LayerSensitivity:
    """What few bits do to the weights of one layer.

    Attributes:
        weights: how many there are; behind a mask, those that it keeps.
        harm: by bits. "hessian": the mean trace times the squared error of rounding; "measured": by how much the loss
            grows.
        bytes: by bits: packed codes and their scales.
        accuracy: by bits, 0 to 1: where it was measured and targets are classes.
        trace: "hessian": the mean of the Hessian's diagonal.
        trace_error: its standard error, over the probes.
    """

    weights: int
    harm: Mapping[int, float]
    bytes: Mapping[int, int]
    accuracy: Mapping[int, float] | None = None
    trace: float | None = None
    trace_error: float | None = None

    def careful(self, bits: int) -> float:
        """Return the harm to reckon with: not below 0, nor below one standard error where it was estimated."""
        harm = self.harm[bits]
        return max(harm, abs(harm / self.trace) * (self.trace_error or 0.0) if self.trace else 0.0)


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """What few bits do to each layer of a model; made by `sensitivities`. Prints as a table.

    Attributes:
        method: "hessian" or "measured".
        bits: those that were tried, rising.
        layers: by name, in the order of the model.
        loss: of the model as it is, on the same batches.
        accuracy: likewise, 0 to 1, where targets are classes.
    """

    method: str
    bits: tuple[int, ...]
    layers: Mapping[str, LayerSensitivity]
    loss: float
    accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all that is known, as JSON has it."""

        def plain_keys(value: Any) -> Any:
            return {str(key): own for key, own in value.items()} if isinstance(value, Mapping) else value

        layers = {
            name: {key: plain_keys(value) for key, value in vars(layer).items() if value is not None}
            for name, layer in self.layers.items()
        }
        own = {"method": self.method, "bits": list(self.bits), "loss": self.loss, "accuracy": self.accuracy}
        return {key: value for key, value in own.items() if value is not None} | {"layers": layers}

    def __str__(self) -> str:
        traces = self.method == "hessian"
        accuracies = self.accuracy is not None and not traces
        rows = [["layer", "weights", *(["trace", "±"] if traces else []), *(f"{bits} bits" for bits in self.bits)]]
        rows[0] += [f"accuracy at {bits}" for bits in self.bits if accuracies]
        for name, layer in self.layers.items():
            rows.append([name, f"{layer.weights:,}"])
            if traces:
                rows[-1] += [f"{layer.trace:.3g}", f"{layer.trace_error:.1g}"]
            rows[-1] += [f"{layer.harm[bits]:.3g}" for bits in self.bits]
            if layer.accuracy is not None:
                rows[-1] += [f"{layer.accuracy[bits]:.2%}" for bits in self.bits]
        reached = f"loss {self.loss:.4g}" + (f", accuracy {self.accuracy:.2%}" if self.accuracy is not None else "")
        return f"{aligned(rows)}\n{_MEANING[self.method]}; of the model as it is: {reached}"

    @look()
    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the harm of each layer, on a logarithmic axis, a colour for each number of bits; return the figure.

        Lines are standard errors of the estimate. A hollow dot is one standard error where the estimate itself is
        below 0. Where the loss did not grow there is no dot.

        Args:
            path: also save it there, as PNG, PDF or SVG by its ending.
        """
        from matplotlib.ticker import LogLocator, NullLocator

        layers = list(self.layers.values())
        places = [{b: harm if harm > 0 else own.careful(b) for b, harm in own.harm.items()} for own in layers]
        drawn = [place for own in places for place in own.values() if 0 < place < np.inf]
        low, high = (min(drawn) / 2, max(drawn) * 2) if drawn else (0.1, 1.0)
        figure = new_figure(6.4, 0.9 + 0.2 * len(layers), layout="constrained")
        axes = figure.subplots()
        for row, own in enumerate(places):
            axes.plot([low, min(max(low, *own.values()), high)], [row, row], color=LINE, lw=3.5, zorder=1)
        for bits, colour in zip(self.bits, SERIES, strict=False):
            for row, (layer, own) in enumerate(zip(layers, places, strict=True)):
                harm, place = layer.harm[bits], own[bits]
                if not 0 < place < np.inf:
                    continue
                fill, edge = (colour, PAPER) if harm > 0 else (PAPER, colour)
                axes.plot(place, row, "o", ms=5.5, mfc=fill, mec=edge, mew=0.8, zorder=3)
                if harm > 0 and layer.trace and layer.trace_error:
                    spread = harm * layer.trace_error / layer.trace
                    axes.plot([max(harm - spread, low), harm + spread], [row, row], color=colour, lw=1.4, zorder=2)
            axes.plot([], [], "o", ms=5.5, color=colour, mec=PAPER, label=f"{bits} bits")
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.set_yticks(range(len(layers)), [plain(name) for name in self.layers], color=INK)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(LogLocator(numticks=8))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(_MEANING[self.method], color=MUTED)
        beside = axes.secondary_yaxis("right")
        beside.set_yticks(
            range(len(layers)), [f"{own.weights:,}{'' if i else ' weights'}" for i, own in enumerate(layers)]
        )
        beside.spines["right"].set_visible(False)
        figure.legend(loc="outside upper left", ncols=len(self.bits), handlelength=1.0, columnspacing=1.4)
        save_figure(figure, path)
        return figure


_MEANING = {
    "hessian": "mean trace of the Hessian times squared error of rounding",
    "measured": "growth of the loss where one layer alone has few bits",
}


def sensitivities(
    model: nn.Module,
    batches: Data | Batch | Iterable[Batch],
    bits: Sequence[int] = (2, 4, 8),
    *,
    method: str = "hessian",
    loss: Loss | None = None,
    probes: int = 50,
    images: int = 256,
    group: Group = None,
    symmetric: bool = True,
    scale: str = "mse",
    exclude: Sequence[str] = (),
    seed: int = 0,
) -> Sensitivities:
    """Return how much each layer suffers if its weights have few bits, and all others stay float.

    Everything is done on a copy in evaluation mode. "measured" is what it says, one pass over the batches for each
    layer and number of bits. "hessian" estimates the growth of the loss near a minimum, but for a factor that is the
    same everywhere: the mean of the Hessian's diagonal in the layer times ``|Q(w) - w|^2``. The traces of all layers
    come from the same products of the whole Hessian with random signs: what other layers add to a layer's estimate is
    0 in the mean. A trace may be negative away from a minimum, and the harm with it. Curvature speaks of small errors:
    at 2 and 3 bits, "measured" is the one to trust.

    Args:
        model: any module of float32 weights, masked or not.
        batches: `nasbench` data, whose training split is used; or one batch (x, y) or some, read once.
        bits: numbers of bits, 2 to 8.
        method: "hessian" or "measured".
        loss: of outputs and targets, a mean over the batch; cross-entropy if None.
        probes: "hessian": random vectors, at least 2; the table says how exact the traces are.
        images: of data: how many to look at, drawn at random, without augmentation. More than 128 are rounded down to
            batches of 128.
        group, symmetric, scale: how weights would be rounded, as `quantize` has it.
        exclude: names of layers, of modules that hold layers, or of parameters, that are left out.
        seed: of the probes and of the images.

    Raises:
        CompressionError: the model or a setting is one that `quantize` refuses, there is no batch or none that fits
            model and loss, the loss is not finite, or torch cannot take second derivatives of the model.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> found = sensitivities(net, (torch.rand(16, 4), torch.arange(16) % 2), method="measured")
        >>> list(found.layers), found.layers["0"].bytes
        (['0', '2'], {2: 40, 4: 48, 8: 64})

    Source: Dong et al., HAWQ-V2, NeurIPS 2020, arXiv:1911.03852, which has the trace of each layer from probes of its
    own.
    """
    if method not in METHODS:
        raise CompressionError(f"there is no method {method!r} to find sensitive layers; {nearest(method, METHODS)}")
    for width in (given := _several(bits, "bits")):
        check_bits(width)
    tried = tuple(sorted(set(given)))
    check_settings(group, scale)
    if method == "hessian" and not _at_least(2, probes, Integral):
        raise CompressionError(f"a standard error takes at least 2 probes, a whole number, got {probes!r}.")
    if not _at_least(1, images, Integral):
        raise CompressionError(f"a batch takes at least 1 image, a whole number, got images={images!r}.")
    names = list(quantizable(model, exclude))
    twin, criterion = copy_of(model), loss or cross_entropy
    some = _listed(batches, device_of(twin), images, seed)
    found = weights(twin)
    settings = {"group": group, "symmetric": symmetric, "scale": scale}
    steps = {name: {width: fake_quantize(found[name], width, **settings) for width in tried} for name in names}
    with torch.random.fork_rng(devices=[]), evaluating(twin):
        torch.default_generator.manual_seed(seed)
        own, accuracy = _score(twin, some, criterion)
        if not np.isfinite(own):
            raise CompressionError(f"the loss of the model as it is is {own}; train it first.")
        if method == "measured":
            parts = _measured(twin, some, criterion, steps)
        else:
            parts = _estimated(twin, some, criterion, steps, probes, seed)
    layers = {}
    for name, own_steps in steps.items():
        weight = found[name]
        kept = weight.size if weight.mask is None else int(weight.mask.sum())
        stored = {width: packed_size(width, weight.size) + _nbytes(step) for width, step in own_steps.items()}
        layers[name] = LayerSensitivity(kept, bytes=stored, **parts[name])
    return Sensitivities(method, tried, layers, own, accuracy)


def assign_bits(found: Sensitivities, budget_bytes: int, choices: Sequence[int] | None = None) -> dict[str, int]:
    """Return the bits of each layer with the least sum of harm whose weights take at most so many bytes.

    The result is exact, not a heuristic; of equal ones it is that of fewest bytes. It fits
    ``compress.quantize(model, bits=...)`` with the settings that `sensitivities` had. An estimated harm counts as one
    standard error of it at least, and a negative growth of the loss as 0 (`LayerSensitivity.careful`). Harms of layers
    are added up; what two of them do to each other is not known here.

    Args:
        found: what each number of bits does to each layer.
        budget_bytes: of packed codes and scales of these layers together; biases and the rest of a file are beside it.
        choices: numbers of bits to choose from; those of `found` if None.

    Raises:
        CompressionError: no choice is small enough, or one was not tried.

    Example:
        >>> sizes = {2: 25, 4: 50}
        >>> first, last = (LayerSensitivity(100, {2: harm, 4: 1.0}, sizes) for harm in (3.0, 9.0))
        >>> layers = {"first": first, "last": last}
        >>> assign_bits(Sensitivities("measured", (2, 4), layers, loss=0.1), budget_bytes=75)
        {'first': 2, 'last': 4}

    Source: the integer program of Yao et al., HAWQ-V3, ICML 2021, arXiv:2011.10680, for bytes alone; solved by
    extending all combinations of the first layers that no other beats in both bytes and harm, one layer at a time.
    """
    if not _at_least(0, budget_bytes, Real):
        raise CompressionError(f"budget_bytes is a number of bytes, got {budget_bytes!r}.")
    wanted = _several(found.bits if choices is None else choices, "choices")
    if unknown := [width for width in wanted if width not in found.bits]:
        raise CompressionError(f"{unknown[0]!r} bits were not tried, only {found.bits}; call sensitivities with them.")
    allowed, layers = tuple(sorted(set(wanted))), list(found.layers.values())
    least = [min(layer.bytes[width] for width in allowed) for layer in layers]
    if sum(least) > budget_bytes:
        raise CompressionError(
            f"these {len(layers)} layers take {sum(least):,} bytes with {allowed} bits at the fewest, more than the "
            f"{budget_bytes:,} that are allowed; allow more, or fewer bits."
        )
    sizes, harms = np.zeros(1, np.int64), np.zeros(1)
    history = []
    for place, layer in enumerate(layers):
        sizes = np.concatenate([sizes + layer.bytes[width] for width in allowed])
        harms = np.concatenate([harms + layer.careful(width) for width in allowed])
        order = np.lexsort((harms, sizes))
        order = order[sizes[order] <= budget_bytes - sum(least[place + 1 :])]
        before = np.minimum.accumulate(np.concatenate([[np.inf], harms[order]]))[:-1]
        kept = order[(harms[order] < before) | (np.arange(len(order)) == 0)]
        history.append((kept, len(sizes) // len(allowed)))
        sizes, harms = sizes[kept], harms[kept]
    chosen, state = [], len(sizes) - 1
    for kept, before_count in reversed(history):
        choice, state = divmod(int(kept[state]), before_count)
        chosen.append(allowed[choice])
    return dict(zip(found.layers, reversed(chosen), strict=True))


def _several(bits: Any, what: str) -> list[int]:
    """Return some numbers of bits, unchecked."""
    if isinstance(bits, str) or not isinstance(bits, Iterable):
        raise CompressionError(f"{what} are some numbers of bits, such as (2, 4, 8), got {bits!r}.")
    if not (found := list(bits)):
        raise CompressionError(f"{what} is empty; name at least one number of bits, 2 to 8.")
    return found


def _at_least(least: int, value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and bool(value >= least)


def _listed(batches: Any, device: torch.device, images: int, seed: int) -> list[Batch]:
    """Return the batches, on the model's device."""
    if isinstance(batches, Data):
        size = min(images, _BATCH)
        drawn = batches.to(device).train_batches(size, seed=seed, epoch=0, augment=False)
        return [batch for _, batch in zip(range(max(1, images // size)), drawn, strict=False)]
    pair = isinstance(batches, tuple | list) and len(batches) == 2 and all(isinstance(part, Tensor) for part in batches)
    if not isinstance(batches, Iterable):
        raise CompressionError(f"batches are data, (x, y) or some of these, got {type(batches).__name__}.")
    some = []
    for batch in [batches] if pair else batches:
        x, y = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (None, None)
        if not (isinstance(x, Tensor) and isinstance(y, Tensor) and x.ndim and len(x)):
            raise CompressionError(f"a batch is (x, y), tensors of inputs and of their targets, got {batch!r:.80}.")
        some.append((x.to(device), y.to(device)))
    if not some:
        raise CompressionError("there is no batch; give at least one (x, y).")
    return some


def _nbytes(step: FakeQuantize) -> int:
    return sum(array.nbytes for array in step.arrays().values())


def _loss(model: nn.Module, batch: Batch, criterion: Loss) -> tuple[Tensor, Any]:
    x, y = batch
    try:
        outputs = model(differentiable(model, x))
        value = criterion(outputs, y)
    except Exception as error:
        raise CompressionError(
            f"there is no loss for a batch x {tuple(x.shape)}, y {tuple(y.shape)}, {y.dtype}: {error}"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise CompressionError(f"the loss of a batch is one number, got {value!r:.80}.")
    return value, outputs


def _score(model: nn.Module, batches: Sequence[Batch], criterion: Loss) -> tuple[float, float | None]:
    """Return mean loss and, where targets are classes, accuracy."""
    losses, examples, hits, targets = 0.0, 0, 0, 0
    for x, y in batches:
        value, outputs = _loss(model, (x, y), criterion)
        losses, examples = losses + float(value) * len(x), examples + len(x)
        labels = isinstance(outputs, Tensor) and outputs.ndim == y.ndim + 1 and not y.is_floating_point()
        if labels and (classes := outputs.argmax(1)).shape == y.shape:
            hits, targets = hits + int((classes == y).sum()), targets + y.numel()
    return losses / examples, hits / targets if targets else None


def _measured(model: nn.Module, batches: Sequence[Batch], criterion: Loss, steps: Steps) -> dict[str, dict[str, Any]]:
    """Return harm and accuracy of each layer, by bits."""
    before, _ = _score(model, batches, criterion)
    found, parts = weights(model), {}
    for name, own in tqdm(steps.items(), desc="sensitivities", unit="layer", leave=False, delay=1):
        parameter = found[name].parameter
        stored, effective = parameter.clone(), getattr(found[name].module, found[name].attribute).clone()
        scores = {}
        for width, step in own.items():
            parameter.copy_(step(effective))
            scores[width] = _score(model, batches, criterion)
        parameter.copy_(stored)
        known = {width: accuracy for width, (_, accuracy) in scores.items() if accuracy is not None}
        harm = {width: float(np.nan_to_num(value - before, nan=np.inf)) for width, (value, _) in scores.items()}
        parts[name] = {"harm": harm, "accuracy": known or None}
    return parts


def _estimated(
    model: nn.Module, batches: Sequence[Batch], criterion: Loss, steps: Steps, probes: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Return harm by bits, mean trace and its standard error of each layer."""
    found = {name: weight for name, weight in weights(model).items() if name in steps}
    parameters = [weight.parameter.requires_grad_() for weight in found.values()]
    examples = sum(len(x) for x, _ in batches)
    traces = torch.zeros(probes, len(found), dtype=torch.double)
    # Fused attention has no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for batch in tqdm(batches, desc="Hessian", unit="batch", leave=False, delay=1):
            value, _ = _loss(model, batch, criterion)
            grads = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)
            for probe, vectors in enumerate(_probes(parameters, probes, seed)):
                try:
                    products = torch.autograd.grad(
                        grads, parameters, vectors, retain_graph=True, materialize_grads=True
                    )
                except RuntimeError as error:
                    raise CompressionError(
                        f"'hessian' needs second derivatives, which torch cannot take here: {error}. Take 'measured'."
                    ) from error
                own = [(v * product).sum() for v, product in zip(vectors, products, strict=True)]
                traces[probe] += torch.stack(own).detach().double().cpu() * (len(batch[0]) / examples)
    parts = {}
    for (name, weight), trace in zip(found.items(), traces.T, strict=True):
        effective = getattr(weight.module, weight.attribute).detach()
        kept = weight.size if weight.mask is None else int(weight.mask.sum())
        mean, deviation = float(trace.mean()) / kept, float(trace.std()) / probes**0.5 / kept
        rounding = {width: float((step(effective) - effective).square().sum()) for width, step in steps[name].items()}
        harm = {width: mean * squared for width, squared in rounding.items()}
        parts[name] = {"harm": harm, "trace": mean, "trace_error": deviation}
    return parts


def _probes(parameters: Sequence[Tensor], count: int, seed: int) -> Iterator[list[Tensor]]:
    """Yield vectors of random signs, the same for every batch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        signs = [torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8) for p in parameters]
        yield [2 * sign.to(p.device, p.dtype) - 1 for sign, p in zip(signs, parameters, strict=True)]
