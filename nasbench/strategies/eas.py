"""A controller that grows networks: it reads one, and says which layers to widen and where to put new ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from nasbench.errors import SettingError, StudyError
from nasbench.recipe import is_number
from nasbench.strategies.base import History, PastTrial, Proposal, Strategy
from nasbench.strategies.relaxation import COUNT, check_settings
from search_spaces.base import Arch, SearchSpace, nearest
from search_spaces.growth import GrowingSpace

CONTROLLERS = ("reinforce", "random")
BASELINES = ("ema", "released")
REWARDS = ("tan", "score")
_DRAWS = 50
_MARKS = ("", "pool", "out")  # padding, between two blocks, the classifier


@dataclass(frozen=True)
class EAS(Strategy):
    """Efficient architecture search: children of a trained network get wider and deeper, and inherit its weights.

    The first trial is the space's `start`, trained from scratch. Every other is a child: `widen` times each layer is
    offered its next width, then `deepen` new layers are put in, as the controller says. After every `batch` finished
    children the controller learns, by REINFORCE, to repeat what led to good ones. After every `restart` children the
    best trial so far becomes the parent of the next.

    A child that was there before is looked up, not trained again: its trial copies metrics and is a lesson like any
    other. Children that break the space's rules or were refused before, by a constraint or a pruner, are drawn anew.
    Trials that failed teach nothing.

    Args:
        controller: "reinforce", or "random": every choice is as likely as its alternatives, and nothing is learned.
        widen: rounds in which every layer is offered its next width. Default: the space's, 4 of PlainCNN, 10 of
            DenseNet.
        deepen: new layers in a child.
        batch: finished children in an update.
        restart: finished children after which the best trial becomes the parent.
        policy_lr: learning rate of Adam.
        entropy: weight of the policy's entropy beside the reward.
        reward: "tan": the tangent of the score times pi / 2, for scores from 0 to 1; "score": the score itself.
        highest: what higher scores count as, for "tan", which goes to infinity at 1.
        baseline: what rewards are compared with. "ema": the moving average of the means of earlier batches. "released":
            as in the released code, where a batch enters first, with weight `decay`. Both begin with the first mean.
        decay: weight of the past for "ema", of the present for "released".
        hidden: units of the encoder in each direction; the actor that deepens has twice as many.
        embedding: size of the embedding of layers and choices.

    Raises:
        SettingError: an unknown name, a setting out of range, a space whose networks do not grow, or, where the reward
            is a tangent, an objective that is minimised or a score outside of 0 to 1.
        StudyError: the start was refused, by a constraint or a pruner.

    Example:
        >>> from search_spaces import PlainCNN
        >>> space, history = PlainCNN(), History()
        >>> EAS().propose(space, history, Random(0)).arch == space.start
        True
        >>> history.append(PastTrial(0, space.start, (0.8,)))
        >>> child = EAS().propose(space, history, Random(1))
        >>> child.parent, len(child.note["widen"]), len(child.note["deepen"])
        (0, 4, 5)

    Source: Cai et al., Efficient Architecture Search by Network Transformation, AAAI 2018, arXiv:1707.04873; the
    defaults are the published ones. There the best of the first 300 children is trained for longer before it becomes a
    parent, and the search then ends after 150 more; here it is taken as it is. The controller's weights always begin
    the same; what differs between seeds is what is drawn.
    """

    controller: str = "reinforce"
    widen: int | None = None
    deepen: int = 5
    batch: int = 10
    restart: int = 300
    policy_lr: float = 0.002
    entropy: float = 1e-5
    reward: str = "tan"
    highest: float = 0.999
    baseline: str = "ema"
    decay: float = 0.95
    hidden: int = 50
    embedding: int = 16

    def __post_init__(self) -> None:
        for name, known in (("controller", CONTROLLERS), ("baseline", BASELINES), ("reward", REWARDS)):
            if getattr(self, name) not in known:
                found = getattr(self, name)
                raise SettingError(f"strategy 'eas' has no {name}={found!r}; {nearest(found, known)}")
        check_settings(
            "strategy 'eas'",
            self,
            widen=(lambda v: v is None or (type(v) is int and v >= 0), "a whole number, at least 0"),
            deepen=(lambda v: type(v) is int and v >= 0, "a whole number, at least 0"),
            **dict.fromkeys(("batch", "restart", "hidden", "embedding"), COUNT),
            policy_lr=(lambda v: is_number(v) and v > 0, "a number above 0"),
            entropy=(lambda v: is_number(v) and v >= 0, "a number, 0 or more"),
            highest=(lambda v: is_number(v) and 0 < v < 1, "a number between 0 and 1"),
            decay=(lambda v: is_number(v) and 0 <= v < 1, "a number from 0 to below 1"),
        )
        if self.widen == self.deepen == 0:
            raise SettingError("strategy 'eas' with widen=0 and deepen=0 grows nothing. Let one of them be more.")

    def refuses(self, space: SearchSpace) -> str | None:
        """Return that a space's networks do not grow, if they do not."""
        if isinstance(space, GrowingSpace):
            return None
        return (
            f"strategy 'eas' grows networks, and those of {type(space).__name__} cannot grow. "
            "Use PlainCNN or DenseNet, or another strategy, such as evolution."
        )

    def refuses_directions(self, directions: Sequence[str]) -> str | None:
        """Return that there must be one objective, and for tangents of the score one that is maximised."""
        if list(directions) == ["minimize"] and self.controller == "reinforce" and self.reward == "tan":
            return (
                "strategy 'eas' learns from tangents of scores from 0 to 1, higher being better, but the objective is "
                'minimised. Use reward="score", or objectives="val_accuracy".'
            )
        return super().refuses_directions(directions)

    def propose(self, space: SearchSpace, history: History, rng: Random) -> Proposal:
        """Return the start, or a child drawn from the policy as it is after all whole batches of the history."""
        return self._replayed(space, history).draw(history, rng)

    def keeps(self, space: SearchSpace, history: History) -> set[int]:
        """Return the parent of the next children, and the best, which may follow it."""
        controller = self._replayed(space, history)
        return {trial.number for trial in (controller.parent, controller.best) if trial is not None}

    def _replayed(self, space: SearchSpace, history: History) -> Controller:
        if not isinstance(space, GrowingSpace):
            raise SettingError(self.refuses(space))
        controller = history.recall((self, space), lambda: Controller(self, space))
        controller.catch_up(history)
        return controller


