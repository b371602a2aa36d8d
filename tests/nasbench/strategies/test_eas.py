"""EAS: its children grow, its policy is a function of the history and learns, and what is masked teaches nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import optuna
import pytest
import torch

from nasbench.errors import SettingError, StudyError
from nasbench.strategies import EAS, History, PastTrial, Proposal, distributions
from nasbench.strategies.eas import Controller, Policy, Step, choice_terms, widen_terms
from search_spaces import Arch, DenseNet, GrowingSpace, NASBench201, PlainCNN
from search_spaces.growth import align

SPACE = PlainCNN(widths=(4, 8, 16, 32), fc_widths=(8, 16, 32, 64), blocks=2, slots=4, fc_slots=3)
DENSE = DenseNet(growths=(4, 6, 8), blocks=2, slots=5, layers_of_start=2)
BOTH = pytest.mark.parametrize("space", [SPACE, DENSE], ids=["plain", "dense"])
SMALL: dict[str, Any] = {"widen": 2, "deepen": 2, "batch": 4, "hidden": 8}


def depth(arch: Arch, space: GrowingSpace = SPACE) -> float:
    """A score that is no trained network's: how full the first block is, and how narrow all of it."""
    words = space.layers(arch)
    return (len(words[0]) - 0.2 * sum(len(block) for block in words[1:])) / 10 + 0.3


def run(
    strategy: EAS,
    trials: int,
    score: Callable[[Arch], float] = depth,
    space: GrowingSpace = SPACE,
    history: History | None = None,
    seed: int = 0,
) -> History:
    history = History() if history is None else history
    for number in range(len(history), trials):
        proposal = strategy.propose(space, history, Random(f"{seed}/{number}"))
        history.append(PastTrial(number, proposal.arch, (score(proposal.arch),), proposal.parent, proposal.note))
    return history


def state(strategy: EAS, history: History, space: GrowingSpace = SPACE) -> dict[str, torch.Tensor]:
    controller = strategy._replayed(space, history)
    assert controller.policy is not None
    return controller.policy.state_dict()


# Children ----------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("controller", ["reinforce", "random"])
def test_children_grow_from_the_start(space: GrowingSpace, controller: str) -> None:
    history = run(EAS(**SMALL, controller=controller), 16, lambda arch: depth(arch, space), space)
    assert (history[0].arch, history[0].parent, history[0].note) == (space.start, None, None)
    for child in history[1:]:
        assert child.parent == 0
        assert child.note is not None
        assert set(child.note) == {"seen", "widen", "deepen", "log_prob"}
        assert child.arch in space
        assert space.canonical(child.arch) == child.arch
        old, new = space._packed(space.start), space._packed(child.arch)  # type: ignore[attr-defined]
        for pair in zip(old, new, strict=True):
            align(*pair)  # raises where a network could not be made from the other
        assert sum(map(len, new)) - sum(map(len, old)) == len(child.note["deepen"]) == 2
        assert child.note["log_prob"] < 0
    assert len({trial.arch for trial in history}) > 8


def test_actions_are_as_many_as_published() -> None:
    for space, rounds in ((PlainCNN(), 4), (DenseNet(), 10)):
        history = run(EAS(), 2, lambda _: 0.5, space)
        assert history[1].note is not None
        assert (len(history[1].note["widen"]), len(history[1].note["deepen"])) == (rounds, 5)


def test_the_best_becomes_the_parent_after_some_children() -> None:
    history = run(EAS(**SMALL, restart=5), 14)
    assert [trial.parent for trial in history[1:6]] == [0] * 5
    best = max(history[:6], key=lambda trial: (trial.score, -trial.number))
    assert [trial.parent for trial in history[6:11]] == [best.number] * 5
    later = max(history[:11], key=lambda trial: (trial.score, -trial.number))
    assert [trial.parent for trial in history[11:]] == [later.number] * 3


