"""Sparse layers: dense, then with learned scores, then with fixed masks."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from search_spaces import DARTS, Arch, ArchError, Mixture
from search_spaces.darts import NODES
from search_spaces.masks import keep_count
from search_spaces.operations import SPARSE_OPERATIONS, operation
from search_spaces.sparse_operations import (
    Scores,
    SparseConv2d,
    SparseLinear,
    fix_masks,
    is_depthwise,
    kept,
    learn_scores,
    masks,
    share_out,
    sparse_layers,
    sparsified,
)

SPACES = {ops: DARTS(channels=4, cells=1, classes=5, in_channels=2, ops=ops) for ops in ("sparse", "both")}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def net() -> nn.Sequential:
    return nn.Sequential(
        SparseConv2d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        SparseConv2d(8, 8, 3, padding=1, groups=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        SparseLinear(8, 5),
    )


def scores(network: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in network.named_parameters() if name.endswith("scores")}


def nonzero(network: nn.Module) -> dict[str, int]:
    return {name: int(layer.weight.count_nonzero()) for name, layer in sparse_layers(network).items()}


def train(network: nn.Module, steps: int = 3, lr: float = 0.1) -> None:
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr, momentum=0.9, weight_decay=0.1)
    x, y = torch.randn(16, 2, 8, 8), torch.randint(5, (16,))
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(network(x), y).backward()
        optimizer.step()


# Layers --------------------------------------------------------------------------------------------------------------


def test_a_density_of_one_is_dense_bit_for_bit() -> None:
    x = torch.randn(4, 2, 8, 8)
    dense = net().eval()
    expected = dense(x)
    for network in (learn_scores(copy.deepcopy(dense), 1.0), fix_masks(learn_scores(copy.deepcopy(dense), 1.0))):
        assert torch.equal(network(x), expected)


def test_the_first_mask_is_that_of_the_largest_weights() -> None:
    network = net()
    weights = {name: layer.weight.detach().clone() for name, layer in sparse_layers(network).items()}
    learn_scores(network, 0.25)
    for name, layer in sparse_layers(network).items():
        keep = keep_count(0.25, weights[name].numel())
        largest = weights[name].abs().flatten().topk(keep).indices.sort().values
        assert torch.equal(layer.weight.flatten().nonzero().squeeze(1), largest)
    first = scores(network)["0.parametrizations.weight.0.scores"]
    assert torch.allclose(first, (6 / 18) ** 0.5 * weights["0"] / weights["0"].abs().max())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_counts_are_exact_in_every_memory_format_with_ties(memory_format: torch.memory_format) -> None:
    network: nn.Module = net()
    with torch.no_grad():
        for layer in sparse_layers(network).values():
            layer.weight.fill_(-0.5)
    network = network.to(memory_format=memory_format)  # type: ignore[call-overload]
    expected = {"0": 14, "3": 7, "6": 4}  # of 144, 72 and 40
    assert nonzero(learn_scores(network, 0.1)) == kept(net(), 0.1) == expected
    fix_masks(network)
    assert nonzero(network) == {name: int(mask.sum()) for name, mask in masks(network).items()} == expected
    assert all(mask.dtype == torch.bool for mask in masks(network).values())
    assert network(torch.randn(2, 2, 8, 8)).isfinite().all()


def test_gradients_are_those_of_the_formula() -> None:
    layer = learn_scores(SparseLinear(6, 4), 0.3).requires_grad_(True)
    x = torch.randn(3, 6)
    masked = layer.weight.detach().requires_grad_()
    loss = layer(x).square().sum()
    loss.backward()
    (upstream,) = torch.autograd.grad(F.linear(x, masked, layer.bias).square().sum(), masked)
    inner: Any = layer.parametrizations["weight"]
    mask = masked != 0
    assert int(mask.sum()) == 7
    assert torch.equal(inner.original.grad, upstream * mask)
    assert torch.equal(inner[0].scores.grad, upstream * inner.original * inner[0].scores.sign())
    assert inner[0].scores.grad[~mask].any()


def test_scores_learn_alone_and_move_the_masks() -> None:
    network = learn_scores(net(), 0.2)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    first = {name: layer.weight.detach() != 0 for name, layer in sparse_layers(network).items()}
    train(network, steps=10, lr=1.0)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]) is not name.endswith("scores")
    now = {name: layer.weight.detach() != 0 for name, layer in sparse_layers(network).items()}
    assert any(not torch.equal(first[name], now[name]) for name in now)
    assert nonzero(network) == kept(net(), 0.2)


def test_fixed_masks_stay_and_pruned_weights_do_not_move() -> None:
    network = fix_masks(learn_scores(net(), 0.2))
    assert not scores(network)
    assert all(p.requires_grad for p in network.parameters())
    before = {name: mask.clone() for name, mask in masks(network).items()}
    kept_before = {name: layer.weight.detach().clone() for name, layer in sparse_layers(network).items()}
    train(network)
    for name, layer in sparse_layers(network).items():
        original: Any = layer.parametrizations["weight"].original  # type: ignore[index, union-attr]
        assert torch.equal(masks(network)[name], before[name])
        assert not original.grad[~before[name]].any()
        assert not layer.weight[~before[name]].any()
        assert not torch.equal(layer.weight, kept_before[name])


def test_a_copy_and_its_model_go_their_own_ways() -> None:
    network = learn_scores(net(), 0.2)
    twin = copy.deepcopy(network)
    fix_masks(network)
    assert isinstance(twin[0].parametrizations["weight"][0], Scores)
    assert torch.equal(fix_masks(twin)[0].weight, network[0].weight)


def test_a_dense_network_takes_masks_from_a_state() -> None:
    pruned = fix_masks(learn_scores(net(), 0.2)).eval()
    twin = net().eval()
    twin.load_state_dict(pruned.state_dict())
    x = torch.randn(2, 2, 8, 8)
    assert nonzero(twin) == kept(net(), 0.2)
    assert torch.equal(twin(x), pruned(x))
    train(twin)
    assert nonzero(twin) == kept(net(), 0.2)
    with torch.device("meta"):
        empty = net()
    empty.load_state_dict(pruned.state_dict(), assign=True)
    assert torch.equal(empty.eval()(x), pruned(x))
    pruned.load_state_dict(net().state_dict())  # and one with masks drops what is under them
    assert nonzero(pruned) == kept(net(), 0.2)


def test_a_plain_network_is_made_sparse_with_its_parameters() -> None:
    plain = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Sequential(nn.Linear(4, 5)))
    parameters = list(plain.parameters())
    assert list(sparse_layers(sparsified(plain))) == ["0", "2.0"]
    assert all(a is b for a, b in zip(parameters, plain.parameters(), strict=True))
    assert not sparse_layers(sparsified(nn.Sequential(nn.Linear(4, 5)), leave=(nn.Sequential,)))


# Budgets -------------------------------------------------------------------------------------------------------------


def test_a_global_budget_is_exact_and_follows_the_scores() -> None:
    network = learn_scores(net(), 0.1, budget="global")
    total = keep_count(0.1, 144 + 72 + 40)
    first = nonzero(network)
    assert sum(first.values()) == total
    with torch.no_grad():
        strong = network[6].parametrizations["weight"][0].scores
        strong.fill_(0.001)
        strong[0].fill_(1.0)  # they are far from equal: more of them are above the others' mean
    share_out(network, 0.1)
    now = nonzero(network)
    assert sum(now.values()) == total
    assert now["6"] == 8 > first["6"]
    with torch.no_grad():
        network[0].parametrizations["weight"][0].scores.fill_(1.0)
        network[3].parametrizations["weight"][0].scores[:4].fill_(100.0)
    share_out(network, 0.1)
    assert min(nonzero(network).values()) >= 1
    fix_masks(network)
    assert sum(nonzero(network).values()) == total


def test_depthwise_convolutions_can_be_spared() -> None:
    network = learn_scores(net(), 0.1, spare_depthwise=True)
    assert nonzero(network) == {"0": 14, "3": 72, "6": 4}
    assert set(masks(fix_masks(network))) == {"0", "6"}
    assert is_depthwise(network[3]) and not is_depthwise(network[0]) and not is_depthwise(nn.Conv2d(1, 1, 3))


def test_a_density_for_each_layer() -> None:
    assert nonzero(fix_masks(learn_scores(net(), {"0": 0.5, "6": 1}))) == {"0": 72, "3": 72, "6": 40}


@pytest.mark.parametrize(
    ("density", "settings", "message"),
    [
        (0, {}, "density is 0; it is the share of weights that are kept, above 0, at most 1"),
        (1.5, {}, "density is 1.5"),
        (float("nan"), {}, "density is nan"),
        ("a", {}, "density is 'a'"),
        (True, {}, "density is True"),
        ({"0": 2}, {}, "density of '0' is 2"),
        ({"00": 0.1}, {}, "density names '00', which is no sparse layer; did you mean '0'"),
        ({}, {}, "density names no layer"),
        ({"0": 0.1}, {"budget": "global"}, "a density for each layer says all"),
        (0.1, {"budget": "all"}, "budget='all'; choices are layer, global"),
        (0.001, {"budget": "global"}, "density=0.001 of 256 weights leaves less than one for each of 3"),
    ],
)
def test_bad_densities_leave_the_network_as_it_is(density: Any, settings: dict[str, Any], message: str) -> None:
    network = net()
    with pytest.raises(ArchError, match=message):
        learn_scores(network, density, **settings)
    assert not scores(network)
    assert all(p.requires_grad for p in network.parameters())


def test_networks_without_dense_sparse_layers_are_refused() -> None:
    with pytest.raises(ArchError, match=r"Linear has no sparse layers to prune. Use DARTS\(ops='sparse'\), or make"):
        learn_scores(nn.Linear(2, 2), 0.1)
    with pytest.raises(ArchError, match="the weight of '0' is masked or parametrized already"):
        learn_scores(fix_masks(learn_scores(net(), 0.5)), 0.5)
    with pytest.raises(ArchError, match="all sparse layers are depthwise and spared"):
        learn_scores(SparseConv2d(4, 4, 3, groups=4), 0.5, spare_depthwise=True)


# DARTS ---------------------------------------------------------------------------------------------------------------


def test_every_layer_of_a_sparse_network_is_sparse_but_those_of_the_auxiliary_head() -> None:
    space = DARTS(channels=4, cells=3, classes=5, in_channels=2, auxiliary=True, ops="sparse")
    network = space.build(space.sample(Random(0)))
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert (name in sparse_layers(network)) is not name.startswith("auxiliary")


def test_both_kinds_stand_side_by_side() -> None:
    both, sparse = SPACES["both"], SPACES["sparse"]
    arch = sparse.sample(Random(1))
    twin = both.arch({k: f"sparse_{v}" if f"sparse_{v}" in SPARSE_OPERATIONS else v for k, v in arch.items()})
    networks = sparse.build(arch), both.build(twin)
    assert list(sparse_layers(networks[0])) == list(sparse_layers(networks[1]))
    some = len(sparse_layers(both.build(both.check(arch))))
    assert 0 < some < len(sparse_layers(networks[0]))
    assert both.arch_of(both.genotype(twin)) == twin
    assert set(both.sites["normal_0_2"]) - set(sparse.sites["normal_0_2"]) == set(SPARSE_OPERATIONS)


def test_dense_spaces_are_what_they_were() -> None:
    dense = DARTS()
    assert "ops" not in dense.to_json()
    assert dense.fingerprint == "c31a91fdbe55"
    assert len({dense.fingerprint, DARTS(ops="sparse").fingerprint, DARTS(ops="both").fingerprint}) == 3
    with pytest.raises(ArchError, match="DARTS was given ops='sparce'; choices are dense, sparse, both"):
        DARTS(ops="sparce")
    with pytest.raises(ArchError, match="no operation 'sparse_conv' to build"):
        operation("sparse_conv", 4, 4)


def mixture(space: DARTS) -> Mixture:
    generator = torch.Generator().manual_seed(0)
    return Mixture({s: torch.rand(len(o), generator=generator).softmax(0) for s, o in space.sites.items()})


@pytest.mark.parametrize("ops", SPACES)
@pytest.mark.parametrize(("side", "fixed"), [(8, False), (7, True)])
def test_both_forms_of_a_supernet_read_the_masks(ops: str, side: int, fixed: bool) -> None:
    space = SPACES[ops]
    fast = learn_scores(space.supernet(), 0.2)
    if fixed:
        fix_masks(fast)
    slow = copy.deepcopy(fast)
    for module in slow.modules():
        if hasattr(module, "form"):
            module.form = "textbook"
    x = torch.randn(4, 2, side, side)
    results = []
    for supernet in (fast.double(), slow.double()):
        out = supernet(x.double(), mixture(space).map(Tensor.double))
        out.square().sum().backward()
        results.append((out, [p.grad for p in supernet.parameters() if p.requires_grad]))
    (a, of_a), (b, of_b) = results
    assert torch.allclose(a, b)
    assert sum(g is not None and bool(g.any()) for g in of_a) > len(of_a) / 2
    for g, h in zip(of_a, of_b, strict=True):
        assert torch.allclose(*(torch.zeros(()) if t is None else t for t in (g, h)), atol=1e-8)


@pytest.mark.parametrize("ops", SPACES)
@pytest.mark.parametrize("fixed", [False, True])
def test_sub_networks_are_extracted_with_their_masks(ops: str, fixed: bool) -> None:
    space = SPACES[ops]
    supernet = learn_scores(space.supernet(), 0.2)
    if fixed:
        fix_masks(supernet)
    x = torch.randn(2, 2, 8, 8)
    for seed in range(2):
        arch: Arch = space.sample(Random(seed))
        network = supernet.extract(arch)
        assert torch.equal(supernet(x, space.one_hot(arch)), network(x))
        for layer in sparse_layers(network).values():
            assert int(layer.weight.count_nonzero()) == keep_count(0.2, layer.weight.numel())
    assert len(sparse_layers(supernet)) > len(NODES)
