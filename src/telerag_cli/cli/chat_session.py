"""A conversation: its questions are answered one after the other, and its commands look at them or change how."""

from __future__ import annotations

import asyncio
import difflib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from telerag_cli.cli.chat_input import Piped, Typed
from telerag_cli.cli.chat_screen import Screen, seconds, source_lines, timeline, whole_source
from telerag_cli.config import Lookahead, PipelineName
from telerag_cli.engine.engine import AskResult, Engine
from telerag_cli.engine.lines import answer_line
from telerag_cli.engine.questions import Question
from telerag_cli.errors import ArtifactError, TeleragError, UsageError
from telerag_cli.files import writing
from telerag_cli.pipelines.base import ANSWER, Listener, Pipeline
from telerag_cli.pipelines.conversation import Turn
from telerag_cli.tracing import Span


def converse(chat: Chat, lines: Piped | Typed, screen: Screen) -> int:
    """Go through lines, one after the other, until they end or one says so; return how many of them failed.

    Ctrl-C during an answer ends that answer, if there is somebody to go on with; `asyncio.Runner` turns it into the
    cancellation of the answer, and then into KeyboardInterrupt here.
    """
    failed = 0
    with asyncio.Runner() as runner:
        while not chat.ended:
            try:
                line = lines.read(runner)
                if line is None:
                    break
                if line.startswith("/"):
                    chat.command(line)
                elif line:
                    runner.run(chat.ask(line))
            except TeleragError as error:
                failed += 1
                screen.fail(str(error))
            except KeyboardInterrupt:
                screen.end_line()
                if not lines.interactive:
                    raise
                screen.note("Interrupted; this question is not part of the conversation.")
    return failed


@dataclass(frozen=True)
class Exchange:
    """A question, its answer, and how it was answered."""

    question: str
    """As it was asked."""
    answered: AskResult


