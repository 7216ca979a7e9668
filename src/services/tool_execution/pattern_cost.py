"""What a regular expression of a tool's schema may cost to evaluate, told from its text.

Python's `re` backtracks: `^(a+)+$` takes longer than anyone lives on forty characters, and can't be interrupted. So a
pattern is matched only where a bound on its steps is known beforehand: the number of ways through it times the length
of one way. The bound is crude and on the safe side; what is above it is left to the tool's server.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_MAX_DEPTH: Final = 30
_MAX_BITS: Final = 64
"""Size of a number in the arithmetic; what needs more is far above any bound of use."""
_MAX_PATTERN: Final = 10_000
_REPEAT: Final = re.compile(r"\{(\d{0,9})(?:(,)(\d{0,9}))?\}")
_GROUPS: Final = re.compile(r"\?(?::|=|!|<=|<!|P<\w+>)")
"""What may follow an opening parenthesis; back references, conditions and flags make a pattern unknown."""


@dataclass(frozen=True, slots=True)
class PatternCost:
    """At most ``ways * length ** degree * steps`` steps on a string of that length."""

    ways: int = 1
    degree: int = 0
    steps: int = 1

    def on(self, length: int) -> int:
        """The bound for a string of so many characters."""
        return int(self.ways * self.steps * max(1, length) ** self.degree)

    def then(self, other: PatternCost) -> PatternCost:
        """Of a sequence: every way through one with every way through the other."""
        return PatternCost(self.ways * other.ways, self.degree + other.degree, self.steps + other.steps)

    def either(self, other: PatternCost) -> PatternCost:
        """Of alternatives."""
        return PatternCost(self.ways + other.ways, max(self.degree, other.degree), max(self.steps, other.steps) + 1)


class _Unknown(Exception):
    """Nothing can be said about the pattern."""


def pattern_cost(pattern: str) -> PatternCost | None:
    """The cost of `re.search` with the pattern, or None where it has no bound or none can be told."""
    if len(pattern) > _MAX_PATTERN:
        return None
    parser = _Parser(pattern)
    try:
        cost = parser.alternatives(0)
    except _Unknown:
        return None
    if parser.at != len(pattern):
        return None
    # Alternatives at the top are anchored one by one, and `re` tries every place for an anchor in MULTILINE alone.
    anchored = pattern.startswith(("^", "\\A")) and not parser.top_alternatives
    return cost if anchored else PatternCost(cost.ways, cost.degree + 1, cost.steps)


class _Parser:
    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self.at = 0
        self.top_alternatives = False

    def alternatives(self, depth: int) -> PatternCost:
        if depth > _MAX_DEPTH:
            raise _Unknown
        cost = self._sequence(depth)
        while self._pattern.startswith("|", self.at):
            self.at += 1
            self.top_alternatives |= depth == 0
            cost = _checked(cost.either(self._sequence(depth)))
        return cost

    def _sequence(self, depth: int) -> PatternCost:
        cost = PatternCost()
        while self.at < len(self._pattern) and self._pattern[self.at] not in "|)":
            cost = _checked(cost.then(self._repeated(self._atom(depth))))
        return cost

    def _atom(self, depth: int) -> PatternCost:
        char = self._pattern[self.at]
        self.at += 1
        if char == "(":
            if self._pattern.startswith("?", self.at):
                kind = _GROUPS.match(self._pattern, self.at)
                if kind is None:
                    raise _Unknown
                self.at = kind.end()
            inside = self.alternatives(depth + 1)
            if not self._pattern.startswith(")", self.at):
                raise _Unknown
            self.at += 1
            return PatternCost(inside.ways, inside.degree, inside.steps + 1)
        if char == "[":
            self._character_class()
        elif char == "\\":
            if self._pattern[self.at : self.at + 1] in tuple("123456789"):
                raise _Unknown  # a back reference
            self.at += 1
        return PatternCost()

    def _character_class(self) -> None:
        if self._pattern.startswith("^", self.at):
            self.at += 1
        first = self.at
        while self.at < len(self._pattern):
            char = self._pattern[self.at]
            if char == "]" and self.at > first:
                self.at += 1
                return
            self.at += 2 if char == "\\" else 1
        raise _Unknown

    def _repeated(self, atom: PatternCost) -> PatternCost:
        bounds = self._bounds()
        if bounds is None:
            return atom
        low, high = bounds
        if self.at < len(self._pattern) and self._pattern[self.at] in "?+":
            self.at += 1  # lazy or possessive: the same ways or fewer
        if self._bounds() is not None:
            raise _Unknown
        plain = atom.ways == 1 and atom.degree == 0
        if high is None:
            if not plain:
                raise _Unknown  # a choice within an endless repetition: exponential
            return PatternCost(1, 1, atom.steps * (low + 1))
        if plain:
            return _checked(PatternCost(max(1, high - low + 1), 0, atom.steps * (low + 1)))
        if high * atom.ways.bit_length() > _MAX_BITS:
            raise _Unknown
        ways = (high - low + 1) * atom.ways**high
        return _checked(PatternCost(max(1, ways), atom.degree * high, atom.steps * (high + 1)))

    def _bounds(self) -> tuple[int, int | None] | None:
        """The bounds of the quantifier at this place, None in the second for no upper one."""
        char = self._pattern[self.at : self.at + 1]
        if char in ("*", "+", "?"):
            self.at += 1
            return (1 if char == "+" else 0), (1 if char == "?" else None)
        found = _REPEAT.match(self._pattern, self.at)
        if found is None or found.group() == "{}":
            return None
        self.at = found.end()
        low = int(found[1] or 0)
        if found[2] is None:
            return low, low
        return low, int(found[3]) if found[3] else None


def _checked(cost: PatternCost) -> PatternCost:
    if max(cost.ways, cost.steps).bit_length() > _MAX_BITS or cost.degree > _MAX_BITS:
        raise _Unknown
    return cost
