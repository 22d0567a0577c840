"""What the routes' responses are made of."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.sse import format_sse_event

from telerag_cli.engine.lines import usage
from telerag_cli.server.service import AnswerResult


def event(body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return format_sse_event(data_str=to_json(body))


def json_response(body: dict[str, Any]) -> Response:
    """A body that needs no checking, because it was made here."""
    return Response(to_json(body), media_type="application/json")


def to_json(body: Any) -> str:
    """JSON in ASCII, because metadata may hold halves of surrogate pairs; numbers that JSON has not become null."""
    try:
        return json.dumps(body, allow_nan=False, separators=(",", ":"))
    except ValueError:
        return json.dumps(_finite(body), allow_nan=False, separators=(",", ":"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def choice(index: int, content: dict[str, Any], outcome: AnswerResult | None = None) -> dict[str, Any]:
    """One of OpenAI's choices; without an outcome it has not ended."""
    finish_reason = outcome.answered.finish_reason if outcome else None
    return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}


def cited(outcome: AnswerResult) -> list[dict[str, Any]]:
    """OpenAI's file citations: which stretch of the answer rests on which passage."""
    found = outcome.answered.found
    return [
        {
            "type": "file_citation",
            "file_citation": {
                "file_id": each["id"],
                "filename": found[each["rank"] - 1].passage.name,
                "index": each["rank"],
                "start_index": each["start"],
                "end_index": each["end"],
            },
        }
        for each in outcome.answered.citations
    ]


def usage_of(outcomes: Sequence[AnswerResult]) -> dict[str, Any]:
    """OpenAI's count of tokens, over all that the LLM read and wrote for these answers."""
    counts = [usage(outcome.answered) for outcome in outcomes]
    total: dict[str, Any] = {name: sum(count[name] for count in counts) for name in counts[0]}
    cached = sum(stage.generation.cached_tokens for outcome in outcomes for stage in outcome.answered.stages)
    return total | {"prompt_tokens_details": {"cached_tokens": cached}}


def note(request: Request, **said: Any) -> None:
    """Add to the request's line in the access log."""
    request.scope.setdefault("state", {}).setdefault("log", {}).update(said)


def note_outcomes(request: Request, outcomes: Sequence[AnswerResult]) -> None:
    """Add what answers took to the access log; of several, the longest waits."""
    total = usage_of(outcomes)
    note(
        request,
        prompt_tokens=total["prompt_tokens"],
        completion_tokens=total["completion_tokens"],
        queue_s=round(max(outcome.waited_s for outcome in outcomes), 6),
        first_token_s=round(max(outcome.first_s for outcome in outcomes), 6),
        retrieval_s=round(max(outcome.answered.timings.get("retrieval_s", 0.0) for outcome in outcomes), 6),
        outcome="done",
    )