def test_what_may_become_a_parent_is_kept() -> None:
    strategy = EAS(**SMALL, restart=5)
    kept = [strategy.keeps(SPACE, run(strategy, trials)) for trials in range(16)]
    history = run(strategy, 16)
    assert kept[0] == set()
    for trials in range(1, 16):
        wanted = {trial.parent for trial in history[trials:] if trial.parent is not None and trial.parent < trials}
        assert wanted <= kept[trials]
        assert len(kept[trials]) <= 2


def test_while_the_start_is_trained_elsewhere_its_children_are_proposed() -> None:
    start = SPACE.start
    child = EAS(**SMALL).propose(SPACE, History([], [start], [7]), Random(0))
    assert child.parent == 7
    assert child.arch != start
    unknown = EAS(**SMALL).propose(SPACE, History([], [start]), Random(0))
    assert unknown == Proposal(start)


def test_a_full_network_has_no_actions_but_is_no_error() -> None:
    tiny = PlainCNN(widths=(4,), fc_widths=(8,), kernels=(3,), blocks=1, slots=1, fc_slots=1)
    history = run(EAS(**SMALL), 12, lambda _: 0.5, tiny)
    assert {trial.arch for trial in history} == {tiny.start}
    assert history[5].note is not None
    assert (history[5].note["widen"], history[5].note["deepen"]) == ([[], []], [])


def test_what_a_constraint_refused_is_drawn_anew() -> None:
    strategy = EAS(**SMALL)
    history = run(strategy, 1)
    refused = strategy.propose(SPACE, history, Random(5)).arch
    history.tried.add(refused)
    assert strategy.propose(SPACE, history, Random(5)).arch != refused
    history.append(PastTrial(1, refused, (0.5,)))  # looked up, if it was finished
    assert strategy.propose(SPACE, history, Random(5)).arch == refused


@dataclass(frozen=True)
class Falling(PlainCNN):
    """Plain networks whose blocks get no deeper."""

    def is_valid(self, arch: Arch) -> bool:
        """No block has more layers than the one before it."""
        depths = [len(block) for block in self._packed(arch)]
        return depths == sorted(depths, reverse=True)


@pytest.mark.parametrize("controller", ["reinforce", "random"])
def test_rules_of_the_space_are_kept(controller: str) -> None:
    space = Falling(widths=(4, 8, 16), fc_widths=(8, 16), blocks=3, slots=4, fc_slots=3)
    history = run(EAS(**SMALL, restart=5, controller=controller), 30, lambda arch: depth(arch, space), space)
    assert all(trial.arch in space for trial in history)
    assert max(len(space.layers(trial.arch)[1]) for trial in history) > 1


def test_where_every_child_breaks_a_rule_one_is_proposed_and_refused() -> None:
    space = Falling(widths=(4, 8), fc_widths=(8,), blocks=2, slots=1, fc_slots=2)
    child = EAS(**SMALL).propose(space, History([PastTrial(0, space.start, (0.5,))]), Random(0))
    assert (child.parent, space.is_valid(child.arch)) == (0, False)


def test_a_start_that_was_refused_ends_the_search_at_once() -> None:
    history = History()
    history.refuse(SPACE.start)
    with pytest.raises(StudyError, match="everything grows from, Arch.*was refused by a constraint.*smaller options"):
        EAS(**SMALL).propose(SPACE, history, Random(0))


@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan])
def test_what_has_no_finite_score_is_never_the_best(odd: float) -> None:
    strategy = EAS(**SMALL, restart=3)
    start = PastTrial(0, SPACE.start, (0.5,))
    history = History([PastTrial(9, SPACE.sample(Random(0)), (odd,)), start])
    run(strategy, 5, lambda _: 0.4, history=history)
    assert strategy.propose(SPACE, history, Random(0)).parent == 0
    assert strategy.keeps(SPACE, history) == {0}


# The policy is a function of the history ---------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"baseline": "released"}, {"restart": 6}], ids=str)
def test_a_replayed_policy_is_the_one_before_to_the_last_bit(settings: dict[str, Any]) -> None:
    strategy = EAS(**SMALL, **settings)
    history = run(strategy, 22)
    replayed = History(list(history))
    before, after = state(strategy, history), state(strategy, replayed)
    assert all(torch.equal(before[name], after[name]) for name in before)
    fresh = state(strategy, History())
    assert any(not torch.equal(before[name], fresh[name]) for name in before)
    assert strategy.propose(SPACE, history, Random(1)) == strategy.propose(SPACE, replayed, Random(1))
    assert strategy._replayed(SPACE, replayed).seen == 20