class Controller:
    """The policy after some finished trials: a function of these and the settings, and nothing else.

    Attributes:
        policy: None where nothing is learned.
        parent: what the next children grow from; None before the first trial has finished.
        best: the best trial so far; of equal ones the first.
        seen: children that the policy has learned from, whole batches.
        baseline: what the next rewards are compared with; None before the first update.
    """

    def __init__(self, settings: EAS, space: GrowingSpace) -> None:
        self.settings, self.space = settings, space
        self.start = space.canonical(space.start)
        self.policy: Policy | None = None
        if settings.controller == "reinforce":
            sizes = (len(space.slots_of_blocks), max(space.slots_of_blocks), max(1, len(space.kernels)))
            words = len(_MARKS) + len(space.vocabulary)
            self.policy = Policy(words, sizes, settings.hidden, settings.embedding)
            self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=settings.policy_lr)
        self.parent: PastTrial | None = None
        self.best: PastTrial | None = None
        self.seen = 0
        self.baseline: float | None = None
        self._read = 0
        self._children = 0
        self._archs: dict[int, Arch] = {}
        self._finished: set[Arch] = set()
        self._lessons: list[tuple[list[Step], float]] = []

    def catch_up(self, history: History) -> None:
        """Take in the trials that finished since the last time; learn from them if they complete a batch."""
        for trial in history[self._read :]:
            self._archs[trial.number] = trial.arch
            self._finished.add(trial.arch)
            if math.isfinite(trial.score) and (self.best is None or trial.score > self.best.score):
                self.best = trial
            if self.parent is None and trial.arch == self.start:
                if self.policy is not None and math.isfinite(trial.score):
                    self._reward(trial.score)  # says what is wrong with it before children are trained
                self.parent = trial
            if (steps := self._steps(trial)) is not None:
                self._children += 1
                if self._children % self.settings.restart == 0:
                    self.parent = self.best
                if self.policy is not None:
                    self._lessons.append((steps, self._reward(trial.score)))
            if self.policy is not None and len(self._lessons) == self.settings.batch:
                self._update(self.policy)
        self._read = len(history)

    def draw(self, history: History, rng: Random) -> Proposal:
        """Return the start if it is not there yet, else a child."""
        if self.parent is not None:
            arch, number = self.parent.arch, self.parent.number
        else:
            numbers = zip(history.pending, history.pending_numbers, strict=False)
            arch, number = self.start, next((n for pending, n in numbers if pending == self.start), -1)
            if number < 0:
                if arch in history.tried:
                    raise StudyError(
                        f"the network that everything grows from, {arch}, was refused by a constraint or a pruner. "
                        "Loosen it, or give the space smaller options."
                    )
                return Proposal(arch)
        for _ in range(_DRAWS):
            child, note = self._child(arch, rng)
            if self.space.is_valid(child) and (child not in history.tried or child in self._finished):
                break
        return Proposal(child, parent=number, note={"seen": self.seen, **note})

    def _child(self, arch: Arch, rng: Random) -> tuple[Arch, dict[str, object]]:
        """Draw the actions one after the other; return where they lead, and they themselves."""
        widened: list[list[int]] = []
        deepened: list[list[int]] = []
        log_prob = 0.0
        for kind in "w" * self._rounds() + "d" * self.settings.deepen:
            step = Step(self.space, arch, kind)
            if not step.possible:
                break
            chances = self.policy.chances(step) if self.policy is not None else None
            log_prob += step.draw(rng, chances)
            (widened if kind == "w" else deepened).append(step.chosen)
            arch = step.taken()
            if not self.space.is_valid(arch):
                break  # to be drawn anew
        return arch, {"widen": widened, "deepen": deepened, "log_prob": round(log_prob, 6)}

    def _rounds(self) -> int:
        return self.space.widenings if self.settings.widen is None else self.settings.widen

    def _steps(self, trial: PastTrial) -> list[Step] | None:
        """Return the steps of a trial that this strategy proposed; of others None."""
        note = trial.note or {}
        if not math.isfinite(trial.score) or trial.parent is None or not {"widen", "deepen"} <= note.keys():
            return None
        arch = self._archs.get(trial.parent, self.start)
        steps = []
        for kind, actions in (("w", note["widen"]), ("d", note["deepen"])):
            for chosen in actions:
                steps.append(Step(self.space, arch, kind, list(chosen)))
                arch = steps[-1].taken()
        return steps if arch == trial.arch else None  # the user may have put another in its place

    def _reward(self, score: float) -> float:
        if self.settings.reward == "score":
            return score
        if not 0 <= score <= 1:
            raise SettingError(
                f"the score {score:g} is not from 0 to 1, as strategy 'eas' wants it for its tangent. "
                'Use reward="score", or objectives="val_accuracy".'
            )
        return math.tan(min(score, self.settings.highest) * math.pi / 2)

    def _update(self, policy: Policy) -> None:
        """Take one step of Adam along the gradient of REINFORCE."""
        rewards = [reward for _, reward in self._lessons]
        mean, decay = sum(rewards) / len(rewards), self.settings.decay
        before = mean if self.baseline is None else self.baseline
        if self.settings.baseline == "released":
            baseline = self.baseline = before + decay * (mean - before)
        else:
            baseline, self.baseline = before, decay * before + (1 - decay) * mean
        steps = [step for steps, _ in self._lessons for step in steps]
        advantages = torch.tensor([reward - baseline for steps, reward in self._lessons for _ in steps])
        with torch.enable_grad():
            log_probs, entropies = policy(steps)
            loss = -(advantages * log_probs + self.settings.entropy * entropies).sum() / len(self._lessons)
        if steps:  # nothing can grow in a full network
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.seen += len(self._lessons)
        self._lessons.clear()


