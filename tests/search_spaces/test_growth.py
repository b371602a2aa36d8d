"""Networks that grow: the same function before and after, whatever the steps."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from search_spaces import Arch, ArchError, DenseNet, GrowingSpace, PlainCNN, net2net
from search_spaces.growth import Growth, Layer, align, spread

PLAIN = PlainCNN(widths=(4, 6, 8, 12, 16, 24), fc_widths=(16, 32, 48), blocks=3, slots=4, classes=10, in_channels=1)
DENSE = DenseNet(growths=(4, 6, 8), blocks=2, slots=5, layers_of_start=2, classes=10, in_channels=1)
SPACES = [PLAIN, DENSE]
spaces = pytest.mark.parametrize("space", SPACES, ids=lambda space: type(space).__name__)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images[:256, None] / 16, dtype=torch.float32), torch.tensor(found.target[:256])


def trained(space: GrowingSpace, digits: tuple[Tensor, Tensor], arch: Arch | None = None, steps: int = 12) -> nn.Module:
    """A network after some steps on real digits, so that its running statistics and weights are no trivial ones."""
    torch.manual_seed(1)
    model = space.build(space.start if arch is None else arch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        rows = torch.arange(64) + 64 * (step % 4)
        optimizer.zero_grad()
        F.cross_entropy(model(digits[0][rows]), digits[1][rows]).backward()
        optimizer.step()
    return model


def random_steps(space: GrowingSpace, arch: Arch, rng: Random, steps: int, kinds: str = "wd") -> Arch:
    """Take random steps of growth that are possible."""
    taken = 0
    while taken < steps:
        blocks = space.layers(arch)
        block = rng.choice([b for b, layers in enumerate(blocks) if layers])
        layer = rng.randrange(len(blocks[block]))
        if rng.choice(kinds) == "w":
            child = space.widened(arch, block, layer)
        else:
            child = space.deepened(arch, block, layer, rng.choice(space.kernels) if space.kernels else None)
        if child is not None:
            arch, taken = child, taken + 1
    return arch


def inherit(space: GrowingSpace, model: nn.Module, arch: Arch, child: Arch, x: Tensor, **settings: Any) -> nn.Module:
    settings = {"noise": False, "generator": torch.Generator().manual_seed(0)} | settings
    return space.inherit(model, arch, child, example=x, **settings)


def difference(a: nn.Module, b: nn.Module, x: Tensor, train: bool = False) -> float:
    """The largest change of a logit; the networks stay as they are."""
    a, b = copy.deepcopy(a).train(train), copy.deepcopy(b).train(train)
    with torch.no_grad():
        return float((a(x) - b(x)).abs().max())


# Exactness ---------------------------------------------------------------------------------------------------------


@spaces
def test_every_single_widening_is_exact_in_both_modes(space: GrowingSpace, digits: tuple[Tensor, Tensor]) -> None:
    model = trained(space, digits)
    for b, block in enumerate(space.layers(space.start)):
        for i in range(len(block)):
            child = space.widened(space.start, b, i)
            assert child is not None
            grown = inherit(space, model, space.start, child, digits[0][:64])
            assert difference(model, grown, digits[0]) <= 1e-5
            assert difference(model, grown, digits[0], train=True) <= 1e-5


@pytest.mark.parametrize("kernel", PLAIN.kernels)
def test_every_single_deepening_of_a_plain_network_is_exact_and_close_in_training(
    digits: tuple[Tensor, Tensor], kernel: int
) -> None:
    model = trained(PLAIN, digits, steps=60)
    for b in range(len(PLAIN.layers(PLAIN.start))):
        child = PLAIN.deepened(PLAIN.start, b, 0, kernel)
        assert child is not None
        grown = inherit(PLAIN, model, PLAIN.start, child, digits[0][:64])
        assert difference(model, grown, digits[0]) <= 1e-5
        with torch.no_grad():
            before, after = copy.deepcopy(model).train()(digits[0]), copy.deepcopy(grown).train()(digits[0])
        assert (before - after).abs().max() < before.std()
        assert torch.equal(before.argmax(1), after.argmax(1))


def test_every_single_deepening_of_a_densenet_is_exact_in_both_modes(digits: tuple[Tensor, Tensor]) -> None:
    model = trained(DENSE, digits)
    for b, block in enumerate(DENSE.layers(DENSE.start)):
        for i in range(len(block)):
            child = DENSE.deepened(DENSE.start, b, i)
            assert child is not None
            grown = inherit(DENSE, model, DENSE.start, child, digits[0][:64])
            assert difference(model, grown, digits[0]) <= 1e-5
            assert difference(model, grown, digits[0], train=True) <= 1e-5


@spaces
@pytest.mark.parametrize("seed", range(3))
def test_nine_random_steps_at_once_keep_the_function(
    space: GrowingSpace, digits: tuple[Tensor, Tensor], seed: int
) -> None:
    model = trained(space, digits)
    child = random_steps(space, space.start, Random(seed), 9)
    assert difference(model, inherit(space, model, space.start, child, digits[0][:64]), digits[0]) <= 1e-4
    model, x = model.double(), digits[0].double()
    grown = inherit(space, model, space.start, child, x[:64])
    assert difference(model, grown, x) <= 1e-10
    if space is DENSE:
        assert difference(model, grown, x, train=True) <= 1e-10


@spaces
@pytest.mark.parametrize("seed", range(2))
def test_nine_random_steps_one_by_one_keep_the_function(
    space: GrowingSpace, digits: tuple[Tensor, Tensor], seed: int
) -> None:
    model, x, arch = trained(space, digits).double(), digits[0].double(), space.start
    grown, rng = model, Random(seed)
    for _ in range(9):
        child = random_steps(space, arch, rng, 1)
        grown, arch = inherit(space, grown, arch, child, x[:64]), child
    assert difference(model, grown, x) <= 1e-10
    assert difference(trained(space, digits), grown.float(), digits[0]) <= 1e-4


@pytest.mark.slow
@spaces
def test_many_random_growths_of_many_networks_keep_the_function(
    space: GrowingSpace, digits: tuple[Tensor, Tensor]
) -> None:
    for seed in range(40):
        rng = Random(seed)
        arch = random_steps(space, space.start, rng, rng.randrange(4))
        model, x = trained(space, digits, arch).double(), digits[0].double()
        child = random_steps(space, arch, rng, rng.randrange(1, 10))
        assert difference(model, inherit(space, model, arch, child, x[:64]), x) <= 1e-10, (arch, child)


@spaces
def test_widening_is_exact_in_training_whatever_is_widened(space: GrowingSpace, digits: tuple[Tensor, Tensor]) -> None:
    model, x = trained(space, digits).double(), digits[0].double()
    child = random_steps(space, space.start, Random(0), 6, kinds="w")
    assert difference(model, inherit(space, model, space.start, child, x[:64]), x, train=True) <= 1e-10


# The same growth on the graph of any network -----------------------------------------------------------------------


def place_of(space: GrowingSpace, block: int, layer: int) -> str:
    """The name of a plain network's layer."""
    return f"block{block}.layer{layer}.conv" if space.kernels_of(block) else f"head.fc{layer}.linear"


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_net2net_grows_a_plain_network_to_the_same(digits: tuple[Tensor, Tensor]) -> None:
    x, rng, arch = digits[0][:64].double(), Random(0), PLAIN.start
    model = trained(PLAIN, digits).double()
    for step in range(8):
        if wider := step % 3 < 2:
            block, layer = rng.choice(PLAIN.widenable(arch))
            child = PLAIN.widened(arch, block, layer)
            assert child is not None
            width = PLAIN._packed(child)[block][layer].width
            other = net2net.widen(model, place_of(PLAIN, block, layer), width, example=x)
        else:
            block = 3 - step % 2  # fully connected, or the last convolution of the last block
            layer, kernel = len(PLAIN.layers(arch)[block]) - 1, rng.choice(PLAIN.kernels_of(block) or (None,))
            child = PLAIN.deepened(arch, block, layer, kernel)
            assert child is not None
            other = net2net.deepen(model, place_of(PLAIN, block, layer), kernel=kernel, example=x)
        grown = inherit(PLAIN, model, arch, child, x)
        assert parameters(other) == parameters(grown) > parameters(model)
        for train in (False, True) if wider else (False,):
            assert difference(model, grown, x, train) <= 1e-10
            assert difference(model, other, x, train) <= 1e-10
        assert difference(grown, other, x, train=True) <= 1e-6  # new batch norms have equal statistics
        model, arch = grown, child


