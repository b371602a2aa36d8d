"""Spaces whose networks can grow: a larger architecture starts from what a smaller one has learned."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from search_spaces.base import Arch, ArchError, SearchSpace
from search_spaces.tracing import switched, undisturbed

WIDEN_NOISE = 0.01
"""Deviation of the noise on new filters, in standard deviations of their layer's weight."""
DEEPEN_NOISE = 0.001
"""Deviation of the noise on the whole kernel of a new layer, in standard deviations of that kernel."""
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


class GrowingSpace(SearchSpace):
    """A space of networks in blocks of layers, where a trained network gets wider and deeper without forgetting.

    Two actions lead from one architecture to a larger one: `widened` gives a layer the next of its widths, `deepened`
    puts a new layer behind it. They count the layers that are there; canonical architectures have no gaps between
    them. `inherit` makes the larger network from the trained smaller one, and both compute the same function.

    Attributes:
        kernels: kernel sizes of which a new layer may have any; empty where it has that of the layer before it.
        widenings: how often the strategy "eas" offers every layer of a network to be widened, unless it is told.
        between: what stands between two blocks, in a word.

    Example:
        >>> from search_spaces import PlainCNN
        >>> space = PlainCNN(widths=(4, 8, 16), classes=10, in_channels=1)
        >>> wider = space.widened(space.start, block=0, layer=0)
        >>> deeper = space.deepened(wider, block=0, layer=0, kernel=5)
        >>> space.layers(deeper)[0]
        ['conv-8-3', 'conv-8-5']
        >>> model, x = space.build(space.start).eval(), torch.randn(64, 1, 8, 8)
        >>> grown = space.inherit(model, space.start, deeper, example=x, noise=False)
        >>> torch.allclose(grown(x), model(x), atol=1e-5)
        True
    """

    kernels: tuple[int, ...] = ()
    widenings: int = 4
    between: str = "pool"

    @property
    @abstractmethod
    def start(self) -> Arch:
        """The small architecture that a search grows from."""

    @property
    @abstractmethod
    def slots_of_blocks(self) -> tuple[int, ...]:
        """How many layers each block may have."""

    @property
    @abstractmethod
    def vocabulary(self) -> tuple[str, ...]:
        """Every word that `layers` may use."""

    @abstractmethod
    def widths_of(self, block: int) -> tuple[int, ...]:
        """Return the widths that layers of a block may have, ascending."""

    @abstractmethod
    def kernels_of(self, block: int) -> tuple[int, ...]:
        """Return those of `kernels` that a new layer of a block may have; empty where there is no choice."""

    def layers(self, arch: Arch) -> list[list[str]]:
        """Return one word for every layer that is there, block by block; layers of one word can be widened alike.

        Raises:
            ArchError: the architecture is not of this space.
        """
        return [[self._word(layer) for layer in block] for block in self._packed(self.check(arch))]

    def widenable(self, arch: Arch) -> list[tuple[int, int]]:
        """Return block and layer of every layer that has not the largest width yet.

        Raises:
            ArchError: the architecture is not of this space.
        """
        blocks = enumerate(self._packed(self.check(arch)))
        return [(b, i) for b, block in blocks for i, old in enumerate(block) if old.width != self.widths_of(b)[-1]]

    def widened(self, arch: Arch, block: int, layer: int) -> Arch | None:
        """Return the architecture with this layer at its next width, or None if it has the largest.

        Raises:
            ArchError: the architecture is not of this space, or has no such layer.
        """
        old = layer_at(self._packed(self.check(arch)), block, layer)
        return None if old.width == self.widths_of(block)[-1] else self.widened_at(arch, [(block, layer)])

    def widened_at(self, arch: Arch, places: Iterable[tuple[int, int]]) -> Arch:
        """Return the architecture with several layers, given as block and layer, at their next widths.

        Raises:
            ArchError: the architecture is not of this space, or has no such layer; a layer has the largest width.
        """
        blocks = self._packed(self.check(arch))
        for b, i in places:
            old, widths = layer_at(blocks, b, i), self.widths_of(b)
            if old.width == widths[-1]:
                raise ArchError(f"layer {i} of block {b} is {old.width} wide, which is the largest. Leave it out.")
            blocks[b][i] = old._replace(width=widths[widths.index(old.width) + 1])
        return self._arch(blocks)

    def deepened(self, arch: Arch, block: int, layer: int, kernel: int | None = None) -> Arch | None:
        """Return the architecture with a new layer of equal width behind this one, or None if the block is full.

        Args:
            kernel: of the new layer, where there is a choice; default: that of the layer before it.

        Raises:
            ArchError: the architecture is not of this space, or has no such layer; no such kernel.
        """
        blocks = self._packed(self.check(arch))
        old = layer_at(blocks, block, layer)
        if kernel is not None and kernel not in self.kernels:
            known = ", ".join(map(str, self.kernels)) or "none: leave it out"
            raise ArchError(f"a new layer of {type(self).__name__} has no kernel {kernel!r}; kernels are {known}.")
        if len(blocks[block]) == self.slots_of_blocks[block]:
            return None
        new = old if kernel is None or not self.kernels_of(block) else old._replace(kernel=kernel)
        blocks[block].insert(layer + 1, new)
        return self._arch(blocks)

    @abstractmethod
    def _word(self, layer: Layer) -> str:
        """Return the word of `vocabulary` for a layer."""

    @abstractmethod
    def _packed(self, arch: Arch) -> list[list[Layer]]:
        """Return the layers that are there, block by block."""

    @abstractmethod
    def _arch(self, blocks: list[list[Layer]]) -> Arch:
        """Return the architecture with these layers."""

    def canonical(self, arch: Arch) -> Arch:
        """Return the architecture with the layers of every block moved together, and what they leave reset."""
        return self._arch(self._packed(arch))

    def graph(self, arch: Arch) -> list[tuple[str, str, str]]:
        """Return the layers that are there as a chain, and what is between blocks."""
        names = ["input"]
        for b, block in enumerate(self.layers(arch)):
            names += [f"{self.between} {b}"] * (b > 0) + [f"{word} ({b}.{i})" for i, word in enumerate(block)]
        return [(one, other, "") for one, other in pairwise([*names, "output"])]

    @abstractmethod
    def _grow(self, growth: Growth, arch: Arch, child: Arch) -> None:
        """Make all of the child's parameters and buffers in `growth`."""

    def inherit(
        self,
        model: nn.Module,
        arch: Arch,
        child: Arch,
        *,
        example: Tensor,
        noise: bool = True,
        generator: torch.Generator | None = None,
    ) -> nn.Module:
        """Return the child's network with what the smaller one has learned; the smaller one stays as it is.

        Its modules, names and shapes are those of ``build(child)``. Without noise it computes the same function as
        `model`; with noise nearly, and channels that were doubled can become different ones in training.

        Args:
            model: a network of `arch`, trained or not.
            child: what can be reached from `arch` by wider layers and new ones.
            example: inputs whose statistics a new batch norm starts from; 64 images in the paper.
            noise: of the published size, on new filters and new layers.
            generator: of all that is random; default: torch's global one.

        Raises:
            ArchError: an architecture is not of this space, the child is no growth of `arch`, or the network is of
                another architecture.
        """
        arch, child = self.canonical(self.check(arch)), self.canonical(self.check(child))
        with torch.device("meta"):
            same, grown = self.build(arch), self.build(child)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in same.state_dict().items()}:
            raise ArchError(f"the network to inherit from is not of the architecture {arch}. Give the one it has.")
        growth = Growth(model, example, noise, generator)
        with torch.no_grad():
            self._grow(growth, arch, child)
            growth.add_noise()
        grown.load_state_dict(growth.state, assign=True)
        return grown.train(model.training)


