"""A search that asks light predictors first: LINAS, a lightweight iterative search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from nasbench.recipe import is_number
from nasbench.strategies.base import History, PastTrial, Proposal, Strategy
from nasbench.strategies.relaxation import check_settings
from search_spaces.base import Arch, SearchSpace

Codes = NDArray[np.int64]
"""Architectures by the positions of their options, (count, decisions)."""
Floats = NDArray[np.float64]

_DRAWS = 50
_NEXT = 5
_FOLDS = 5
_ROUNDS = 10
_REFUSED = 500
_MARGIN = 0.3


@dataclass(frozen=True)
class Linas(Strategy):
    """Fit a predictor to each objective, search the predictors, measure what they find, and again.

    The first `population` architectures are random. After every `population` finished trials, ridge regressions and
    support vector machines are fitted to all of them, the better kind for each objective, and NSGA-II looks at
    `evaluations` new architectures with these. Then its last population is measured, the best first: always one of the
    five best that are neither finished, refused nor running, so that one which fails again and again stops nothing.
    One that `space.canonical` says to be the same as a finished or a better one is left out. Where a constraint or a
    pruner refused some, one more predictor tells what will be refused, and NSGA-II ranks that behind all else; after
    `population` more refusals it learns these, and NSGA-II runs again. Failed trials teach nothing.

    The note of a proposal says what was `predicted` (like scores: higher is better), in which `generation`, and how
    well the generation before was ranked by its predictors: `kendall_taus` reads this.

    Args:
        population: finished trials in a generation, and architectures in a population of NSGA-II.
        evaluations: architectures that are predicted in each generation, fewer where the space has not as many new.
        crossover: chance that a child has two parents, every option from one or the other.
        mutation: chance of each decision to change. None: one decision of a child on average.

    Raises:
        SettingError: a setting out of range.

    Example:
        >>> import nasbench as nb
        >>> from search_spaces import NASBench201
        >>> def score(arch):
        ...     return {"score": list(arch.values()).count("nor_conv_3x3")}
        >>> result = nb.search(NASBench201(), score, "linas", objectives={"score": "maximize"}, trials=40,
        ...                    population=20, evaluations=200, progress=False)
        >>> max(trial.metrics["score"] for trial in result.trials[:20]), result.best.metrics["score"]
        (4, 6)

    Source: Cummings et al., A Hardware-Aware Framework for Accelerating Neural Architecture Search Across Modalities,
    2022, arXiv:2205.10358; populations and numbers of evaluations are those of the released code, DyNAS-T. Ours
    differs: a few strengths of the same two kinds of predictor are compared, by squared error in cross-validation
    instead of relative error, which a value near zero spoils; numbers are given to them as such too, beside one column
    for every option; children are made by uniform crossover and mutation, for options have no order in most spaces; and
    there is one NSGA-II for any number of objectives.
    """

    many_objectives: ClassVar[bool] = True

    population: int = 50
    evaluations: int = 10_000
    crossover: float = 0.9
    mutation: float | None = None

    def __post_init__(self) -> None:
        least = self.population  # of evaluations
        check_settings(
            "strategy 'linas'",
            self,
            population=(lambda v: type(v) is int and v >= 2, "a whole number, at least 2"),
            evaluations=(lambda v: type(v) is int and v >= least, f"a whole number, at least population={least}"),
            crossover=(lambda v: is_number(v) and 0 <= v <= 1, "a number from 0 to 1"),
            mutation=(lambda v: v is None or (is_number(v) and 0 < v <= 1), "a number above 0, at most 1, or None"),
        )

    def propose(self, space: SearchSpace, history: History, rng: Random) -> Arch | Proposal:
        """Draw at random for the first generation, then propose what the last whole generation's predictors found."""
        pending = set(history.pending)
        ends = [end for end, trial in enumerate(history, 1) if usable(trial)][self.population - 1 :: self.population]
        if ends and max(map(len, space.choices.values())) > 1:
            before = sum(finished < ends[-1] for finished, _ in history.refused)
            refusals = before + (len(history.refused) - before) // self.population * self.population
            key = self, space, len(ends), refusals
            generation = history.recall(key, lambda: Generation(self, space, history, len(ends), refusals))
            untried = (i for i, arch in enumerate(generation) if arch not in history.tried and arch not in pending)
            if found := list(islice(untried, _NEXT)):
                return generation.proposal(rng.choice(found))
        for _ in range(_DRAWS):
            arch = space.sample(rng)
            if arch not in history.tried and arch not in pending:
                break
        return arch


