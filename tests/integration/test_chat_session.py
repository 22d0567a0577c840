"""A conversation over a scripted engine: follow-up questions, what is shown, commands, and what goes wrong."""

import asyncio
import contextlib
import io
import json
import re
import signal
import time

import pytest

from expect import fails
from telerag_cli.cli.chat_screen import Screen, Wrapping, timeline
from telerag_cli.cli.chat_session import COMMANDS, Chat, converse
from telerag_cli.config import Lookahead, PipelineName
from telerag_cli.errors import InputError, UsageError
from telerag_cli.llm.base import Generation
from telerag_cli.llm.scripted import Reply, ScriptedGenerator
from telerag_cli.pipelines.base import Answer, Pipeline
from telerag_cli.pipelines.conversation import (
    MAX_CHARACTERS,
    MAX_TURNS,
    REWRITE_TOKENS,
    Turn,
    recent_turns,
    rewrite,
    standalone_prompt,
)
from telerag_cli.pipelines.registry import make_pipeline, make_pipelines
from telerag_cli.tracing import Span, Tracer

NAIVE = make_pipeline(PipelineName.NAIVE)
TURNS = [Turn("Where do owls live?", "In place 8. [1]")]
FOLLOW_UP = "And what do they eat?"
STANDALONE = "owls number 3 live in place what and eat food what"


def script(request):
    last = request.messages[-1].content
    if "Complete question:" in last:
        return STANDALONE
    if "passage that answers" in last:
        return "owls number 3 live in place 8 and eat food 3"
    return "owls number 3 live in place 8 and eat food 3 [1]"


def last_words(request):
    return request.messages[-1].content


# Follow-up questions


def test_a_follow_up_is_rewritten_with_what_was_said_and_then_answered(engine_of):
    engine = engine_of(script)
    answered = asyncio.run(engine.aask(FOLLOW_UP, pipeline=NAIVE, turns=TURNS))
    assert [stage.name for stage in answered.stages] == ["rewrite", "answer"]
    rewriting, answering = engine.generator.requests
    assert all(part in last_words(rewriting) for part in (TURNS[0].question, TURNS[0].answer, FOLLOW_UP))
    assert STANDALONE in last_words(answering)
    assert FOLLOW_UP not in last_words(answering)
    assert [retrieval.queries for retrieval in answered.retrievals] == [(STANDALONE,)]


class Recorder:
    """A `Rag` that notes what it is asked for."""

    def __init__(self):
        self.noted = []

    @contextlib.asynccontextmanager
    async def lookahead(self, query):
        self.noted.append(("lookahead", query))
        yield "ahead"

    async def generate(self, stage, messages, *, max_tokens, shape, refining):
        self.noted.append((stage, refining))
        return Generation(f"1. {STANDALONE}", "stop", 1, 1, 0.0, 0.0)


def test_lookahead_follows_the_rewriting_from_its_beginning():
    rag = Recorder()
    assert asyncio.run(rewrite(rag, TURNS, FOLLOW_UP)) == STANDALONE
    assert rag.noted == [("lookahead", FOLLOW_UP), ("rewrite", "ahead")]


def test_lists_are_moved_while_the_follow_up_is_rewritten(engine_of):
    tracer = Tracer()
    engine = engine_of(script, Lookahead.QUESTION, token_s=0.01, tracer=tracer, arena=0.9)
    first = asyncio.run(engine.aask("bees", pipeline=NAIVE))
    assert first.joins[0].lists_moved == 0  # nothing is written before, so nothing runs ahead
    tracer.clear()
    answered = asyncio.run(engine.aask(FOLLOW_UP, pipeline=NAIVE, turns=TURNS))
    assert answered.joins[0].lists_moved > 0
    rewriting = next(span for span in tracer.spans() if span.name == "rewrite")
    assert min(span.start_s for span in tracer.spans() if span.lane.startswith("link")) < rewriting.end_s


@pytest.mark.parametrize("written", ["", "  "])
def test_an_empty_rewriting_leaves_the_question(engine_of, written):
    engine = engine_of(lambda request: written if "Complete question:" in last_words(request) else "yes")
    answered = asyncio.run(engine.aask(FOLLOW_UP, pipeline=NAIVE, turns=TURNS))
    assert answered.retrievals[0].queries == (FOLLOW_UP,)


