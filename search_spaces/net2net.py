"""Net2Net on any network: wider, deeper, with larger kernels or more branches, and the same outputs as before."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from search_spaces.certificates import Certificate, Grow, Transfer, carry_momentum, certified
from search_spaces.channels import Group, analyse
from search_spaces.explanation import Explanation, LayerReport, Verdict, explain
from search_spaces.inserted import (
    Branches,
    Residual,
    add_noise,
    check_noise,
    layer_like,
    norm_like,
    set_randomly,
    set_statistics,
    to_identity,
)
from search_spaces.memory import free_bytes
from search_spaces.sites import check_layer, kernel_grown, new_kernel, new_site
from search_spaces.tracing import GrowthError, check_same_calls, copied, switched, undisturbed

__all__ = [
    "Certificate",
    "Explanation",
    "GrowthError",
    "LayerReport",
    "Transfer",
    "Verdict",
    "add_branch",
    "carry_momentum",
    "deepen",
    "explain",
    "grow_kernel",
    "widen",
]

Example = Tensor | tuple[Any, ...]


@overload
def widen(
    model: nn.Module,
    name: str,
    channels: int,
    *,
    example: Example,
    noise: float = ...,
    generator: torch.Generator | None = ...,
    certificate: Literal[False] = ...,
) -> nn.Module: ...
@overload
def widen(
    model: nn.Module,
    name: str,
    channels: int,
    *,
    example: Example,
    noise: float = ...,
    generator: torch.Generator | None = ...,
    certificate: Literal[True],
) -> tuple[nn.Module, Certificate]: ...
def widen(
    model: nn.Module,
    name: str,
    channels: int,
    *,
    example: Example,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    certificate: bool = False,
) -> nn.Module | tuple[nn.Module, Certificate]:
    """Return a network in which a layer has more channels, and the same outputs, in evaluation and in training.

    New channels are copies of channels drawn at random; whoever reads copies shares its weight among them. Layers whose
    channels are added to these, or multiplied, widen with them, in the same way. Dropout treats copies differently.

    Args:
        model: any network that torch.fx can trace. It stays as it is.
        name: of a convolution or linear layer, ``"layer1.0.conv1"``.
        channels: how many it shall have.
        example: a batch that the model takes; a tuple if it takes several inputs. Only its shape matters.
        noise: standard deviation of noise on new filters, in those of their layer's weight. Without noise copies get
            the same gradients and never differ; 0.01 is usual, and moves the outputs a little.
        generator: where random numbers come from; torch's own if left out.
        certificate: return also a `Certificate` of what was done, with the measured difference.

    Returns:
        A network of the same class, whose parameters have the same names.

    Raises:
        GrowthError: it cannot be done exactly, there is no such layer, or its parameters are frozen or shared.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> net = net.eval()
        >>> x = torch.randn(2, 3, 8, 8)
        >>> wide = widen(net, "0", 6, example=x)
        >>> wide[0].weight.shape, wide[4].weight.shape
        (torch.Size([6, 3, 3, 3]), torch.Size([2, 216]))
        >>> torch.allclose(wide(x), net(x), atol=1e-5)
        True

    Source: Chen et al., Net2Net: Accelerating Learning via Knowledge Transfer, ICLR 2016, arXiv:1511.05641, section
    2.2, and Cai et al., Efficient Architecture Search by Network Transformation, AAAI 2018, arXiv:1707.04873. Theirs
    are for chains of layers and for DenseNet; ours follows channels through any graph. Where convolutions have groups
    or norms take statistics over channels, copies are drawn so that it stays exact.
    """
    draw = _checked(generator)
    return _grown(partial(_widen, name, channels, noise, draw), model, example, draw, certificate)


def _widen(
    name: str, channels: int, noise: float, generator: torch.Generator, model: nn.Module, example: tuple[Any, ...]
) -> tuple[nn.Module, Transfer]:
    with _refusing(f"{name!r} cannot be widened to {channels!r} channels"):
        found = analyse(model, example)
        layer = found.layer(name)
        if type(channels) is not int or channels <= layer.outputs:
            raise GrowthError(f"it has {layer.outputs}; give a larger whole number.")
        group, own = found.place(name)
        distinct = list(dict.fromkeys(own))
        change = found.widening(group, distinct, _copies(group, own, channels, model), generator)
        check_noise(noise)
        new = copied(model)
        change.apply(new)
        check_same_calls(found.traces, new, example, None)
    for maker in group.makers:
        if maker in found.layers and noise:
            weight = found.layers[maker].tensors["weight"]
            outputs = next(axis for axis in change.maps[weight].axes if not axis.divided)
            owner, _, own_name = weight.rpartition(".")
            tensor = getattr(new.get_submodule(owner), own_name)
            add_noise(tensor, noise, generator, outputs.repeated(tensor))
    changed = tuple(dict.fromkeys(tensor.rpartition(".")[0] for tensor in change.maps))
    action = f"widened {name} from {layer.outputs} to {channels} channels"
    if len(group.makers) > 1:
        action += f", together with {', '.join(maker for maker in group.makers if maker != name)}"
    return new, Transfer(action, changed, change.maps)


def _copies(group: Group, own: list[int], channels: int, model: nn.Module) -> int:
    """Return how many channels of a group must be copied for a layer of it to have so many, if that is possible."""
    distinct = set(own)
    several = len(own) // len(distinct)  # a depthwise convolution may have several filters for each of its inputs
    step = several * group.step([*distinct])
    if (channels - len(own)) % step:
        below = len(own) + (channels - len(own)) // step * step
        near = " or ".join(str(width) for width in (below, below + step) if width > len(own))
        why = "a norm takes statistics over its channels" if group.even else "its channels are in groups"
        raise GrowthError(f"{why}, so that it can be widened by multiples of {step}: to {near}, say.")
    count = (channels - len(own)) // several
    sizes = {name: float(p.numel() * p.element_size()) for name, p in model.named_parameters()}
    for slot in group.slots:
        if slot.tensor in sizes:
            sizes[slot.tensor] *= 1 + float((slot.channels >= 0).float().mean()) * count / group.size
    _check_memory(sum(sizes.values()), next(model.parameters()).device)
    return count


def _check_memory(needed: float, device: torch.device) -> None:
    free = free_bytes(device)
    if free is not None and needed > free:
        raise GrowthError(f"it would take {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free.")


@overload
def deepen(
    model: nn.Module,
    name: str,
    *,
    example: Example,
    kernel: int | Sequence[int] | None = ...,
    noise: float = ...,
    generator: torch.Generator | None = ...,
    certificate: Literal[False] = ...,
) -> nn.Module: ...
@overload
def deepen(
    model: nn.Module,
    name: str,
    *,
    example: Example,
    kernel: int | Sequence[int] | None = ...,
    noise: float = ...,
    generator: torch.Generator | None = ...,
    certificate: Literal[True],
) -> tuple[nn.Module, Certificate]: ...
def deepen(
    model: nn.Module,
    name: str,
    *,
    example: Example,
    kernel: int | Sequence[int] | None = None,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    certificate: bool = False,
) -> nn.Module | tuple[nn.Module, Certificate]:
    """Return a network with a new layer behind a layer, and the same outputs in evaluation.

    Behind a layer, its batch norm if it has one, and an activation that changes nothing when it is done twice (ReLU,
    ReLU6, Hardtanh), come a layer that is the identity, a batch norm that is too, and that activation. The batch norm
    has the statistics of what it reads for the example in training mode, in which outputs stay close, too.

    Where there is no such activation (GELU, SiLU, Hardswish, none) a `Residual` branch comes, convolution, batch norm
    and activation times zero: the outputs stay exactly, in both modes. `explain` and the certificate say which it is.

    The new layer has the layer's number of channels and its groups, stride 1. It can be widened and deepened in turn;
    the certificate has the names. Parameters keep their names where the activation is a module that is called once: it
    is replaced by a sequence that begins with it. Otherwise the module before the activation is, and "bn1.weight" is
    "bn1.0.weight" from then on.

    Args:
        model: any network that torch.fx can trace. It stays as it is.
        name: of a convolution or linear layer.
        example: a batch that the model takes, of real data: 64 images, say. A tuple if it takes several inputs.
        kernel: odd; the layer's own if left out (3 where that is even).
        noise: standard deviation of noise on the new kernel, in those of the kernel; 0.001 is usual.
        generator: where random numbers come from; torch's own if left out.
        certificate: return also a `Certificate` of what was done, with the measured difference.

    Raises:
        GrowthError: there is no such layer, its parameters are frozen or shared, or it is a call of a function.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> net = net.eval()
        >>> x = torch.randn(16, 3, 8, 8)
        >>> deep, certificate = deepen(net, "0", example=x, certificate=True)
        >>> [type(module).__name__ for module in deep[2]]
        ['ReLU', 'Conv2d', 'BatchNorm2d', 'ReLU']
        >>> certificate.given < 1e-10, certificate.transfer.changed
        (True, ('2.1', '2.2'))

    Source: Chen et al., Net2Net, ICLR 2016, arXiv:1511.05641, section 2.3, and Cai et al., EAS, AAAI 2018,
    arXiv:1707.04873. There, layers with other activations cannot be deepened, and statistics are those of evaluation.
    """
    draw = _checked(generator)
    return _grown(partial(_deepen, name, kernel, noise, draw), model, example, draw, certificate)


def _deepen(
    name: str,
    kernel: int | Sequence[int] | None,
    noise: float,
    generator: torch.Generator,
    model: nn.Module,
    example: tuple[Any, ...],
) -> tuple[nn.Module, Transfer]:
    with _refusing(f"{name!r} cannot be deepened"):
        found = analyse(model, example)
        site = new_site(found, name)
        layer = model.get_submodule(name)
        size = new_kernel(layer, kernel)
        channels = found.layers[name].outputs
        weight = layer.get_parameter("weight")
        _check_memory(weight.element_size() * math.prod(size) * channels**2 / found.layers[name].groups, weight.device)
        check_noise(noise)
        new = copied(model)
        body: list[nn.Module] = [layer_like(layer, channels, size, bias=site.norm is None)]
        if site.norm is not None:
            body.append(norm_like(model.get_submodule(site.norm), channels))
        weight = body[0].get_parameter("weight")
        before = new.get_submodule(site.module)
        if site.identity:
            to_identity(body[0])
            add_noise(weight, noise, generator)
            assert site.activation is not None
            # The activation comes between; the one that is in the network already, behind the new layer.
            chain = [site.activation, *body] if site.outside else [*body, site.activation]
            added = nn.Sequential(before, *(part.train(before.training) for part in chain))
            first = 1 + site.outside
        else:
            set_randomly(body[0], generator)
            body.append(site.activation or nn.ReLU())
            place = {"device": weight.device, "dtype": weight.dtype}
            branch = Residual(nn.Sequential(*body), channels, max(weight.ndim - 2, 0), **place)
            added = nn.Sequential(before, branch.train(before.training))
        added.training = before.training
        _replace(new, site.module, added)
        check_same_calls(found.traces, new, example, site.module)
        if site.identity and site.norm is not None:
            set_statistics(added[first + 1], _input_of(added[first + 1], new, example))
    if site.identity and site.norm is not None:
        norm = added[first + 1]
        seen = model.get_buffer(f"{site.norm}.num_batches_tracked")
        norm.load_state_dict({"num_batches_tracked": seen}, strict=False)
    if site.identity:
        names = [f"{site.module}.{first + i}" for i in range(len(body))]
        action = f"deepened {name} by an identity"
    else:
        names = [f"{site.module}.1", *(f"{site.module}.1.body.{i}" for i in range(len(body) - 1))]
        action = f"deepened {name} by a residual branch that starts at zero: {site.reason}"
    old = {f"{site.module}.0": site.module}
    return new, _transfer(action, names, old, new)


class _Reached(Exception):
    """A module was called."""


def _input_of(module: nn.Module, model: nn.Module, example: tuple[Any, ...]) -> Tensor:
    """Return what a module reads in training mode, without going on behind it; in evaluation where training fails.

    Evaluation may differ much where running averages lag behind, early in training.
    """

    def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise _Reached(inputs[0])

    hook = module.register_forward_pre_hook(stop)
    failed: Exception | None = None
    try:
        for training in (True, False):
            with switched(model, False), undisturbed(model):
                if training:
                    model.train()  # its own, which may leave norms in evaluation
                try:
                    model(*example)
                except _Reached as reached:
                    x: Tensor = reached.args[0]
                    return x
                except Exception as error:  # noqa: BLE001 - a model's own code may raise anything
                    failed = error
    finally:
        hook.remove()
    raise GrowthError(
        f"{type(model).__name__} stops on the example, {type(failed).__name__}: {failed} Give a real batch, of the "
        "model's dtype and on its device: the new batch norm gets its statistics from it."
    ) from failed


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where another is, by whatever names it is known."""
    old = model.get_submodule(name)
    for owner in list(model.modules()):
        for own in [own for own, child in owner.named_children() if child is old] if owner is not module else ():
            setattr(owner, own, module)