def test_a_search_cut_anywhere_continues_as_if_unbroken() -> None:
    strategy = EAS(**SMALL, restart=6)
    whole = list(run(strategy, 18))
    for cut in range(0, 18, 2):
        assert list(run(strategy, 18, history=History(whole[:cut]))) == whole


def test_trials_of_others_and_infinite_scores_teach_nothing() -> None:
    strategy = EAS(**SMALL)
    history = run(strategy, 9)
    child = history[1]
    assert child.note is not None
    with_others = History(list(history))
    for odd in (
        PastTrial(9, child.arch, (0.9,)),
        PastTrial(10, child.arch, (0.9,), note=child.note),
        PastTrial(11, SPACE.start, (0.9,), 0, child.note),  # not where its actions lead
        PastTrial(12, child.arch, (-math.inf,), 0, child.note),
    ):
        with_others.append(odd)
    a, b = state(strategy, history), state(strategy, with_others)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_log_probabilities_of_the_note_are_those_of_the_policy() -> None:
    strategy = EAS(**SMALL)
    history = run(strategy, 8)
    controller = strategy._replayed(SPACE, history)
    child = strategy.propose(SPACE, history, Random(3))
    steps = controller._steps(PastTrial(8, child.arch, (0.5,), child.parent, child.note))
    assert steps is not None
    assert controller.policy is not None
    assert child.note is not None
    log_probs, _ = controller.policy(steps)
    assert float(log_probs.detach().sum()) == pytest.approx(child.note["log_prob"], abs=1e-4)


# Masks -------------------------------------------------------------------------------------------------------------


def test_masked_places_get_no_gradient() -> None:
    logits = torch.randn(2, 5, requires_grad=True)
    log_probs, entropies = widen_terms(logits, [[0, 2], [1]], [[2], []])
    (log_probs.sum() + entropies.sum()).backward()
    assert logits.grad is not None
    free = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0]], dtype=torch.bool)
    assert torch.equal(logits.grad != 0, free)


@BOTH
def test_in_a_whole_policy_logits_of_what_cannot_be_done_get_no_gradient(
    space: GrowingSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = Controller(EAS(**SMALL), space)
    assert controller.policy is not None
    wide, *_, full = [space.widened_at(space.start, [(0, 0)]), space.start]
    while (wider := space.widened(full, 0, 0)) is not None:
        full = wider  # its first layer cannot be widened
    while len(space.layers(full)[1]) < space.slots_of_blocks[1]:
        full = space.deepened(full, 1, 0) or full  # its second block has no room
    steps = [Step(space, arch, kind) for arch in (wide, full) for kind in "wd"]
    for step in steps:
        step.draw(Random(0), None)
    logits: list[torch.Tensor] = []

    def look(_module: object, _inputs: object, output: torch.Tensor) -> None:
        output.retain_grad()
        logits.append(output)

    for module in (controller.policy.widen, *controller.policy.heads):
        module.register_forward_hook(look)
    log_probs, entropies = controller.policy(steps)
    (log_probs + entropies).sum().backward()
    widen, *stages = [output.grad for output in logits]
    assert widen is not None
    for row, step in enumerate((steps[0], steps[2])):
        assert (widen[row, :, 0] != 0).nonzero()[
            :, 0
        ].tolist() == step.free  # no pool, padding, classifier, nor the widest
        assert len(step.free) == len(step.places) - row
    for stage, gradient in enumerate(stages):
        assert gradient is not None
        for row, step in enumerate((steps[1], steps[3])):
            options = step.options(stage)
            expected = options if len(options) > 1 else []
            assert (gradient[row] != 0).nonzero()[:, 0].tolist() == expected
    assert 1 not in steps[3].free


def test_masked_options_get_no_gradient_and_no_share() -> None:
    logits = torch.randn(2, 4, requires_grad=True)
    log_probs, entropies = choice_terms(logits, [[0, 2, 3], [1]], [2, 1])
    expected = logits[0, [0, 2, 3]].log_softmax(0).detach()
    assert log_probs[0] == expected[1]
    assert float(entropies[0].detach()) == pytest.approx(float(-(expected.exp() * expected).sum()))
    assert log_probs[1] == entropies[1] == 0
    (log_probs.sum() + entropies.sum()).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 1] == 0
    assert not logits.grad[1].any()


