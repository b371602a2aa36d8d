"""A recurrent controller that learns by reinforcement which options to choose: the search of NASNet, for any space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, nn

from nasbench.errors import SettingError
from nasbench.recipe import is_number
from nasbench.strategies.base import History, PastTrial, Proposal, Strategy
from nasbench.strategies.relaxation import COUNT, check_settings
from search_spaces.base import Arch, SearchSpace, nearest

ALGORITHMS = ("ppo", "reinforce")
_DRAWS = 100


@dataclass(frozen=True)
class Reinforce(Strategy):
    """An LSTM draws one option after the other; every `batch` finished trials it learns to draw the better ones.

    The reward of a trial is its score. What is proposed is drawn from the policy, so an architecture that it likes
    comes again, more often the surer it is. Drawn anew are architectures that break the space's rules or were refused
    before, by a constraint or a pruner; after a hundred draws in vain one is taken at random from the space. Trials
    that failed, have no finite score, or were not proposed by this strategy teach nothing.

    Args:
        algorithm: "ppo": several steps on each batch, none of which moves a decision's probability too far.
            "reinforce": one step along the score function's gradient, in which an architecture that is less likely by
            now (it was drawn by an older policy, beside other workers) weighs less.
        policy_lr: learning rate of Adam.
        batch: finished trials in an update.
        passes: steps of PPO on a batch.
        clip_ratio: how far the probability of a decision may move from what it was when drawn, for PPO.
        entropy: weight of the policy's entropy beside the reward, in the reward's unit.
        baseline: weight of the past in the moving average of rewards that a reward is compared with. The first batch
            is compared with its own mean.
        hidden: units of the LSTM.

    Raises:
        SettingError: an unknown algorithm, or a setting out of range.

    Example:
        >>> from search_spaces import NASBench201
        >>> proposal = Reinforce().propose(NASBench201(), History(), Random(0))
        >>> proposal.arch in NASBench201(), proposal.note["seen"]
        (True, 0)

    Source: Zoph et al., Learning Transferable Architectures for Scalable Image Recognition, CVPR 2018,
    arXiv:1707.07012, with PPO (Schulman et al., arXiv:1707.06347). The defaults are the paper's but for `policy_lr`:
    its 0.00035 is meant for 20,000 architectures, the default here, found on NAS-Bench-201, for hundreds. The paper
    gives neither `passes` nor `clip_ratio`: these are PPO's usual ones. Weights begin between -0.1 and 0.1, as there,
    always the same ones: what differs between seeds is what is drawn. Decisions with one option are left out.
    """

    algorithm: str = "ppo"
    policy_lr: float = 0.002
    batch: int = 20
    passes: int = 4
    clip_ratio: float = 0.2
    entropy: float = 1e-5
    baseline: float = 0.95
    hidden: int = 100

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise SettingError(
                f"strategy 'reinforce' has no algorithm={self.algorithm!r}; {nearest(self.algorithm, ALGORITHMS)}"
            )
        check_settings(
            "strategy 'reinforce'",
            self,
            **dict.fromkeys(("batch", "passes", "hidden"), COUNT),
            policy_lr=(lambda v: is_number(v) and v > 0, "a number above 0"),
            clip_ratio=(lambda v: is_number(v) and 0 < v < 1, "a number between 0 and 1"),
            entropy=(lambda v: is_number(v) and v >= 0, "a number, 0 or more"),
            baseline=(lambda v: is_number(v) and 0 <= v < 1, "a number from 0 to below 1"),
        )

    def propose(self, space: SearchSpace, history: History, rng: Random) -> Arch | Proposal:
        """Draw from the policy as it is after all whole batches of the history."""
        if all(len(options) == 1 for options in space.choices.values()):
            return space.sample(rng)
        controller = history.recall((self, space), lambda: Controller(self, space))
        controller.catch_up(history)
        return controller.draw(history, rng)


class Controller:
    """The policy after some finished trials: a function of these and the settings, and nothing else.

    Args:
        settings: of the strategy.
        space: with at least one decision that has several options.

    Attributes:
        seen: trials it has learned from, whole batches.
        baseline: moving average of their rewards; None before the first update.
    """

    def __init__(self, settings: Reinforce, space: SearchSpace) -> None:
        self.settings, self.space = settings, space
        self.free = [i for i, options in enumerate(space.choices.values()) if len(options) > 1]
        sizes = [len(options) for options in space.choices.values() if len(options) > 1]
        self.policy = Policy(sizes, settings.hidden)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=settings.policy_lr)
        self.seen = 0
        self.baseline: float | None = None
        self._read = 0
        self._finished: set[Arch] = set()
        self._lessons: list[tuple[list[int], list[float], float]] = []

    def catch_up(self, history: History) -> None:
        """Learn from the trials that finished since the last time, if they complete a batch."""
        for trial in history[self._read :]:
            self._finished.add(trial.arch)
            lesson = self._lesson(trial)
            if lesson is not None:
                self._lessons.append(lesson)
            if len(self._lessons) == self.settings.batch:
                self._update()
                self.seen += len(self._lessons)
                self._lessons.clear()
        self._read = len(history)

    def draw(self, history: History, rng: Random) -> Proposal:
        """Return an architecture drawn from the policy, with the log-probabilities of its decisions."""
        for draws in (1, _DRAWS - 1):
            actions, log_probs = self.policy.draw([[rng.random() for _ in self.free] for _ in range(draws)])
            for chosen, logs in zip(actions.tolist(), log_probs.tolist(), strict=True):
                arch = self._arch(chosen)
                refused = arch in history.tried and arch not in self._finished
                if not refused and self.space.is_valid(arch):
                    return self._proposal(arch, chosen, logs)
        arch = self.space.sample(rng)
        chosen = self._actions(arch)
        with torch.no_grad():
            logs = self.policy(torch.tensor([chosen]))[0][0].tolist()
        return self._proposal(arch, chosen, logs)

    def _proposal(self, arch: Arch, actions: list[int], log_probs: list[float]) -> Proposal:
        note = {"seen": self.seen, "actions": actions, "log_probs": [round(value, 6) for value in log_probs]}
        return Proposal(arch, note=note)

    def _arch(self, actions: Sequence[int]) -> Arch:
        code = [0] * len(self.space.choices)
        for i, action in zip(self.free, actions, strict=True):
            code[i] = action
        return self.space.decode(code)

    def _actions(self, arch: Arch) -> list[int]:
        code = self.space.encode(arch)
        return [code[i] for i in self.free]

    def _lesson(self, trial: PastTrial) -> tuple[list[int], list[float], float] | None:
        """Return actions, log-probabilities and reward of a trial that this strategy proposed; of others None."""
        note = trial.note or {}
        if not math.isfinite(trial.score) or not {"actions", "log_probs"} <= note.keys():
            return None
        if note["actions"] != self._actions(trial.arch):  # the user's own, put in the place of what was proposed
            return None
        return note["actions"], note["log_probs"], trial.score

    def _update(self) -> None:
        actions, log_probs, rewards = zip(*self._lessons, strict=True)
        baseline = self.baseline if self.baseline is not None else sum(rewards) / len(rewards)
        advantages = torch.tensor([reward - baseline for reward in rewards])
        for reward in rewards:
            baseline = self.settings.baseline * baseline + (1 - self.settings.baseline) * reward
        self.baseline = baseline
        batch = torch.tensor(actions), torch.tensor(log_probs), advantages
        for _ in range(self.settings.passes if self.settings.algorithm == "ppo" else 1):
            with torch.enable_grad():
                loss = policy_loss(self.policy, *batch, self.settings)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def policy_loss(
    policy: Policy, actions: Tensor, old_log_probs: Tensor, advantages: Tensor, settings: Reinforce
) -> Tensor:
    """Return what an update makes smaller, the mean over a batch.

    Args:
        policy: as it is now.
        actions: (B, decisions), what was drawn.
        old_log_probs: (B, decisions), how likely it was then.
        advantages: (B,), rewards less the baseline.
        settings: of the strategy.
    """
    log_probs, entropies = policy(actions)
    if settings.algorithm == "ppo":
        ratios = (log_probs - old_log_probs).exp()
        clipped = ratios.clamp(1 - settings.clip_ratio, 1 + settings.clip_ratio)
        gains = torch.minimum(ratios * advantages[:, None], clipped * advantages[:, None]).sum(dim=1)
    else:
        likelihood = log_probs.sum(dim=1)
        weights = (likelihood.detach() - old_log_probs.sum(dim=1)).exp().clamp(max=1)
        gains = weights * advantages * likelihood
    loss: Tensor = -(gains + settings.entropy * entropies).mean()
    return loss


class Policy(nn.Module):
    """A distribution over assignments: an LSTM reads the options chosen so far, a softmax draws the next.

    Every decision has its own softmax, and its own embedding of each of its options for the next step.

    Args:
        sizes: how many options each decision has.
        hidden: units of the LSTM.

    Example:
        >>> policy = Policy([2, 5], hidden=8)
        >>> log_probs, entropies = policy(torch.tensor([[1, 4], [0, 2], [1, 1]]))
        >>> log_probs.shape, entropies.shape
        (torch.Size([3, 2]), torch.Size([3]))
    """

    def __init__(self, sizes: Sequence[int], hidden: int) -> None:
        super().__init__()
        shape = len(sizes), max(sizes), hidden
        # On "meta", for the usual first weights would be drawn from torch's global random numbers.
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True, device="meta").to_empty(device="cpu")
        self.inputs = nn.Parameter(torch.empty(shape))  # of decision d: the options of decision d - 1
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[:2]))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-0.1, 0.1, generator=generator)
        none = torch.tensor([[option >= size for option in range(max(sizes))] for size in sizes])
        self.register_buffer("none", none)
        self.none: Tensor
        self.last = [size - 1 for size in sizes]

    def forward(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities of actions (B, decisions), of the same shape, and entropies (B,).

        An entropy is the sum of those of the decisions, each given the actions before it.
        """
        before = torch.cat([torch.zeros_like(actions[:, :1]), actions[:, :-1]], dim=1)
        states, _ = self.lstm(self.inputs[torch.arange(len(self.last)), before])
        logits = torch.einsum("bdh,dmh->bdm", states, self.weight) + self.bias
        logs = logits.masked_fill(self.none, -1e9).log_softmax(dim=2)
        return logs.gather(2, actions[:, :, None])[:, :, 0], -(logs.exp() * logs).sum(dim=(1, 2))

    @torch.no_grad()
    def draw(self, numbers: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
        """Return actions and their log-probabilities, both (B, decisions), from uniform numbers of that shape."""
        uniform = torch.tensor(numbers)
        action, state = torch.zeros(len(numbers), dtype=torch.long), None
        actions, log_probs = [], []
        for d, last in enumerate(self.last):
            output, state = self.lstm(self.inputs[d, action, None], state)
            logits = torch.addmm(self.bias[d, : last + 1], output[:, 0], self.weight[d, : last + 1].T)
            logs = logits.log_softmax(dim=1)
            action = (logs.exp().cumsum(dim=1) <= uniform[:, d, None]).sum(dim=1).clamp(max=last)
            actions.append(action)
            log_probs.append(logs.gather(1, action[:, None])[:, 0])
        return torch.stack(actions, dim=1), torch.stack(log_probs, dim=1)
