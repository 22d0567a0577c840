"""Which tokens a grammar allows next, by llguidance.

It builds what a repetition needs while the text is written, so that a ``maxLength`` of a million costs nothing. A
client's schema comes here only after `check_schema` has taken its time and memory (`schema_check.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from telerag_cli.arrays import BoolArray
from telerag_cli.errors import InputError, one_line

WHITE_SPACE = r"( |\n[ \t]{0,20})?"
"""Between the parts of JSON: bounded, or a small model can write line ends for ever."""
LIMITS = LLParserLimits(step_lexer_fuel=50_000, step_max_items=20_000, verbose_errors=False)
"""A step takes some milliseconds at most, as everybody's answers wait for it; errors do not quote the grammar."""
_UNNAMED = (("regex", "pattern"), ("Resource", "$ref"))
"""Words of llguidance's messages that do not name the keyword they are about, and that keyword."""


class Constraint:
    """What the text of one request may go on with."""

    def __init__(self, tokenizer: LLTokenizer, grammar: str) -> None:
        """Compile the grammar; this takes milliseconds, and lets other threads run.

        Raises:
            InputError: the grammar cannot be followed.
        """
        self._vocab_size = tokenizer.vocab_size
        self._ends = frozenset(tokenizer.eos_tokens)
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
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
    # By this keyword a schema could have others ignored.
    plain = {name: value for name, value in schema.items() if name != "x-guidance"}
    return str(LLMatcher.grammar_from_json_schema(json.dumps(plain), overrides=options))


def refusal(schema: Mapping[str, Any]) -> str:
    """Return why texts cannot be held to a schema, with the keyword that cannot be kept; empty if they can.

    This is native code without limits of its own: see `schema_check.py`.
    """
    matcher = LLMatcher(LLTokenizer("byte"), schema_grammar(schema), log_level=0, limits=LIMITS)
    error = str(matcher.get_error()) if matcher.is_error() else ""
    keyword = next((f"{name}: " for sign, name in _UNNAMED if sign in error), "")
    return keyword + error