def test_a_network_with_fully_connected_layers_at_their_maximum_is_masked_there() -> None:
    step = Step(SPACE, SPACE.start | {"fc0": 64, "block1_filters0": 32}, "w")
    assert [step.places[p] for p in step.free] == [(0, 0)]
    deep = Step(SPACE, SPACE.start | {"fc0": 0}, "d")
    assert deep.options(0) == [0, 1]  # behind no layer there is no place for one
    deep.chosen = [0, 0]
    assert deep.options(2) == [0, 1, 2]
    fc = Step(SPACE, SPACE.start, "d", [2, 0])
    assert fc.options(2) == [0]  # no kernels
    assert Step(DENSE, DENSE.start, "d", [0, 1]).options(2) == [0]


def test_what_chooses_a_new_layer_has_read_the_network_both_ways_and_what_it_chose_before() -> None:
    controller = Controller(EAS(**SMALL), SPACE)
    assert controller.policy is not None
    deeper = SPACE.deepened(SPACE.start, 1, 0)
    assert deeper is not None
    controller.policy([Step(SPACE, deeper, "d", [1, 1, 2])])[0].sum().backward()
    rows = controller.policy.choice.weight.grad
    assert rows is not None
    assert rows.any(dim=1).nonzero()[:, 0].tolist() == [0, 1 + 1, 1 + 3 + 1]  # nothing yet; of 3 blocks, and of layers
    outputs, last = controller.policy.read([Step(SPACE, deeper, "d")])
    half = controller.settings.hidden
    assert torch.equal(last[0][0, :half], outputs[0, -1, :half])  # forwards the last place is the last
    assert torch.equal(last[0][0, half:], outputs[0, 0, half:])  # backwards the first
    for name in ("weight_hh_l0", "weight_hh_l0_reverse"):
        gradient = controller.policy.encoder.get_parameter(name).grad
        assert gradient is not None and gradient.any()


def test_padding_changes_nothing() -> None:
    policy = Policy(40, (3, 4, 3), 8, 4)
    short = Step(SPACE, SPACE.start, "w", [0])
    deeper = SPACE.deepened(SPACE.start, 0, 0)
    assert deeper is not None
    long = Step(SPACE, deeper, "d", [0, 1, 2])
    together, alone = policy([short, long]), [policy([step]) for step in (short, long)]
    for part in range(2):
        assert together[part].tolist() == pytest.approx([float(one[part].detach()) for one in alone], abs=1e-6)


# Learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", ["ema", "released"])
def test_the_policy_learns_a_made_up_reward(baseline: str) -> None:
    settings: dict[str, Any] = {"widen": 1, "deepen": 2, "hidden": 16, "policy_lr": 0.02, "baseline": baseline}
    learned = run(EAS(**settings, reward="score"), 201)
    chance = run(EAS(**settings, controller="random"), 201)

    def mean(trials: list[PastTrial]) -> float:
        return sum(trial.score for trial in trials) / len(trials)

    assert mean(learned[-50:]) > mean(learned[1:51]) + 0.05
    assert mean(learned[-50:]) > mean(chance[-50:]) + 0.05


