"""The page of ``telerag serve-local`` in a real browser: questions, sources, and what goes wrong."""

import json
import time
from urllib.parse import urlsplit

from page_double import ANSWER, NASTY, Double, answered, answering, ask, doubled, enter_key, ready
from served import serving
from telerag_cli.config import PipelineName
from telerag_cli.server.errors import ApiError
from telerag_cli.tracing import Tracer


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
    answering(page)
    assert page.get_attribute(".turn", "data-status") == "asking"
    double.held = None
    turn = answered(page)
    assert page.is_visible("#send")
    assert turn.locator(".answer").text_content().startswith("🦉 Owls live in old trees. 1 They hear")
    (body,) = double.asked
    assert body["messages"] == [{"role": "user", "content": "Where do owls live?"}]
    assert (body["model"], body["stream"]) == ("telerag-hyde", True)
    assert body["telerag"] == {"lookahead": "refined", "timeline": True, "events": True}
    assert page.text_content("#announce").startswith("Answer: 🦉 Owls")


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
    assert ready(page).input_value("#pipeline") == "telerag-naive"
    double.fails = None
    page.click("text=Retry")
    answered(page, 3)
    assert len(double.asked[-1]["messages"]) == 5
    page.click("#new")
    assert page.locator(".turn").count() == 0
    assert page.is_visible("#welcome")
    page.click("text=Bring the old one back")
    assert page.locator(".turn").count() == 3


def test_a_citation_opens_its_passage_and_gives_the_focus_back(opened, double):
    page = opened()
    ask(page)
    turn = answered(page)
    cites = turn.locator(".cite")
    # The third marker of the text names no passage and stays text; the overlap is behind its sentence.
    labels = [f"Source 1: Owls {NASTY}", "Source 2, found by its words: voles#7"]
    assert [cite.get_attribute("aria-label") for cite in cites.all()] == labels
    assert "very well.2 <script>" in turn.locator(".answer").text_content()
    assert "[9]" in turn.locator(".answer").text_content()
    cites.first.focus()
    page.keyboard.press("Enter")
    panel = page.get_by_role("dialog", name=f"Owls {NASTY}")
    assert panel.is_visible()
    assert page.evaluate("document.activeElement.id") == "passage-title"
    assert panel.locator(".passage-text").text_content() == f"Owls live in old trees. {NASTY}"
    (link,) = panel.locator("a").all()
    assert link.get_attribute("href") == "https://example.invalid/owls?a=1&b=2"
    assert link.get_attribute("rel") == "noopener noreferrer"
    assert "javascript:window.hacked=3" in panel.text_content()
    panel.get_by_role("button", name="Next source").click()
    assert page.text_content("#passage-title") == "voles#7"
    page.keyboard.press("Escape")
    assert not page.is_visible("#passage")
    assert page.evaluate("document.activeElement.classList.contains('cite')")
    turn.locator(".source").last.click()
    assert page.text_content("#passage-title") == "voles#7"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.classList.contains('source')")


def test_nothing_that_is_told_becomes_markup(opened, double):
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


def test_code_is_shown_as_code(opened, double):
    code = "```python\nprint(lines[2])\n# <b>no</b>\n```"
    double.answer = f"Use `argv[1]`, as owls do. [1]\n\n{code}\nDone. [2]\n```\nnot ended [1]"
    page = opened()
    ask(page)
    answer = answered(page).locator(".answer")
    shown = ["argv[1]", "print(lines[2])\n# <b>no</b>\n", "not ended [1]"]
    assert answer.locator("code").all_text_contents() == shown
    assert answer.locator("pre").count() == 2
    assert page.locator(".answer > .cite").all_text_contents() == ["1", "2"]
    assert answer.text_content() == f"Use {shown[0]}, as owls do. 1\n\n{shown[1]}Done. 2\n{shown[2]}"


def test_a_server_that_stops_is_noticed_and_nothing_is_lost(opened, double):
    double.held = 9
    with doubled(double) as (url, stop):
        page = opened(url=url)
        ask(page)
        answering(page)
        stop()
    page.wait_for_selector(".failure >> text=the server has stopped")
    page.wait_for_selector("text=unreachable")
    page.click(".failure >> text=Retry")
    page.wait_for_selector("text=The server cannot be reached")
    assert page.locator(".asked").all_text_contents() == ["Where do owls live?"]
    with doubled(Double(), urlsplit(url).port):
        page.click("text=Retry")
        answered(page)


