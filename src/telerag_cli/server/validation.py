"""What a client is told of a malformed request, in OpenAI's words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError

from telerag_cli.server.errors import ApiError, shortened
from telerag_cli.server.fields import UNSUPPORTED
from telerag_cli.server.requests import NOT_AN_OBJECT, NOT_TEXT

_EXPECTED = {
    "string_type": "a string",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "a boolean",
    "list_type": "an array",
    "none_required": "null",
    **dict.fromkeys(("int_type", "int_parsing"), "an integer"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "an object"),
}
_BOUNDS = {"greater_than_equal": ("ge", "at least"), "less_than_equal": ("le", "at most")}
_LENGTHS = {
    "too_short": ("min_length", "at least", "items"),
    "too_long": ("max_length", "at most", "items"),
    "string_too_short": ("min_length", "at least", "characters"),
    "string_too_long": ("max_length", "at most", "characters"),
}
_CODES = {
    "missing": "missing_required_parameter",
    "union_tag_not_found": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    UNSUPPORTED: UNSUPPORTED,
    NOT_AN_OBJECT: NOT_AN_OBJECT,
    **dict.fromkeys(_EXPECTED, "invalid_type"),
}
"""OpenAI's ``code`` for pydantic's kinds of errors; ``invalid_value`` for all others."""
_JSON_NAMES: dict[type, str] = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
}


def invalid_request(error: RequestValidationError) -> ApiError:
    """Return the first thing that is wrong with a request.

    Unknown names come before anything else, for they are often a misspelling of what is then missing.
    """
    errors = error.errors()
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = f"{first['ctx']['error']} at character {first['loc'][-1]}"
        return ApiError(400, f"The request's body is not valid JSON: {shortened(reason)}.")
    if first["loc"] == ("body",):
        return ApiError(400, _wrong_body(first, error.body))
    unknown = [each["loc"][1] for each in errors if each["type"] == "extra_forbidden" and len(each["loc"]) == 2]
    if unknown:
        names = shortened(", ".join(unknown))
        noun = "argument" if len(unknown) == 1 else "arguments"
        return ApiError(400, f"Unrecognized request {noun} supplied: {names}", param=names, code="unknown_parameter")
    path = _path(first, error.body)
    # Each alternative of a union reports what it would have accepted.
    kinds = [each["type"] for each in errors if _path(each, error.body) == path]
    param = shortened(path)
    return ApiError(400, _describe(first, param, kinds), param=param, code=_CODES.get(first["type"], "invalid_value"))


def _wrong_body(error: Mapping[str, Any], body: Any) -> str:
    if error["type"] == NOT_TEXT:
        return str(error["msg"])
    if error["type"] == "missing" or body is None:
        return "The request has no body; it must be a JSON object."
    if isinstance(body, bytes):
        return "The request's body must be JSON, and its header Content-Type must be application/json."
    return f"The request's body must be a JSON object, and it is {_json_name(body)}."


def _path(error: Mapping[str, Any], body: Any) -> str:
    """``messages.0.content``: those parts of pydantic's location that are names and places in the request itself."""
    source, *location = error["loc"]
    if source != "body":
        return ".".join(map(str, location))
    # Only a missing name is absent from the request; other absent parts are names of alternatives.
    missing = [str(location.pop())] if error["type"] == "missing" else []
    if error["type"] in ("union_tag_not_found", "union_tag_invalid"):
        missing = [error["ctx"]["discriminator"].strip("'")]
    parts, value = [], body
    for part in location:
        if (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        ):
            value = value[part]
            parts.append(str(part))
    return ".".join(parts + missing)


def _describe(error: Mapping[str, Any], param: str, kinds: Sequence[str]) -> str:
    """Return what is wrong with a parameter; ``kinds`` are those of all its errors."""
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    if kind in ("missing", "union_tag_not_found"):
        return f"Missing required parameter: '{param}'."
    if kind == "extra_forbidden":
        return f"Unknown parameter: '{param}'."
    if kind == UNSUPPORTED:
        return f"Unsupported parameter: '{param}' cannot be {_shown(value)} here; {error['msg']}."
    if kind in ("literal_error", "union_tag_invalid"):
        wrong, supported = context.get("tag", value), context.get("expected") or context["expected_tags"]
        return f"Invalid value: {_shown(wrong)} for '{param}'. Supported values are: {supported}."
    if kind in _EXPECTED:
        expected = list(dict.fromkeys(_EXPECTED[each] for each in kinds if each in _EXPECTED))
        expected = [each for each in expected if each != "an integer" or "a number" not in expected]
        return f"Invalid type for '{param}': expected {' or '.join(expected)}, but got {_json_name(value)} instead."
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"Invalid '{param}': it is {_shown(value)} and must be {words} {_shown(context[name])}."
    if kind in _LENGTHS:
        name, words, things = _LENGTHS[kind]
        return f"Invalid '{param}': it has {len(value):,} {things} and must have {words} {context[name]:,}."
    reasons = {
        "string_pattern_mismatch": f"it must match {context.get('pattern')}",
        "recursion_depth_exceeded": "it is nested too deep",
    }
    return f"Invalid '{param}': {reasons.get(kind, shortened(error['msg']))}."


def _json_name(value: Any) -> str:
    return _JSON_NAMES.get(type(value), "null")


def _shown(value: Any) -> str:
    """A client's value, short enough to be repeated."""
    if isinstance(value, str):
        return f"'{shortened(value)}'"
    return _json_name(value) if isinstance(value, list | dict) and value else shortened(json.dumps(value))
