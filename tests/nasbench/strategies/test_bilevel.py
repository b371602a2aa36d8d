"""The architecture's gradient: exact where it can be, and nothing else in the supernet moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from nasbench.strategies import bilevel
from nasbench.strategies.relaxation import Softmax
from search_spaces import NASBench201
from search_spaces.base import Arch, Mixture, SearchSpace, Supernet

OPTIONS = ("tanh", "softplus", "linear")
FUNCTIONS = {"tanh": torch.tanh, "softplus": F.softplus, "linear": lambda y: y}


@dataclass(frozen=True)
class Toys(SearchSpace):
    """Two layers, each with one of three activations. Nothing in it has a kink, so finite differences converge."""

    norm: bool = False

    @property
    def choices(self) -> Mapping[str, tuple[str, ...]]:
        return {"first": OPTIONS, "second": OPTIONS}

    def build(self, arch: Arch) -> nn.Module:
        raise NotImplementedError


class Toy(Supernet):
    def __init__(self, norm: bool) -> None:
        super().__init__(Toys(norm))
        self.first = nn.ModuleDict({name: nn.Linear(4, 5, dtype=torch.float64) for name in OPTIONS})
        self.second = nn.ModuleDict({name: nn.Linear(5, 3, dtype=torch.float64) for name in OPTIONS})
        self.norm = nn.BatchNorm1d(5, dtype=torch.float64) if norm else nn.Identity()

    def forward(self, x: Tensor, mixture: Mixture) -> Tensor:
        x = x.flatten(1)
        for site, layers in (("first", self.first), ("second", self.second)):
            pairs = zip(mixture[site], layers.items(), strict=True)
            terms = [weight * FUNCTIONS[name](layer(x)) for weight, (name, layer) in pairs]
            x = torch.stack(terms).sum(0)
            x = self.norm(x) if site == "first" else x
        return x

    def extract(self, arch: Arch) -> nn.Module:
        raise NotImplementedError


def batch(seed: int, images: int = 16) -> bilevel.Batch:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(images, 1, 2, 2, generator=rng, dtype=torch.float64)
    return x, torch.randint(3, (images,), generator=rng)


class Setting:
    """A supernet with a momentum behind it, architecture weights and two batches."""

    def __init__(self, norm: bool = False, lr: float = 0.1) -> None:
        torch.manual_seed(0)
        self.supernet = Toy(norm)
        self.optimizer = torch.optim.SGD(self.supernet.parameters(), lr=lr, momentum=0.9, weight_decay=0.01)
        self.logits = {site: torch.randn(3, dtype=torch.float64).requires_grad_() for site in ("first", "second")}
        self.rows = list(self.logits.values())
        self.train, self.val = batch(1), batch(2)
        for seed in (3, 4):  # so that there is momentum
            bilevel.weight_gradients(self.supernet, self.mix(), batch(seed))
            self.optimizer.step()

    def mix(self) -> Mixture:
        return Softmax().mix(self.logits, 0.0, torch.Generator())

    def second_order(self, exact: bool) -> list[Tensor]:
        return bilevel.second_order(
            self.supernet, self.mix, self.rows, self.train, self.val, self.optimizer, exact=exact
        )[1]

    def through_the_unrolled_step(self) -> list[Tensor]:
        """The same by autograd alone: w' stays a function of the architecture weights."""
        weights = dict(self.supernet.named_parameters())
        buffers = {name: b.clone() for name, b in self.supernet.named_buffers()}

        def loss(parameters: Mapping[str, Tensor], data: bilevel.Batch) -> Tensor:
            out = functional_call(self.supernet, {**parameters, **buffers}, (data[0], self.mix()))
            return F.cross_entropy(out, data[1])

        gradients = torch.autograd.grad(loss(weights, self.train), list(weights.values()), create_graph=True)
        (group,) = self.optimizer.param_groups
        moved = {
            name: w - group["lr"] * (g + group["weight_decay"] * w + 0.9 * self.optimizer.state[w]["momentum_buffer"])
            for (name, w), g in zip(weights.items(), gradients, strict=True)
        }
        return list(torch.autograd.grad(loss(moved, self.val), self.rows))


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    one, other = torch.cat(a), torch.cat(b)
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("norm", "bound"), [(False, 1e-5), (True, 4e-5)])
def test_second_order_is_the_gradient_through_the_unrolled_step(norm: bool, bound: float) -> None:
    setting = Setting(norm)
    truth = setting.through_the_unrolled_step()
    assert distance(setting.second_order(exact=True), truth) < 1e-12
    assert distance(setting.second_order(exact=False), truth) < bound
    first = bilevel.first_order(setting.supernet, setting.mix, setting.rows, setting.val)[1]
    assert distance(first, truth) > 100 * bound  # the second term is not nothing


