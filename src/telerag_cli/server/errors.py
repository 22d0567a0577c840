"""Errors as OpenAI's API words them, without a word about the file system or other requests; the log has the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import JSONResponse

from telerag_cli.errors import ContextError, InputError, ReasoningError, TeleragError, UsageError

INVALID, NOT_FOUND = "invalid_request_error", "not_found_error"
SERVER, OVERLOADED, TIMEOUT = "server_error", "overloaded_error", "timeout_error"
DO_NOT_RETRY = {"x-should-retry": "false"}
"""OpenAI's clients try again after most errors of a server; this header tells them not to."""
RETRY_S = 5
"""After so many seconds a server that loads or stops is worth another try."""
MAX_SHOWN = 80
"""Characters of a client's own text in an error."""


@dataclass(eq=False)
class ApiError(Exception):
    """What a client is told when its request cannot be answered."""

    status: int
    """The HTTP status."""
    message: str
    kind: str = INVALID
    """OpenAI's ``type`` of the error."""
    param: str | None = field(default=None, kw_only=True)
    """The field of the request that is wrong."""
    code: str | None = field(default=None, kw_only=True)
    """OpenAI's ``code``, for programs."""
    headers: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    """Further headers of the response."""

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        """The response's JSON, and the ``data`` of an error inside a stream."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the whole response."""
        return JSONResponse(self.body, self.status, self.headers)


def as_api_error(error: Exception, request_id: str) -> ApiError:
    """Return what a client is told of any error: what is wrong with its request, or that the server is at fault."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextError):
        return ApiError(400, error.message, param="messages", code="context_length_exceeded")
    if isinstance(error, ReasoningError):
        return ApiError(400, f"{error.message} Raise max_tokens.", param="max_tokens", code=error.code)
    if isinstance(error, InputError | UsageError):
        return ApiError(400, error.message)
    kind = "failed" if isinstance(error, TeleragError) else "has a bug"
    message = f"The server {kind}; its log says more under the request id {request_id}."
    return ApiError(500, message, SERVER, code="internal_error", headers=DO_NOT_RETRY)


def stopping() -> ApiError:
    """Return what a client is told whose request comes too late, or takes longer than the server still has."""
    message = "The server is stopping; ask again when it is back."
    return ApiError(503, message, OVERLOADED, code="stopping", headers={"Retry-After": str(RETRY_S)})


def shortened(text: str) -> str:
    """Return a client's own text as it is repeated: at most `MAX_SHOWN` characters, all of them valid."""
    text = text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"
    return text.encode(errors="backslashreplace").decode()