@dataclass
class Step:
    """One action on an architecture, drawn or to be drawn.

    Args:
        kind: "w": some layers are widened; "d": a new layer is put in.
        chosen: places of the layers among the words, or block, layer and kernel, each a number from 0.
    """

    space: GrowingSpace
    arch: Arch
    kind: str
    chosen: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        blocks = self.space.layers(self.arch)
        ids = {word: i for i, word in enumerate((*_MARKS, *self.space.vocabulary))}
        self.words: list[int] = []
        self.places: dict[int, tuple[int, int]] = {}  # place among the words -> block and layer
        for b, block in enumerate(blocks):
            self.words += [ids["pool"]] * (b > 0)
            for i, word in enumerate(block):
                self.places[len(self.words)] = b, i
                self.words.append(ids[word])
        self.words.append(ids["out"])
        self.depths = [len(block) for block in blocks]
        self.free: list[int] = []  # places that can be widened, or blocks that have room
        if self.kind == "w":
            wider = set(self.space.widenable(self.arch))
            self.free = [place for place, where in self.places.items() if where in wider]
        else:
            slots = self.space.slots_of_blocks
            self.free = [b for b, depth in enumerate(self.depths) if 0 < depth < slots[b]]

    @property
    def possible(self) -> bool:
        """Whether there is anything to do; a round in which nothing can be widened counts, and does nothing."""
        return self.kind == "w" or bool(self.free)

    def options(self, stage: int) -> list[int]:
        """Return what may be chosen: a block, then a layer of it, then a kernel; one option is no choice."""
        if stage == 0:
            return self.free
        block = self.chosen[0]
        if stage == 1:
            return list(range(self.depths[block]))
        return list(range(len(self.space.kernels_of(block)))) or [0]

    def draw(self, rng: Random, chances: Chances | None) -> float:
        """Choose, by these chances or by equal ones, and return the log-probability."""
        total = 0.0
        if self.kind == "w":
            for place in self.free:
                chance = 0.5 if chances is None else chances.widen[place]
                if rng.random() < chance:
                    self.chosen.append(place)
                    total += math.log(max(chance, 1e-30))
                else:
                    total += math.log(max(1 - chance, 1e-30))
            return total
        for stage in range(3):
            options = self.options(stage)
            if chances is None or len(options) == 1:
                weights = [1 / len(options)] * len(options)
            else:
                weights = chances.deepen(stage, self.chosen, options)
            (option,) = rng.choices(options, weights)
            total += math.log(weights[options.index(option)] / sum(weights))
            self.chosen.append(option)
        return total

    def taken(self) -> Arch:
        """Return the architecture after the action."""
        if self.kind == "w":
            return self.space.widened_at(self.arch, [self.places[place] for place in self.chosen])
        block, layer, kernel = self.chosen
        kernels = self.space.kernels_of(block)
        arch = self.space.deepened(self.arch, block, layer, kernels[kernel] if kernels else None)
        assert arch is not None, f"{self.chosen} is no action on {self.arch}"
        return arch


