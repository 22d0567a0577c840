"""Errors as OpenAI's API words them. Nothing of the file system or of other requests is in them; the log has the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

from telerag_cli.errors import ContextError, InputError, TeleragError, UsageError

INVALID, NOT_FOUND = "invalid_request_error", "not_found_error"
SERVER, OVERLOADED, TIMEOUT = "server_error", "overloaded_error", "timeout_error"
DO_NOT_RETRY = {"x-should-retry": "false"}
"""OpenAI's clients try again after most errors of a server; this header tells them not to."""


class ApiError(Exception):
    """What a client is told when its request cannot be answered."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Say what is wrong.

        Args:
            status: the HTTP status.
            message: one sentence or two.
            kind: OpenAI's ``type`` of the error.
            param: the field of the request that is wrong, if it is one.
            code: OpenAI's ``code``, for programs.
            headers: further headers of the response.
        """
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The response's JSON, and the ``data`` of an error inside a stream."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole response."""
        return JSONResponse(self.body, self.status, self.headers)


def told(error: Exception, request_id: str) -> ApiError:
    """What a client is told of an error in the engine: what is wrong with its request, or that it is not its fault."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError | UsageError):
        context = isinstance(error, ContextError)
        return ApiError(
            400,
            error.message,
            param="messages" if context else None,
            code="context_length_exceeded" if context else None,
        )
    kind = "failed" if isinstance(error, TeleragError) else "has a bug"
    return ApiError(
        500,
        f"The server {kind}; its log says more under the request id {request_id}.",
        SERVER,
        code="internal_error",
        headers=DO_NOT_RETRY,
    )
