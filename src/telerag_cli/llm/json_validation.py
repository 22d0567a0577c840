"""Whether JSON follows a schema that a stranger wrote: in bounded time, without their regular expressions.

Patterns are left to what sampled the text: Python's ``re`` can take years over one, and its call cannot be ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, _WrappedReferencingError
from jsonschema.validators import extend, validator_for

from telerag_cli.text import TextError, parse_json

MAX_REFERENCES = 20_000
"""References followed for one text: those of a small schema can multiply without end."""


class _TooManyError(Exception):
    """The references of a schema multiply."""


def draft_of(schema: Mapping[str, Any]) -> Any:
    """Return the validator's class for the draft that a schema names, or for the latest one."""
    return validator_for(dict(schema), Draft202012Validator)


def follows(schema: Mapping[str, Any], reply: str) -> bool:
    """Whether a text is JSON of this schema; False too where that cannot be found out in bounded time."""
    followed = 0
    draft = draft_of(schema)
    usual = draft.VALIDATORS

    def counted(validator: Any, reference: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
        nonlocal followed
        followed += 1
        if followed > MAX_REFERENCES:
            raise _TooManyError
        yield from usual["$ref"](validator, reference, instance, schema) or ()

    def additional(validator: Any, allowed: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        if "patternProperties" not in schema:
            yield from usual["additionalProperties"](validator, allowed, instance, schema) or ()

    def unchecked(*_arguments: Any) -> Iterator[ValidationError]:
        return iter(())

    validators = {
        "$ref": counted,
        "additionalProperties": additional,
        "pattern": unchecked,
        "patternProperties": unchecked,
    }
    try:
        return bool(extend(draft, validators)(dict(schema)).is_valid(parse_json(reply)))
    except (TextError, _TooManyError, RecursionError, _WrappedReferencingError):
        return False