class Policy(nn.Module):
    """How likely each action on a network is.

    A bidirectional LSTM reads its layers. One sigmoid, the same at every place, says whether a layer is widened. A
    second LSTM, which begins with what the first ended with, chooses a block, a layer and a kernel for a new layer;
    each choice is its next input.

    Args:
        words: in the vocabulary.
        sizes: how many blocks, layers of a block, and kernels there are to choose from.
        hidden: units of the encoder in each direction.
        embedding: of words and of choices.
    """

    def __init__(self, words: int, sizes: Sequence[int], hidden: int, embedding: int) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        # On "meta", for the usual first weights would be drawn from torch's global random numbers.
        with torch.device("meta"):
            self.word = nn.Embedding(words, embedding)
            self.encoder = nn.LSTM(embedding, hidden, batch_first=True, bidirectional=True)
            self.widen = nn.Linear(2 * hidden, 1)
            self.choice = nn.Embedding(1 + sizes[0] + sizes[1], embedding)  # nothing yet, a block, a layer
            self.decoder = nn.LSTMCell(embedding, 2 * hidden)
            self.heads = nn.ModuleList(nn.Linear(2 * hidden, size) for size in sizes)
        self.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                inputs = hidden if name.startswith("encoder") else 2 * hidden
                bound = math.sqrt(3) if name in ("word.weight", "choice.weight") else inputs**-0.5
                parameter.uniform_(-bound, bound, generator=generator)

    def read(self, steps: Sequence[Step]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return what the encoder says at every place (N, T, 2 hidden), and its last states (N, 2 hidden) twice."""
        lengths = [len(step.words) for step in steps]
        ids = torch.tensor([step.words + [0] * (max(lengths) - len(step.words)) for step in steps])
        packed = pack_padded_sequence(self.word(ids), torch.tensor(lengths), batch_first=True, enforce_sorted=False)
        outputs, (h, c) = self.encoder(packed)
        padded, _ = pad_packed_sequence(outputs, batch_first=True)
        return padded, (torch.cat([h[0], h[1]], dim=1), torch.cat([c[0], c[1]], dim=1))

    def decode(
        self, stage: int, chosen: Sequence[Sequence[int]], state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the logits of a stage (N, options), and the decoder's states, given what was chosen before it."""
        before = [0] * len(chosen)
        if stage > 0:
            offset = 1 if stage == 1 else 1 + self.sizes[0]
            before = [offset + choices[stage - 1] for choices in chosen]
        state = self.decoder(self.choice(torch.tensor(before)), state)
        return self.heads[stage](state[0]), state

    def forward(self, steps: Sequence[Step]) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies (N,) of steps that were taken.

        What cannot be widened or chosen has no part in either, and its logit no gradient.
        """
        if not steps:
            return torch.zeros(0), torch.zeros(0)
        outputs, (h, c) = self.read(steps)
        totals = torch.zeros(2, len(steps))
        wide = [n for n, step in enumerate(steps) if step.kind == "w"]
        if wide:
            logits = self.widen(outputs[wide])[:, :, 0]
            terms = widen_terms(logits, [steps[n].free for n in wide], [steps[n].chosen for n in wide])
            totals = totals.index_add(1, torch.tensor(wide), torch.stack(terms))
        deep = [n for n, step in enumerate(steps) if step.kind == "d"]
        if deep:
            chosen, state = [steps[n].chosen for n in deep], (h[deep], c[deep])
            for stage in range(3):
                logits, state = self.decode(stage, chosen, state)
                options = [steps[n].options(stage) for n in deep]
                terms = choice_terms(logits, options, [choices[stage] for choices in chosen])
                totals = totals.index_add(1, torch.tensor(deep), torch.stack(terms))
        return totals[0], totals[1]

    @torch.no_grad()
    def chances(self, step: Step) -> Chances:
        """Return the chances of what may be done in a step that is not yet taken."""
        return Chances(self, step)


class Chances:
    """What a policy thinks of one step, choice by choice."""

    def __init__(self, policy: Policy, step: Step) -> None:
        self.policy = policy
        self._stage = 0  # the next to be decoded
        outputs, self._state = policy.read([step])
        self.widen: list[float] = policy.widen(outputs[0])[:, 0].sigmoid().tolist() if step.kind == "w" else []

    @torch.no_grad()
    def deepen(self, stage: int, chosen: list[int], options: list[int]) -> list[float]:
        """Return the chance of every option of a stage. Stages come in order; where there is no choice they may not."""
        for earlier in range(self._stage, stage + 1):
            logits, self._state = self.policy.decode(earlier, [chosen], self._state)
        self._stage = stage + 1
        chances: list[float] = logits[0, options].softmax(dim=0).tolist()
        return chances


def widen_terms(logits: Tensor, free: Sequence[list[int]], chosen: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies (N,) of yes or no at the free places; logits are (N, T)."""
    mask, yes = torch.zeros_like(logits, dtype=torch.bool), torch.zeros_like(logits)
    for row, (places, taken) in enumerate(zip(free, chosen, strict=True)):
        mask[row, places] = True
        yes[row, taken] = 1.0
    terms = -nn.functional.binary_cross_entropy_with_logits(logits, yes, reduction="none")
    chance = logits.sigmoid()
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, chance, reduction="none")
    return terms.where(mask, 0.0).sum(dim=1), entropy.where(mask, 0.0).sum(dim=1)


def choice_terms(logits: Tensor, options: Sequence[list[int]], chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies (N,) of one choice among options; logits are (N, all there may be)."""
    mask = torch.zeros_like(logits, dtype=torch.bool)
    for row, places in enumerate(options):
        mask[row, places] = True
    logs = logits.masked_fill(~mask, -math.inf).log_softmax(dim=1)
    terms = logs.gather(1, torch.tensor(chosen)[:, None])[:, 0]
    safe = logs.masked_fill(~mask, 0.0)
    return terms, -(safe.exp() * safe).sum(dim=1)