def test_history_is_bounded_in_turns_characters_and_tokens():
    turns = [Turn(f"question-{n}?", f"answer-{n} " + "long " * 1000) for n in range(10)]

    def kept_of(room):
        generator = ScriptedGenerator({}, context_tokens=REWRITE_TOKENS + room)
        return asyncio.run(recent_turns(turns, "next?", generator))

    kept = kept_of(10_000)
    assert kept == turns[-MAX_TURNS:]
    prompt = standalone_prompt(kept, "next?")[-1].content
    assert "question-7?" in prompt
    assert "question-6?" not in prompt
    assert len(prompt) < MAX_TURNS * (MAX_CHARACTERS + 40) + 60
    one = ScriptedGenerator({}).count_tokens(standalone_prompt(turns[-1:], "next?"))
    assert kept_of(one) == turns[-1:]
    assert kept_of(one - 1) == []


# What is shown


class Stream(io.StringIO):
    def __init__(self, terminal=False):
        super().__init__()
        self._terminal = terminal

    def isatty(self):
        return self._terminal


class Script:
    """Lines that a test gives; each may be an error to raise."""

    def __init__(self, *lines, interactive=True):
        self.interactive = interactive
        self._lines = iter(lines)

    def read(self, runner):
        line = next(self._lines, None)
        if isinstance(line, Exception):
            raise line
        return line


class Table:
    """A chat over a scripted engine, with its streams."""

    def __init__(self, engine, pipeline=PipelineName.NAIVE, *, terminal=False, tracing=False, **given):
        self.engine = engine
        self.out, self.talk = Stream(terminal), Stream(terminal)
        self.screen = Screen(self.out, self.talk, apart=not terminal)
        if isinstance(pipeline, Pipeline):
            engine.pipeline = pipeline
        else:
            engine.configure(pipeline=pipeline, **given)
        self.chat = Chat(engine, self.screen, make_pipelines(given), tracing=tracing)

    def say(self, *lines, interactive=True):
        """Have these lines answered; returns how many failed and what came to stdout and stderr."""
        for stream in (self.out, self.talk):
            stream.seek(0)
            stream.truncate()
        failed = converse(self.chat, Script(*lines, interactive=interactive), self.screen)
        return failed, self.out.getvalue(), self.talk.getvalue()


@pytest.fixture
def table(engine_of):
    def make(answers=script, pipeline=PipelineName.NAIVE, **options):
        own = {name: options.pop(name) for name in ("terminal", "tracing", "rounds") if name in options}
        return Table(engine_of(answers, tracer=Tracer(), **options), pipeline, **own)

    return make


ANSWER = "owls number 3 live in place 8 and eat food 3 [1]"


def test_answers_and_sources_go_to_stdout_and_talk_to_stderr(table):
    failed, out, talk = table().say("Where do owls live?", FOLLOW_UP)
    assert failed == 0
    first, second = out.split("\n\n")
    assert first.splitlines()[0] == second.splitlines()[0] == ANSWER
    assert re.fullmatch(r"  \[1\] p\d+  \(cited\)", first.splitlines()[1])
    assert len(first.splitlines()) == 4
    assert talk == f"→ {STANDALONE}\n"