def test_an_error_within_a_stream_and_a_stream_that_breaks_off(opened, double):
    page = opened()
    double.last = ""
    ask(page)
    page.wait_for_selector("text=The connection ended before the answer did")
    assert page.text_content(".answer").startswith("🦉")
    double.last = json.dumps(ApiError(500, f"The engine failed. {NASTY}").body)
    page.click(".turn .failure >> text=Retry")
    page.wait_for_selector("text=The engine failed. <script>")


def test_stop_ends_the_request(opened, double):
    double.held = 9
    page = opened()
    ask(page)
    answering(page)
    page.click("#stop")
    page.wait_for_selector("text=Stopped.")
    assert page.text_content(".answer").startswith("🦉 Owls")
    end = time.monotonic() + 20
    while not double.gone and time.monotonic() < end:
        time.sleep(0.01)
    assert double.gone == 1
    assert page.is_visible("#send")


def test_a_key_is_asked_for_and_kept_in_the_tab_only(opened, double):
    double.key = "secret"
    page = opened()
    page.get_by_role("dialog", name="This server asks for a key").wait_for()
    assert page.text_content("#server-status") == "key needed"
    enter_key(page, "wrong")
    page.wait_for_selector("text=The key was not accepted: The key is wrong.")
    enter_key(page, "secret")
    ask(page)
    answered(page)
    assert "secret" not in page.evaluate("JSON.stringify({ ...localStorage })")
    assert page.evaluate("sessionStorage.getItem('telerag.key')") == "secret"
    double.key = "another"
    ask(page, "And now?")
    page.get_by_role("dialog").wait_for()
    enter_key(page, "another")
    answered(page, 2)


def test_the_servers_state_is_shown_while_the_panel_is_open(opened, double):
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


def test_events_are_read_however_the_bytes_are_cut(opened):
    told = opened().evaluate("""async () => {
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


def test_the_kept_conversation_is_bounded(opened):
    kept = opened().evaluate("""async () => {
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
      return { size: JSON.stringify(again.turns).length, questions: again.turns.map((turn) => turn.question),
        drawn: again.turns.map((turn) => turn.result.timeline !== null),
        broken: broken.turns.length, whole: conversation.turns.length };
    }""")
    assert kept["questions"] == [f"question {number}" for number in range(20, 60)]
    assert kept["size"] <= 2_000_000
    assert kept["drawn"] == sorted(kept["drawn"])
    assert any(kept["drawn"])
    assert (kept["broken"], kept["whole"]) == (0, 60)


def test_the_description_of_the_api_needs_nothing_from_outside(opened, double):
    page = opened("docs")
    page.wait_for_selector(".opblock-summary")
    assert page.locator(".opblock").count() == 3
    page.click(".opblock-summary-path >> text=state")
    page.click("text=Try it out")
    page.click("text=Execute")
    page.wait_for_selector(".responses-table.live-responses-table")


SCRIPT = {
    "answers the question": "owls number 3 live in place 8",
    "Question: where do owls": "Owls number 3 live in place 8 and eat food 3. [1]",
}


def test_the_real_server_asks_for_its_key_answers_and_is_compared(opened, engine_of):
    engine = engine_of(SCRIPT, token_s=0.005, tracer=Tracer(enabled=False))
    with serving(engine, key="secret") as running:
        page = opened(url=f"{running.url}/")
        enter_key(page, "secret")
        ask(page, "where do owls number 3 live")
        turn = answered(page)
        assert turn.locator(".answer").text_content() == "Owls number 3 live in place 8 and eat food 3. 1"
        turn.locator(".cite").click()
        assert page.text_content(".passage-text").startswith("owls number 3")
        page.keyboard.press("Escape")
        (kept,) = json.loads(page.evaluate("localStorage['telerag.conversation.v1']"))["turns"]
        counts = kept["result"]["timeline"]["counts"]
        assert counts["lists_wanted"] > 0
        assert counts["lists_undrawn"] == 0
        hit, wasted = (
            int(turn.locator(f".legend [data-outcome={each}] b").text_content()) for each in ("hit", "wasted")
        )
        assert hit + wasted == counts["lists_moved"] > 0
        assert wasted == counts["lists_wasted"]
        assert turn.locator(".bar.llm").count() == 2
        turn.get_by_role("button", name="Compare with lookahead off").click()
        page.wait_for_selector(".verdict >> text=Both gave the same answer.")
        page.click("#server-button")
        page.wait_for_selector("text=0 of ")
        running.idle()