class Generation:
    """What the predictors of one generation propose, best first: a function of the trials before it.

    Args:
        settings: of the strategy.
        space: what to choose from.
        history: the finished trials and refused architectures.
        number: how many whole generations have finished; scores of later trials are not looked at.
        refusals: how many refused architectures are looked at.
    """

    def __init__(self, settings: Linas, space: SearchSpace, history: History, number: int, refusals: int) -> None:
        self.space = space
        until = [end for end, trial in enumerate(history, 1) if usable(trial)][number * settings.population - 1]
        trials = [trial for trial in history[:until] if usable(trial)]
        refused = history.refused[:refusals][:: -max(1, -(-refusals // _REFUSED))][::-1]
        accepted = [t.arch for t in history[: max([until, *(finished for finished, _ in refused)])]]
        encoder = Encoder(space)

        def encode(archs: Iterable[Arch]) -> Codes:
            return np.array([space.encode(arch) for arch in archs])

        features = encoder(encode(trial.arch for trial in trials))
        predictors = [Predictor(features, column) for column in np.array([trial.scores for trial in trials]).T]
        known = encode([*accepted, *(arch for _, arch in refused)])
        if refused:  # below 0 is what will be refused; optimisation finds where a predictor errs, hence the margin
            labels = np.repeat([1.0, -1.0], [len(accepted), len(refused)]) - _MARGIN
            predictors.append(Predictor(encoder(known), labels))

        def predict(codes: Codes) -> Floats:
            features = encoder(codes)
            columns = [predictor(features) for predictor in predictors]
            return np.stack(columns if refused else [*columns, np.ones(len(codes))], axis=1)

        self._codes, self._scores = nsga2(space, predict, known, settings, np.random.default_rng(number))
        self._classes = {space.canonical(trial.arch) for trial in trials}
        self._found: list[Arch] = []
        self._places: list[int] = []
        self._rest = iter(range(len(self._codes)))
        newest = [t for t in trials[-settings.population :] if (t.note or {}).get("generation") == number - 1]
        self.note = {"generation": number, "kendall_tau": _taus([t for t in newest if "predicted" in (t.note or {})])}

    def __iter__(self) -> Iterator[Arch]:
        yield from self._found
        for place in self._rest:
            arch = self.space.decode(self._codes[place].tolist())
            if (same := self.space.canonical(arch)) not in self._classes:
                self._classes.add(same)
                self._found.append(arch)
                self._places.append(place)
                yield arch

    def proposal(self, i: int) -> Proposal:
        """Return the architecture in this place, with what was predicted of it."""
        predicted = [float(f"{value:.6g}") for value in self._scores[self._places[i], :-1]]
        return Proposal(self._found[i], note={**self.note, "predicted": predicted})


def usable(trial: PastTrial) -> bool:
    """Whether all scores of a trial are finite."""
    return all(map(math.isfinite, trial.scores))


def _taus(trials: Sequence[PastTrial]) -> list[float | None] | None:
    """Return Kendall's tau of predicted and measured scores for each objective, or None if there is none."""
    from scipy.stats import kendalltau

    if len(trials) < 2:
        return None
    predicted = zip(*((trial.note or {})["predicted"] for trial in trials), strict=True)
    measured = zip(*(trial.scores for trial in trials), strict=True)
    taus = [float(kendalltau(p, m).statistic) for p, m in zip(predicted, measured, strict=True)]
    return [round(tau, 4) if math.isfinite(tau) else None for tau in taus]


class _Noted(Protocol):
    @property
    def note(self) -> Mapping[str, Any] | None: ...


def kendall_taus(trials: Iterable[_Noted]) -> dict[int, list[float | None]]:
    """Return how well predictors ranked the generations: Kendall's tau of predicted and measured, by objective.

    Args:
        trials: of a search with "linas", such as `result.trials`. A generation is judged by a proposal after it, so
            the last is missing, as are the first, which was random, and those with fewer than two predicted trials.
            A tau is None where all was predicted or measured equal.

    Example:
        >>> import nasbench as nb
        >>> from search_spaces import NASBench201
        >>> def score(arch):
        ...     return {"score": sum((i + 1) * (op == "nor_conv_3x3") for i, op in enumerate(arch.values()))}
        >>> result = nb.search(NASBench201(), score, "linas", objectives={"score": "maximize"}, trials=45,
        ...                    population=15, evaluations=300, progress=False)
        >>> kendall_taus(result.trials).keys() == {1}
        True
    """
    notes = (trial.note or {} for trial in trials)
    return {note["generation"] - 1: note["kendall_tau"] for note in notes if note.get("kendall_tau") is not None}


class Encoder:
    """Makes predictors' features of codes: a column for every option, and for a decision of numbers one from 0 to 1.

    Decisions with one option have no columns.

    Example:
        >>> from search_spaces import ResNet
        >>> space = ResNet(depths=(1, 2), widths=(4, 8, 16))
        >>> len(space.choices), Encoder(space)(np.array([space.encode(space.at(0))])).shape  # 3 x 2 and 3 x (3 + 1)
        (6, (1, 18))
    """

    def __init__(self, space: SearchSpace) -> None:
        # Of each decision a table with a row for every option.
        self._tables: list[Floats | None] = []
        for options in space.choices.values():
            if len(options) == 1:
                self._tables.append(None)
                continue
            table = np.eye(len(options))
            if len(options) > 2 and all(type(option) in (int, float) for option in options):
                values = np.array(options, np.float64)
                number = (values - values.min()) / (values.max() - values.min())
                table = np.concatenate([table, number[:, None]], axis=1)
            self._tables.append(table)

    def __call__(self, codes: Codes) -> Floats:
        """Return features (count, columns)."""
        columns = [table[codes[:, d]] for d, table in enumerate(self._tables) if table is not None]
        return np.concatenate(columns, axis=1)


class Predictor:
    """A ridge regression or a support vector machine, whichever cross-validation finds better.

    Args:
        features: (count, columns) of measured architectures.
        values: (count,), what was measured.

    Example:
        >>> features = np.eye(4)[[0, 1, 2, 3, 0, 1, 2, 3]]
        >>> predictor = Predictor(features, np.array([0.0, 1, 2, 3, 0, 1, 2, 3]))
        >>> predictor(np.eye(4)).argsort().tolist()
        [0, 1, 2, 3]
    """

    def __init__(self, features: Floats, values: Floats) -> None:
        from sklearn.linear_model import Ridge
        from sklearn.model_selection import KFold
        from sklearn.svm import SVR

        self._middle, self._scale = values.mean(), values.std() or 1.0
        values = (values - self._middle) / self._scale
        folds = KFold(min(_FOLDS, len(values)), shuffle=True, random_state=0)
        splits = list(folds.split(features))
        machines = [SVR(C=cost, epsilon=0.0, gamma="auto") for cost in (1.0, 10.0, 100.0)]
        for machine in machines:
            machine.random_state = 0  # it would draw a seed from numpy's global random numbers
        models: list[Any] = [*(Ridge(strength) for strength in (0.1, 1.0, 10.0)), *machines]

        def error(model: Any) -> float:
            guesses = np.empty(len(values))
            for known, asked in splits:
                guesses[asked] = model.fit(features[known], values[known]).predict(features[asked])
            return float(np.square(guesses - values).mean())

        self.model = min(models, key=error).fit(features, values)

    def __call__(self, features: Floats) -> Floats:
        """Return predicted values (count,)."""
        values: Floats = self.model.predict(features) * self._scale + self._middle
        return values


def nsga2(
    space: SearchSpace,
    predict: Callable[[Codes], Floats],
    measured: Codes,
    settings: Linas,
    rng: np.random.Generator,
) -> tuple[Codes, Floats]:
    """Search with predicted scores, higher is better; return all codes looked at, the best first, and their scores.

    First comes the last population by rank and crowding distance, then what was dropped on the way, the last dropped
    first. Nothing measured is looked at, and nothing twice, so a small space ends the search early.

    Args:
        space: what to choose from.
        predict: of codes (count, decisions) the scores, and last what is below 0 for a code that would be refused,
            (count, objectives + 1).
        measured: codes that need no prediction.
        settings: of the strategy.
        rng: for populations, crossover and mutation.

    Source: Deb et al., A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II, IEEE TEC 2002.
    """
    sizes = np.array([len(options) for options in space.choices.values()])
    rates = np.where(sizes > 1, settings.mutation or 1 / (sizes > 1).sum(), 0.0)
    known = {code.tobytes() for code in measured}
    ruled = type(space).is_valid is not SearchSpace.is_valid

    def fresh(make: Callable[[int], Codes], count: int) -> Codes:
        """Return up to `count` codes that were not known; fewer where nearly all that is made is known."""
        found: list[Codes] = []
        for _ in range(_ROUNDS):
            for code in make(settings.population):
                if len(found) < count and (key := code.tobytes()) not in known:
                    known.add(key)
                    if not ruled or space.is_valid(space.decode(code.tolist())):
                        found.append(code)
            if len(found) == count:
                break
        return np.array(found, np.int64).reshape(len(found), len(sizes))

    def random(count: int) -> Codes:
        return rng.integers(0, sizes, (count, len(sizes)))

    def children(count: int) -> Codes:
        # The population is sorted: of two drawn members the one in front is the better.
        mothers, fathers = codes[rng.integers(0, len(codes), (2, 2, count)).min(axis=1)]
        crossed = (rng.random((count, 1)) < settings.crossover) & (rng.random((count, len(sizes))) < 0.5)
        changed = rng.random((count, len(sizes))) < rates
        made = np.where(crossed, fathers, mothers)
        other: Codes = (made + rng.integers(1, np.maximum(sizes, 2), made.shape)) % sizes
        return np.where(changed, other, made)

    codes = fresh(random, settings.population)
    if not len(codes):
        return codes, np.empty((0, 0))
    scores = predict(codes)
    order = best_first(scores)
    codes, scores = codes[order], scores[order]
    dropped: list[tuple[Codes, Floats]] = []
    for looked_at in range(settings.population, settings.evaluations, settings.population):
        new = fresh(children, min(settings.population, settings.evaluations - looked_at))
        if not len(new):
            break
        codes, scores = np.concatenate([codes, new]), np.concatenate([scores, predict(new)])
        order = best_first(scores)
        codes, scores = codes[order], scores[order]
        dropped.append((codes[settings.population :], scores[settings.population :]))
        codes, scores = codes[: settings.population], scores[: settings.population]
    parts = [(codes, scores), *reversed(dropped)]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def best_first(predicted: Floats) -> NDArray[np.intp]:
    """Return positions in the order of NSGA-II: by front, within one the least crowded first; ties as they come.

    Those that would be refused come last, the likeliest to be accepted first.

    Args:
        predicted: (count, objectives + 1), scores of which higher is better; the last is below 0 for refused ones.

    Example:
        >>> best_first(np.array([[1.0, 1, 1], [3, 1, 1], [1, 3, 1], [2, 2, 1], [9, 9, -1]])).tolist()
        [1, 2, 3, 0, 4]
    """
    scores, accepted = predicted[:, :-1], predicted[:, -1]
    refused = np.flatnonzero(accepted < 0)
    left, parts = np.flatnonzero(accepted >= 0), [refused[np.argsort(-accepted[refused], kind="stable")]]
    if scores.shape[1] == 1:
        return np.concatenate([left[np.argsort(-scores[left, 0], kind="stable")], *parts])
    above = scores[:, None] - scores
    better = np.all(above >= 0, axis=2) & np.any(above > 0, axis=2)  # the row dominates the column
    fronts = []
    while len(left):
        first = ~better[np.ix_(left, left)].any(axis=0)
        front = left[first]
        fronts.append(front[np.argsort(-_crowding(scores[front]), kind="stable")])
        left = left[~first]
    return np.concatenate([*fronts, *parts])


def _crowding(scores: Floats) -> Floats:
    """Return the crowding distance of each member of a front: infinite at the ends of every objective."""
    distances = np.zeros(len(scores))
    for column in scores.T:
        order = np.argsort(column, kind="stable")
        low, high = column[order[0]], column[order[-1]]
        distances[order[[0, -1]]] = np.inf
        if high > low:
            distances[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / (high - low)
    return distances
