"""Supernets: one-hot mixtures are the extracted networks, both forms agree, and what is extracted stands alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from random import Random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from search_spaces.base import Arch, ArchError, Mixture, SearchSpace, Supernet
from search_spaces.darts import DARTS, DARTSSupernet
from search_spaces.nasbench201 import NASBench201
from search_spaces.operations import DARTS_OPERATIONS
from search_spaces.relaxed import RelaxedCell

DARTS_SMALL = DARTS(channels=4, cells=3, classes=3, in_channels=2)
NB201_SMALL = NASBench201(channels=4, cells=1, classes=3, in_channels=2)
SPACES = [pytest.param(DARTS_SMALL, id="darts"), pytest.param(NB201_SMALL, id="nasbench201")]


def images(space: SearchSpace, side: int = 8, dtype: torch.dtype = torch.float) -> Tensor:
    return torch.randn(3, space.in_channels, side, side, dtype=dtype)  # type: ignore[attr-defined]


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_buffers())


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_one_hot_is_the_extracted_network(space: SearchSpace, parts: int, channels_last: bool) -> None:
    supernet, rng = space.supernet(partial_channels=parts), Random(0)
    with torch.no_grad():  # statistics that are not those of a fresh norm
        supernet(images(space), Mixture({s: torch.full((len(o),), 0.1) for s, o in space.sites.items()}))
    x = images(space)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    for i in range(8):
        arch = space.sample(rng)
        if i == 0:
            arch = edge_case(space)
        for training in (True, False):
            supernet.train(training)
            alone = supernet.extract(arch)
            assert alone.training == training
            assert all(not isinstance(m, (Supernet, RelaxedCell)) for m in alone.modules())
            before = buffers(alone)
            with torch.no_grad():
                assert torch.equal(supernet(x, space.one_hot(arch)), alone(x))
            after = buffers(supernet.extract(arch))
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)


def edge_case(space: SearchSpace) -> Arch:
    """In NAS-Bench-201 an edge that leads nowhere, zeros that are convolved, and skips."""
    if isinstance(space, NASBench201):
        return space.arch(
            e01="none", e02="nor_conv_3x3", e12="nor_conv_1x1", e03="skip_connect", e13="nor_conv_3x3", e23="none"
        )
    return space.sample(Random(1))


@pytest.mark.slow
@pytest.mark.parametrize("space", SPACES)
def test_many_one_hots_are_the_extracted_networks(space: SearchSpace) -> None:
    supernet, rng, x = space.supernet(), Random(1), images(space, side=9)
    for _ in range(200):
        arch = space.sample(rng)
        for training in (True, False):
            alone = supernet.train(training).extract(arch)
            assert torch.equal(supernet(x, space.one_hot(arch)), alone(x))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_of_a_path_are_those_of_the_extracted_network(space: SearchSpace, parts: int) -> None:
    supernet, arch = space.supernet(partial_channels=parts), space.sample(Random(3))
    x = images(space)
    alone = supernet.extract(arch)
    alone(x).sin().sum().backward()
    supernet(x, space.one_hot(arch)).sin().sum().backward()
    wanted = [p.grad for p in alone.parameters() if p.grad is not None]
    found = [p.grad for p in supernet.parameters() if p.grad is not None]
    assert len(found) == len(wanted) > 0
    assert sum(float(g.square().sum()) for g in found) == pytest.approx(sum(float(g.square().sum()) for g in wanted))


@pytest.mark.parametrize("space", SPACES)
def test_extracted_networks_stand_alone(space: SearchSpace) -> None:
    supernet, arch = space.supernet(), space.sample(Random(0))
    state = torch.random.get_rng_state()
    alone = supernet.extract(arch)
    assert torch.equal(torch.random.get_rng_state(), state)
    theirs = {p.untyped_storage().data_ptr() for p in [*supernet.parameters(), *supernet.buffers()]}
    assert not theirs & {p.untyped_storage().data_ptr() for p in [*alone.parameters(), *alone.buffers()]}
    loss = F.cross_entropy(alone(images(space)), torch.tensor([0, 1, 2]))
    loss.backward()
    assert all(p.grad is None for p in supernet.parameters())
    gone = weakref.ref(supernet)
    del supernet
    gc.collect()
    assert gone() is None


def test_extracted_parameters_by_hand() -> None:
    # 4 channels: stem 2 x 4 x 9 + 2 x 4 = 80; each cell of c channels one 3x3 convolution without scale and shift,
    # 9 c^2, for c = 4, 8, 16: 3024; reductions c -> 2c: 9 c 2c + 9 (2c)^2 + 2 x 2 (2c) + 2 c c, for c = 4: 928, for
    # c = 8: 3648; head: 2 x 16 + 16 x 3 + 3 = 83.
    arch = NB201_SMALL.arch(dict.fromkeys(NB201_SMALL.choices, "none") | {"e03": "nor_conv_3x3"})
    alone = NB201_SMALL.supernet().extract(arch)
    assert sum(p.numel() for p in alone.parameters()) == 80 + 3024 + 928 + 3648 + 83
    # DARTS: every operation of both cells a max pool, so no parameters but those of stem, preprocessing and head.
    space = DARTS_SMALL
    values = {name: "max_pool_3x3" if "op" in name else options[0] for name, options in space.choices.items()}
    alone = space.supernet().extract(space.arch(values))
    # Stem 2 x 12 x 9 + 2 x 12 = 240. Cells of 4 at full size, 8 at a half, 16 at a quarter, inputs of (12, 12),
    # (12, 16 after a cell of 4), ... cells=3: reductions are cells 1 and 2.
    first = 12 * 4 + 12 * 4
    second = 12 * 8 + 16 * 8
    third = 16 * 16 + 32 * 16
    assert sum(p.numel() for p in alone.parameters()) == 240 + first + second + third + 64 * 3 + 3


def test_parameters_of_the_published_search_network() -> None:
    with torch.device("meta"):
        supernet = DARTS(channels=16, cells=8, classes=10, in_channels=3).supernet()
    assert sum(p.numel() for p in supernet.parameters()) == 1_930_618
    assert isinstance(supernet, DARTSSupernet)
    assert [place.reduction for place in supernet.places] == [i in (2, 5) for i in range(8)]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(("side", "parts", "edges"), [(8, 1, False), (9, 2, True)])
def test_forms_agree(space: SearchSpace, side: int, parts: int, edges: bool) -> None:
    textbook = space.supernet(form="textbook", partial_channels=parts).double()
    sites = {**space.sites, **(space.edge_sites if edges else {})}
    leaves = {s: torch.randn(len(o), dtype=torch.double, requires_grad=True) for s, o in sites.items()}
    x, y = images(space, side, torch.double), torch.tensor([0, 1, 2])
    results = []
    for settings in ({"form": "textbook"}, {"form": "fast"}, {"form": "fast", "recompute": True}):
        supernet = space.supernet(partial_channels=parts, **settings).double()
        supernet.load_state_dict(textbook.state_dict())
        logits = supernet(x, Mixture({s: leaf.softmax(0) for s, leaf in leaves.items()}))
        grads = torch.autograd.grad(F.cross_entropy(logits, y), [*leaves.values(), *supernet.parameters()])
        results.append((logits, grads, buffers(supernet)))
    for logits, grads, found in results[1:]:
        assert (logits - results[0][0]).norm() <= 1e-12 * logits.norm()
        for a, b in zip(grads, results[0][1], strict=True):
            assert (a - b).norm() <= 1e-12 * b.norm() + 1e-14
        for name, b in results[0][2].items():
            assert (found[name] - b).abs().max() <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_forms_agree_in_the_published_network(recompute: bool) -> None:
    space = DARTS(channels=16, cells=8, classes=10, in_channels=3)
    textbook = space.supernet(form="textbook").double()
    fast = space.supernet(recompute=recompute).double()
    fast.load_state_dict(textbook.state_dict())
    leaves = {s: (1e-3 * torch.randn(8, dtype=torch.double)).requires_grad_() for s in space.sites}
    x, y = torch.randn(2, 3, 32, 32, dtype=torch.double), torch.tensor([3, 7])
    wanted, found = (
        torch.autograd.grad(
            F.cross_entropy(net(x, Mixture({s: leaf.softmax(0) for s, leaf in leaves.items()})), y),
            [*leaves.values(), *net.parameters()],
        )
        for net in (textbook, fast)
    )
    distance = sum(float((a - b).square().sum()) for a, b in zip(found, wanted, strict=True)) ** 0.5
    assert distance <= 1e-12 * sum(float(b.square().sum()) for b in wanted) ** 0.5


@pytest.mark.parametrize("space", SPACES)
def test_a_nan_on_a_path_not_taken_does_not_spread(space: SearchSpace) -> None:
    supernet, arch = space.supernet(), space.sample(Random(0))
    mixture = space.one_hot(arch)
    assert mixture.active is not None
    before = supernet(images(space), mixture)
    assert before.isfinite().all()
    for cell in supernet.modules():
        if isinstance(cell, RelaxedCell):
            for edge, operations in cell.edges.items():
                for name, module in operations.items():  # type: ignore[operator]
                    if cell.operations.index(name) not in mixture.active[edge]:
                        for parameter in module.parameters():
                            torch.nn.init.constant_(parameter, torch.nan)
    assert supernet(images(space), mixture).isfinite().all()


@pytest.mark.parametrize("space", SPACES)
def test_mixtures_are_checked_and_cast(space: SearchSpace) -> None:
    supernet, x = space.supernet().double(), images(space, dtype=torch.double)
    mixture = Mixture({s: torch.full((len(o),), 0.2, requires_grad=True) for s, o in space.sites.items()})
    supernet(x, mixture).sum().backward()
    assert all(w.grad is not None and w.grad.dtype == torch.float for w in mixture.values())
    site, *others = mixture
    with pytest.raises(ArchError, match=f"{site!r} has none"):
        supernet(x, Mixture({s: mixture[s] for s in others}))
    with pytest.raises(ArchError, match="no site"):
        supernet(x, Mixture({**mixture, "e99": torch.ones(5)}))


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: DARTS_SMALL.supernet(form="slow"), "DARTS was given form='slow'; choices are fast, textbook"),
    (lambda: NB201_SMALL.supernet(partial_channels=3), "4 channels, which cannot be divided"),
    (lambda: DARTS_SMALL.supernet(partial_channels=-1), "positive integer"),
    (lambda: DARTS().supernet(), "does not know classes and in_channels"),
    (lambda: NASBench201().supernet(), "does not know classes and in_channels"),
    (lambda: DARTS_SMALL.supernet().extract(Arch({"e01": "none"})), "an architecture of DARTS needs"),
    (lambda: NB201_SMALL.supernet().extract(Arch({"e01": "none"})), "an architecture of NASBench201 needs"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_settings_say_what_to_do(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ArchError, match=message):
        call()


def test_darts_supernet_for_imagenet_has_its_stem() -> None:
    space = DARTS(channels=4, cells=3, stem="imagenet", classes=3, in_channels=2)
    supernet, arch = space.supernet(), space.sample(Random(0))
    x = images(space, side=32)
    assert torch.equal(supernet(x, space.one_hot(arch)), supernet.extract(arch)(x))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("form", ["fast", "textbook"])
def test_a_supernet_learns(space: SearchSpace, form: str) -> None:
    supernet = space.supernet(form=form)
    mixture = Mixture({s: torch.full((len(o),), 1 / len(o)) for s, o in space.sites.items()})
    optimizer = torch.optim.SGD(supernet.parameters(), 0.05, momentum=0.9)
    x, y = images(space), torch.tensor([0, 1, 2])
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(supernet(x, mixture), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_darts_operations_are_those_of_its_sites() -> None:
    assert set(DARTS_SMALL.sites.values()) == {DARTS_OPERATIONS}