def test_net2net_widens_a_densenet_to_the_same(digits: tuple[Tensor, Tensor]) -> None:
    x, model = digits[0][:64].double(), trained(DENSE, digits).double()
    for block, layer in ((0, 0), (0, 1), (1, 1)):
        child = DENSE.widened(DENSE.start, block, layer)
        assert child is not None
        grown = inherit(DENSE, model, DENSE.start, child, x)
        other = model
        for name, module in grown.named_modules():  # in the order in which each sees what is before it wider
            if isinstance(module, nn.Conv2d) and module.out_channels > other.get_submodule(name).out_channels:  # type: ignore[operator]
                other = net2net.widen(other, name, module.out_channels, example=x)
        assert parameters(other) == parameters(grown) > parameters(model)
        for train in (False, True):
            assert difference(model, grown, x, train) <= 1e-10
            assert difference(model, other, x, train) <= 1e-10


def test_net2net_deepens_a_densenet_by_other_layers_but_to_the_same_function(digits: tuple[Tensor, Tensor]) -> None:
    x, model = digits[0][:64].double(), trained(DENSE, digits).double()
    child = DENSE.deepened(DENSE.start, 0, 1)
    assert child is not None
    other = net2net.deepen(model, "block0.layer1.conv1", example=x)  # an identity inside of the layer, no copy of it
    for network in (inherit(DENSE, model, DENSE.start, child, x), other):
        assert difference(model, network, x) <= 1e-10


