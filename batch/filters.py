"""`--filter 'score.seg >= 80 and score.depth <= 40'`: which images follow their conditions well enough."""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..conditions import CONDITIONS
from ..errors import UserError
from ..messages import printable, unknown_choice

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_TERM = re.compile(r"score\.(\w{1,40})\s{0,9}(>=|<=|>|<)\s{0,9}(-?\d{1,9}(?:\.\d{1,9})?)", re.ASCII)
_MOST = 16  # terms


@dataclass(frozen=True)
class Term:
    """One comparison of a condition's score with a number."""

    condition: str
    sign: str
    limit: float

    def holds(self, score: float) -> bool:
        """Whether a score satisfies it."""
        return _COMPARE[self.sign](score, self.limit)

    def margin(self, score: float) -> float:
        """How far a score is on the right side of the limit; negative on the wrong one."""
        return score - self.limit if ">" in self.sign else self.limit - score


@dataclass(frozen=True)
class Filter:
    """Terms that must all hold; one on a condition that an image does not have counts as satisfied."""

    terms: tuple[Term, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Filter":
        """A filter as it is written: `score.CONDITION >= NUMBER`, several joined by `and`.

        Raises:
            UserError: it is not of this form.
        """
        parts = re.split(r"\s+and\s+", text.strip()[:2000])
        terms = []
        for part in parts[: _MOST + 1]:
            found = _TERM.fullmatch(part.strip())
            if not found:
                shown = printable(repr(part), 60)
                raise UserError(f"cannot read --filter {shown}: give score.seg >= 80, several joined by and")
            if found[1] not in CONDITIONS:
                raise unknown_choice("condition in --filter", found[1], CONDITIONS)
            terms.append(Term(found[1], found[2], float(found[3])))
        if len(terms) > _MOST:
            raise UserError(f"--filter has more than {_MOST} comparisons: leave some out")
        return cls(tuple(terms))

    def passes(self, scores: Mapping[str, float]) -> bool:
        """Whether an image is good enough by its scores."""
        return all(term.holds(scores[term.condition]) for term in self.terms if term.condition in scores)

    def rank(self, scores: Mapping[str, float]) -> tuple[int, float]:
        """For comparing images that do not pass: the satisfied terms, then the margin of the first other one."""
        own = [term for term in self.terms if term.condition in scores]
        missed = [term.margin(scores[term.condition]) for term in own if not term.holds(scores[term.condition])]
        return len(own) - len(missed), missed[0] if missed else 0.0
