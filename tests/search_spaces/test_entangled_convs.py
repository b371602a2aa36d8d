"""What all spaces of entangled convolutions do: one-hot mixtures are the extracted networks, and mixtures teach."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from nasbench.memory import step_bytes
from search_spaces import Arch, ArchError, ConvMacro, Mixture, MobileNetV3, SearchSpace, Supernet
from search_spaces.entangled import Axis

MACRO = ConvMacro(widths=(4, 6, 8), classes=3, in_channels=2)
# As small as it goes. There are squeeze-excitations of which several expansions have the same size.
MOBILE = MobileNetV3(depths=(1, 2), width=0.1, stem="cifar", classes=3, in_channels=2)
SPACES = [pytest.param(MACRO, id="conv_macro"), pytest.param(MOBILE, id="mobilenet")]
SIDE = 16


def images(count: int = 4, dtype: torch.dtype = torch.float) -> Tensor:
    return torch.randn(count, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(dtype)


def archs(space: SearchSpace, count: int) -> list[Arch]:
    rng = Random(0)
    return [space.sample(rng) for _ in range(count)]


def uniform(space: SearchSpace, **settings: Any) -> Mixture:
    return Mixture({s: torch.full((len(o),), 1 / len(o), **settings) for s, o in space.sites.items()})


def trained(space: SearchSpace) -> Supernet:
    """A supernet whose norms are not those of a fresh one."""
    supernet, generator = space.supernet(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        supernet(images(), uniform(space))
        for module in supernet.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0.0, 0.2, generator=generator)
    return supernet


@pytest.mark.parametrize("sliced", [True, False])
@pytest.mark.parametrize("space", SPACES)
def test_one_hot_is_the_extracted_network(space: SearchSpace, sliced: bool) -> None:
    supernet, x = trained(space), images()
    for arch in archs(space, 12):
        mixture = space.one_hot(arch) if sliced else Mixture(dict(space.one_hot(arch)))
        alone, statistics = supernet.train().extract(arch), {}
        for training in (True, False):
            assert alone.training == training
            with torch.no_grad():
                wanted = alone(x)
                assert (supernet(x, mixture) - wanted).norm() <= 1e-5 * wanted.norm()
            if training:  # both have seen the images: their statistics are to be the same
                seen, alone = alone, supernet.eval().extract(arch)
                statistics = {name: buffer.clone() for name, buffer in supernet.named_buffers()}
                for buffer, ours in zip(seen.buffers(), alone.buffers(), strict=True):
                    assert torch.allclose(buffer, ours, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(buffer, statistics[name]) for name, buffer in supernet.named_buffers())


@pytest.mark.parametrize("space", SPACES)
def test_extracted_networks_are_built_networks(space: SearchSpace) -> None:
    supernet = space.supernet()
    theirs = {t.untyped_storage().data_ptr() for t in [*supernet.parameters(), *supernet.buffers()]}
    for arch in archs(space, 50):
        state = torch.random.get_rng_state()
        alone = supernet.extract(arch)
        assert torch.equal(torch.random.get_rng_state(), state)
        built = space.build(arch)
        assert {n: p.shape for n, p in alone.named_parameters()} == {n: p.shape for n, p in built.named_parameters()}
        assert {n: b.shape for n, b in alone.named_buffers()} == {n: b.shape for n, b in built.named_buffers()}
        assert not any(isinstance(m, Axis) or type(m).__name__.startswith("Entangled") for m in alone.modules())
        ours = [*alone.parameters(), *alone.buffers()]
        assert not theirs & {t.untyped_storage().data_ptr() for t in ours}
        assert all(p.requires_grad and p.is_leaf for p in alone.parameters())
        assert space.decode(space.one_hot(arch)) == arch
    gone = weakref.ref(supernet)
    del supernet
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("space", SPACES)
def test_a_dense_mixture_has_the_gradients_of_finite_differences(space: SearchSpace) -> None:
    supernet, x, y = trained(space).double(), images(dtype=torch.double), torch.tensor([0, 1, 2, 0])
    generator = torch.Generator().manual_seed(2)
    rows = {s: torch.rand(len(o), generator=generator).double().softmax(0) for s, o in space.sites.items()}

    def loss(rows: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(supernet(x, Mixture(rows)), y)

    leaves = {site: row.clone().requires_grad_() for site, row in rows.items()}
    gradients = dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values())), strict=True))
    assert all(gradient.norm() > 1e-6 for gradient in gradients.values())
    with torch.no_grad():
        for site in [*rows][:: max(1, len(rows) // 8)]:
            for option in range(len(rows[site])):
                step = 1e-7 * F.one_hot(torch.tensor(option), len(rows[site]))
                above, below = (loss(rows | {site: rows[site] + sign * step}) for sign in (1, -1))
                slope = float(above - below) / 2e-7
                assert slope == pytest.approx(float(gradients[site][option]), rel=1e-3, abs=1e-6)  # there are kinks


@pytest.mark.parametrize("space", SPACES)
def test_every_site_of_a_sample_that_asks_for_a_gradient_has_one(space: SearchSpace) -> None:
    supernet, x = trained(space), images()
    for arch in (space.at(0), space.at(space.size - 1), space.sample(Random(3))):
        sample = space.one_hot(arch)
        leaves = {site: row.clone().requires_grad_() for site, row in sample.items()}
        F.cross_entropy(supernet(x, Mixture(leaves, sample.active)), torch.tensor([0, 1, 2, 0])).backward()
        for site, leaf in leaves.items():
            assert leaf.grad is not None
            if exists(arch, site):
                assert leaf.grad.norm() > 1e-5, site


def exists(arch: Arch, site: str) -> bool:
    """Whether the block that a site of MobileNetV3 is about is within the depth."""
    stage, _, block = site.lstrip("kernlxpad").partition("_")
    return not block or int(block) < int(str(arch[f"depth{stage}"]))


@pytest.mark.parametrize("space", SPACES)
def test_a_sampled_path_costs_its_own_size(space: SearchSpace) -> None:
    supernet, x = space.supernet().eval(), images(1)
    for arch in (space.at(0), space.sample(Random(5))):
        with FlopCounterMode(display=False) as alone, torch.no_grad():
            supernet.extract(arch)(x)
        with FlopCounterMode(display=False) as shared, torch.no_grad():
            supernet(x, space.one_hot(arch))
        assert shared.get_total_flops() == alone.get_total_flops() > 0


@pytest.mark.parametrize(
    ("space", "single"),
    [(MACRO, {"kernels": (7,), "widths": (8,)}), (MOBILE, {"kernels": (7,), "expands": (6,), "depths": (2,)})],
)
def test_memory_does_not_grow_with_the_number_of_options(space: SearchSpace, single: dict[str, Any]) -> None:
    def need(space: SearchSpace) -> int:
        supernet = space.supernet()

        def step(x: Tensor, y: Tensor) -> None:
            F.cross_entropy(supernet(x, uniform(space, requires_grad=True)), y).backward()

        return step_bytes(supernet, step, (2, SIDE, SIDE), 32)

    assert need(space) < 1.02 * need(dataclasses.replace(space, **single))  # type: ignore[type-var]


@pytest.mark.parametrize("space", SPACES)
def test_recomputation_changes_nothing(space: SearchSpace) -> None:
    plain = trained(space).double()
    saving = space.supernet(recompute=True).double()
    saving.load_state_dict(plain.state_dict())
    found = []
    for supernet in (plain, saving):
        mixture = uniform(space, requires_grad=True)
        loss = F.cross_entropy(supernet(images(dtype=torch.double), mixture), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        found.append([*(w.grad for w in mixture.values()), *(p.grad for p in supernet.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*found, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), saving.buffers(), strict=True))


@pytest.mark.parametrize("space", SPACES)
def test_a_supernet_learns(space: SearchSpace) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        supernet = space.supernet()
    optimizer = torch.optim.SGD(supernet.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(supernet(images(6), uniform(space)), torch.tensor([0, 1, 2, 0, 1, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: ConvMacro(kernels=(3, 4)), r"kernels have odd sizes, .* got 4 in \(3, 4\)"),
    (lambda: ConvMacro(kernels=()), r"ConvMacro was given kernels=\(\); it needs at least one option"),
    (lambda: ConvMacro(widths=(8, 4)), r"ConvMacro was given widths=\(8, 4\); it needs .* in ascending order"),
    (lambda: ConvMacro(widths=(8, 8)), r"ConvMacro was given widths=\(8, 8\); it needs .* in ascending order"),
    (lambda: ConvMacro(widths=(8.0,)), r"ConvMacro was given widths=\(8.0,\); it is a tuple of positive integers"),  # type: ignore[arg-type]
    (lambda: ConvMacro(widths=8), "ConvMacro was given widths=8; it is a tuple of positive integers"),  # type: ignore[arg-type]
    (lambda: ConvMacro(classes=0), "ConvMacro was given classes=0; it is a positive integer"),
    (lambda: ConvMacro().supernet(), "does not know classes and in_channels"),
    (lambda: MobileNetV3(kernels=(2, 3)), r"kernels have odd sizes, .* got 2 in \(2, 3\)"),
    (lambda: MobileNetV3(depths=(4, 2)), r"MobileNetV3 was given depths=\(4, 2\); it needs .* in ascending order"),
    (lambda: MobileNetV3(expands=(1, 3)), r"MobileNetV3 was given expands=\(1, 3\); expansions are 2 or more"),
    (lambda: MobileNetV3(width=0), "MobileNetV3 was given width=0; it is a number above 0"),
    (lambda: MobileNetV3(width=True), "MobileNetV3 was given width=True; it is a number above 0"),
    (lambda: MobileNetV3(stem="imagnet"), "MobileNetV3 was given stem='imagnet'; did you mean 'imagenet'"),
    (lambda: MobileNetV3(in_channels=-1), "MobileNetV3 was given in_channels=-1; it is a positive integer"),
    (lambda: MobileNetV3(classes=3).supernet(), "does not know in_channels"),
    (lambda: MACRO.supernet().extract(MOBILE.at(0)), "an architecture of ConvMacro needs"),
    (lambda: MOBILE.supernet()(images(), MACRO.one_hot(MACRO.at(0))), "'depth0' has none"),
    (lambda: MACRO.supernet()(images(), Mixture(uniform(MACRO), add_others=True)), "Leave it out"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_says_what_to_do(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ArchError, match=message):
        call()


@pytest.mark.parametrize("space", SPACES)
def test_lists_as_json_has_them_make_the_same_space(space: SearchSpace) -> None:
    settings = {name: getattr(space, name) for name in space.__dataclass_fields__}  # type: ignore[attr-defined]
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    assert type(space)(**lists) == space
    assert hash(type(space)(**lists)) == hash(space)