def test_a_terminal_sees_the_answer_grow_and_what_goes_on_before(table, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    wide = table(pipeline=PipelineName.HYDE, terminal=True)
    grown = []
    wide.out.write = lambda text: grown.append(text) or len(text)
    _failed, _out, talk = wide.say("Where do owls live?")
    stages = ["writing passage...", "retrieving...", "reading passages..."]
    assert [name for name in re.findall(r"\x1b\[2m(.*?)\x1b\[0m", talk) if name in stages] == stages
    assert talk.endswith("\r\x1b[K")
    assert len([text for text in grown if "owls" in text or "place" in text]) >= 2
    assert "".join(grown).startswith(ANSWER + "\n")


def test_an_answer_that_is_not_what_was_being_written_is_told_apart(table):
    async def second_thoughts(rag, question):
        draft = await rag.answer(question, [])
        return Answer(f"No: {draft.text}", [])

    chat = table(pipeline=Pipeline("second_thoughts", second_thoughts))
    _failed, out, talk = chat.say("Where do owls live?")
    assert out == f"{ANSWER}\nThat was a draft. The answer is:\nNo: {ANSWER}\n"
    assert "No passages were looked up" in talk


def test_pipelines_without_a_stage_of_that_name_show_their_answer_once(table):
    _failed, out, _talk = table(pipeline=PipelineName.FLARE).say("Where do owls live?")
    assert out == f"{ANSWER}.\n"


def test_words_are_not_broken_whatever_pieces_they_come_in():
    text = "one two  three\n    indented four five\n\nsix averyveryverylongword end"
    whole = "one two\nthree\n    indented\nfour five\n\nsix\naveryveryverylongword\nend"
    for size in (1, 2, 5, 100):
        wrapping = Wrapping(12)
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert "".join(map(wrapping.feed, pieces)) + wrapping.end() == whole


def test_a_terminal_is_not_given_orders(table):
    hostile = "red \x1b[31m and \x9b2J title\x07"
    _failed, shown, _talk = table(lambda _: hostile, terminal=True).say("q")
    assert "\x1b[31m" not in shown
    assert not set("\x9b\x07") & set(shown)
    _failed, raw, _talk = table(lambda _: hostile).say("q")
    assert raw.startswith(hostile)


def test_the_timeline_has_a_row_for_each_lane_over_one_axis():
    spans = [
        Span("join", "join", 11.0, 11.1),
        Span("link 1", "list 3", 10.0, 10.5),
        Span("LLM", "passage", 10.0, 11.0),
        Span("LLM", "answer", 11.1, 12.0),
    ]
    axis, llm, link, join = timeline(spans, 60)
    assert max(map(len, (axis, llm, link, join))) <= 60
    assert axis.split() == ["|0.0", "s", "|0.5", "|1.0", "|1.5", "|2.0"][: len(axis.split())]
    assert [row.split()[0] for row in (llm, link, join)] == ["LLM", "link", "join"]
    assert axis.index("|1.0") == llm.index("answer") - 2 or llm.index("answer") >= axis.index("|1.0")
    assert link.index("█") == llm.index("passage")
    assert link.rindex("█") < join.index("█") <= axis.index("|1.0") + 1
    assert timeline([], 60) == []


def test_white_space_at_the_end_of_an_answer_is_not_shown(table):
    out = table(lambda _request: "owls \n\n ").say("q")[1]
    assert out.startswith("owls\n  [1] ")


def test_an_answer_that_was_cut_says_so(table):
    assert "as long as --max-tokens lets it be" in table(max_tokens=3).say("q")[2]
    assert "as long" not in table().say("q")[2]


# Commands


def test_an_unknown_command_is_told_the_nearest(table):
    failed, out, talk = table().say("/sorces", "/pipelin hyde")
    assert failed == 2
    assert out == ""
    assert "There is no command /sorces; the nearest is /sources." in talk
    assert "the nearest is /pipeline." in talk


@pytest.mark.parametrize("line", ["/sources", "/timings", "/save x.md"])
def test_commands_about_an_answer_want_one(table, line):
    assert "No question was answered yet." in table().say(line)[2]


def test_sources_in_full(table):
    chat = table()
    chat.say("Where do owls live?")
    _failed, out, _talk = chat.say("/sources")
    assert [line[:3] for line in out.splitlines() if line.startswith("[")] == ["[1]", "[2]", "[3]"]
    assert re.search(r"\[2\] -?\d\.\d{4}  p\d+\n    \w+ number \d+ live in place", out)
    _failed, out, _talk = chat.say("/sources 2")
    assert [line[:3] for line in out.splitlines() if line.startswith("[")] == ["[2]"]
    for wrong in ("0", "4", "x"):
        assert f"has no passage {wrong}." in chat.say(f"/sources {wrong}")[2]


def test_pipeline_and_lookahead_change_with_the_next_question(table):
    chat = table(token_s=0.002)
    assert "Pipeline: naive" in chat.say("/pipeline")[1]
    assert "Pipeline: hyde" in chat.say("/pipeline hyde", "Where do owls live?", "/lookahead off")[1]
    assert chat.chat.exchanges[-1].answered.stages[0].name == "passage"
    assert chat.chat.exchanges[-1].answered.joins[0].orders > 0
    chat.say("/clear", "Where do owls live?")
    assert chat.chat.exchanges[-1].answered.joins[0].orders == 0
    failed, _out, talk = chat.say("/pipeline none", "/lookahead sometimes")
    assert failed == 2
    assert "There is no pipeline none. Choose one of naive, hyde" in talk
    assert "There is no lookahead sometimes. Choose one of refined, question, off." in " ".join(talk.split())
    assert chat.engine.config.lookahead is Lookahead.OFF


def test_options_of_pipelines_stay_with_those_that_know_them(table):
    chat = table(pipeline=PipelineName.ITER_RETGEN, rounds=2)
    chat.say("/pipeline hyde", "/pipeline iter_retgen", "Where do owls live?")
    assert [stage.name for stage in chat.chat.exchanges[-1].answered.stages] == ["draft_1", "answer"]
    with fails(UsageError, "--rounds", "hyde"):
        table(pipeline=PipelineName.HYDE, rounds=2)


def test_timings_show_the_last_answer(table):
    chat = table(pipeline=PipelineName.HYDE, token_s=0.005)
    chat.say("Where do owls live?")
    _failed, out, _talk = chat.say("/timings")
    _axis, llm, *rows = out.lstrip().partition("\n\n")[0].splitlines()
    assert re.match(r"LLM +passage─+┤ *answer─+┤$", llm)
    assert {row.split()[0] for row in rows} == {"link", "sketch", "embed", "join"}
    assert re.search(r"Seconds: passage 0\.\d\d, answer 0\.\d\d, embedding", out)
    assert "Lists in fast memory at the join: " in out
    assert max(map(len, out.splitlines())) <= 80


def test_spans_are_kept_for_one_turn_unless_a_trace_is_wanted(table):
    for tracing, turns in ((False, 1), (True, 3)):
        chat = table(tracing=tracing)
        chat.say("owls?", "/clear", "bees?", "/clear", "cats?")
        assert [span.name for span in chat.engine.tracer.spans()].count("answer") == turns


def test_save(table, tmp_path):
    chat = table()
    chat.say("Where do owls live?", FOLLOW_UP)
    markdown, lines = tmp_path / "talk.md", tmp_path / "talk.jsonl"
    failed, _out, talk = chat.say(f"/save {markdown}", f"/save {lines}")
    assert failed == 0
    assert "Saved 2 questions and answers" in talk
    text = markdown.read_text()
    assert text.startswith(f"## Where do owls live?\n\n{ANSWER}\n\n- [1] p")
    assert f"## {FOLLOW_UP}\n\n*{STANDALONE}*\n\n{ANSWER}" in text
    saved = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line["question"] for line in saved] == ["Where do owls live?", FOLLOW_UP]
    assert saved[1]["queries"] == [[STANDALONE]]
    assert saved[0]["pipeline"] == "naive"
    before = markdown.read_bytes()
    failed, _out, talk = chat.say(f"/save {markdown}", "/save", f"/save {tmp_path}/none/x.md")
    assert failed == 3
    assert "is there already" in talk
    assert "needs a file's name" in talk
    assert "does not exist" in talk
    assert markdown.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["talk.jsonl", "talk.md"]