def test_at_learning_rate_zero_second_order_is_first_order() -> None:
    setting = Setting()
    setting.optimizer.param_groups[0]["lr"] = 0.0
    first = bilevel.first_order(setting.supernet, setting.mix, setting.rows, setting.val)[1]
    for exact in (True, False):
        assert distance(setting.second_order(exact), first) < 1e-12


def test_momentum_and_decay_are_in_the_step_ahead() -> None:
    setting = Setting()
    with_both = setting.second_order(exact=True)
    setting.optimizer.param_groups[0]["weight_decay"] = 0.0
    without_decay = setting.second_order(exact=True)
    for state in setting.optimizer.state.values():
        state["momentum_buffer"].zero_()
    assert distance(with_both, without_decay) > 1e-4
    assert distance(setting.second_order(exact=True), without_decay) > 1e-4


def snapshot(supernet: Supernet, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    return [t.clone() for t in (*supernet.parameters(), *supernet.buffers(), *state)]


@pytest.mark.parametrize("order", ["first", "finite", "exact"])
def test_an_architecture_step_leaves_weights_and_buffers_bitwise_alone(order: str) -> None:
    space = NASBench201(channels=4, cells=1, classes=3, in_channels=1)
    supernet = space.supernet()
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    logits = Softmax().initial(space.sites, torch.Generator().manual_seed(0))
    rows = [row.requires_grad_() for row in logits.values()]
    x, y = torch.randn(8, 1, 8, 8), torch.randint(3, (8,))

    def mix() -> Mixture:
        return Softmax().mix(logits, 0.0, torch.Generator())

    bilevel.weight_gradients(supernet, mix(), (x, y))
    optimizer.step()
    before = snapshot(supernet, optimizer)
    if order == "first":
        _, gradients = bilevel.first_order(supernet, mix, rows, (x, y))
    else:
        _, gradients = bilevel.second_order(supernet, mix, rows, (x, y), (x + 1, y), optimizer, exact=order == "exact")
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(supernet, optimizer), strict=True))
    assert all(p.requires_grad for p in supernet.parameters())
    assert all(m.track_running_stats for m in supernet.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(torch.isfinite(g).all() and g.norm() > 0 for g in gradients)


def test_an_architecture_step_that_fails_puts_the_weights_back() -> None:
    setting = Setting()
    before = snapshot(setting.supernet, setting.optimizer)
    x, y = setting.val
    setting.val = (x, y + 99)  # there is no such class
    with pytest.raises((IndexError, RuntimeError)):
        setting.second_order(exact=False)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(setting.supernet, setting.optimizer), strict=True))


def test_a_drawn_path_that_leads_nowhere_has_no_gradient() -> None:
    space = NASBench201(channels=4, cells=1, classes=3, in_channels=1)
    supernet = space.supernet()
    logits = {site: torch.zeros(5, requires_grad=True) for site in space.sites}
    nothing = space.one_hot(space.at(0))

    def mix() -> Mixture:
        return Mixture({site: nothing[site] * (1 + row) for site, row in logits.items()}, nothing.active)

    batch = torch.randn(4, 1, 8, 8), torch.randint(3, (4,))
    _, gradients = bilevel.first_order(supernet, mix, list(logits.values()), batch)
    assert all(gradient.eq(0).all() for gradient in gradients)
    loss, _ = bilevel.weight_gradients(supernet, mix(), batch)
    assert torch.isfinite(loss)


def test_weight_gradients_do_not_reach_the_architecture() -> None:
    setting = Setting()
    bilevel.weight_gradients(setting.supernet, setting.mix(), setting.train)
    assert all(row.grad is None for row in setting.rows)
    assert all(p.grad is not None for p in setting.supernet.parameters())


def test_dominant_eigenvalue_is_that_of_the_whole_hessian() -> None:
    setting = Setting()
    x, y = setting.val

    def loss(flat: Tensor) -> Tensor:
        logits = dict(zip(setting.logits, flat.split(3), strict=True))
        return F.cross_entropy(setting.supernet(x, Softmax().mix(logits, 0.0, torch.Generator())), y)

    hessian = torch.autograd.functional.hessian(loss, torch.cat([row.detach() for row in setting.rows]))
    values = torch.linalg.eigvalsh(hessian)
    largest = float(values[values.abs().argmax()])
    found = bilevel.dominant_eigenvalue(
        setting.supernet, setting.mix, setting.rows, setting.val, torch.Generator().manual_seed(0), steps=200
    )
    assert found == pytest.approx(largest, rel=1e-3)
