"""Blocks, and supernets of both transformer spaces: one option is the extracted network, whatever the mixture says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from search_spaces import GPT, Arch, ArchError, Mixture, SearchSpace, Supernet, ViT
from search_spaces.base import one_hot
from search_spaces.entangled import Axis, EntangledAttention, EntangledLayerNorm, Span
from search_spaces.gpt import GPTSupernet
from search_spaces.operations import DropPath
from search_spaces.transformer import Attention, Block, EntangledBlock, EntangledMLP, TransformerSpace, hidden_size
from search_spaces.vit import ViTSupernet

VIT = ViT(
    widths=(8, 16, 20), heads=(1, 2, 3), ratios=(1.3, 2, 3), depths=(1, 2, 3), head_dim=4, classes=5, in_channels=2,
    image_size=8,
)  # fmt: skip
LANGUAGE = GPT(widths=(12, 24, 36), heads=(2, 3, 6), ratios=(1, 2, 3), depths=(1, 2, 3), classes=5, context=8)
SPACES = [pytest.param(VIT, id="vit"), pytest.param(LANGUAGE, id="gpt")]
Sites = Mapping[str, Sequence[Any]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def inputs(space: SearchSpace, batch: int = 3, dtype: torch.dtype = torch.float) -> Tensor:
    return torch.randint(5, (batch, 8)) if isinstance(space, GPT) else torch.randn(batch, 2, 8, 8, dtype=dtype)


def spread(space: SearchSpace) -> Supernet:
    """A supernet whose weights, biases and norms all count."""
    supernet = space.supernet()
    noise(supernet)
    return supernet


def noise(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)


def dense(mixture: Mixture) -> Mixture:
    """The same weights, but nobody says that they are a sample."""
    return Mixture(dict(mixture))


def random_mixture(space: SearchSpace, dtype: torch.dtype = torch.float) -> Mixture:
    return Mixture({site: torch.randn(len(o), dtype=dtype).softmax(0) for site, o in space.sites.items()})


def archs(space: SearchSpace, count: int = 50) -> list[Arch]:
    rng = Random(0)
    return [space.at(0), space.at(space.size - 1), *(space.sample(rng) for _ in range(count - 2))]


# Supernets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [lambda mixture: mixture, dense], ids=["sampled", "dense"])
@pytest.mark.parametrize("space", SPACES)
def test_one_hot_is_the_extracted_network(space: SearchSpace, kind: Callable[[Mixture], Mixture]) -> None:
    supernet, x = spread(space), inputs(space)
    with torch.no_grad():
        for arch in archs(space):
            expected = supernet.extract(arch)(x)
            found = supernet(x, kind(space.one_hot(arch)))
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("space", SPACES)
def test_extracted_networks_are_those_of_the_space_and_stand_alone(space: SearchSpace) -> None:
    supernet = space.supernet()
    ours = {t.untyped_storage().data_ptr() for t in [*supernet.parameters(), *supernet.buffers()]}
    for arch in archs(space):
        state = torch.random.get_rng_state()
        network = supernet.extract(arch)
        assert torch.equal(torch.random.get_rng_state(), state)
        built = space.build(arch)
        assert type(network) is type(built)
        assert [(n, p.shape) for n, p in network.named_parameters()] == [
            (n, p.shape) for n, p in built.named_parameters()
        ]
        assert all(p.requires_grad and p.device.type == "cpu" for p in network.parameters())
        assert not ours & {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers()]}


@pytest.mark.parametrize("space", SPACES)
def test_supernets_can_be_extracted_from_without_memory(space: SearchSpace) -> None:
    arch = space.sample(Random(0))
    with torch.device("meta"):
        meta, real = space.supernet().extract(arch), spread_outside(space).extract(arch)
        shapes = [p.shape for p in space.build(arch).parameters()]
    assert [p.shape for p in meta.parameters()] == [p.shape for p in real.parameters()] == shapes
    assert all(p.device.type == "meta" for p in meta.parameters())
    assert all(p.device.type == "cpu" for p in real.parameters())


def spread_outside(space: SearchSpace) -> Supernet:
    with torch.device("cpu"):
        return spread(space)


@pytest.mark.parametrize("space", SPACES)
def test_supernets_start_like_their_networks(space: SearchSpace) -> None:
    arch = space.at(space.size - 1)
    with torch.random.fork_rng():
        supernet = space.supernet()
    ours = dict(supernet.extract(arch).named_parameters())
    for name, parameter in space.build(arch).named_parameters():
        assert float(ours[name].detach().std(correction=0)) == pytest.approx(
            float(parameter.detach().std(correction=0)), rel=0.5, abs=1e-9
        )


@pytest.mark.parametrize("space", SPACES)
def test_a_sampled_path_costs_its_own_size(space: SearchSpace) -> None:
    supernet, x = space.supernet(), inputs(space)
    counts = set()
    for arch in archs(space, 8):
        pair = []
        for network in (partial(supernet, mixture=space.one_hot(arch)), supernet.extract(arch)):
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
                network(x)
            pair.append(counter.get_total_flops())
        assert pair[0] == pair[1] > 0
        counts.add(pair[0])
    assert len(counts) > 4


@pytest.mark.parametrize("space", SPACES)
def test_gradients_of_mixture_weights(space: SearchSpace) -> None:
    supernet = spread(space).double()
    x, mixture = inputs(space, 2, torch.double), random_mixture(space, torch.double)

    def loss(*rows: Tensor) -> Tensor:
        logits: Tensor = supernet(x, Mixture(dict(zip(mixture, rows, strict=True))))
        return logits.square().mean()

    for parameter in supernet.parameters():
        parameter.requires_grad_(False)
    assert torch.autograd.gradcheck(loss, [row.requires_grad_() for row in mixture.values()])
    wanted = torch.autograd.grad(loss(*mixture.values()), [*mixture.values()])
    assert all(bool((row != 0).all()) for row in wanted)  # every option is weighed somewhere


@pytest.mark.parametrize("space", SPACES)
def test_the_straight_through_sample_is_the_path_and_has_all_gradients(space: SearchSpace) -> None:
    supernet, x, arch = spread(space), inputs(space), space.sample(Random(3))
    hard = space.one_hot(arch)
    rows = {site: torch.zeros(len(row), requires_grad=True) for site, row in hard.items()}
    through = {site: hard[site] + row.softmax(0) - row.softmax(0).detach() for site, row in rows.items()}
    logits = supernet(x, Mixture(through, hard.active))
    expected = supernet.extract(arch)(x)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    logits.square().sum().backward()
    assert all(row.grad is not None and row.grad.isfinite().all() for row in rows.values())
    assert bool((rows["width"].grad != 0).all())  # type: ignore[union-attr]


@pytest.mark.parametrize("space", SPACES)
def test_an_option_of_little_weight_changes_little(space: SearchSpace) -> None:
    supernet, x, one = spread(space).double(), inputs(space, dtype=torch.double), space.one_hot(space.at(0))
    before = supernet(x, dense(one))
    for site, row in one.items():
        if site[-1] not in "12":  # of blocks that are not there
            after = supernet(x, Mixture({**one, site: row + 1e-7 * torch.ones(len(row)).double()}))
            assert 0 < (after - before).abs().max() < 1e-4 * before.abs().max()


@pytest.mark.parametrize("space", SPACES)
def test_recomputation_changes_nothing_but_memory(space: SearchSpace) -> None:
    supernet, x = spread(space), inputs(space)
    again = space.supernet(recompute=True)
    again.load_state_dict(supernet.state_dict())
    mixture = random_mixture(space)
    rows = [row.requires_grad_() for row in mixture.values()]
    wanted, found = (
        torch.autograd.grad(net(x, mixture).square().sum(), [*rows, *net.parameters()]) for net in (supernet, again)
    )
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("space", SPACES)
def test_a_supernet_learns(space: SearchSpace) -> None:
    supernet, mixture, x = space.supernet(), random_mixture(space), inputs(space)
    y = torch.randint(5, (3, 8) if isinstance(space, GPT) else (3,))
    optimizer, losses = torch.optim.AdamW(supernet.parameters(), 1e-2), []
    for _ in range(30):
        loss = F.cross_entropy(supernet(x, mixture), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("space", SPACES)
def test_mixtures_are_checked(space: SearchSpace) -> None:
    supernet, mixture = space.supernet(), random_mixture(space)
    with pytest.raises(ArchError, match="'width' has none"):
        supernet(inputs(space), Mixture({site: row for site, row in mixture.items() if site != "width"}))
    with pytest.raises(ArchError, match="weight-entangled supernets options that were not drawn have gradients anyway"):
        supernet(inputs(space), Mixture(dict(mixture), add_others=True))


# What a mixture means, written out -----------------------------------------------------------------------------------
#
# Sums over the options, each a slice of the weights times its weight in the mixture. Where a factor stands here and
# where none does is the point: a dimension counts once. Of a mixture of one option no test can see that.


def normed(norm: EntangledLayerNorm, x: Tensor, width: Tensor, widths: Sequence[int], mean: bool = False) -> Tensor:
    """The layer norms of all widths, weighted and added; `mean`: divided by what the widths of an entry weigh."""
    total, weight = torch.zeros_like(x), torch.zeros_like(x)
    for a, w in zip(width, widths, strict=True):
        total[..., :w] += a * F.layer_norm(x[..., :w], (w,), norm.weight[:w], norm.bias[:w])
        weight[..., :w] += a
    return total / weight if mean else total


def heads_of(attention: EntangledAttention, x: Tensor, inner: int, count: int, causal: bool) -> Tensor:
    """What so many heads, of `inner` features together, make of the features of x."""
    q, k, v = (
        F.linear(x, layer.weight[:inner, : x.shape[-1]], layer.bias[:inner]).unflatten(-1, (count, -1)).transpose(1, 2)
        for layer in (attention.query, attention.key, attention.value)
    )
    logits: Tensor = q @ k.transpose(2, 3) / (inner / count) ** 0.5
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -torch.inf)
    out: Tensor = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return out


def mlp_of(mlp: EntangledMLP, x: Tensor, width: Tensor, ratio: Tensor, sites: Sites) -> Tensor:
    """The MLP: its first layer is a sum over pairs of a width and a ratio, its second has no weight at all."""
    hidden = x.new_zeros(*x.shape[:-1], mlp.first.out_features)
    for (a, w), (b, r) in product(zip(width, sites["width"], strict=True), zip(ratio, sites["ratio"], strict=True)):
        size = int(r * w)
        hidden[..., :size] += a * b * F.linear(x[..., :w], mlp.first.weight[:size, :w], mlp.first.bias[:size])
    return F.linear(F.gelu(hidden), mlp.second.weight, mlp.second.bias)


def block_of(block: EntangledBlock, x: Tensor, width: Tensor, heads: Tensor, ratio: Tensor, sites: Sites) -> Tensor:
    """A block: a stream without weights beside two branches, of which each weighs width and heads or ratio once."""
    attention, widths, head_dim = block.attention, sites["width"], block.attention.head_dim
    y, causal, projection = torch.zeros_like(x), attention.causal, attention.projection
    for b, count in zip(heads, sites["heads"], strict=True):
        if head_dim is None:  # every pair of a width and a number of heads is an attention of its own
            read = normed(block.norm1, x, width, widths, mean=True)
            for a, w in zip(width, widths, strict=True):
                y += a * b * F.linear(heads_of(attention, read[..., :w], w, count, causal), projection.weight[:, :w])
        else:
            read, inner = normed(block.norm1, x, width, widths), count * head_dim
            y += b * F.linear(heads_of(attention, read, inner, count, causal), projection.weight[:, :inner])
    x = x + y + projection.bias
    return x + mlp_of(block.mlp, normed(block.norm2, x, width, widths, mean=True), width, ratio, sites)


def supernet_of(supernet: Supernet, x: Tensor, mixture: Mixture) -> Tensor:
    """Logits of a whole supernet. Embedding and head are without weights: the last norm weighs the width."""
    space, width = supernet.space, mixture["width"]
    assert isinstance(space, TransformerSpace)
    if isinstance(supernet, GPTSupernet):
        x = supernet.embedding.weight[x] + supernet.position[: x.shape[1]]
    else:
        assert isinstance(supernet, ViTSupernet)
        patches = F.conv2d(x, supernet.patch.weight, supernet.patch.bias, stride=4).flatten(2).transpose(1, 2)
        x = torch.cat([supernet.token.expand(len(x), 1, -1), patches], 1) + supernet.position
    outputs, sites = [], {"width": space.widths, "heads": space.heads, "ratio": space.ratios}
    for i, block in enumerate(supernet.blocks):
        assert isinstance(block, EntangledBlock)
        x = block_of(block, x, width, mixture[f"heads{i}"], mixture[f"ratio{i}"], sites)
        outputs.append(x)
    x = sum((a * outputs[d - 1] for a, d in zip(mixture["depth"], space.depths, strict=True)), torch.zeros(()))
    x = normed(supernet.norm, x, width, space.widths)
    if isinstance(supernet, GPTSupernet):
        return (x @ supernet.embedding.weight.T).transpose(1, 2)
    return F.linear(x[:, 1:].mean(1), supernet.head.weight, supernet.head.bias)


PARTS: Sites = {"width": (8, 12, 20), "heads": (1, 2, 4), "ratio": (1.3, 2, 3)}


def rows_and_spans() -> tuple[list[Tensor], list[Span]]:
    """A dense mixture of PARTS, for modules on their own."""
    rows = [torch.randn(3, dtype=torch.double).softmax(0) for _ in PARTS]
    axes = [Axis((8, 12, 20)), Axis((1, 2, 4)), Axis((1, 2, 3))]
    return rows, [axis(Mixture({"site": row}), "site") for axis, row in zip(axes, rows, strict=True)]


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-12 * expected.abs().max())


@torch.no_grad()
def test_a_mixed_mlp_weighs_pairs_in_its_first_layer_alone() -> None:
    mlp, x = EntangledMLP((8, 12, 20), (1.3, 2, 3)).double(), torch.randn(3, 5, 20, dtype=torch.double)
    noise(mlp)
    (width, _, ratio), (width_span, _, ratio_span) = rows_and_spans()
    assert close(mlp(x, width_span, ratio_span), mlp_of(mlp, x, width, ratio, PARTS))
    hidden, _ = mlp.hidden(width_span, ratio_span)
    assert hidden.sizes == (10, 16, 24, 15, 24, 36, 26, 40, 60)  # rounded down: 1.3 * 8, 2 * 8, ..., 3 * 20


@pytest.mark.parametrize("head_dim", [4, None])
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_a_mixed_block_weighs_every_dimension_once(head_dim: int | None, causal: bool) -> None:
    block = EntangledBlock((8, 12, 20), (1, 2, 4), (1.3, 2, 3), head_dim, causal).double()
    noise(block)
    (width, heads, ratio), spans = rows_and_spans()
    x = torch.randn(3, 5, 20, dtype=torch.double)
    assert close(block(x, *spans), block_of(block, x, width, heads, ratio, PARTS))


@pytest.mark.parametrize("space", SPACES)
@torch.no_grad()
def test_a_mixed_supernet_weighs_every_dimension_once(space: SearchSpace) -> None:
    supernet, x = spread(space).double(), inputs(space, dtype=torch.double)
    mixture = random_mixture(space, torch.double)
    assert close(supernet(x, mixture), supernet_of(supernet, x, mixture))


# Spaces --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES)
def test_blocks_beyond_the_depth_do_not_matter(space: TransformerSpace) -> None:
    arch = space.arch({site: options[-1] for site, options in space.choices.items()} | {"depth": 2})
    canonical = space.canonical(arch)
    assert canonical == arch | {"heads2": space.heads[0], "ratio2": space.ratios[0]}
    supernet, x = spread(space), inputs(space)
    assert torch.equal(supernet.extract(arch)(x), supernet.extract(canonical)(x))
    assert space.canonical(arch | {"depth": 3}) == arch | {"depth": 3}


@pytest.mark.parametrize("space", SPACES)
def test_drawings_show_the_blocks_there_are(space: TransformerSpace) -> None:
    arch = space.at(0) | {"depth": 2}
    heads, ratio, width = space.heads[0], space.ratios[0], space.widths[0]
    first, second = (f"block {i}: {heads} heads, ratio {ratio:g}" for i in range(2))
    assert space.graph(arch) == [
        ("input", f"width {width}", ""),
        (f"width {width}", first, ""),
        (first, second, ""),
        (second, "output", ""),
    ]


@pytest.mark.parametrize("space", SPACES)
def test_drop_path_grows_with_depth_and_drops_both_branches(space: TransformerSpace) -> None:
    network = space.build(space.at(0) | {"depth": 2})
    paths = [module for module in network.modules() if isinstance(module, DropPath)]
    assert [path.depth for path in paths] == [0.5, 1.0]
    block = Block(8, 2, 16)
    block.drop_path.p = 1 - 1e-9  # what is not dropped would be 1e9 times as large
    x = torch.randn(4, 5, 8)
    assert torch.equal(block(x), x)
    assert not torch.equal(block.eval()(x), x)


BAD = [
    ({"widths": (0, 8)}, r"was given widths=\(0, 8\); it is a tuple of positive integers"),
    ({"widths": 12}, "was given widths=12; it is a tuple of positive integers"),
    ({"depths": (2, 1)}, r"was given depths=\(2, 1\); it needs at least one option, in ascending order"),
    ({"heads": (2, 2)}, r"was given heads=\(2, 2\); it needs at least one option, in ascending order"),
    ({"ratios": ()}, r"was given ratios=\(\); it needs at least one option, in ascending order"),
    ({"ratios": (2, 1.5)}, r"was given ratios=\(2.0, 1.5\); it needs at least one option, in ascending order"),
    ({"ratios": (1, float("inf"))}, r"was given ratios=\(1, inf\); it is a tuple of positive numbers"),
    ({"ratios": (-1, 1)}, r"was given ratios=\(-1, 1\); it is a tuple of positive numbers"),
    ({"ratios": (0.001, 1)}, r"was given .* but an MLP with 0.001 times .* features has none. Give larger ones"),
    ({"classes": 0}, "was given classes=0; it is a positive integer"),
]


@pytest.mark.parametrize("space", [ViT, GPT])
@pytest.mark.parametrize(("settings", "message"), BAD)
def test_settings_are_checked(space: type[ViT | GPT], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArchError, match=f"^{space.__name__} {message}"):
        space(**settings)


@pytest.mark.parametrize("space", [ViT, GPT])
def test_lists_become_tuples(space: type[ViT | GPT]) -> None:
    lists: dict[str, Any] = {"widths": [12, 24], "heads": [1, 2], "ratios": [1, 2], "depths": [1]}
    made = space(**lists)
    assert made == space(widths=(12, 24), heads=(1, 2), ratios=(1, 2), depths=(1,))
    assert len({made}) == 1


# Parts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [4, None])
@pytest.mark.parametrize("causal", [False, True])
def test_mixed_heads_are_the_mixed_outputs_of_plain_attentions(head_dim: int | None, causal: bool) -> None:
    heads, width = (1, 2, 4), 8
    block = EntangledBlock((width,), heads, (1,), head_dim, causal).double()
    weights = torch.randn(3).double().softmax(0)
    mixture = Mixture({"width": torch.ones(1).double(), "heads": weights})
    x = torch.randn(2, 5, width, dtype=torch.double)
    found = block.attention(x, Axis((width,))(mixture, "width"), Axis(heads)(mixture, "heads"))
    expected = torch.zeros_like(x)
    for weight, count in zip(weights, heads, strict=True):
        plain = Attention(width, count, head_dim, causal).double()
        large = block.attention.state_dict()
        plain.load_state_dict({n: large[n][tuple(map(slice, p.shape))] for n, p in plain.named_parameters()})
        expected = expected + weight * plain(x)
    assert (found - expected).abs().max() < 1e-12


def test_mixed_widths_and_heads_are_the_mixed_outputs_of_pairs() -> None:
    widths, heads = (4, 8), (1, 2)
    attention = EntangledBlock(widths, heads, (1,)).attention.double()
    a, b = (torch.randn(2).double().softmax(0) for _ in range(2))
    mixture, x = Mixture({"width": a, "heads": b}), torch.randn(2, 5, 8, dtype=torch.double)
    found = attention(x, Axis(widths)(mixture, "width"), Axis(heads)(mixture, "heads"))
    large = attention.state_dict()
    expected = torch.zeros(2, 5, 4, dtype=torch.double)
    for (i, width), (j, count) in product(enumerate(widths), enumerate(heads)):
        plain = Attention(width, count).double()
        plain.load_state_dict({n: large[n][tuple(map(slice, p.shape))] for n, p in plain.named_parameters()})
        expected = expected + a[i] * b[j] * plain(x[..., :width])[..., :4]
    assert (found[..., :4] - expected).abs().max() < 1e-12  # features that all widths have


@pytest.mark.parametrize("head_dim", [4, None])
def test_a_block_of_one_option_is_the_plain_block(head_dim: int | None) -> None:
    sites: dict[str, tuple[Any, ...]] = {"width": (8, 12), "heads": (1, 2), "ratio": (1.5, 3.0)}
    large = EntangledBlock((8, 12), (1, 2), (1.5, 3.0), head_dim)
    noise(large)
    x = torch.randn(2, 5, 12)
    for chosen in product(range(2), repeat=3):
        width, heads, ratio = (options[k] for options, k in zip(sites.values(), chosen, strict=True))
        plain = Block(width, heads, hidden_size(width, ratio), head_dim)
        state = large.state_dict()
        plain.load_state_dict({n: state[n][tuple(map(slice, p.shape))] for n, p in plain.named_parameters()})
        for mixture in (drawn := one_hot(sites, dict(zip(sites, chosen, strict=True))), dense(drawn)):
            axes = {"width": Axis((8, 12)), "heads": Axis((1, 2)), "ratio": Axis((1, 2))}
            spans = [axis(mixture, site) for site, axis in axes.items()]
            found = large(x[..., : spans[0].size], *spans)[..., :width]
            assert (found - plain(x[..., :width])).abs().max() < 1e-5


def test_networks_begin_small() -> None:
    weights = {n: p for n, p in LANGUAGE.build(LANGUAGE.at(LANGUAGE.size - 1)).named_parameters() if p.dim() == 2}
    assert all(0.017 < float(p.detach().std()) < 0.023 for p in weights.values() if p.numel() > 500)
