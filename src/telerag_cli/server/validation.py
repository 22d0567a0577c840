"""What a client is told of a malformed request: pydantic's words in OpenAI's form."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from telerag_cli.server.errors import ApiError, shortened
from telerag_cli.server.fields import UNSUPPORTED, UNUSABLE
from telerag_cli.server.requests import MAX_VALUES, NOT_AN_OBJECT
from telerag_cli.text import TextError, parse_json

SMALL_BYTES = 16 << 10
LARGE_SHARE = 0.25
"""Share of the event loop's time for parsing bodies that are larger: some take it tens of milliseconds, and it has
everybody's to do."""
_CODES = {
    "missing": "missing_required_parameter",
    "union_tag_not_found": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    UNSUPPORTED: UNSUPPORTED,
    NOT_AN_OBJECT: NOT_AN_OBJECT,
    **dict.fromkeys(("finite_number", "none_required", "int_parsing"), "invalid_type"),
}
"""OpenAI's ``code`` for pydantic's kinds of errors beside those of types; ``invalid_value`` for all others."""
_COMPLETE = (UNUSABLE, NOT_AN_OBJECT, "too_short", "too_long")
"""Kinds of errors whose message already says what was sent."""


class TimeShare:
    """Work of a kind, one at a time, that takes at most a share of the time; for one event loop."""

    def __init__(self, share: float) -> None:
        self._pauses = 1 / share - 1
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> None:
        await self._turn.acquire()
        self._began_s = time.perf_counter()

    async def __aexit__(self, *_error: object) -> None:
        # The next one waits, and not the one whose work is done.
        pause_s = self._pauses * (time.perf_counter() - self._began_s)
        asyncio.get_running_loop().call_later(pause_s, self._turn.release)


class JsonRoute(APIRoute):
    """A route whose body is read by the strict reader, and refused if it holds more than `MAX_VALUES`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See `APIRoute`."""
        handle, large = super().get_route_handler(), TimeShare(LARGE_SHARE)

        async def handler(request: Request) -> Response:
            return await handle(_JsonRequest(request, large))

        return handler


class _JsonRequest(Request):
    def __init__(self, request: Request, large: TimeShare) -> None:
        super().__init__(request.scope, request.receive)
        self._large = large

    async def json(self) -> Any:
        body = await self.body()
        try:
            async with self._large if len(body) > SMALL_BYTES else contextlib.nullcontext():
                return parse_json(body, max_values=MAX_VALUES)
        except TextError as error:
            # The error that FastAPI expects here, which says where by itself.
            raise json.JSONDecodeError(str(error), "", 0) from None


def invalid_request(error: RequestValidationError) -> ApiError:
    """Return the first thing that is wrong with a request.

    Unknown names come before anything else, for they are often a misspelling of what is then missing.
    """
    errors = error.errors()
    first = errors[0]
    kind = first["type"]
    if kind == "json_invalid":
        return ApiError(400, f"The request's body is not valid JSON: {first['ctx']['error']}.")
    if first["loc"] == ("body",):
        return ApiError(400, _wrong_body(first, error.body))
    unknown = [each["loc"][1] for each in errors if each["type"] == "extra_forbidden" and len(each["loc"]) == 2]
    if unknown:
        names = shortened(", ".join(unknown))
        noun = "argument" if len(unknown) == 1 else "arguments"
        return ApiError(400, f"Unrecognized request {noun} supplied: {names}", param=names, code="unknown_parameter")
    path = _path(first, error.body)
    # Each alternative of a union reports what it would have accepted.
    messages = dict.fromkeys(each["msg"] for each in errors if _path(each, error.body) == path)
    param = shortened(path)
    code = _CODES.get(kind, "invalid_type" if kind.endswith("_type") else "invalid_value")
    return ApiError(400, _describe(first, param, list(messages)), param=param, code=code)


def _wrong_body(error: Mapping[str, Any], body: Any) -> str:
    if error["type"] == "missing" or body is None:
        return "The request has no body; it must be a JSON object."
    if isinstance(body, bytes):
        return "The request's body must be JSON, and its header Content-Type must be application/json."
    return f"The request's body must be a JSON object, and it is {_shown(body)}."


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


def _describe(error: Mapping[str, Any], param: str, messages: list[str]) -> str:
    """Return what is wrong with a parameter; ``messages`` are those of all its errors."""
    kind, value = error["type"], error["input"]
    if kind in ("missing", "union_tag_not_found"):
        return f"Missing required parameter: '{param}'."
    if kind == "extra_forbidden":
        return f"Unknown parameter: '{param}'."
    if kind == UNSUPPORTED:
        return f"Unsupported parameter: '{param}' cannot be {_shown(value)} here; {error['msg']}."
    if kind == "recursion_depth_exceeded":
        return f"Invalid '{param}': it is nested too deep."
    if kind == "union_tag_invalid":
        value, messages = error["ctx"]["tag"], [f"Input should be one of {error['ctx']['expected_tags']}"]
    start = "Input should be "
    wanted = [messages[0], *(message.removeprefix(start) for message in messages[1:] if message.startswith(start))]
    text = " or ".join(wanted)
    given = "" if kind in _COMPLETE else f", but it is {_shown(value)}"
    return f"Invalid '{param}': {text[0].lower()}{text[1:]}{given}."


def _shown(value: Any) -> str:
    """A client's value, short enough to be repeated."""
    return f"'{shortened(value)}'" if isinstance(value, str) else shortened(json.dumps(value))
