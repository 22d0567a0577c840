"""Where an OpenAI-compatible API is, if it is not at the address that was given."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urlsplit, urlunsplit

import httpx2

CHAT = "/chat/completions"
_PROBE_S = 5.0
_ENDINGS = (CHAT, "/completions", "/chat", "/models", "/responses", "/embeddings")
"""Parts of the API, which people copy with the address."""
_INVALID = {"messages": "none", "max_tokens": 1}
_READ_BYTES = 1 << 12
_NO_ROUTE = re.compile(
    r"unexpected endpoint|cannot post|\b(?:endpoint|route|path|url)\b.{0,40}\bnot (?:found|exist|supported|known)"
    r"|(?:unknown|invalid|no such|no matching) (?:\w+ )?(?:endpoint|route|path|url)\b"
)
_ABSENT = (404, 405, 410, 501, 502, 503, 504)


def find_api(url: str, headers: Mapping[str, str]) -> str | None:
    """Return the address of the chat completions of the server at ``url``, or None if there are none; takes seconds.

    It is asked with a request that is invalid, so that nothing is written; whatever it says to that, it knows the path.
    """
    with httpx2.Client(timeout=_PROBE_S, headers=dict(headers)) as client:
        return next((candidate for candidate in _candidates(url) if _has_chat(client, candidate)), None)


def is_elsewhere(said: str) -> bool:
    """Whether a server says, whatever the status, that there is nothing at an address."""
    return bool(_NO_ROUTE.search(said.lower()))


def _candidates(url: str) -> list[str]:
    """The address itself, and those that people mean by it."""
    parts = urlsplit(url)
    path = parts.path.rstrip("/")
    while ending := next((ending for ending in _ENDINGS if path.endswith(ending)), None):
        path = path.removesuffix(ending)
    bare = path
    while bare.endswith("/v1"):
        bare = bare.removesuffix("/v1")
    above = bare.rpartition("/")[0]
    paths = [parts.path.rstrip("/"), path, f"{bare}/v1", bare, f"{above}/v1", "/v1", "", "/api/v1", "/openai/v1"]
    return [urlunsplit((parts.scheme, parts.netloc, path, "", "")) for path in dict.fromkeys(paths)]


def _has_chat(client: httpx2.Client, url: str) -> bool:
    try:
        with client.stream("POST", f"{url}{CHAT}", json=_INVALID) as response:
            if response.is_redirect or response.status_code in _ABSENT:
                return False
            start = next(response.iter_bytes(_READ_BYTES), b"").decode(errors="replace")
            return "html" not in response.headers.get("content-type", "") and not is_elsewhere(start)
    except httpx2.ReadTimeout:
        return True  # it is at work
    except httpx2.HTTPError:
        return False
