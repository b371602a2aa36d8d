"""The controller learns by the published rule, from its own trials only, and a replay ends at the same bits."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from random import Random
from statistics import mean
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState
from torch import nn

from nasbench.errors import SettingError
from nasbench.strategies import History, PastTrial, Proposal, Reinforce, distributions
from nasbench.strategies.reinforce import Controller, Policy, policy_loss
from search_spaces.base import Arch, Choices, SearchSpace


@dataclass(frozen=True)
class Letters(SearchSpace):
    """Decisions of as many letters as the digits say, some of them perhaps ruled out."""

    sizes: str = "323"
    ruled_out: str = ""

    @cached_property
    def choices(self) -> Choices:
        return {f"d{i}": tuple("abcdefghi"[: int(size)]) for i, size in enumerate(self.sizes)}

    def build(self, arch: Arch) -> nn.Module:
        raise NotImplementedError

    def is_valid(self, arch: Arch) -> bool:
        """No letter is ruled out."""
        return not set(self.ruled_out) & set(map(str, arch.values()))


LONG = Letters("555555")


def words(space: SearchSpace) -> list[str]:
    return ["".join(map(str, arch.values())) for arch in space.archs()]


def letters_a(arch: Arch) -> float:
    return list(arch.values()).count("a") / len(arch)


def letters_b(arch: Arch) -> float:
    return list(arch.values()).count("b")


def propose(strategy: Reinforce, space: SearchSpace, history: History, seed: Any) -> Proposal:
    proposal = strategy.propose(space, history, Random(seed))
    assert isinstance(proposal, Proposal)
    return proposal


def walk(
    strategy: Reinforce, space: SearchSpace, steps: int, score: Callable[[Arch], float] = letters_a, seed: int = 0
) -> History:
    history = History()
    for number in range(steps):
        proposal = propose(strategy, space, history, f"{seed}/{number}")
        history.append(PastTrial(number, proposal.arch, (score(proposal.arch),), note=proposal.note))
    return history


def learned(strategy: Reinforce, space: SearchSpace, history: History) -> Controller:
    controller = Controller(strategy, space)
    controller.catch_up(history)
    return controller


def same_policy(a: Controller, b: Controller) -> bool:
    pairs = zip(a.policy.state_dict().values(), b.policy.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


# Learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"algorithm": "reinforce", "policy_lr": 0.01}], ids=["ppo", "reinforce"])
def test_rewards_rise_clearly_above_random(settings: dict[str, Any]) -> None:
    scores = [trial.score for trial in walk(Reinforce(**settings), LONG, 300)]
    assert mean(scores[:40]) == pytest.approx(0.2, abs=0.06)  # one letter in five
    assert mean(scores[-60:]) > 0.7


def test_what_is_minimised_falls() -> None:
    space = LONG
    study = optuna.create_study(direction="minimize", sampler=Reinforce(policy_lr=0.01).sampler(space))
    for _ in range(200):
        trial = study.ask(distributions(space))
        study.tell(trial, 5.0 - letters_a(Arch(trial.params)))
    values = [trial.value for trial in study.trials if trial.value is not None]
    assert mean(values[-40:]) < mean(values[:40]) - 0.5
    up = [dict(trial.arch) for trial in walk(Reinforce(policy_lr=0.01), space, 40, lambda a: letters_a(a) - 5.0)]
    assert [trial.params for trial in study.trials[:40]] == up


def test_the_scale_of_rewards_does_not_matter() -> None:
    strategy = Reinforce(entropy=0.0)
    small, large = (walk(strategy, LONG, 120, lambda arch, s=s: s * letters_a(arch)) for s in (1.0, 256.0))  # type: ignore[misc]
    assert [t.arch for t in small][:60] == [t.arch for t in large][:60]


# Updates -----------------------------------------------------------------------------------------------------------


def gradients(policy: Policy, value: torch.Tensor) -> list[torch.Tensor]:
    return [g.clone() for g in torch.autograd.grad(value, list(policy.parameters()))]


def test_the_expected_step_of_reinforce_is_the_gradient_of_the_expected_reward() -> None:
    # All 18 architectures can be listed: the sum of their steps, each weighted with its probability, must be exact.
    policy = Policy([3, 2, 3], hidden=8).double()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(20)  # far from uniform
    actions = torch.tensor(list(itertools.product(range(3), range(2), range(3))))
    rewards = torch.arange(18, dtype=torch.float64).square() % 7
    probabilities = policy(actions)[0].sum(dim=1).exp()
    assert probabilities.sum().item() == pytest.approx(1)
    assert probabilities.max() > 4 * probabilities.min()
    exact = gradients(policy, (probabilities * rewards).sum())

    settings, baseline = Reinforce(algorithm="reinforce", entropy=0.0), 2.5
    expected = [torch.zeros_like(g) for g in exact]
    for action, reward, p in zip(actions, rewards, probabilities.detach(), strict=True):
        drawn = policy(action[None])[0].detach()
        loss = policy_loss(policy, action[None], drawn, (reward - baseline)[None], settings)
        for total, g in zip(expected, gradients(policy, loss), strict=True):
            total -= p * g
    for ours, truth in zip(expected, exact, strict=True):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)


def batch_of(policy: Policy, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    actions = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 1, 0], [0, 0, 0]])
    advantages = torch.tensor([0.5, -0.2, 0.1, -0.7])
    return actions, policy(actions)[0].detach() - shift, advantages


@pytest.mark.parametrize("entropy", [0.0, 0.3])
def test_the_first_step_of_ppo_is_that_of_reinforce(entropy: float) -> None:
    policy = Policy([3, 2, 3], hidden=8)
    batch = batch_of(policy)
    ppo, plain = (
        gradients(policy, policy_loss(policy, *batch, Reinforce(algorithm=name, entropy=entropy)))
        for name in ("ppo", "reinforce")
    )
    for a, b in zip(ppo, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_ppo_moves_no_decision_that_has_moved_far_enough() -> None:
    policy, settings = Policy([3, 2, 3], hidden=8), Reinforce(entropy=0.0)
    actions, log_probs, advantages = batch_of(policy, shift=0.3)  # all are more likely by a third than when drawn
    for sign, moves in ((1.0, False), (-1.0, True)):
        loss = policy_loss(policy, actions, log_probs, sign * advantages.abs(), settings)
        assert any(g.abs().max() > 0 for g in gradients(policy, loss)) is moves


def test_reinforce_weighs_less_what_has_become_unlikely_and_nothing_more() -> None:
    policy, settings = Policy([3, 2, 3], hidden=8), Reinforce(algorithm="reinforce", entropy=0.0)
    fresh, rarer, likelier = (
        gradients(policy, policy_loss(policy, *batch_of(policy, shift), settings)) for shift in (0.0, -0.5, 0.5)
    )
    for a, b, c in zip(fresh, rarer, likelier, strict=True):
        torch.testing.assert_close(b, a * torch.tensor(-1.5).exp())  # three decisions
        torch.testing.assert_close(c, a)


def test_the_entropy_is_the_policys() -> None:
    policy = Policy([3, 2, 3], hidden=8).double()
    actions = torch.tensor(list(itertools.product(range(3), range(2), range(3))))
    with torch.no_grad():
        log_probs, entropies = policy(actions)
    joint = log_probs.sum(dim=1)
    torch.testing.assert_close((joint.exp() * entropies).sum(), -(joint.exp() * joint).sum())


def test_a_large_weight_of_entropy_keeps_the_policy_open() -> None:
    varied, settled = (
        len({trial.arch for trial in walk(Reinforce(policy_lr=0.01, entropy=e), LONG, 200)[-60:]}) for e in (1.0, 0.0)
    )
    assert varied > 2 * settled


def test_rewards_are_compared_with_a_moving_average() -> None:
    strategy = Reinforce(batch=2, baseline=0.5)
    history = walk(strategy, LONG, 4)
    a, b, c, d = (trial.score for trial in history)
    first = learned(strategy, LONG, History(history[:3]))
    assert first.seen == 2
    start = (a + b) / 2
    assert first.baseline == pytest.approx(((start + a) / 2 + b) / 2)
    both = learned(strategy, LONG, history)
    assert both.baseline == pytest.approx(((first.baseline + c) / 2 + d) / 2)


def test_equal_rewards_teach_nothing() -> None:
    strategy = Reinforce(entropy=0.0, batch=5)
    history = walk(strategy, LONG, 20, score=lambda arch: 0.5)
    assert same_policy(learned(strategy, LONG, history), Controller(strategy, LONG))


# What is learned from ----------------------------------------------------------------------------------------------


def seen_after(trials: list[PastTrial]) -> int:
    return learned(Reinforce(batch=5), LONG, History(trials)).seen


def test_trials_of_others_and_without_a_score_teach_nothing() -> None:
    trials = walk(Reinforce(batch=5), LONG, 5)[:]
    assert seen_after(trials) == 5
    last = trials.pop()
    others = {
        "no note": PastTrial(4, last.arch, last.scores),
        "another note": PastTrial(4, last.arch, last.scores, note={"path": [1]}),
        "in the place of what was proposed": PastTrial(4, LONG.at(0), last.scores, note=last.note),
        "infinite": PastTrial(4, last.arch, (float("inf"),), note=last.note),
        "no number": PastTrial(4, last.arch, (float("nan"),), note=last.note),
    }
    for name, other in others.items():
        assert seen_after([*trials, other]) == 0, name
        assert seen_after([other, *trials, last]) == 5, name


def test_failed_and_enqueued_trials_teach_nothing() -> None:
    strategy = Reinforce(batch=2)
    study = optuna.create_study(direction="maximize", sampler=strategy.sampler(LONG))
    for number in range(5):
        if number == 1:
            study.enqueue_trial(dict(LONG.at(7)))
        trial = study.ask(distributions(LONG))
        study.tell(trial, None if number == 0 else 0.5, TrialState.FAIL if number == 0 else None)
    assert Arch(study.trials[1].params) == LONG.at(7)
    notes = [trial.system_attrs.get("nasbench:proposal", {}).get("note") for trial in study.trials]
    assert notes[1] is None
    assert [note["seen"] for note in notes if note] == [0, 0, 0, 2]  # the third and fourth are the first that count


def test_a_note_says_how_much_the_policy_had_seen_when_workers_run_side_by_side() -> None:
    strategy, history = Reinforce(batch=2), History()
    asked = [propose(strategy, LONG, history, number) for number in range(4)]  # all by the first policy
    for number, proposal in enumerate(asked):
        history.append(PastTrial(number, proposal.arch, (letters_a(proposal.arch),), note=proposal.note))
    note = propose(strategy, LONG, history, 4).note
    assert note is not None and note["seen"] == 4
    assert [proposal.note["seen"] for proposal in asked if proposal.note] == [0] * 4


def test_what_a_policy_likes_comes_again_and_counts_again() -> None:
    strategy, space = Reinforce(policy_lr=0.02, batch=10), Letters("33")
    history = walk(strategy, space, 150)
    best, times = Counter(trial.arch for trial in history[-50:]).most_common(1)[0]
    assert best == space.arch(d0="a", d1="a")
    assert times > 25
    assert learned(strategy, space, history).seen == 150


# Drawing -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_architectures_are_drawn_as_often_as_the_policy_says() -> None:
    space, strategy = Letters("323"), Reinforce(policy_lr=0.03, batch=10)
    history = walk(strategy, space, 50)
    policy = learned(strategy, space, history).policy
    actions = torch.tensor([space.encode(arch) for arch in space.archs()])
    expected = policy(actions)[0].sum(dim=1).exp().tolist()
    draws = 2000
    counts = Counter(propose(strategy, space, history, seed).arch for seed in range(draws))
    assert max(expected) > 3 / 18
    for arch, chance in zip(space.archs(), expected, strict=True):
        spread = (draws * chance * (1 - chance)) ** 0.5
        assert abs(counts[arch] - draws * chance) <= 4 * spread + 1, arch


def test_the_note_has_the_log_probabilities_of_what_was_drawn() -> None:
    strategy = Reinforce(policy_lr=0.03, batch=10)
    history = walk(strategy, LONG, 30)
    note = propose(strategy, LONG, history, 5).note
    assert note is not None
    log_probs, _ = learned(strategy, LONG, history).policy(torch.tensor([note["actions"]]))
    assert note["log_probs"] == pytest.approx(log_probs[0].tolist(), abs=2e-6)


def test_decisions_of_one_option_and_options_that_are_not_there_change_nothing() -> None:
    strategy = Reinforce(batch=5)
    plain, padded = (walk(strategy, Letters(sizes), 30, letters_b) for sizes in ("24", "12141"))
    assert [(t.arch["d0"], t.arch["d1"]) for t in plain] == [(t.arch["d1"], t.arch["d3"]) for t in padded]
    assert plain[-1].note == padded[-1].note
    before, after = Controller(strategy, Letters("24")).policy, learned(strategy, Letters("24"), plain).policy
    assert torch.equal(before.weight[0, 2:], after.weight[0, 2:])  # the first has two options, the second four
    assert torch.equal(before.bias[0, 2:], after.bias[0, 2:])
    assert not torch.equal(before.weight[0, :2], after.weight[0, :2])
    assert after(torch.tensor([[0, 3]]))[1].isfinite().all()


def test_rules_of_the_space_are_kept() -> None:
    space = Letters("555555", ruled_out="b")  # one draw in four keeps them
    history = walk(Reinforce(), space, 60)
    assert all(trial.arch in space for trial in history)
    assert learned(Reinforce(), space, history).seen == 60


def test_rules_that_hardly_a_draw_keeps_are_kept_and_learned() -> None:
    space = Letters("555555", ruled_out="bcd")  # one in 244
    history = walk(Reinforce(policy_lr=0.02, batch=10), space, 100)
    assert all(trial.arch in space for trial in history)
    kept = [propose(Reinforce(policy_lr=0.02, batch=10), space, history, seed).arch for seed in range(20)]
    assert mean(map(letters_a, kept)) > 0.8


def test_what_was_refused_is_not_proposed_again() -> None:
    space, strategy = Letters("33"), Reinforce()
    history = History()
    history.tried = {arch for arch in space.archs() if arch["d0"] != "c"}
    drawn = {propose(strategy, space, history, seed).arch for seed in range(40)}
    assert drawn == {arch for arch in space.archs() if arch["d0"] == "c"}
    history.tried = set(space.archs())  # nothing is left: rather one more refusal than none
    assert propose(strategy, space, history, 0).arch in space


# Replays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
def test_a_replay_ends_at_the_same_bits(algorithm: str) -> None:
    strategy = Reinforce(algorithm=algorithm, policy_lr=0.02, batch=10)
    history = walk(strategy, LONG, 65)
    steps = Controller(strategy, LONG)
    for end in range(len(history) + 1):
        steps.catch_up(History(history[:end]))
    replayed = learned(strategy, LONG, history)
    assert steps.seen == replayed.seen == 60
    assert same_policy(steps, replayed)
    assert steps.baseline == replayed.baseline
    assert propose(strategy, LONG, History(history[:]), "next") == propose(strategy, LONG, history, "next")


def test_histories_and_settings_do_not_mix() -> None:
    a, b = Reinforce(batch=5), Reinforce(batch=5, policy_lr=0.05)
    history, other = walk(a, LONG, 30), walk(a, LONG, 30, seed=1)
    expected = propose(a, LONG, History(history[:]), "next")
    propose(a, LONG, other, "next")
    propose(b, LONG, history, "next")
    assert propose(a, LONG, history, "next") == expected


def test_gradients_may_be_off_outside() -> None:
    strategy = Reinforce(batch=5)
    history = walk(strategy, LONG, 20)
    with torch.no_grad():
        again = propose(strategy, LONG, History(history[:]), "next")
    assert again == propose(strategy, LONG, history, "next")


# Settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"algorithm": "ppo2"}, "algorithm='ppo2'; did you mean 'ppo'. Known: ppo, reinforce"),
        ({"policy_lr": 0}, "policy_lr=0, but it must be a number above 0"),
        ({"policy_lr": float("nan")}, "policy_lr=nan"),
        ({"batch": 0}, "batch=0, but it must be a whole number, at least 1"),
        ({"batch": 2.5}, r"batch=2\.5"),
        ({"passes": True}, "passes=True"),
        ({"hidden": "100"}, "hidden='100'"),
        ({"clip_ratio": 1.0}, r"clip_ratio=1\.0, but it must be a number between 0 and 1"),
        ({"entropy": -1e-5}, "entropy=-1e-05, but it must be a number, 0 or more"),
        ({"baseline": 1.0}, r"baseline=1\.0, but it must be a number from 0 to below 1"),
    ],
)
def test_settings_are_checked_at_once(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(SettingError, match=expected):
        Reinforce(**settings)