def _transfer(action: str, changed: Sequence[str], renamed: dict[str, str], new: nn.Module) -> Transfer:
    added = [
        name
        for name, _ in new.named_parameters()
        if any(name.startswith(f"{part}.") for part in changed) and not any(name.startswith(f"{n}.") for n in renamed)
    ]
    return Transfer(action, tuple(changed), {}, renamed, frozenset(added))


def _grown(
    grow: Grow, model: nn.Module, example: Example, generator: torch.Generator, certificate: bool
) -> nn.Module | tuple[nn.Module, Certificate]:
    inputs = example if isinstance(example, tuple) else (example,)
    return certified(grow, model, inputs, generator) if certificate else grow(model, inputs)[0]


def _checked(generator: torch.Generator | None) -> torch.Generator:
    if generator is None:
        return torch.default_generator
    if not isinstance(generator, torch.Generator):
        raise GrowthError(f"generator={generator!r} is none; give torch.Generator().manual_seed(0), say.")
    return generator


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Begin what is refused with what was asked for."""
    try:
        yield
    except GrowthError as error:
        raise GrowthError(f"{what}: {error}") from error.__cause__


@overload
def grow_kernel(
    model: nn.Module, name: str, kernel: int | Sequence[int], *, example: Example, certificate: Literal[False] = ...
) -> nn.Module: ...
@overload
def grow_kernel(
    model: nn.Module, name: str, kernel: int | Sequence[int], *, example: Example, certificate: Literal[True]
) -> tuple[nn.Module, Certificate]: ...
def grow_kernel(
    model: nn.Module, name: str, kernel: int | Sequence[int], *, example: Example, certificate: bool = False
) -> nn.Module | tuple[nn.Module, Certificate]:
    """Return a network in which a convolution has a larger kernel, with zeros around what it was, and more padding.

    Args:
        model: any network that torch.fx can trace. It stays as it is.
        name: of a convolution.
        kernel: its new size; larger by an even number, so that zeros come on both sides.
        example: a batch that the model takes; a tuple if it takes several inputs.
        certificate: return also a `Certificate` of what was done, with the measured difference.

    Raises:
        GrowthError: it is no convolution, is transposed, frozen or shared, or such a kernel is not larger or not exact.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, dilation=2))
        >>> large = grow_kernel(net, "0", 5, example=torch.zeros(1, 3, 9, 9))
        >>> large[0]
        Conv2d(3, 4, kernel_size=(5, 5), stride=(2, 2), padding=(2, 2), dilation=(2, 2))

    Source: Cai et al., Once for All, ICLR 2020, arXiv:1908.09791, takes the centre of kernels; this is the way back.
    """
    return _grown(partial(_grow_kernel, name, kernel), model, example, torch.default_generator, certificate)


def _grow_kernel(
    name: str, kernel: int | Sequence[int], model: nn.Module, example: tuple[Any, ...]
) -> tuple[nn.Module, Transfer]:
    with _refusing(f"{name!r} cannot have a kernel of {kernel!r}"):
        found = analyse(model, example)
        layer = found.layer(name)
        check_layer(found, layer)
        weight = layer.tensors["weight"]
        old = model.get_parameter(weight)
        more = kernel if isinstance(kernel, Sequence) else (kernel,) * (old.ndim - 2)
        if all(type(size) is int for size in more):
            _check_memory(math.prod((*old.shape[:2], *more)) * old.element_size(), old.device)
        conv, padding = kernel_grown(model.get_submodule(name), kernel)
        new = copied(model)
        _replace(new, name, conv)
        check_same_calls(found.traces, new, example, None)  # refuses padding that the image is too small for, too
    transfer = Transfer(f"grew the kernel of {name} to {kernel}", (name,), {weight: padding})
    return new, transfer


@overload
def add_branch(
    model: nn.Module,
    name: str,
    kind: str = ...,
    *,
    example: Example,
    copies: int = ...,
    noise: float = ...,
    generator: torch.Generator | None = ...,
    certificate: Literal[False] = ...,
) -> nn.Module: ...
@overload
def add_branch(
    model: nn.Module,
    name: str,
    kind: str = ...,
    *,
    example: Example,
    copies: int = ...,
    noise: float = ...,
    generator: torch.Generator | None = ...,
    certificate: Literal[True],
) -> tuple[nn.Module, Certificate]: ...
def add_branch(
    model: nn.Module,
    name: str,
    kind: str = "residual",
    *,
    example: Example,
    copies: int = 2,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    certificate: bool = False,
) -> nn.Module | tuple[nn.Module, Certificate]:
    """Return a network in which several layers of the same input, in a weighted sum, stand where one was.

    The layer, ``"conv1"``, is `Branches` from then on; it is ``"conv1.layers.0"`` now, and can be grown in turn, as can
    the others.

    Args:
        model: any network that torch.fx can trace. It stays as it is.
        name: of a convolution or linear layer.
        kind: ``"residual"``: a freshly initialised layer times zero is added; ``"copies"``: the mean of copies.
        example: a batch that the model takes; a tuple if it takes several inputs.
        copies: how many layers of equal weight there are; for ``"copies"`` only.
        noise: standard deviation of noise on the weights of the new copies, in those of the weight: without it they
            never differ.
        generator: where random numbers come from; torch's own if left out.
        certificate: return also a `Certificate` of what was done, with the measured difference.

    Raises:
        GrowthError: there is no such layer or kind, its parameters are frozen or shared, or it is called as a function.

    Example:
        >>> net, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 8, 8)
        >>> more = add_branch(net, "0", "copies", example=x)
        >>> torch.allclose(more(x), net(x), atol=1e-6)
        True

    Source: Cai et al., Path-Level Network Transformation, ICML 2018, arXiv:1806.02639, whose "add" is ``"copies"``.
    """
    draw = _checked(generator)
    return _grown(partial(_add_branch, name, kind, copies, noise, draw), model, example, draw, certificate)


def _add_branch(
    name: str,
    kind: str,
    copies: int,
    noise: float,
    generator: torch.Generator,
    model: nn.Module,
    example: tuple[Any, ...],
) -> tuple[nn.Module, Transfer]:
    with _refusing(f"{name!r} cannot have branches"):
        found = analyse(model, example)
        layer = found.layer(name)
        check_layer(found, layer)
        if kind not in ("residual", "copies") or type(copies) is not int or copies < 2:
            raise GrowthError(f"kind={kind!r} with copies={copies!r} is neither 'residual' nor two or more 'copies'.")
        check_noise(noise)
        size = sum(p.numel() * p.element_size() for p in model.get_submodule(name).parameters())
        _check_memory(size * copies, model.get_parameter(layer.tensors["weight"]).device)
        new = copied(model)
        own = new.get_submodule(name)
        others = [copy.deepcopy(own) for _ in range(copies - 1 if kind == "copies" else 1)]
        for other in others:
            if kind == "copies":
                add_noise(other.get_parameter("weight"), noise, generator)
            else:
                set_randomly(other, generator)
        weight = own.get_parameter("weight")
        weights = [1 / copies] * copies if kind == "copies" else [1.0, 0.0]
        place = {"device": weight.device, "dtype": weight.dtype}
        branches = Branches([own, *others], weights, layer.outputs, max(weight.ndim - 2, 0), **place)
        _replace(new, name, branches.train(own.training))
        check_same_calls(found.traces, new, example, name)
    names = [f"{name}.layers.{i + 1}" for i in range(len(others))]
    transfer = _transfer(f"added {kind} to {name}", [*names, f"{name}.weights"], {f"{name}.layers.0": name}, new)
    return new, transfer