def test_clear_forgets_and_quit_ends(table):
    chat = table()
    chat.say("Where do owls live?", "/clear", "Where do bees live?")
    assert not any("Complete question:" in last_words(request) for request in chat.engine.generator.requests)
    asked = len(chat.engine.generator.requests)
    chat.say("/quit", "never asked")
    assert len(chat.engine.generator.requests) == asked


def test_help_names_every_command(table):
    out = table().say("/help")[1]
    assert [line.split()[0] for line in out.splitlines() if line.startswith("/")] == list(COMMANDS)
    assert max(map(len, out.splitlines())) <= 80


# What goes wrong


def test_a_turn_that_fails_is_one_sentence_and_no_part_of_the_conversation(table):
    def failing(request):
        if "broken" in last_words(request):
            return Reply("half of an answer", fails_after=2)
        return script(request)

    chat = table(failing)
    failed, out, talk = chat.say("broken?", "Where do owls live?", InputError("line 3 is odd."))
    assert failed == 2
    assert talk.count("error: ") == 2
    assert "error: line 3 is odd." in talk
    assert out.startswith("half of\n")  # what was shown stays, and its line ends
    assert f"\n{ANSWER}\n" in out
    assert not any("Complete question:" in last_words(request) for request in chat.engine.generator.requests)


def interrupting(request):
    """Like Ctrl-C when the answer to this question begins."""
    if "bees" in last_words(request):
        signal.raise_signal(signal.SIGINT)
        return "never " * 1000
    return script(request)


def test_an_interrupted_answer_ends_alone(table):
    chat = table(interrupting, token_s=0.01, max_tokens=1500)
    started_s = time.perf_counter()
    failed, _out, talk = chat.say("Where do owls live?", "/clear", "Where do bees live?", "Where do owls live?")
    assert time.perf_counter() - started_s < 5  # the whole answer would have taken ten
    assert failed == 0
    assert "Interrupted" in talk
    assert [item.question for item in chat.chat.exchanges] == ["Where do owls live?"]
    assert chat.engine.generator.running == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_a_person_an_interrupt_ends_everything(table):
    chat = table(interrupting, token_s=0.01, max_tokens=1500)
    with pytest.raises(KeyboardInterrupt):
        chat.say("Where do bees live?", "Where do owls live?", interactive=False)
    assert len(chat.engine.generator.requests) == 1


def test_a_reader_that_is_gone_ends_the_answer(table):
    chat = table(token_s=0.01)

    def broken(_text):
        raise BrokenPipeError

    chat.out.write = broken
    with pytest.raises(BrokenPipeError):
        chat.say("Where do owls live?")
    assert chat.engine.generator.running == 0
