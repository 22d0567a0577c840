"""What a question asks of a replica, as it was recorded: texts with their lengths, and lists with their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from telerag_cli.arrays import BoolArray, IntArray

SAME_SIZE = 64
"""Lists of neighbouring sizes among which a copy of a question finds others for its own."""


@dataclass(frozen=True, eq=False)
class Follow:
    """An order of lists that lookahead follows once so many tokens of a text are written."""

    at_tokens: int
    fraction: float
    """Of the text's expected length."""
    order: IntArray
    """All lists, best first, shape (nlist,)."""
    prefetch_depth: int
    """How many of them are worth moving."""


@dataclass(frozen=True, eq=False)
class Ahead:
    """Lookahead begins; it ends with the next retrieval."""

    order: IntArray
    """All lists, best first, shape (nlist,)."""
    prefetch_depth: int
    with_others: bool
    """Whether it is the question's own, which begins for a whole micro-batch at once; another is embedded first."""


@dataclass(frozen=True, eq=False)
class Text:
    """One LLM call."""

    stage: str
    prompt_tokens: int
    """At least 1."""
    common_tokens: int
    """With which all prompts of this stage begin."""
    picks: int
    """Times that a token is chosen, the end of the text included; at least 1."""
    follows: tuple[Follow, ...] = ()
    """By ``at_tokens``, ascending."""


@dataclass(frozen=True, eq=False)
class Lookup:
    """One retrieval."""

    probes: tuple[IntArray, ...]
    """The lists that each of its queries really probes."""


Call = Text | Lookup


@dataclass(frozen=True, eq=False)
class Question:
    """A question's way through its pipeline."""

    number: int
    ranked: IntArray
    """The lists nearest to it, best first, by which the scheduler finds similar ones; as many as it looks at."""
    likely: BoolArray
    """Lists that it will probably probe, as the scheduler is told, shape (nlist,)."""
    steps: tuple[Ahead | tuple[Call, ...], ...]
    """One after the other; the calls of one step run at the same time."""

    @property
    def calls(self) -> list[Call]:
        """All of them."""
        return [call for step in self.steps if not isinstance(step, Ahead) for call in step]


def copies(questions: Sequence[Question], count: int, list_bytes: IntArray, seed: int) -> list[Question]:
    """Questions until there are ``count``: themselves first, then again and again as questions of other topics.

    A copy writes the same lengths, and its lists are others of nearly the same sizes. All copies of one turn have their
    lists changed in the same way, so that they are as similar and share as much as the originals, and little with
    others.

    Args:
        questions: at least one.
        count: how many are wanted.
        list_bytes: bytes of each list, shape (nlist,).
        seed: of the choice of lists.
    """
    random = np.random.default_rng(seed)
    made: list[Question] = []
    while len(made) < count:
        some = questions[: count - len(made)]
        if not made:
            made += some
            continue
        others = _others(list_bytes, random)
        made += [_changed(each, others) for each in some]
    return [replace(each, number=number) for number, each in enumerate(made)]


def _others(list_bytes: IntArray, random: np.random.Generator) -> IntArray:
    """For each list another one of nearly its size; every list once. Empty ones stay."""
    others: IntArray = np.arange(len(list_bytes), dtype=np.int64)
    ranked = np.argsort(list_bytes, kind="stable")
    ranked = ranked[list_bytes[ranked] > 0]
    for start in range(0, len(ranked), SAME_SIZE):
        block = ranked[start : start + SAME_SIZE]
        others[block] = random.permutation(block)
    return others


def _changed(question: Question, others: IntArray) -> Question:
    likely: BoolArray = np.zeros_like(question.likely)
    likely[others[question.likely]] = True

    def call(each: Call) -> Call:
        if isinstance(each, Lookup):
            return Lookup(tuple(others[probes] for probes in each.probes))
        return replace(each, follows=tuple(replace(follow, order=others[follow.order]) for follow in each.follows))

    steps = tuple(
        replace(step, order=others[step.order]) if isinstance(step, Ahead) else tuple(map(call, step))
        for step in question.steps
    )
    return replace(question, ranked=others[question.ranked], likely=likely, steps=steps)