class Shown(Listener):
    """Shows what happens to a question, and keeps the growing answer to be shown too."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.written: asyncio.Queue[str | None] = asyncio.Queue()
        """All of the answer so far, time and again; None after the last."""
        self._loop = asyncio.get_running_loop()

    def rewritten(self, question: str) -> None:
        """See `Listener`."""
        self.screen.note(f"→ {question}")

    def begins(self, stage: str) -> None:
        """See `Listener`."""
        phrases = {"rewrite": "rewriting the question...", ANSWER: "reading passages..."}
        self.screen.stage(phrases.get(stage, f"writing {stage.replace('_', ' ')}..."))

    def retrieving(self) -> None:
        """See `Listener`."""
        self.screen.stage("retrieving...")

    def wrote(self, stage: str, text: str) -> None:
        """See `Listener`."""
        if stage == ANSWER:
            self._loop.call_soon_threadsafe(self.written.put_nowait, text)


class Chat:
    """The state of a conversation. An answer that fails or is interrupted leaves it as it was."""

    def __init__(
        self, engine: Engine, screen: Screen, pipelines: Mapping[PipelineName, Pipeline], *, tracing: bool
    ) -> None:
        """Begin, with an engine whose tracer is on; with ``tracing`` the spans of all turns are kept."""
        self.ended = False
        self._engine = engine
        self._screen = screen
        self._pipeline = engine.pipeline
        self._pipelines = pipelines
        self._tracing = tracing
        self.exchanges: list[Exchange] = []
        self._spans: list[Span] = []
        """Of the last answer."""

    async def ask(self, question: str) -> None:
        """Answer a question, show the answer, and remember both.

        Raises:
            TeleragError: it cannot be answered.
        """
        if not self._tracing:
            self._engine.tracer.clear()
        begun_s = time.perf_counter()
        try:
            answered = await self._written(question)
            self._screen.answered(answered)
        finally:
            self._screen.end_line()
        if answered.finish_reason == "length":
            self._screen.note("The answer is as long as --max-tokens lets it be.")
        self.exchanges.append(Exchange(question, answered))
        self._spans = [span for span in self._engine.tracer.spans() if span.start_s >= begun_s]

    def command(self, line: str) -> None:
        """Do what a line that begins with a slash says.

        Raises:
            UsageError: there is no such command, or it cannot do this.
        """
        name, _space, argument = line.partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            nearest = difflib.get_close_matches(name, COMMANDS, 1, cutoff=0)[0]
            raise UsageError(f"There is no command {name}; the nearest is {nearest}.", remedy="/help lists them.")
        command.run(self, argument.strip())

    async def _written(self, question: str) -> AskResult:
        """Let the engine answer, and show what it writes while it does."""
        shown = Shown(self._screen)
        turns = [Turn(exchange.question, exchange.answered.answer) for exchange in self.exchanges]
        asked = self._engine.aask(question, pipeline=self._pipeline, listener=shown, turns=turns)
        answering = asyncio.create_task(asked)
        answering.add_done_callback(lambda _task: shown.written.put_nowait(None))
        try:
            while (text := await shown.written.get()) is not None:
                self._screen.writing(text)
        finally:
            answering.cancel()  # if this one was, or cannot write any more
            await asyncio.wait([answering])
        return answering.result()

    def _last(self) -> AskResult:
        if not self.exchanges:
            raise UsageError("No question was answered yet.", remedy="Ask one.")
        return self.exchanges[-1].answered

    def _help(self, _argument: str) -> None:
        width = max(len(command.usage) for command in COMMANDS.values())
        self._screen.show(
            [
                *(f"{command.usage:{width}}  {command.does}" for command in COMMANDS.values()),
                "",
                "Enter sends, Alt+Enter or a backslash before Enter begins a new line, Ctrl-R",
                "searches what was typed, Ctrl-C stops an answer, Ctrl-D ends.",
            ]
        )

    def _sources(self, argument: str) -> None:
        found = self._last().found
        if argument and not (argument.isdecimal() and 1 <= int(argument) <= len(found)):
            raise UsageError(
                f"The last answer has no passage {argument}.", remedy=f"It has {len(found)}, counted from 1."
            )
        chosen = [int(argument)] if argument else range(1, len(found) + 1)
        blocks = [whole_source(rank, found[rank - 1], self._screen.width) for rank in chosen]
        self._screen.show([line for block in blocks for line in ["", *block]][1:])

    def _change_pipeline(self, argument: str) -> None:
        if argument:
            self._pipeline = self._pipelines[PipelineName(_chosen(argument, list(PipelineName), "pipeline"))]
        self._show_choice("Pipeline", self._pipeline.name, list(PipelineName))

    def _change_lookahead(self, argument: str) -> None:
        if argument:
            self._engine.configure(lookahead=_chosen(argument, list(Lookahead), "lookahead"))
        self._show_choice("Lookahead", self._engine.config.lookahead, list(Lookahead))

    def _show_choice(self, what: str, chosen: str, words: Sequence[str]) -> None:
        others = ", ".join(word for word in words if word != chosen)
        self._screen.show([f"{what}: {chosen} (or {others})"])

    def _timings(self, _argument: str) -> None:
        answered, width = self._last(), self._screen.width
        self._screen.show([*timeline(self._spans, width), "", *seconds(answered, width)])

    def _save(self, argument: str) -> None:
        if not argument:
            raise UsageError("/save needs a file's name.", remedy="Try /save conversation.md")
        path = Path(argument).expanduser()
        if path.exists():
            raise ArtifactError(f"{path} is there already.", remedy="Choose another name.")
        self._last()
        with writing(path) as temporary:
            text = _json_lines(self.exchanges) if path.suffix == ".jsonl" else _markdown(self.exchanges)
            temporary.write_text(text, encoding="utf-8")
        self._screen.note(f"Saved {len(self.exchanges)} questions and answers in {path}.")

    def _clear(self, _argument: str) -> None:
        self.exchanges.clear()
        self._screen.note("The conversation is forgotten.")

    def _quit(self, _argument: str) -> None:
        self.ended = True


def _chosen(word: str, words: Sequence[str], what: str) -> str:
    if word not in words:
        raise UsageError(f"There is no {what} {word}.", remedy=f"Choose one of {', '.join(words)}.")
    return word


def _markdown(exchanges: Sequence[Exchange]) -> str:
    blocks = []
    for exchange in exchanges:
        blocks.append(f"## {' '.join(exchange.question.split())}")
        if exchange.answered.question != exchange.question:
            blocks.append(f"*{exchange.answered.question}*")
        blocks.append(exchange.answered.answer)
        if exchange.answered.found:
            blocks.append("\n".join(f"- {line.strip()}" for line, _cited in source_lines(exchange.answered)))
    return "\n\n".join(blocks) + "\n"


def _json_lines(exchanges: Sequence[Exchange]) -> str:
    lines = (
        answer_line(Question(str(number), exchange.question), exchange.answered)
        for number, exchange in enumerate(exchanges, 1)
    )
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


@dataclass(frozen=True)
class Command:
    """What a line that begins with a slash does."""

    usage: str
    does: str
    run: Callable[[Chat, str], None]
    words: tuple[str, ...] = ()
    """What may follow it, if that can be listed."""


COMMANDS = {
    command.usage.split()[0]: command
    for command in (
        Command("/help", "These lines.", Chat._help),
        Command("/sources [N]", "The passages of the last answer, or its Nth, in full.", Chat._sources),
        Command("/pipeline [NAME]", "How questions are answered.", Chat._change_pipeline, tuple(PipelineName)),
        Command("/lookahead [MODE]", "What predicts the lists to move.", Chat._change_lookahead, tuple(Lookahead)),
        Command("/timings", "Where the time of the last answer went.", Chat._timings),
        Command("/save FILE", "The conversation as Markdown, or as JSON lines (.jsonl).", Chat._save),
        Command("/clear", "Forget the conversation.", Chat._clear),
        Command("/quit", "End.", Chat._quit),
    )
}
