"""Mixtures: what they weigh, what they draw, and where their gradients go."""

from __future__ import annotations

import pytest
import torch

from nasbench.errors import SettingError
from nasbench.strategies import make
from nasbench.strategies.relaxation import Dirichlet, Gumbel, Relaxation, Softmax

SITES = {"a": ("none", "skip", "conv"), "b": ("none", "skip"), "c": ("none", "skip", "conv")}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(relaxation: Relaxation, scale: float = 1000.0) -> dict[str, torch.Tensor]:
    return {site: (scale * row).requires_grad_() for site, row in relaxation.initial(SITES, rng()).items()}


@pytest.mark.parametrize("relaxation", [Softmax(), Gumbel(), Dirichlet()], ids=lambda r: type(r).__name__)
def test_mixtures_fit_the_sites_and_repeat_under_a_seed(relaxation: Relaxation) -> None:
    rows = logits(relaxation)
    mixture = relaxation.mix(rows, 0.5, rng(1)).check(SITES, values=True)
    assert list(mixture) == list(SITES)
    for site in SITES:
        assert float(mixture[site].detach().sum()) == pytest.approx(1, abs=1e-5)
        assert torch.equal(mixture[site], relaxation.mix(rows, 0.5, rng(1))[site])
    sum((mixture[site] * torch.randn(len(mixture[site]))).sum() for site in SITES).backward()  # type: ignore[union-attr]
    assert all(row.grad is not None and row.grad.abs().sum() > 0 for row in rows.values())
    probabilities = relaxation.probabilities(rows).check(SITES, values=True)
    assert all(not row.requires_grad and float(row.sum()) == pytest.approx(1) for row in probabilities.values())


def test_draws_leave_the_global_generator_alone() -> None:
    for relaxation in (Gumbel(), Dirichlet()):
        state = torch.get_rng_state()
        relaxation.mix(logits(relaxation), 0.5, rng(1))
        assert torch.equal(torch.get_rng_state(), state)


def test_initial_weights_are_small_and_the_seed_decides_them() -> None:
    first, again, other = (Softmax().initial({"a": ("x",) * 1000}, rng(s))["a"] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(first.std()) == pytest.approx(1e-3, rel=0.1)


def test_gumbel_draws_with_the_softmax_probabilities() -> None:
    row = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    counts = torch.zeros(3)
    for seed in range(4000):
        (chosen,) = Gumbel().mix({"a": row}, 0.0, rng(seed)).active["a"]  # type: ignore[index]
        counts[chosen] += 1
    assert torch.allclose(counts / 4000, row.detach().softmax(0), atol=0.03)


def test_gumbel_is_one_hot_forward_and_soft_backward() -> None:
    row = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
    gumbel = Gumbel(tau=2.0, tau_end=2.0)
    mixture = gumbel.mix({"a": row}, 0.0, rng(5))
    (chosen,) = mixture.active["a"]  # type: ignore[index]
    assert mixture["a"].tolist() == [float(i == chosen) for i in range(3)]
    (gradient,) = torch.autograd.grad(mixture["a"][chosen], row)
    noise = -torch.empty(3).exponential_(generator=rng(5)).log()
    soft = ((row.log_softmax(0) + noise) / 2.0).softmax(0)
    (expected,) = torch.autograd.grad(soft[chosen], row)
    assert torch.allclose(gradient, expected)


def test_gumbel_temperature_falls_linearly() -> None:
    row = torch.zeros(3, requires_grad=True)

    def slope(progress: float) -> float:
        mixture = Gumbel(tau=4.0, tau_end=1.0).mix({"a": row}, progress, rng(3))
        (chosen,) = mixture.active["a"]  # type: ignore[index]
        return float(torch.autograd.grad(mixture["a"][chosen], row)[0][chosen])

    def expected(tau: float) -> float:
        soft = (-torch.empty(3).exponential_(generator=rng(3)).log() / tau).softmax(0)
        top = float(soft.max())
        return top * (1 - top) / tau

    assert [slope(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([expected(t) for t in (4.0, 2.5, 1.0)], rel=1e-5)


def test_dirichlet_mean_and_gradient_are_those_of_the_distribution() -> None:
    row = torch.tensor([0.5, 0.0, -1.0], requires_grad=True)
    mean = Dirichlet().probabilities({"a": row})["a"]
    concentration = torch.tensor([1.5, 1.0, 2.718281828**-1])  # elu(x) + 1: x + 1 above zero, exp(x) below
    assert torch.allclose(mean, concentration / concentration.sum())
    draws = torch.stack([Dirichlet().mix({"a": row}, 0.0, rng(seed))["a"] for seed in range(4000)])
    assert torch.allclose(draws.mean(0).detach(), mean, atol=0.02)
    (pathwise,) = torch.autograd.grad(draws[:, 0].mean(), row)
    c = torch.nn.functional.elu(row) + 1
    (truth,) = torch.autograd.grad((c / c.sum())[0], row)
    assert torch.allclose(pathwise, truth, atol=0.02)


def test_dirichlet_takes_any_weights() -> None:
    row = torch.tensor([-60.0, 0.0, 30.0], requires_grad=True)
    mixture = Dirichlet(kl=0.1).mix({"a": row}, 0.0, rng()).check({"a": ("x", "y", "z")}, values=True)
    mixture["a"].sum().backward()
    assert torch.isfinite(Dirichlet().probabilities({"a": row})["a"]).all()


def test_a_penalty_takes_the_place_of_weight_decay() -> None:
    assert make("drnas").arch_decay == 1e-3
    assert make("drnas", kl=0.1).arch_decay == 0.0


def test_dirichlet_penalty_is_the_divergence_from_uniform() -> None:
    assert Dirichlet().penalty({"a": torch.zeros(3)}) is None
    assert float(Dirichlet(kl=2.0).penalty({"a": torch.zeros(3)}) or 0) == pytest.approx(0, abs=1e-6)
    assert float(Dirichlet(kl=2.0).penalty({"a": torch.tensor([3.0, 0.0, 0.0])}) or 0) > 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gumbel(tau=0), "tau=0, but it must be a temperature, a number above 0"),
        (lambda: Gumbel(tau_end=-1), "tau_end=-1, but it must be a temperature"),
        (lambda: Dirichlet(kl=-1), "kl=-1, but it must be a number, 0 or more"),
    ],
)
def test_bad_settings(make: object, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make()  # type: ignore[operator]


def test_the_weights_of_what_was_not_drawn_change_gradients_only() -> None:
    from search_spaces import NASBench201

    space = NASBench201(channels=4, cells=1, classes=3, in_channels=1)
    supernet = space.supernet().double()
    rows = {site: torch.randn(5, dtype=torch.float64).requires_grad_() for site in space.sites}
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    outputs, gradients = [], []
    for add_others in (False, True):
        mixture = Gumbel(add_others=add_others).mix(rows, 0.5, rng(2))
        outputs.append(supernet(x, mixture))
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), list(rows.values()), allow_unused=True))
    assert torch.allclose(outputs[0], outputs[1])
    changed = [not torch.allclose(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None]
    assert any(changed)