# The network that comes back ---------------------------------------------------------------------------------------


@spaces
def test_a_grown_network_is_that_of_build_and_shares_nothing(
    space: GrowingSpace, digits: tuple[Tensor, Tensor]
) -> None:
    model = trained(space, digits)
    before = copy.deepcopy(model.state_dict())
    child = random_steps(space, space.start, Random(3), 9)
    grown = inherit(space, model, space.start, child, digits[0][:64])
    fresh = space.build(child)
    assert [(n, type(m)) for n, m in grown.named_modules()] == [(n, type(m)) for n, m in fresh.named_modules()]
    assert {n: t.shape for n, t in grown.state_dict().items()} == {n: t.shape for n, t in fresh.state_dict().items()}
    assert all(p.requires_grad and p.device.type == "cpu" for p in grown.parameters())
    assert grown.training
    assert not inherit(space, model.eval(), space.start, child, digits[0][:64]).training
    assert not model.training
    model.train()
    with torch.no_grad():
        for tensor in [*grown.parameters(), *grown.buffers()]:
            tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    trained_on = inherit(space, model, space.start, child, digits[0][:64])
    F.cross_entropy(trained_on(digits[0]), digits[1]).backward()
    assert all(p.grad is not None for p in trained_on.parameters())


@spaces
def test_growing_to_itself_is_a_copy(space: GrowingSpace, digits: tuple[Tensor, Tensor]) -> None:
    model = trained(space, digits)
    same = inherit(space, model, space.start, space.start, digits[0][:64], noise=True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))