class Growth:
    """Collects the numbers of a larger network in `state`, made from those of a smaller one by maps of channels.

    A map is an index tensor: to every channel of the larger network it gives the one of the smaller network whose
    values it carries. Where several channels carry the same values, the layer that reads them divides its weights
    among them.
    """

    def __init__(self, model: nn.Module, example: Tensor, noise: bool, generator: torch.Generator | None) -> None:
        self.model, self.example, self.noise, self.generator = model, example, noise, generator
        self.old = model.state_dict()
        self.state: dict[str, Tensor] = {}
        self.noisy: list[tuple[str, int, float]] = []  # layers, from which filter on, how much

    def extend(self, size: int, to: int) -> Tensor:
        """Return a map of `to` channels: the first are the old ones, each of the others carries one drawn at random."""
        return torch.cat([torch.arange(size), self.draw(size, to - size)])

    def draw(self, size: int, count: int) -> Tensor:
        """Return a map of channels that each carry one drawn at random."""
        return torch.randint(size, (count,), generator=self.generator)

    def add_noise(self) -> None:
        """Add the noise, last, so that the maps are the same without it."""
        for name, first, scale in self.noisy if self.noise else ():
            weight = self.state[f"{name}.weight"]
            shape = (len(weight) - first, *weight.shape[1:])
            drawn = torch.randn(shape, generator=self.generator, dtype=weight.dtype).to(weight.device)
            weight[first:] += scale * weight.std(correction=0) * drawn

    def layer(self, name: str, source: str, out: Tensor, into: Tensor, known: Tensor | None = None) -> None:
        """Make a convolution or linear layer that carries `out` of what `source` computes, and reads `into`.

        Args:
            known: False for inputs that `source` does not have: their weights are zero.
        """
        old = self.old[f"{source}.weight"]
        self.state[f"{name}.weight"] = spread(old, out, into, known)
        if len(out) > len(old):
            self.noisy.append((name, len(old), WIDEN_NOISE))
        if f"{source}.bias" in self.old:
            self.state[f"{name}.bias"] = self.old[f"{source}.bias"][out]

    def norm(self, name: str, source: str, index: Tensor, known: Tensor | None = None) -> None:
        """Make a batch norm of these channels of `source`; a channel that it does not know has mean 0 and variance 1.

        All of its numbers follow the map: scale, shift and running statistics.
        """
        for part, default in zip(_BATCH_NORM, (1.0, 0.0, 0.0, 1.0), strict=True):
            value = self.old[f"{source}.{part}"]
            if known is None:
                self.state[f"{name}.{part}"] = value[index]
            else:
                value = value[index.clamp(max=len(value) - 1)]
                self.state[f"{name}.{part}"] = torch.where(known.to(value.device), value, default)
        self.state[f"{name}.num_batches_tracked"] = self.old[f"{source}.num_batches_tracked"].clone()

    def identity_norm(self, name: str, moments: tuple[Tensor, Tensor], index: Tensor, eps: float = 1e-5) -> None:
        """Make a batch norm that, with these statistics (mean and variance), changes nothing."""
        mean, variance = (part[index] for part in moments)
        values = ((variance + eps).sqrt(), mean.clone(), mean, variance)
        self.state |= {f"{name}.{part}": value for part, value in zip(_BATCH_NORM, values, strict=True)}
        self.state[f"{name}.num_batches_tracked"] = torch.zeros((), dtype=torch.long, device=mean.device)

    def moments(self, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return mean and variance, channel by channel, of what modules give for the example in training mode.

        The paper takes those of evaluation, which differ where running averages lag behind; so do we where training
        fails, on a single image.
        """
        found: dict[str, tuple[Tensor, Tensor]] = {}

        def look(name: str) -> None:
            def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
                axes = [axis for axis in range(output.ndim) if axis != 1]
                found[name] = output.mean(axes), output.var(axes, correction=0)

            hooks.append(self.model.get_submodule(name).register_forward_hook(hook))

        if not names:
            return found
        hooks: list[torch.utils.hooks.RemovableHandle] = []
        x = self.example.to(next(self.model.parameters()))
        try:
            for name in names:
                look(name)
            try:
                with switched(self.model, True), undisturbed(self.model):
                    self.model(x)
            except ValueError:
                with switched(self.model, False), undisturbed(self.model):
                    self.model(x)
        finally:
            for handle in hooks:
                handle.remove()
        return found


def spread(weight: Tensor, out: Tensor, into: Tensor, known: Tensor | None = None) -> Tensor:
    """Return a weight whose rows are those of `out`, and whose columns share those of `into` among equal channels.

    Over every group of equal channels the shares, one over the size of the group, sum to 1.

    Example:
        >>> spread(torch.tensor([[2.0, 6.0]]), torch.tensor([0, 0]), torch.tensor([0, 1, 1]))
        tensor([[2., 3., 3.],
                [2., 3., 3.]])
    """
    share = 1.0 / torch.bincount(into)[into].to(weight)
    if known is not None:
        share = torch.where(known.to(share.device), share, 0.0)
        into = into.clamp(max=weight.shape[1] - 1)
    return weight[out][:, into] * share.view(1, -1, *[1] * (weight.ndim - 2))


class Layer(NamedTuple):
    """A layer of a block: its width, and its kernel where there is a choice."""

    width: int
    kernel: int = 0


def align(old: Sequence[Layer], new: Sequence[Layer]) -> list[list[int]]:
    """Return, for every layer of a block, which layers of the grown block come from it: itself, then new ones.

    A layer keeps its kernel and gets no narrower; a new one is at least as wide as the layer that it follows was.
    Where there are several ways, the one with the fewest new layers that had to be widened at once.

    Raises:
        ArchError: there is no way.

    Example:
        >>> align([Layer(4, 3), Layer(8, 3)], [Layer(4, 3), Layer(4, 5), Layer(16, 3)])
        [[0, 1], [2]]
    """

    @cache
    def ways(layer: int, at: int) -> tuple[int, tuple[int, ...]] | None:
        """Return the least cost of the layers from this one on, which is at this place, and where their groups end."""
        if new[at].kernel != old[layer].kernel or new[at].width < old[layer].width:
            return None
        found: list[tuple[int, tuple[int, ...]]] = []
        odd = 0
        for end in range(at + 1, len(new) + 1):
            if layer == len(old) - 1:
                if end == len(new):
                    found.append((odd, (end,)))
            elif end < len(new) and (rest := ways(layer + 1, end)) is not None:
                found.append((odd + rest[0], (end, *rest[1])))
            if end < len(new):
                if new[end].width < old[layer].width:
                    break
                odd += new[end].width != new[at].width
        return min(found, default=None)

    if not old and not new:
        return []
    way = ways(0, 0) if old and new else None
    if way is None:
        raise ArchError(
            f"layers {_words(old)} cannot grow to {_words(new)}: a layer keeps its kernel and gets no narrower, and a "
            "new one follows a layer that was not wider than it. Take steps with space.widened and space.deepened."
        )
    ends = 0, *way[1]
    return [list(range(a, b)) for a, b in pairwise(ends)]


def layer_at(blocks: Sequence[Sequence[Layer]], block: int, layer: int) -> Layer:
    """Return a layer of a block, both counted from 0, or say which there are.

    Raises:
        ArchError: there is none.
    """
    if not 0 <= block < len(blocks) or not 0 <= layer < len(blocks[block]):
        counts = ", ".join(str(len(b)) for b in blocks)
        raise ArchError(f"there is no layer {layer} in block {block}; the blocks have {counts} layers, counted from 0.")
    return blocks[block][layer]


def _words(layers: Sequence[Layer]) -> str:
    texts = [f"{layer.width} wide" + f", kernel {layer.kernel}" * bool(layer.kernel) for layer in layers]
    return f"({'; '.join(texts) or 'none'})"
