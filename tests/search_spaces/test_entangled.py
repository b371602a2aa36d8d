from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from search_spaces import ArchError, ConvMacro, Mixture
from search_spaces.base import one_hot
from search_spaces.entangled import (
    Axis,
    CoupledAxis,
    EntangledAttention,
    EntangledBatchNorm2d,
    EntangledConv2d,
    EntangledConvBN,
    EntangledEmbedding,
    EntangledLayerNorm,
    EntangledLinear,
    EntangledSupernet,
    KernelAxis,
    Span,
)

WIDTHS, KERNELS = (4, 6, 8), (3, 5, 7)
SITES = {"out": WIDTHS, "in": WIDTHS, "kernel": KERNELS}
AXES = {"out": Axis(WIDTHS), "in": Axis(WIDTHS), "kernel": KernelAxis(KERNELS)}
CHOICES = [dict(zip(SITES, chosen, strict=True)) for chosen in product(range(3), repeat=3)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def spans_of(mixture: Mixture) -> dict[str, Span]:
    return {site: AXES[site](mixture, site) for site in mixture}


def drawn(chosen: dict[str, int]) -> Mixture:
    return one_hot(SITES, chosen)


def dense(chosen: dict[str, int]) -> Mixture:
    """The same weights, but nobody says that they are a sample."""
    return Mixture(dict(drawn(chosen)))


def random_mixture(dtype: torch.dtype = torch.float64) -> Mixture:
    rows = {site: torch.randn(len(options), dtype=dtype).softmax(0).requires_grad_() for site, options in SITES.items()}
    return Mixture(rows)


def part(conv: nn.Conv2d, out: int, inputs: int, kernel: int) -> Tensor:
    rim = (7 - kernel) // 2
    return conv.weight[:out, :inputs, rim : 7 - rim, rim : 7 - rim]


def padded(y: Tensor, size: int) -> Tensor:
    """Channels (B, C, ...) filled up with zeros."""
    return torch.cat([y, y.new_zeros(len(y), size - y.shape[1], *y.shape[2:])], 1)


# One option ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_of_one_option_is_exactly_the_slice(bias: bool, stride: int) -> None:
    conv, x = EntangledConv2d(8, 8, 7, stride, bias=bias), torch.randn(2, 8, 9, 9)
    for chosen in CHOICES:
        out, inputs, kernel = (SITES[site][chosen[site]] for site in SITES)
        b = None if conv.bias is None else conv.bias[:out]
        expected = F.conv2d(x[:, :inputs], part(conv, out, inputs, kernel), b, stride, kernel // 2)
        spans = spans_of(drawn(chosen))
        found = conv(x[:, :inputs], spans["out"], spans["in"], spans["kernel"])
        assert torch.equal(found, expected)
        spans = spans_of(dense(chosen))
        weight = conv.mixed_weight(spans["out"], spans["in"], spans["kernel"])
        rim = (7 - kernel) // 2
        assert torch.equal(weight[:out, :inputs, rim : 7 - rim, rim : 7 - rim], part(conv, out, inputs, kernel))
        assert weight.count_nonzero() == out * inputs * kernel**2
        whole = conv(x, spans["out"], spans["in"], spans["kernel"])
        assert (whole[:, :out] - expected).abs().max() < 1e-6  # the same products, added in another order
        assert not whole[:, out:].any()


def test_linear_layers_and_embeddings_of_one_option_are_exactly_the_slice() -> None:
    layer, embedding, x = EntangledLinear(8, 8), EntangledEmbedding(11, 8), torch.randn(3, 8)
    tokens = torch.randint(11, (2, 5))
    for chosen in CHOICES:
        out, inputs = WIDTHS[chosen["out"]], WIDTHS[chosen["in"]]
        spans = spans_of(drawn(chosen))
        expected = F.linear(x[:, :inputs], layer.weight[:out, :inputs], layer.bias[:out])
        assert torch.equal(layer(x[:, :inputs], spans["out"], spans["in"]), expected)
        columns = embedding.weight[:, :out]
        assert torch.equal(embedding(tokens, spans["out"]), F.embedding(tokens, columns))
        assert torch.equal(embedding.head(x[:, :out], spans["out"]), F.linear(x[:, :out], columns))
        spans = spans_of(dense(chosen))
        assert torch.equal(embedding(tokens, spans["out"])[..., :out], F.embedding(tokens, columns))
        assert not embedding(tokens, spans["out"])[..., out:].any()
        assert (layer(x, spans["out"], spans["in"])[:, :out] - expected).abs().max() < 1e-6


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_of_one_option_is_that_of_its_channels(training: bool) -> None:
    norm = EntangledBatchNorm2d(8).train(training)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(4, 8, 3, 3)
    norm.running_var.uniform_(1, 2)  # type: ignore[union-attr]
    for option, size in enumerate(WIDTHS):
        small = nn.BatchNorm2d(size).train(training)
        small.load_state_dict({name: v[:size] if v.dim() else v for name, v in norm.state_dict().items()})
        chosen = {"out": option, "in": 0, "kernel": 0}
        before = norm.running_mean.clone()  # type: ignore[union-attr]
        expected = small(x[:, :size])
        assert torch.equal(norm(x[:, :size], spans_of(drawn(chosen))["out"]), expected)
        assert torch.equal(norm.running_mean[:size], small.running_mean)  # type: ignore[index, arg-type]
        assert torch.equal(norm.running_mean[size:], before[size:])  # type: ignore[index]
        assert norm.num_batches_tracked == small.num_batches_tracked
        whole = norm.eval()(x, spans_of(dense(chosen))["out"])
        assert (whole[:, :size] - small.eval()(x[:, :size])).abs().max() < 1e-5
        assert not whole[:, size:].any()
        norm.train(training)


def test_a_batch_norm_of_cumulative_averages_takes_plain_means() -> None:
    norm, reference = EntangledBatchNorm2d(4, momentum=None), nn.BatchNorm2d(4, momentum=None)
    for _ in range(3):
        x = torch.randn(5, 4, 2, 2)
        assert torch.equal(norm(x), reference(x))
    assert torch.equal(norm.running_mean, reference.running_mean)  # type: ignore[arg-type]


def test_a_layer_norm_of_one_option_has_the_statistics_of_its_width() -> None:
    norm, x = EntangledLayerNorm(8), 3 + torch.randn(2, 5, 8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    for option, size in enumerate(WIDTHS):
        expected = F.layer_norm(x[..., :size], (size,), norm.weight[:size], norm.bias[:size])
        chosen = {"out": option, "in": 0, "kernel": 0}
        for mean in (False, True):
            assert torch.equal(norm(x[..., :size], spans_of(drawn(chosen))["out"], mean), expected)
            whole = norm(x, spans_of(dense(chosen))["out"], mean)
            assert (whole[..., :size] - expected).abs().max() < 1e-5
            assert mean or not whole[..., size:].any()
    masked = F.layer_norm(x, (8,), norm.weight, norm.bias)[..., :4]  # statistics over all widths, as often published
    assert (masked - F.layer_norm(x[..., :4], (4,), norm.weight[:4], norm.bias[:4])).abs().max() > 0.5


# Mixtures ------------------------------------------------------------------------------------------------------------


def test_a_mixed_weight_gives_the_mixed_outputs_of_a_bare_convolution() -> None:
    conv, x = EntangledConv2d(8, 8, 7, bias=True).double(), torch.randn(2, 8, 9, 9, dtype=torch.float64)
    mixture = random_mixture()
    spans = spans_of(mixture)
    expected = torch.zeros(2, 8, 9, 9, dtype=torch.float64)
    for chosen in CHOICES:
        out, inputs, kernel = (SITES[site][chosen[site]] for site in SITES)
        weight = torch.stack([mixture[site][option] for site, option in chosen.items()]).prod()
        assert conv.bias is not None
        y = F.conv2d(x[:, :inputs], part(conv, out, inputs, kernel), conv.bias[:out], padding=kernel // 2)
        expected = expected + weight * padded(y, 8)
    assert (conv(x, spans["out"], spans["in"], spans["kernel"]) - expected).abs().max() < 1e-12


def test_a_mixture_weight_has_the_inner_product_with_its_padded_slice_for_gradient() -> None:
    conv, x = EntangledConv2d(8, 8, 7), torch.randn(2, 8, 9, 9)
    mixture = random_mixture(torch.float32)
    spans = spans_of(mixture)
    mixed = conv.mixed_weight(spans["out"], spans["in"], spans["kernel"])
    mixed.retain_grad()
    F.conv2d(x, mixed, padding=3).square().mean().backward()
    assert mixed.grad is not None
    for option, size in enumerate(KERNELS):
        slices = F.pad(part(conv, 8, 8, size), [(7 - size) // 2] * 4)
        others = (spans["out"].mask[:, None] * spans["in"].mask)[..., None, None]  # type: ignore[index, operator]
        expected = (mixed.grad * slices * others).sum()
        grad = mixture["kernel"].grad
        assert grad is not None
        assert torch.allclose(grad[option], expected, rtol=1e-4)
    for site, dim in (("out", 0), ("in", 1)):
        others = conv.mixed_weight(
            **{"out": None, "inputs": None} | ({"inputs": spans["in"]} if site == "out" else {"out": spans["out"]}),
            kernel=spans["kernel"],
        )
        for option, size in enumerate(WIDTHS):
            reach = (torch.arange(8) < size).float().view([8 if d == dim else 1 for d in range(4)])
            expected = (mixed.grad * others * reach).sum()
            grad = mixture[site].grad
            assert grad is not None
            assert torch.allclose(grad[option], expected, rtol=1e-4)


def test_a_mixed_layer_norm_is_the_mixture_of_layer_norms() -> None:
    norm, x = EntangledLayerNorm(8).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    mixture = random_mixture()
    span = spans_of(mixture)["out"]
    expected = torch.zeros_like(x)
    for option, size in enumerate(WIDTHS):
        y = F.layer_norm(x[..., :size], (size,), norm.weight[:size], norm.bias[:size])
        expected = expected + mixture["out"][option] * F.pad(y, (0, 8 - size))
    assert (norm(x, span) - expected).abs().max() < 1e-12
    assert (norm(x, span, mean=True) * span.mask - expected).abs().max() < 1e-12


def test_a_mean_is_defined_where_nothing_weighs() -> None:
    norm, x = EntangledLayerNorm(8), torch.randn(2, 5, 8, requires_grad=True)
    weights = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)
    found = norm(x, AXES["out"](Mixture({"out": weights}), "out"), mean=True)
    four, six, eight = (F.pad(F.layer_norm(x[..., :size], (size,)), (0, 8 - size)) for size in WIDTHS)
    assert (found[..., :4] - four[..., :4]).abs().max() < 1e-6
    assert (found[..., 4:6] - (six + eight)[..., 4:6] / 2).abs().max() < 1e-6  # the mean, as if all weighed the same
    assert (found[..., 6:] - eight[..., 6:]).abs().max() < 1e-6
    found.square().sum().backward()
    assert weights.grad is not None
    assert weights.grad.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_a_batch_norm_cancels_weights_in_front_of_it() -> None:
    conv, norm, x = EntangledConv2d(3, 8, 3), EntangledBatchNorm2d(8), torch.randn(8, 3, 9, 9)
    target = torch.randn(8, 8, 9, 9)
    sizes = {}
    for place in ("convolution", "norm"):
        weights = torch.full((3,), 1 / 3, requires_grad=True)
        span = AXES["out"](Mixture({"out": weights}), "out")
        y = norm(conv(x, span), None) if place == "convolution" else norm(conv(x, span.plain), span)
        (y * target).sum().backward()
        assert weights.grad is not None
        sizes[place] = float(weights.grad.abs().max())
    assert 100 * sizes["convolution"] < sizes["norm"]


def test_coupled_axes_weigh_pairs() -> None:
    ratios = (2, 3)
    axis = CoupledAxis(WIDTHS, ratios, lambda width, ratio: int(width * ratio))
    layer = EntangledLinear(8, axis.size).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    a, b = (torch.randn(n, dtype=torch.float64).softmax(0) for n in (3, 2))
    mixture = Mixture({"width": a, "ratio": b})
    width, ratio = Axis(WIDTHS)(mixture, "width"), Axis((16, 24))(mixture, "ratio")
    hidden, joint = axis(width, ratio)
    expected = torch.zeros(5, 24, dtype=torch.float64)
    for i, w in enumerate(WIDTHS):
        for j, r in enumerate(ratios):
            y = F.linear(x[:, :w], layer.weight[: w * r, :w], layer.bias[: w * r])
            expected = expected + a[i] * b[j] * padded(y, 24)
    assert (layer(x, hidden, width, joint) - expected).abs().max() < 1e-12
    product_of_axes = layer(x, hidden, width)
    assert (product_of_axes - expected).abs().max() > 1e-3  # that would be another mixture


def test_coupled_axes_of_a_sample_are_a_slice() -> None:
    axis = CoupledAxis(WIDTHS, (2, 3), lambda width, ratio: int(width * ratio))
    mixture = one_hot({"width": WIDTHS, "ratio": (2, 3)}, {"width": 1, "ratio": 1})
    hidden, joint = axis(Axis(WIDTHS)(mixture, "width"), Axis((16, 24))(mixture, "ratio"))
    assert (hidden.size, hidden.sizes, joint) == (18, (18,), None)


class Supernet(EntangledSupernet):
    """Of no network: for its `through`."""

    def forward(self, x: Tensor, mixture: Mixture) -> Tensor:
        raise NotImplementedError


def test_a_mixed_depth_is_the_mixture_of_the_outputs_of_every_depth() -> None:
    depths = (1, 3, 4)
    supernet = Supernet(ConvMacro(), {"depth": Axis(depths)})
    blocks = [EntangledLinear(8, 8).double() for _ in range(5)]  # one more than are used
    x, weights = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, dtype=torch.float64).softmax(0)
    spans = [spans_of(random_mixture()) for _ in blocks]
    outs, ins = ([spans[i][site] for i in range(5)] for site in ("out", "in"))
    outputs = [x]
    for block, out, inputs in zip(blocks, outs, ins, strict=True):
        outputs.append(block(outputs[-1], out, inputs))  # the stream goes on unweighted
    found = supernet.through(x, blocks, Axis(depths)(Mixture({"depth": weights}), "depth"), outs, ins)
    expected = weights[0] * outputs[1] + weights[1] * outputs[3] + weights[2] * outputs[4]
    assert (found - expected).abs().max() < 1e-12
    sample = Axis(depths)(Mixture({"depth": torch.tensor([0.0, 0.5, 0.0])}, {"depth": (1,)}), "depth")
    assert (supernet.through(x, blocks, sample, outs, ins) - 0.5 * outputs[3]).abs().max() < 1e-12


def test_a_mixed_convolution_with_norm_weighs_what_it_reads_and_not_what_it_writes() -> None:
    layer, x = EntangledConvBN(8, 8, 7).double(), torch.randn(4, 8, 9, 9, dtype=torch.float64)
    nn.init.normal_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    mixture = random_mixture()
    spans = spans_of(mixture)
    y = torch.zeros(4, 8, 9, 9, dtype=torch.float64)
    for (i, inputs), (k, kernel) in product(enumerate(WIDTHS), enumerate(KERNELS)):
        weight = mixture["in"][i] * mixture["kernel"][k]
        y = y + weight * F.conv2d(x[:, :inputs], part(layer.conv, 8, inputs, kernel), padding=kernel // 2)
    expected = F.batch_norm(y, None, None, layer.norm.weight, layer.norm.bias, training=True)
    assert (layer(x, spans["out"], spans["in"], spans["kernel"]) - expected).abs().max() < 1e-12


# Cost ----------------------------------------------------------------------------------------------------------------


def saved_bytes(options: int) -> int:
    sizes = tuple(range(32 - options + 1, 33))
    conv, x = EntangledConv2d(16, 32, 7), torch.randn(4, 16, 8, 8)
    weights = torch.full((options,), 1 / options, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        conv(x, Axis(sizes)(Mixture({"out": weights}), "out"))
    return sum(kept.values())


def test_memory_does_not_grow_with_the_options() -> None:
    assert saved_bytes(24) < 1.05 * saved_bytes(2)


def test_a_sample_uses_what_was_drawn_and_all_where_it_has_a_gradient() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0])
    assert AXES["out"](Mixture({"out": weights}, {"out": (1,)}), "out").size == 6
    assert AXES["out"](Mixture({"out": weights.requires_grad_()}, {"out": (1,)}), "out").size == 8
    two = Mixture({"out": torch.tensor([0.5, 0.5, 0.0])}, {"out": (0, 1)})
    assert AXES["out"](two, "out").size == 8


def test_a_sampled_weight_counts() -> None:
    conv, x = EntangledConv2d(2, 8, 3), torch.randn(1, 2, 4, 4)
    half = Mixture({"out": torch.tensor([0.0, 0.5, 0.0])}, {"out": (1,)})
    assert torch.allclose(conv(x, AXES["out"](half, "out")), 0.5 * conv(x)[:, :6], atol=1e-6)


def test_groups_keep_their_width() -> None:
    conv, x = EntangledConv2d(8, 8, 3, group_width=2), torch.randn(2, 8, 5, 5)
    span = AXES["out"](drawn({"out": 1, "in": 0, "kernel": 0}), "out")
    expected = F.conv2d(x[:, :6], conv.weight[:6], padding=1, groups=3)
    assert torch.equal(conv(x[:, :6], span), expected)


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((), "the sizes of an axis are positive integers, got ()"),
        ((4, 0), "positive integers, got (4, 0)"),
        ((8, 4), "ascend"),
        ((4.0, 8), "positive integers"),
    ],
)
def test_sizes_are_checked(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ArchError) as caught:
        Axis(sizes)
    assert message in str(caught.value)


def test_even_kernels_are_refused() -> None:
    with pytest.raises(ArchError, match=r"odd sizes, for smaller ones are the centres of larger; got 4 in \(3, 4\)"):
        KernelAxis((3, 4))
    with pytest.raises(ArchError, match="odd sizes"):
        EntangledConv2d(3, 8, 4)


def test_widths_are_divisible_by_heads_and_groups() -> None:
    with pytest.raises(ArchError, match="a width is 6, which is not divisible by the number of heads, 4"):
        EntangledAttention((6, 8), (2, 4))
    with pytest.raises(ArchError, match="a size of channels is 9, which is not divisible by the group width, 2"):
        EntangledConv2d(9, 9, 3, group_width=2)
    with pytest.raises(ArchError, match="equal channels on both sides, got 4 and 8"):
        EntangledConv2d(4, 8, 3, group_width=2)
    conv = EntangledConv2d(8, 8, 3, group_width=2)
    odd = Axis((5, 8))(Mixture({"w": torch.tensor([1.0, 0.0])}, {"w": (0,)}), "w")
    with pytest.raises(ArchError, match="a size of channels is 5, which is not divisible by the group width, 2"):
        conv(torch.zeros(1, 5, 4, 4), odd)


def test_a_mixture_of_another_length_is_refused() -> None:
    with pytest.raises(ArchError, match="the mixture has 2 weights for 'out', which has 3 sizes: 4, 6, 8"):
        AXES["out"](Mixture({"out": torch.ones(2)}), "out")


def test_few_channels_of_a_strided_layer_in_channels_last() -> None:
    """On a processor with AVX2, oneDNN's own stride writes past a buffer here."""
    layer = EntangledConv2d(16, 16, 1, stride=2)
    span = Axis((4, 16))(Mixture({"in": torch.tensor([1.0, 0.0])}, {"in": (0,)}), "in")
    x, grads = torch.randn(16, 4, 32, 32), []
    for kind, layout in ((torch.float, torch.channels_last), (torch.double, torch.contiguous_format)):
        layer.to(kind).zero_grad()
        layer(x.to(kind).contiguous(memory_format=layout), inputs=span).square().sum().backward()
        assert layer.weight.grad is not None
        grads.append(layer.weight.grad.double())
    assert torch.allclose(*grads, rtol=1e-3)