@spaces
def test_a_generator_decides_and_global_random_numbers_stay(space: GrowingSpace, digits: tuple[Tensor, Tensor]) -> None:
    model = trained(space, digits)
    child = random_steps(space, space.start, Random(3), 9)
    state = torch.get_rng_state()
    first, again = (inherit(space, model, space.start, child, digits[0][:64], noise=True) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    other = inherit(space, model, space.start, child, digits[0][:64], generator=torch.Generator().manual_seed(1))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


# Noise -------------------------------------------------------------------------------------------------------------


def test_noise_is_on_new_filters_and_new_layers_only(digits: tuple[Tensor, Tensor]) -> None:
    model = trained(PLAIN, digits)
    child = PLAIN.widened(PLAIN.start, 1, 0)
    assert child is not None
    exact, noisy = (inherit(PLAIN, model, PLAIN.start, child, digits[0][:64], noise=noise) for noise in (False, True))
    changed = {
        name: delta
        for (name, a), b in zip(exact.state_dict().items(), noisy.state_dict().values(), strict=True)
        if (delta := (a - b).float()).any()
    }
    assert list(changed) == ["block1.layer0.conv.weight"]
    delta, old = changed["block1.layer0.conv.weight"], model.state_dict()["block1.layer0.conv.weight"]
    assert not delta[: len(old)].any()
    assert 0.5 < float(delta[len(old) :].std() / (0.01 * old.std())) < 2

    deeper = PLAIN.deepened(PLAIN.start, 1, 0, 3)
    assert deeper is not None
    new = inherit(PLAIN, model, PLAIN.start, deeper, digits[0][:64], noise=True).get_parameter(
        "block1.layer1.conv.weight"
    )
    identity = torch.zeros_like(new)
    identity[range(len(new)), range(len(new)), 1, 1] = 1
    delta = new.detach() - identity
    assert (delta != 0).all()
    assert 0.5 < float(delta.std() / (0.001 * identity.std())) < 2


def test_noise_of_a_densenet_spares_the_old_filters(digits: tuple[Tensor, Tensor]) -> None:
    model = trained(DENSE, digits)
    deeper = DENSE.deepened(DENSE.start, 0, 0)
    assert deeper is not None
    exact, noisy = (inherit(DENSE, model, DENSE.start, deeper, digits[0][:64], noise=noise) for noise in (False, True))
    pairs = zip(exact.state_dict().items(), noisy.state_dict().values(), strict=True)
    changed = [name for (name, a), b in pairs if not torch.equal(a, b)]
    # A new layer (of equal ones the last counts as new), and the transition, which keeps half of more channels.
    assert changed == ["block0.layer2.conv2.weight", "transition1.conv.weight"]


@spaces
def test_doubled_channels_separate_in_training_with_noise_only(
    space: GrowingSpace, digits: tuple[Tensor, Tensor]
) -> None:
    model = trained(space, digits)
    child = space.widened(space.start, 1, 0)
    assert child is not None
    apart = []
    for noise in (False, True):
        grown = inherit(space, model, space.start, child, digits[0][:64], noise=noise).double()
        F.cross_entropy(grown(digits[0].double()), digits[1]).backward()
        name = "block1.layer0.conv.weight" if space is PLAIN else "block1.layer0.conv2.weight"
        gradient = grown.get_parameter(name).grad
        assert gradient is not None
        distances = torch.cdist(gradient.flatten(1), gradient.flatten(1)) / gradient.norm()
        apart.append(bool((distances + torch.eye(len(gradient))).min() > 1e-6))
    assert apart == [False, True]


# Maps --------------------------------------------------------------------------------------------------------------


def test_shares_of_equal_channels_sum_to_one() -> None:
    growth = Growth(nn.Linear(1, 1), torch.zeros(1, 1), False, torch.Generator().manual_seed(0))
    into = growth.extend(5, 17)
    assert into[:5].tolist() == list(range(5))
    shares = spread(torch.ones(1, 5), torch.tensor([0]), into)[0]
    for channel in range(5):
        assert shares[into == channel].sum() == pytest.approx(1.0)
        assert len(shares[into == channel].unique()) == 1


def test_inputs_that_a_layer_does_not_have_get_no_weight() -> None:
    weight = torch.tensor([[2.0, 6.0]])
    into = torch.tensor([0, 1, 1, 2, 3])
    assert spread(weight, torch.tensor([0]), into, into < 2).tolist() == [[2, 3, 3, 0, 0]]


@pytest.mark.parametrize(
    ("old", "new", "groups"),
    [
        ([(4, 3)], [(4, 3)], [[0]]),
        ([(4, 3), (4, 3)], [(4, 3), (4, 3), (4, 3)], [[0], [1, 2]]),
        ([(4, 3), (4, 3)], [(4, 3), (4, 3), (8, 3)], [[0, 1], [2]]),  # the new one need not be widened
        ([(4, 3), (8, 3)], [(8, 3), (8, 3), (8, 3)], [[0], [1, 2]]),
        ([(4, 3), (8, 3)], [(4, 3), (6, 1), (8, 3)], [[0, 1], [2]]),
        ([], [], []),
    ],
)
def test_layers_are_matched(old: list[Any], new: list[Any], groups: list[list[int]]) -> None:
    assert align([Layer(*o) for o in old], [Layer(*n) for n in new]) == groups


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ([(8, 3)], [(4, 3)]),  # narrower
        ([(4, 3)], [(4, 5)]),  # another kernel
        ([(4, 3), (4, 3)], [(4, 3)]),  # fewer
        ([(8, 3)], [(8, 3), (4, 3)]),  # a new layer would drop channels
        ([], [(8, 0)]),  # nothing to follow
        ([(8, 0)], []),
    ],
)
def test_what_is_no_growth_is_refused(old: list[Any], new: list[Any]) -> None:
    with pytest.raises(ArchError, match="cannot grow to .* Take steps with space.widened and space.deepened"):
        align([Layer(*o) for o in old], [Layer(*n) for n in new])


