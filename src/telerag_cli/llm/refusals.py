"""Why a server did not answer: what its errors say, whether another try may help, and what to tell."""

from __future__ import annotations

import contextlib
import email.utils
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import openai

from telerag_cli.config import KEY_VARIABLE
from telerag_cli.errors import ContextError, ModelError, TeleragError, connection_cause, one_line
from telerag_cli.text import printable, repaired

FIRST_WAIT_S = 0.5
"""Wait before the second try; it doubles with every further one."""
MAX_WAIT_S = 60.0
"""Longest wait that a server may ask for; beyond it the request fails."""

_TRANSIENT = (408, 409, 429)
_CROWDED = (429, 503)
_CROWDED_WORDS = re.compile(
    r"too many (?:\w+ )?(?:requests|connections|clients|users)|\bbusy\b|overload|concurren|capacity|rate.?limit"
    r"|no (?:\w+ )?slot"
)
_WAIT = "Wait, or send it fewer requests at once."
_REMEDIES = {
    401: f"Set {KEY_VARIABLE} to a key of this server.",
    403: f"Set {KEY_VARIABLE} to a key of this server.",
    404: "Check the address; it often ends in /v1.",
    **dict.fromkeys(_TRANSIENT, _WAIT),
}
"""What to do about a refusal, by its status."""


class BrokenOffError(Exception):
    """A stream ended in good order, but before the answer did."""


class UnreadableError(Exception):
    """What came is not what a server of this kind sends; the message says what it is."""

    def __init__(self, problem: str, *, elsewhere: bool) -> None:
        """Take what is wrong, and whether it may be another kind of page: the address may be wrong."""
        super().__init__(problem)
        self.elsewhere = elsewhere


Trouble = openai.APIError | BrokenOffError
"""What may end a try."""


@dataclass(frozen=True)
class Server:
    """A server as messages speak of it."""

    url: str
    timeout_s: float
    """Longest silence."""
    connect_s: float
    """Longest time for making a connection."""

    def __str__(self) -> str:
        return f"The server at {self.url}"

    def explained(self, error: Trouble, tried: int, pieces: int = 0, models: Sequence[str] = ()) -> TeleragError:
        """Return the error to show for one that the server caused in its last try.

        Args:
            error: what happened.
            tried: how many tries there were.
            pieces: tokens that came in the last one.
            models: the server's, if it does not know the one that was asked for.
        """
        server, cause = str(self), error.__cause__
        counts = [f"{tried} tries"] * (tried > 1) + [f"{pieces} token{'s' * (pieces > 1)}"] * (pieces > 0)
        after = f" after {' and '.join(counts)}" if counts else ""
        if isinstance(error, BrokenOffError):
            return ModelError(
                f"{server} ended its stream{after} without saying that the answer is complete.",
                remedy="Its log may say why.",
            )
        if isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout):
            silent = isinstance(cause, httpx2.ConnectTimeout)
            why = f"no connection within {self.connect_s:g} s" if silent else connection_cause(cause)
            return ModelError(f"{server} cannot be reached{after}: {why}.", remedy="Start it, or check the address.")
        if isinstance(error, openai.APITimeoutError):
            return ModelError(
                f"{server} sent nothing for {self.timeout_s:g} s{after}.",
                remedy="Check that it is not overloaded, or allow it more time.",
            )
        if isinstance(error, openai.APIConnectionError):
            why = connection_cause(cause or error)
            return ModelError(f"{server} broke the connection{after}: {why}.", remedy="Its log may say why.")
        status = status_of(error)
        refusal = f"{server} answers {status or 'with an error'}{after}: {said_by(error)}"
        if is_context(error):
            return ContextError(f"{refusal}.", remedy="Shorten the question, lower --max-tokens or --ctx-size.")
        if models:
            return ModelError(f"{refusal}; it has {', '.join(models)}.", remedy="Name one of its models.")
        return ModelError(f"{refusal}.", remedy=_REMEDIES.get(status or 0, "Its log may say more."))

    def unreadable(self, problem: str) -> ModelError:
        """Return the error for something that cannot be read."""
        return ModelError(
            f"{self} sent an answer that cannot be read: {_clean(problem)}.",
            remedy="Check that the address is that of an OpenAI-compatible API; it often ends in /v1.",
        )

    def misplaced(self, why: str, better: str) -> ModelError:
        """Return the error for an address that is not that of the API, which is at a ``better`` one."""
        return ModelError(
            f"There are no chat completions at {self.url}/chat/completions ({_clean(why)}), but at {better}.",
            remedy=f"Use --base-url {better}.",
        )


def wait_s(error: Trouble, tried: int) -> float | None:
    """Return the seconds until the next try; None if it would fail like the last one."""
    status = status_of(error)
    lost = isinstance(error, openai.APIConnectionError | BrokenOffError)
    if not lost and not is_crowded(error) and (status is None or (status not in _TRANSIENT and status < 500)):
        return None
    asked_s = _retry_after_s(error)
    if asked_s is not None:
        return asked_s if asked_s <= MAX_WAIT_S else None
    # Clients that failed together must not come back together.
    return min(FIRST_WAIT_S * 2.0 ** (tried - 1), MAX_WAIT_S) * random.uniform(0.75, 1.0)


def is_crowded(error: Trouble) -> bool:
    """Whether an error may mean that there were too many requests at once.

    Servers say so, or they break off what they are doing, or hang up.
    """
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__
        hung_up = isinstance(cause, httpx2.NetworkError) and not isinstance(cause, httpx2.ConnectError)
        return hung_up or isinstance(cause, httpx2.RemoteProtocolError) or _was_reset(cause)
    if isinstance(error, BrokenOffError):
        return True
    status = status_of(error)
    if is_context(error) or "loading" in said_by(error).lower():
        return False
    return status in _CROWDED or ((status or 500) >= 500 and bool(_CROWDED_WORDS.search(said_by(error).lower())))


def status_of(error: Exception) -> int | None:
    """Return the HTTP status, or the one within a stream that had begun with 200."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code
    code = str(getattr(error, "code", None))
    return int(code) if code.isdecimal() and len(code) == 3 else None


def is_context(error: openai.APIError) -> bool:
    """Whether the server says that a prompt is longer than its context."""
    said = f"{error.code} {error.type} {said_by(error)}".lower()
    words = ("context length", "context_length", "context size", "context_size", "context window")
    return status_of(error) in (None, 400, 413, 422) and any(word in said for word in words)


def said_by(error: openai.APIError) -> str:
    """Return the server's own words, however it wraps them, on one line."""
    body: Any = error.body
    if isinstance(body, dict):
        body = next((body[key] for key in ("message", "detail", "error") if body.get(key)), body)
    return _clean(str(body or error.message))


def _retry_after_s(error: Exception) -> float | None:
    """The header Retry-After, which has seconds or a date."""
    if not isinstance(error, openai.APIStatusError):
        return None
    value = error.response.headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(float(value), 0.0)
    with contextlib.suppress(ValueError):
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    return None


def _was_reset(cause: BaseException | None) -> bool:
    """Whether a connection was reset while it was made."""
    while cause is not None:
        if isinstance(cause, ConnectionResetError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _clean(text: str) -> str:
    return one_line(printable(repaired(text)))