def test_the_entropy_is_made_larger() -> None:
    steps = [Step(SPACE, SPACE.start, "w"), Step(SPACE, SPACE.start, "d", [0, 0, 0])]
    sums = []
    for trials in (1, 41):
        strategy = EAS(**SMALL, entropy=1.0, policy_lr=0.01)
        history = run(strategy, trials, lambda _: 0.5)  # all rewards are equal: only the entropy teaches
        policy = strategy._replayed(SPACE, history).policy
        assert policy is not None
        sums.append(float(policy(steps)[1].sum().detach()))
    most = 3 * math.log(2) + math.log(3) + math.log(3)  # three layers, three blocks, three kernels
    assert sums[0] < sums[1] <= most + 1e-6
    assert most - sums[1] < (most - sums[0]) / 4


def test_rewards_are_tangents() -> None:
    controller = Controller(EAS(), SPACE)
    assert [round(controller._reward(score), 2) for score in (0.0, 0.87, 0.95, 0.96)] == [0.0, 4.83, 12.71, 15.89]
    assert controller._reward(1.0) == controller._reward(0.999) < 640
    with pytest.raises(SettingError, match=r'the score -0.3 is not from 0 to 1.*Use reward="score"'):
        controller._reward(-0.3)


def test_a_score_without_a_tangent_is_refused_before_children_are_made() -> None:
    history = History([PastTrial(0, SPACE.start, (55.0,))])
    for strategy in (EAS(**SMALL, reward="score"), EAS(**SMALL, controller="random")):
        assert strategy.propose(SPACE, history, Random(0)).parent == 0
    with pytest.raises(SettingError, match="the score 55 is not from 0 to 1"):
        EAS(**SMALL).propose(SPACE, history, Random(0))


def test_tangents_of_what_is_minimised_are_refused_at_once() -> None:
    study = optuna.create_study(direction="minimize", sampler=EAS(**SMALL).sampler(SPACE))
    with pytest.raises(SettingError, match=r"but the objective is minimised. Use reward=\"score\""):
        study.ask(distributions(SPACE))
    for allowed in (EAS(**SMALL, reward="score"), EAS(**SMALL, controller="random")):
        study = optuna.create_study(direction="minimize", sampler=allowed.sampler(SPACE))
        for _ in range(6):
            trial = study.ask(distributions(SPACE))
            study.tell(trial, 1 - depth(Arch(trial.params)))
    assert EAS().refuses_directions(["maximize"]) is None
    assert "follows one objective" in (EAS().refuses_directions(["maximize"] * 2) or "")


@pytest.mark.parametrize(
    ("baseline", "expected"), [("ema", [0.5, 0.95 * 0.5 + 0.05 * 0.7]), ("released", [0.5, 0.5 + 0.95 * 0.2])]
)
def test_baselines(baseline: str, expected: list[float]) -> None:
    scores = iter([0.5] * 5 + [0.7] * 4)
    strategy = EAS(**SMALL, baseline=baseline, reward="score")
    history = run(strategy, 5, lambda _: next(scores))
    found = [strategy._replayed(SPACE, history).baseline]
    run(strategy, 9, lambda _: next(scores), history=history)
    found.append(strategy._replayed(SPACE, history).baseline)
    assert found == [pytest.approx(value) for value in expected]


# Bad input ---------------------------------------------------------------------------------------------------------


def test_a_space_that_does_not_grow_is_refused() -> None:
    with pytest.raises(SettingError, match="those of NASBench201 cannot grow. Use PlainCNN or DenseNet"):
        EAS().sampler(NASBench201())
    with pytest.raises(SettingError, match="cannot grow"):
        EAS().propose(NASBench201(), History(), Random(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"controller": "randm"}, "no controller='randm'; did you mean 'random'"),
        ({"baseline": "mean"}, "Known: ema, released"),
        ({"reward": "log"}, "Known: score, tan"),
        ({"batch": 0}, "batch=0, but it must be a whole number, at least 1"),
        ({"widen": -1}, "widen=-1"),
        ({"widen": 0, "deepen": 0}, "grows nothing"),
        ({"restart": 2.5}, "restart=2.5"),
        ({"highest": 1.0}, "highest=1.0, but it must be a number between 0 and 1"),
        ({"policy_lr": 0}, "policy_lr=0"),
        ({"decay": 1}, "decay=1"),
        ({"entropy": -1}, "entropy=-1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        EAS(**settings)