@spaces
def test_bad_growth_is_refused_and_leaves_the_network(space: GrowingSpace, digits: tuple[Tensor, Tensor]) -> None:
    child = random_steps(space, space.start, Random(0), 5)
    model = space.build(child)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArchError, match="cannot grow to"):
        inherit(space, model, child, space.start, digits[0][:64])
    with pytest.raises(ArchError, match="is not of the architecture .* Give the one it has"):
        inherit(space, model, space.start, child, digits[0][:64])
    with pytest.raises(ArchError, match="needs"):
        inherit(space, model, child, Arch({}), digits[0][:64])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


@spaces
def test_several_layers_are_widened_at_once(space: GrowingSpace) -> None:
    arch = random_steps(space, space.start, Random(1), 6)
    places = [(b, i) for b, block in enumerate(space.layers(arch)) for i in range(len(block))]
    free = [place for place in places if space.widened(arch, *place) is not None]
    assert space.widenable(arch) == free
    one_by_one = arch
    for place in free:
        wider = space.widened(one_by_one, *place)
        assert wider is not None
        one_by_one = wider
    assert space.widened_at(arch, free) == one_by_one
    assert space.widened_at(arch, []) == arch
    while (wider := space.widened(arch, 0, 0)) is not None:
        arch = wider
    assert (0, 0) not in space.widenable(arch)
    with pytest.raises(ArchError, match="layer 0 of block 0 is .* wide, which is the largest. Leave it out"):
        space.widened_at(arch, [(0, 0)])


# Actions -----------------------------------------------------------------------------------------------------------


@spaces
def test_actions_stay_in_the_space_and_end_at_the_largest(space: GrowingSpace) -> None:
    assert space.start in space
    assert space.canonical(space.start) == space.start
    arch, rng = space.start, Random(0)
    words = set(space.vocabulary)
    for _ in range(20):
        arch = random_steps(space, arch, rng, 1)
        assert arch in space
        assert space.canonical(arch) == arch
        assert words.issuperset(word for block in space.layers(arch) for word in block)
    while (child := space.widened(arch, 0, 0)) is not None:
        arch = child
    while (child := space.deepened(arch, 0, 0)) is not None:
        arch = child
    assert len(space.layers(arch)[0]) == space.slots_of_blocks[0]
    for block, layer in ((0, 99), (99, 0), (-1, 0), (0, -1)):
        with pytest.raises(ArchError, match=rf"no layer {layer} in block {block}; the blocks have"):
            space.widened(arch, block, layer)
        with pytest.raises(ArchError, match="no layer"):
            space.deepened(arch, block, layer)
    with pytest.raises(ArchError, match="kernel"):
        space.deepened(space.start, 0, 0, kernel=7)


def test_a_single_image_is_example_enough(digits: tuple[Tensor, Tensor]) -> None:
    space = PlainCNN(widths=(4, 8), fc_widths=(8, 16), blocks=2, slots=2, classes=10, in_channels=1)
    child = space.deepened(space.start, space.blocks, 0)
    assert child is not None
    model, x = space.build(space.start), digits[0][:1]
    model(digits[0][:64])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grown = space.inherit(model, space.start, child, example=x, noise=False)
    assert torch.allclose(grown.eval()(x), model.eval()(x), atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
