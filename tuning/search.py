"""The search: settings are proposed, judged on few prompts, the best on more, and one is confirmed on fresh ones."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..benchmarks.statistics import Ratio, paired_ratio
from ..benchmarks.systems import ImageGenerator
from ..errors import CnppError, UserError
from ..install import cannot_import
from ..runtime.settings.preset import Levers
from .cost import CostModel
from .space import describe, first_guesses, suggest
from .trials import Compared, Trials

logger = logging.getLogger(__name__)

_REPORT_EVERY = 20.0  # seconds
_SURVIVORS = (1 / 4, 1 / 2)  # of the settings, from one number of prompts to its double
_MARGIN = 3.0
"""Half of a trial's prompts are enough where even the better end of the loss is so many times the budget."""


@dataclass(frozen=True)
class SearchSettings:
    """How much is tried.

    Attributes:
        budget: points that a setting may lose: the upper end of the paired 95 % interval.
        trials: settings that are proposed.
        prompts: for each of them; the best go on with twice and four times as many.
        confirm: fresh prompts for each setting that is to be confirmed.
        attempts: settings that may be tried to confirm, each on prompts of its own.
        rounds: requests of both settings, in turn, that are timed for each of these.
        seed: of the proposals.

    Raises:
        UserError: a value cannot be used.
    """

    budget: float = 1.0
    trials: int = 48
    prompts: int = 8
    confirm: int = 96
    attempts: int = 4
    rounds: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.budget):
            raise UserError(f"a budget is a number of points, not {self.budget}")
        for name, least in (("trials", 1), ("prompts", 2), ("confirm", 8), ("attempts", 1), ("rounds", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} must be at least {least}, not {getattr(self, name)}")

    @property
    def searched(self) -> int:
        """How many prompts the search may use; those after them are fresh."""
        return self.prompts << len(_SURVIVORS)

    def fresh(self, attempt: int) -> range:
        """The prompts of an attempt to confirm, counted from 0; those after the last attempt's are the ablation's."""
        first = self.searched + attempt * self.confirm
        return range(first, first + self.confirm)

    @property
    def needed(self) -> int:
        """Prompts that a search can use at most, with the ablation's."""
        return self.searched + (self.attempts + 1) * self.confirm


@dataclass(frozen=True)
class Candidate:
    """A setting that was tried: seconds of a request by the cost model, and its comparison on the most prompts."""

    levers: Levers
    seconds: float
    compared: Compared

    def passes(self, budget: float, prompts: int) -> bool:
        """Whether it would be within the budget on so many prompts, if its loss were the same there."""
        loss, share = self.compared.loss, math.sqrt(self.compared.prompts / prompts)
        return loss["value"] + (loss["high"] - loss["value"]) * share <= budget


@dataclass(frozen=True)
class Attempt:
    """A candidate on fresh prompts, and how many times faster than the exact setting it was there."""

    candidate: Candidate
    speedup: Ratio


class Search:
    """A search for one condition. What it drew before is read from records, so it goes on where it was interrupted."""

    def __init__(
        self, trials: Trials, cost: CostModel, settings: SearchSettings, exact_cost: CostModel | None = None
    ) -> None:
        self._trials = trials
        self._cost = cost
        self._settings = settings
        self.exact_seconds = (exact_cost or cost).seconds(trials.exact_request(0))

    def candidates(self) -> list[Candidate]:
        """Every setting that was tried, in the order of the trials; those that went on have more prompts.

        Raises:
            CnppError: optuna is not installed.
        """
        found = self._propose()
        logger.info(f"{len(found)} settings tried on {self._settings.prompts} prompts")
        survivors = list(found.values())
        for rung, share in enumerate(_SURVIVORS, 1):
            prompts = self._settings.prompts * 2**rung
            survivors = self._best(survivors, max(self._settings.attempts, round(len(survivors) * share)))
            judged = [self._candidate(c.levers, range(prompts)) for c in survivors]
            found |= {c.levers: c for c in judged}
            survivors = judged
            logger.info(f"{len(judged)} of them on {prompts} prompts")
        return list(found.values())

    def confirm(self, candidates: Sequence[Candidate]) -> list[Attempt]:
        """The fastest that promise to pass, on fresh prompts, until one does: the last of the result.

        Raises:
            UserError: none is within the budget.
        """
        s = self._settings
        faster = [c for c in candidates if c.seconds < self.exact_seconds]
        most = max((c.compared.prompts for c in faster), default=0)
        judged = sorted((c for c in faster if c.compared.prompts == most), key=lambda c: c.seconds)
        ordered = sorted(judged, key=lambda c: not c.passes(s.budget, s.confirm))
        attempts: list[Attempt] = []
        for number, candidate in enumerate(ordered[: s.attempts]):
            fresh = s.fresh(number)
            confirmed = self._candidate(candidate.levers, fresh)
            attempts.append(Attempt(confirmed, self._timed(candidate.levers, fresh)))
            loss = confirmed.compared.loss
            within = loss["high"] <= s.budget
            logger.info(
                f"{describe(candidate.levers)}: {'within' if within else 'beyond'} the budget on {s.confirm} fresh "
                f"prompts, {loss['value']:.2f} points lost ({loss['low']:.2f} to {loss['high']:.2f})"
            )
            if within:
                return attempts
        raise UserError(self._nothing(attempts))

    def ablation(self, settings: Sequence[Levers]) -> list[Candidate]:
        """Settings on fresh prompts that no attempt has."""
        fresh = self._settings.fresh(self._settings.attempts)
        return [self._candidate(levers, fresh) for levers in settings]

    def _propose(self) -> dict[Levers, Candidate]:
        try:
            import optuna
        except ImportError as e:
            raise CnppError(cannot_import("cnpp-trt tune", e, "optuna")) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        s, bundle = self._settings, self._trials.pipeline.bundle
        sampler = optuna.samplers.TPESampler(seed=s.seed, n_startup_trials=min(16, s.trials))
        study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        for guess in first_guesses(bundle):
            study.enqueue_trial(dict(guess))
        found: dict[Levers, Candidate] = {}
        said, start = time.perf_counter(), time.perf_counter()
        for number in range(s.trials):
            trial = study.ask()
            levers = suggest(trial, bundle)
            if levers not in found:
                found[levers] = self._judged(levers)
            candidate = found[levers]
            study.tell(trial, [candidate.seconds / self.exact_seconds, candidate.compared.loss["value"]])
            if (now := time.perf_counter()) - said > _REPORT_EVERY:
                logger.info(f"{number + 1} of {s.trials} trials in {now - start:.0f} s")
                said = now
        return found

    def _judged(self, levers: Levers) -> Candidate:
        half = max(2, self._settings.prompts // 2)
        first = self._candidate(levers, range(half))
        if first.compared.loss["low"] > _MARGIN * max(self._settings.budget, 0.1):
            return first
        return self._candidate(levers, range(self._settings.prompts))

    def _candidate(self, levers: Levers, indices: Sequence[int]) -> Candidate:
        seconds = self._cost.seconds(self._trials.request(levers, 0))
        return Candidate(levers, seconds, self._trials.compare(levers, indices))

    def _best(self, candidates: Sequence[Candidate], count: int) -> list[Candidate]:
        """The fastest of those within the budget, filled up with those that lose least."""
        budget = self._settings.budget
        within = sorted((c for c in candidates if c.compared.loss["value"] <= budget), key=lambda c: c.seconds)
        beyond = sorted((c for c in candidates if c not in within), key=lambda c: c.compared.loss["value"])
        return [*within, *beyond][:count]

    def _timed(self, levers: Levers, indices: Sequence[int]) -> Ratio:
        """How many times faster than the exact setting."""
        return self.race(levers, indices, {"": self._trials.reference})[""]

    def race(self, levers: Levers, indices: Sequence[int], others: Mapping[str, ImageGenerator]) -> dict[str, Ratio]:
        """How many times faster these levers are than the exact setting on each of `others`.

        All take turns, and every round has a prompt of its own that no encoding is kept of.
        """
        trials = self._trials
        runs: list[tuple[str | None, ImageGenerator]] = [(None, trials.pipeline), *others.items()]
        seconds: dict[str | None, list[float]] = {name: [] for name, _ in runs}
        for round_ in range(self._settings.rounds + 1):
            index = indices[round_ % len(indices)]
            for name, run in runs if round_ % 2 else runs[::-1]:
                request = trials.request(levers, index) if name is None else trials.exact_request(index)
                trials.pipeline.forget_encodings()
                trials.reference.forget_encodings()
                start = time.perf_counter()
                run(request)
                if round_:  # the first one binds launches
                    seconds[name].append(time.perf_counter() - start)
        return {name: paired_ratio(seconds[name], seconds[None]) for name in others}

    def _nothing(self, attempts: Sequence[Attempt]) -> str:
        s = self._settings
        budget = f"{s.budget:g} points of {self._trials.condition}"
        if not attempts:
            return f"no setting that was tried is faster than the exact one: give more --trials than {s.trials}"
        closest = min((a.candidate for a in attempts), key=lambda c: c.compared.loss["high"])
        loss = closest.compared.loss
        return (
            f"no setting stays within {budget}: the closest, {describe(closest.levers)}, loses {loss['value']:.2f} "
            f"({loss['low']:.2f} to {loss['high']:.2f}) on {closest.compared.prompts} fresh prompts; "
            "give a larger --budget, or more --trials or --confirm"
        )
