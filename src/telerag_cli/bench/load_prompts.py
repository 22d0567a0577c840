"""What a load asks: questions of a file, conversations of ShareGPT, or random words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from telerag_cli.engine.questions import QUESTION_KEYS
from telerag_cli.errors import InputError

PROMPT_KEYS = ("prompt", *QUESTION_KEYS)
HUMAN = ("human", "user")
"""Who asks, in ShareGPT's conversations."""
ORDER_STREAM, WORD_STREAM = 1, 2
"""Told apart from each other and from the arrivals, so that each is the same whatever becomes of the others."""

_WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government number "
    "night point home water room mother area money story fact month lot right study book eye job word "
    "business issue side kind head house service friend father power hour game line end member law car "
    "city community name president team minute idea body information back parent face others level "
    "office door health person art war history party result change morning reason"
)
WORDS = tuple(_WORDS.split())
"""Common enough to be one token each in most vocabularies."""


@dataclass(frozen=True)
class Prompt:
    """A request to be made."""

    text: str
    max_tokens: int | None = None
    """Tokens of the answer at most; None for the same as all others."""


def read_custom(lines: IO[bytes], name: str) -> list[Prompt]:
    """Prompts of a file: one a line, or JSON lines with a prompt or question and perhaps ``output_tokens``.

    Args:
        lines: UTF-8 text; empty lines are skipped.
        name: of the source, for messages.

    Raises:
        InputError: a line is none, or there is no line.
    """
    prompts = []
    for number, raw in enumerate(lines, 1):
        where = f"{name}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where} is not UTF-8: {error.reason} at byte {error.start}.", remedy="Save the file as UTF-8."
            ) from error
        if line.startswith("{"):
            prompts.append(_from_json(line, where))
        elif line:
            prompts.append(Prompt(line))
    return _some(prompts, name)


def _from_json(line: str, where: str) -> Prompt:
    try:
        value: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}.", remedy="Correct the line.") from error
    text = next((value[key] for key in PROMPT_KEYS if value.get(key) is not None), None)
    if not isinstance(text, str) or not text.strip():
        raise InputError(
            f"{where} has {sorted(value)} and no text as one of {', '.join(PROMPT_KEYS)}.",
            remedy="Correct the line, or remove it.",
        )
    tokens = value.get("output_tokens")
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1):
        raise InputError(
            f"{where} has output_tokens {json.dumps(tokens)}, and it should be a whole number above 0.",
            remedy="Correct the line.",
        )
    return Prompt(text.strip(), tokens)


def read_sharegpt(lines: IO[bytes], name: str) -> tuple[list[Prompt], int]:
    """The first question of each conversation, and how many conversations have none.

    Args:
        lines: JSON: a list of objects with ``conversations``, each a list of ``from`` and ``value``.
        name: of the source, for messages.

    Raises:
        InputError: it is no ShareGPT, or has no question.
    """
    try:
        value = json.load(lines)
    except ValueError as error:
        raise InputError(f"{name} is not JSON: {error}.", remedy="Name a file of ShareGPT's form.") from error
    if not isinstance(value, list):
        raise InputError(
            f"{name} is a JSON {type(value).__name__} and not ShareGPT's list of conversations.",
            remedy="Name another file, or another --dataset-name.",
        )
    found = [_first_question(item) for item in value]
    prompts = [Prompt(text) for text in found if text]
    return _some(prompts, name), len(found) - len(prompts)


def _first_question(item: Any) -> str | None:
    turns = item.get("conversations") if isinstance(item, dict) else None
    first = turns[0] if isinstance(turns, list) and turns else None
    if not isinstance(first, dict) or first.get("from") not in HUMAN or not isinstance(first.get("value"), str):
        return None
    return str(first["value"]).strip() or None


def _some(prompts: list[Prompt], name: str) -> list[Prompt]:
    if not prompts:
        raise InputError(f"{name} holds no prompt.", remedy="Give one a line, or JSON objects with a prompt.")
    return prompts


def shuffled(prompts: Sequence[Prompt], seed: int) -> Iterator[Prompt]:
    """The prompts in an order that the seed decides, again and again in the same order."""
    order = np.random.default_rng((seed, ORDER_STREAM)).permutation(len(prompts))
    while True:
        for number in order:
            yield prompts[number]


def random_prompts(words: int, max_tokens: int, range_ratio: float, seed: int) -> Iterator[Prompt]:
    """Prompts of random words, no two alike unless they are very short.

    Args:
        words: of a prompt, on average.
        max_tokens: of an answer, on average.
        range_ratio: both are drawn evenly from this share below to this share above, as vLLM does.
        seed: decides all of it.
    """
    draw = np.random.default_rng((seed, WORD_STREAM))

    def around(mean: int) -> int:
        low, high = int(mean * (1 - range_ratio)), int(mean * (1 + range_ratio))
        return max(int(draw.integers(low, high, endpoint=True)), 1)

    while True:
        text = " ".join(WORDS[place] for place in draw.integers(len(WORDS), size=around(words)))
        yield Prompt(text, around(max_tokens))
