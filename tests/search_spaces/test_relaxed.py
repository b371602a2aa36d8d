"""Relaxed cells: the fast form computes what the textbook form does, derivatives and running statistics included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from search_spaces.base import ArchError, Mixture
from search_spaces.nasbench201 import EDGES, OPERATIONS
from search_spaces.operations import DARTS_OPERATIONS, DilConv, ReLUConvBN, SepConv, operation
from search_spaces.relaxed import PartialChannels, RelaxedCell

DARTS_EDGES = {f"e{source}{node}": (source, node) for node in (2, 3, 4) for source in range(node)}
T = TypeVar("T", bound=nn.Module)
TOLERANCE = 1e-12  # of float64, relative to the norm


def darts_cell(reduction: bool = False, **settings: Any) -> RelaxedCell:
    """Two inputs, three nodes: as in DARTS, but a node less."""
    cell = RelaxedCell(
        DARTS_EDGES,
        DARTS_OPERATIONS,
        lambda name, c, stride: operation(name, c, c, stride, search=True),
        channels=4,
        inputs=2,
        outputs=(2, 3, 4),
        reduction=reduction,
        node_sites={2: "n2", 3: "n3", 4: "n4"},
        **settings,
    )
    return cell.double()


def nasbench_cell(reduction: bool = False, **settings: Any) -> RelaxedCell:
    def make(name: str, c: int, stride: int) -> nn.Module:
        kernels = {"nor_conv_1x1": 1, "nor_conv_3x3": 3}
        if name in kernels:
            return ReLUConvBN(c, c, kernels[name], affine=False)
        return operation(name, c, c) if name == "skip_connect" else nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    node_sites = {2: "n2", 3: "n3"}
    cell = RelaxedCell(EDGES, OPERATIONS, make, 4, outputs=(3,), node_sites=node_sites, **settings)
    return cell.double()


def mixture_of(cell: RelaxedCell, *, edge_weights: bool = False) -> Mixture:
    """Weights that are leaves and require gradients."""
    sizes = dict.fromkeys(cell.ends, len(cell.operations))
    if edge_weights:
        sizes |= {
            site: sum(target == node for _, target in cell.ends.values()) for node, site in cell.node_sites.items()
        }
    return Mixture({s: torch.randn(n, dtype=torch.double).softmax(0).requires_grad_() for s, n in sizes.items()})


def inputs_of(cell: RelaxedCell, side: int = 6) -> list[Tensor]:
    return [torch.randn(3, 4, side, side, dtype=torch.double, requires_grad=True) for _ in range(cell.inputs)]


def copy_of(cell: RelaxedCell, form: str, **settings: Any) -> RelaxedCell:
    make = darts_cell if cell.inputs == 2 else nasbench_cell
    other = make(cell.strides[0] == 2, form=form, partial_channels=cell.partial_channels, **settings)
    other.load_state_dict(cell.state_dict())
    return other.train(cell.training)


def assert_close(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= TOLERANCE * b.norm() + 1e-14


def leaves(cell: RelaxedCell, mixture: Mixture, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [*inputs, *mixture.values(), *cell.parameters()]


def modules_of(cell: RelaxedCell, kind: type[T]) -> list[T]:
    return [module for module in cell.modules() if isinstance(module, kind)]


CELLS = [
    pytest.param(darts_cell, False, id="darts"),
    pytest.param(darts_cell, True, id="darts-reduction"),
    pytest.param(nasbench_cell, False, id="nasbench201"),
]


@pytest.mark.parametrize(("make", "reduction"), CELLS)
@pytest.mark.parametrize(("side", "parts", "edge_weights"), [(6, 1, False), (5, 1, True), (6, 2, True), (5, 2, False)])
def test_forms_agree_in_output_gradients_and_statistics(
    make: Callable[..., RelaxedCell], reduction: bool, side: int, parts: int, edge_weights: bool
) -> None:
    textbook = make(reduction, form="textbook", partial_channels=parts)
    fast = copy_of(textbook, "fast")
    mixture, inputs = mixture_of(textbook, edge_weights=edge_weights), inputs_of(textbook, side)
    results = []
    for cell in (textbook, fast):
        for _ in range(2):  # running statistics move on from what the first batch left
            y = cell(mixture, *inputs)
        results.append((y, torch.autograd.grad(y.sin().sum(), leaves(cell, mixture, inputs))))
    assert_close([results[1][0], *results[1][1]], [results[0][0], *results[0][1]])
    counts = [b for name, b in fast.named_buffers() if name.endswith("num_batches_tracked")]
    assert all(count == 2 for count in counts)
    for a, b in zip(fast.buffers(), textbook.buffers(), strict=True):
        assert (a - b).abs().max() <= TOLERANCE
    # Evaluation uses them.
    fast.eval(), textbook.eval()
    assert_close([fast(mixture, *inputs)], [textbook(mixture, *inputs)])
    assert (textbook(mixture, *inputs) - results[0][0]).norm() > 0.1


@pytest.mark.parametrize(("make", "reduction"), CELLS)
@pytest.mark.parametrize("side", [5, 6])
def test_forms_agree_in_second_derivatives(make: Callable[..., RelaxedCell], reduction: bool, side: int) -> None:
    textbook = make(reduction, form="textbook")
    mixture, inputs = mixture_of(textbook, edge_weights=True), inputs_of(textbook, side)
    results = []
    for cell in (textbook, copy_of(textbook, "fast"), copy_of(textbook, "fast", recompute=True)):
        at = leaves(cell, mixture, inputs)
        grads = torch.autograd.grad(cell(mixture, *inputs).sin().sum(), at, create_graph=True)
        generator = torch.Generator().manual_seed(1)
        dot = sum((g * torch.randn(g.shape, generator=generator, dtype=g.dtype)).sum() for g in grads)
        assert isinstance(dot, Tensor)
        results.append(torch.autograd.grad(dot, at))
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])


@pytest.mark.parametrize(("make", "reduction"), CELLS)
@pytest.mark.parametrize("form", ["fast", "textbook"])
@pytest.mark.parametrize("sampled", [False, True])
def test_recomputation_changes_no_gradient_and_counts_a_batch_once(
    make: Callable[..., RelaxedCell], reduction: bool, form: str, sampled: bool
) -> None:
    plain = make(reduction, form=form)
    again = copy_of(plain, form, recompute=True)
    mixture, inputs = mixture_of(plain), inputs_of(plain)
    if sampled:
        mixture = Mixture(mixture, active={site: (len(plain.operations) - 1,) for site in mixture})
    results = []
    for cell in (plain, again):
        y = cell(mixture, *inputs)
        results.append(torch.autograd.grad(y.sin().sum(), leaves(cell, mixture, inputs), allow_unused=True))
    pairs = list(zip(*results, strict=True))
    assert all((a is None) == (b is None) for a, b in pairs)
    assert_close([b for _, b in pairs if b is not None], [a for a, _ in pairs if a is not None])
    for a, b in zip(plain.buffers(), again.buffers(), strict=True):
        assert torch.equal(a, b)


def test_weights_alone_get_the_same_gradients_as_with_everything_else() -> None:
    """The architecture step asks for those of the mixture only."""
    cell = darts_cell()
    mixture, inputs = mixture_of(cell), [x.detach() for x in inputs_of(cell)]
    wanted = torch.autograd.grad(cell(mixture, *inputs).sin().sum(), list(mixture.values()))
    found = torch.autograd.grad(cell.requires_grad_(False)(mixture, *inputs).sin().sum(), list(mixture.values()))
    assert_close(found, wanted)


@pytest.mark.parametrize("form", ["fast", "textbook"])
@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_statistics_stay_as_they_are(form: str, recompute: bool) -> None:
    cell = darts_cell(form=form, recompute=recompute)
    mixture, inputs = mixture_of(cell), inputs_of(cell)
    before = [b.clone() for b in cell.buffers()]
    norms = modules_of(cell, nn.BatchNorm2d)
    for norm in norms:
        norm.track_running_stats = False  # as an architecture step does
    y = cell(mixture, *inputs)
    for norm in norms:
        norm.track_running_stats = True
    y.sum().backward()  # also where recomputation comes later, with the flags set again
    assert all(torch.equal(a, b) for a, b in zip(cell.buffers(), before, strict=True))
    assert torch.equal(y, cell(mixture, *inputs))  # the batch's own statistics were used all the same
    assert not torch.equal(next(cell.buffers()), before[0])


def test_a_cumulative_average_of_statistics_is_kept_too() -> None:
    textbook = darts_cell(form="textbook")
    for module in textbook.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    fast = copy_of(textbook, "fast")
    for module in fast.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    mixture = mixture_of(textbook)
    for _ in range(3):
        inputs = inputs_of(textbook)
        fast(mixture, *inputs), textbook(mixture, *inputs)
    assert_close([b.double() for b in fast.buffers()], [b.double() for b in textbook.buffers()])


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("reduction", [False, True])
def test_a_sample_is_the_sum_of_its_active_operations(parts: int, reduction: bool) -> None:
    cell = darts_cell(reduction, partial_channels=parts)
    inputs = inputs_of(cell)
    weights = {site: torch.zeros(8, dtype=torch.double) for site in cell.ends}
    active: dict[str, tuple[int, ...]] = dict.fromkeys(cell.ends, (0,))  # none
    for edge, position in (("e02", 3), ("e12", 4), ("e23", 1), ("e03", 6), ("e24", 2), ("e34", 5)):
        weights[edge][position] = 0.5 + position
        active[edge] = (position,)
    active["e13"] = ()
    weights = {site: w.requires_grad_() for site, w in weights.items()}
    y = cell(Mixture(weights, active), *inputs)

    def term(edge: str, position: int, x: Tensor) -> Tensor:
        stride, name = cell.strides[cell.ends[edge][0]], DARTS_OPERATIONS[position]
        mixed, rest = x[:, : 4 // parts], x[:, 4 // parts :]
        operations: Any = cell.edges[edge]
        mixed = operations[name](mixed).mul(0.5 + position)
        if parts == 1:
            return torch.as_tensor(mixed)
        rest = torch.nn.functional.max_pool2d(rest, 2) if stride == 2 else rest
        return torch.cat([mixed, rest], 1)[:, [0, 2, 1, 3]]

    n2 = term("e02", 3, inputs[0]) + term("e12", 4, inputs[1])
    n3 = term("e03", 6, inputs[0]) + term("e23", 1, n2)
    n4 = term("e24", 2, n2) + term("e34", 5, n3)
    assert torch.allclose(y, torch.cat([n2, n3, n4], 1), rtol=0, atol=1e-12)
    grads = torch.autograd.grad(y.sin().sum(), list(weights.values()), allow_unused=True)
    for (edge, _), g in zip(weights.items(), grads, strict=True):
        if active[edge] in ((), (0,)):
            assert g is None
        else:
            assert g is not None and g.nonzero().flatten().tolist() == list(active[edge])


def test_nothing_active_is_zero_and_what_is_not_active_is_not_computed() -> None:
    cell = darts_cell()
    nan = torch.nn.Parameter(torch.full((1,), torch.nan, dtype=torch.double))
    for parameter in cell.edges["e12"].parameters():
        parameter.data = nan.data.expand_as(parameter).clone()
    weights = {site: torch.zeros(8, dtype=torch.double) for site in cell.ends}
    inputs = inputs_of(cell)
    assert torch.equal(cell(Mixture(weights, dict.fromkeys(cell.ends, ())), *inputs), torch.zeros(3, 12, 6, 6))
    active = dict.fromkeys(cell.ends, (3,)) | {"e12": (0,)}
    weights = {site: w.index_fill(0, torch.tensor(active[site]), 1.0) for site, w in weights.items()}
    assert cell(Mixture(weights, active), *inputs).isfinite().all()
    assert cell(Mixture(weights), *inputs).isnan().any()  # a dense mixture computes all of it


def test_weights_of_nodes_scale_their_edges() -> None:
    cell = nasbench_cell()
    mixture, inputs = mixture_of(cell), inputs_of(cell)
    scales = {"n2": torch.tensor([0.25, 4.0]).double(), "n3": torch.tensor([0.5, 0.0, 3.0]).double()}
    factors = {"e01": 1.0, "e02": 0.25, "e12": 4.0, "e03": 0.5, "e13": 0.0, "e23": 3.0}
    scaled = Mixture({edge: factors[edge] * w for edge, w in mixture.items()})
    assert_close([cell(Mixture({**mixture, **scales}), *inputs)], [cell(scaled, *inputs)])


def test_fast_form_keeps_convolutions_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state's depthwise convolutions are one call for all its edges: not one for each edge."""
    shapes: list[int] = []
    conv2d: Callable[..., Tensor] = torch.nn.functional.conv2d

    def counted(x: Tensor, w: Tensor, *rest: object, **settings: object) -> Tensor:
        shapes.append(w.shape[0])
        return conv2d(x, w, *rest, **settings)

    cell = darts_cell()
    monkeypatch.setattr(torch.nn.functional, "conv2d", counted)
    with torch.no_grad():
        cell(mixture_of(cell), *inputs_of(cell))
    # Per state: 2 kernels x 2 depthwise convolutions and 2 pointwise ones of separable ones, 2 dilated ones; 4 states
    # have edges, to 3, 3, 2 and 1 nodes.
    assert len(shapes) == 4 * 8
    assert sorted(set(shapes)) == [4, 8, 12]


