"""Which tokens a grammar allows next, by llguidance, and what of a JSON schema it can keep.

A client's schema never reaches a parser before `check_schema` has bounded it. llguidance builds what a repetition needs
while the text is written, so that a `maxLength` of a million costs nothing, and has limits of its own for what a step
may take.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from telerag_cli.arrays import BoolArray
from telerag_cli.errors import InputError, one_line

MAX_SCHEMA_BYTES = 128 << 10
MAX_SCHEMA_VALUES = 5_000
"""Properties, choices and subschemas together; compiling so many takes less than a second of one core."""
MAX_SCHEMA_DEPTH = 60
WHITE_SPACE = r"( |\n[ \t]{0,20})?"
"""Between the parts of JSON: bounded, or a small model can write line ends for ever."""


class Constraint:
    """What the text of one request may go on with."""

    def __init__(self, tokenizer: LLTokenizer, grammar: str) -> None:
        """Compile the grammar; this takes milliseconds, and lets other threads run.

        Raises:
            InputError: the grammar cannot be followed.
        """
        self._vocab_size = tokenizer.vocab_size
        self._ends = frozenset(tokenizer.eos_tokens)
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)
        self._check()

    def allows(self, token: int) -> bool:
        """Whether the text may go on with this token, or end with it."""
        allowed = self._matcher.validate_tokens([token]) == 1 or (token in self._ends and self._matcher.is_accepting())
        self._check()
        return allowed

    def allowed(self) -> BoolArray:
        """Return all tokens that the text may go on or end with, shape (vocab_size,)."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(mask, bitorder="little", count=self._vocab_size).astype(bool)

    def accept(self, token: int) -> None:
        """Note that the text goes on with this token."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(
                f"The grammar cannot be followed: {one_line(self._matcher.get_error(), 160)}.",
                remedy="Make the schema simpler.",
            )


def regex_grammar(pattern: str) -> str:
    """Return llguidance's grammar for a regular expression of Rust's."""
    return str(LLMatcher.grammar_from_regex(pattern))


def schema_grammar(schema: Mapping[str, Any]) -> str:
    """Return llguidance's grammar for the JSON of a schema; of ``oneOf`` it takes any."""
    options: Any = {"whitespace_pattern": WHITE_SPACE, "coerce_one_of": True}
    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options))


def check_schema(schema: Mapping[str, Any]) -> None:
    """Check that texts can be held to a schema, without compiling what is too large.

    Raises:
        InputError: it is beyond a limit, not a schema, or has a keyword that cannot be kept, which is named.
    """
    for values, (depth, _value) in enumerate(_walk(schema), 1):
        if depth > MAX_SCHEMA_DEPTH or values > MAX_SCHEMA_VALUES:
            raise InputError(
                f"The schema has more than {MAX_SCHEMA_VALUES:,} values or {MAX_SCHEMA_DEPTH} levels.",
                remedy="Make it smaller.",
            )
    if (size := len(json.dumps(schema))) > MAX_SCHEMA_BYTES:
        raise InputError(
            f"The schema has {size:,} bytes, and at most {MAX_SCHEMA_BYTES:,} can be followed.",
            remedy="Make it smaller.",
        )
    failed, messages = LLMatcher.validate_grammar_with_warnings(schema_grammar(schema))
    if failed:
        raise InputError(f"The schema cannot be followed: {one_line(messages[0], 160)}.", remedy="Leave that out.")


def _walk(schema: Any) -> Iterator[tuple[int, Any]]:
    """Yield the values of a JSON value with their depths, without recursion."""
    waiting = [(1, schema)]
    while waiting:
        depth, value = waiting.pop()
        yield depth, value
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        waiting += [(depth + 1, each) for each in inner]
