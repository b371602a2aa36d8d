from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from compress.discriminators import Adversary, Discriminator

PAIRS = [(32, 8), (20, 2)]


def batch() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(64, size, generator=generator), torch.randn(64, size, generator=generator) + 0.5)
        for size, _ in PAIRS
    ]


def trained(mode: str) -> Adversary:
    """Discriminators that know something already, so that there is a way up and a way down."""
    adversary = Adversary(mode, PAIRS, lr=0.05, seed=0)
    optimizer = torch.optim.Adam(adversary.discriminators.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        adversary.measure(batch()).backward()
        optimizer.step()
    return adversary


def test_sizes_are_the_papers() -> None:
    # 1000 * 125 + 125, 125 * 15 + 15, 15 * 2 + 2
    model = Discriminator(1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == 125_125 + 1_890 + 32 == 127_047
    assert [x.out_features for x in Discriminator(1000, 2).layers if isinstance(x, nn.Linear)] == [500, 250, 2]
    assert [x.out_features for x in Discriminator(10).layers if isinstance(x, nn.Linear)] == [8, 8, 2]


def test_the_last_relu_bounds_the_loss_and_only_joint_has_it() -> None:
    for mode in ("joint", "reversed", "alternate"):
        adversary = Adversary(mode, [(4, 2)], lr=0.1, seed=0)
        assert isinstance(adversary.discriminators[0].layers[-1], nn.ReLU) == (mode == "joint")
        with torch.no_grad():
            last = [x for x in adversary.discriminators[0].layers if isinstance(x, nn.Linear)][-1]
            nn.init.zeros_(last.weight)
            last.bias.copy_(torch.tensor([-1.0, -1.0]))
        x = torch.zeros(3, 4)
        loss = adversary.measure([(x, x)]).item()
        if mode == "joint":
            assert loss == pytest.approx(math.log(2)), "a dead unit"
        else:
            # a right answer costs log(1 + e), a wrong one log(1 + 1 / e)
            assert loss == pytest.approx((math.log(1 + math.e) + math.log(1 + 1 / math.e)) / 2)
    perfect = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])
    truth = torch.eye(2)
    bounded = nn.functional.binary_cross_entropy_with_logits(perfect.relu(), truth)
    assert float(bounded) == pytest.approx(math.log(2) / 2), "0.3466"


@pytest.mark.parametrize(("mode", "sign"), [("joint", -1), ("reversed", 1), ("alternate", 1)])
def test_a_student_step_raises_the_loss_of_adversaries_and_lowers_it_in_joint(mode: str, sign: int) -> None:
    adversary = trained(mode)
    pairs = batch()
    students = [student.requires_grad_() for student, _ in pairs]
    loss = adversary.loss(pairs)
    loss.backward()
    with torch.no_grad():  # discriminators as they are now: "alternate" has stepped, the others have not
        before = adversary.measure(pairs).item()
        moved = [(student - 1.0 * student.grad, other) for student, (_, other) in zip(students, pairs, strict=True)]
        after = adversary.measure(moved).item()
    assert sign * (after - before) > 1e-5


@pytest.mark.parametrize("mode", ["joint", "reversed", "alternate"])
def test_a_discriminator_step_lowers_its_loss(mode: str) -> None:
    adversary, pairs = trained(mode), batch()
    before = adversary.measure(pairs).item()
    adversary.loss([(student.requires_grad_(), teacher) for student, teacher in pairs]).backward()
    adversary.step()
    assert adversary.measure(pairs).item() < before - 1e-5


def test_reversal_is_the_joint_gradient_with_the_other_sign_for_the_student_alone() -> None:
    both = {}
    for mode in ("joint", "reversed"):
        adversary, pairs = Adversary(mode, PAIRS, lr=0.1, seed=0), batch()
        for discriminator in adversary.discriminators:
            discriminator.layers = discriminator.layers[:5]  # without the last ReLU, the two are the same function
        pairs = [(student.requires_grad_(), teacher) for student, teacher in pairs]
        loss = adversary.loss(pairs)
        loss.backward()
        own = [parameter.grad.clone() for parameter in adversary.discriminators.parameters()]
        both[mode] = loss.item(), [student.grad for student, _ in pairs], own
    assert both["joint"][0] == both["reversed"][0]
    assert all(torch.equal(a, -b) and a.any() for a, b in zip(both["joint"][1], both["reversed"][1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(both["joint"][2], both["reversed"][2], strict=True))


def test_in_alternate_the_discriminator_has_no_gradient_from_the_students_step() -> None:
    adversary, pairs = trained("alternate"), batch()
    pairs = [(student.requires_grad_(), teacher) for student, teacher in pairs]
    loss = adversary.loss(pairs)
    weights = [parameter.detach().clone() for parameter in adversary.discriminators.parameters()]
    adversary.optimizer.zero_grad()
    loss.backward()
    adversary.step()
    assert all(student.grad is not None and student.grad.any() for student, _ in pairs)
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in adversary.discriminators.parameters()
    )
    assert all(torch.equal(a, b) for a, b in zip(weights, adversary.discriminators.parameters(), strict=True))


def test_first_weights_follow_from_the_seed_and_the_random_state_stays() -> None:
    state = torch.get_rng_state()
    one, same, other = (Adversary("joint", PAIRS, 0.1, seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    first = [next(adversary.discriminators.parameters()) for adversary in (one, same, other)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_state_goes_on_where_it_was() -> None:
    one, other = Adversary("alternate", PAIRS, 0.1, 0), Adversary("alternate", PAIRS, 0.1, 1)
    one.loss(batch())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for adversary in (one, other):
        adversary.loss(batch())
    pairs = zip(one.discriminators.parameters(), other.discriminators.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), "momentum, too"


def test_every_character_of_a_text_is_a_row() -> None:
    adversary = Adversary("reversed", [(6, 8)], 0.1, 0)
    student, teacher = torch.randn(2, 6, 5), torch.randn(2, 6, 5)
    flat = [x.transpose(1, 2).reshape(10, 6) for x in (student, teacher)]
    assert torch.equal(adversary.measure([(student, teacher)]), adversary.measure([(flat[0], flat[1])]))