@pytest.mark.parametrize("affine", [False, True])
def test_operations_that_the_fast_form_does_not_know_are_computed_one_by_one(affine: bool) -> None:
    def make(name: str, c: int, stride: int) -> nn.Module:
        if affine:  # known operations, whose norms have a scale that the fast form does not provide for
            return operation("sep_conv_3x3" if name == "a" else "dil_conv_3x3", c, c, stride)
        return nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.Tanh()) if name == "a" else nn.Tanh()

    settings: dict[str, Any] = {"edges": EDGES, "operations": ("none", "b", "a"), "make": make, "channels": 4}
    cells = [RelaxedCell(**settings, outputs=(3,), form=form).double() for form in ("textbook", "fast")]
    for module in modules_of(cells[0], nn.BatchNorm2d):
        nn.init.uniform_(module.weight)
    cells[1].load_state_dict(cells[0].state_dict())
    mixture, inputs = mixture_of(cells[0]), inputs_of(cells[0])
    wanted, found = (
        torch.autograd.grad(cell(mixture, *inputs).sin().sum(), leaves(cell, mixture, inputs)) for cell in cells
    )
    assert_close(found, wanted)


def test_partial_channels_shuffle() -> None:
    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert PartialChannels(nn.Identity(), 3)(x).flatten().tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "quick"}, "form='quick'; choices are fast, textbook"),
        ({"partial_channels": 3}, "4 channels, which cannot be divided"),
        ({"partial_channels": 0}, "partial_channels=0; it is a positive integer"),
        ({"partial_channels": True}, "positive integer"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArchError, match=message):
        darts_cell(**settings)


def test_state_dict_names_edges_and_operations() -> None:
    cell = darts_cell()
    assert "edges.e02.sep_conv_3x3.depthwise1.weight" in cell.state_dict()
    assert not any("none" in name for name in cell.state_dict())
    assert len(modules_of(cell, SepConv)) == len(modules_of(cell, DilConv)) == 9 * 2
