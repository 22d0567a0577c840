"""A recorded run again: its texts, in the time that a model takes for as many tokens.

Two ways of retrieving can so be compared over the very same texts, whatever the model would write today.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from telerag_cli.config import DEFAULT_CTX_SIZE
from telerag_cli.errors import ArtifactError, ModelError
from telerag_cli.files import wrap_os_error
from telerag_cli.llm.base import FinishReason, Generation, Generator, Message, OnText, Request, Token

T = TypeVar("T")

_SHOWN_CHARACTERS = 60

Turns = tuple[tuple[str, str], ...]
"""Messages as a key: role and content of each."""


class Replay:
    """A generator that writes what was recorded for the same messages and the same ``max_tokens``."""

    def __init__(self, trace: Path, pacer: Generator | None = None, *, context_tokens: int = DEFAULT_CTX_SIZE) -> None:
        """Read the recording.

        Args:
            trace: what ``telerag run --record`` wrote.
            pacer: the model whose time it takes: it gets the same prompts and writes as many tokens as recorded, which
                nobody sees. Without one the texts come at once.
            context_tokens: tokens that prompt and answer may have together, if there is no pacer to say it.

        Raises:
            ArtifactError: the file is missing or no recording.
        """
        self._trace = trace
        self._pacer = pacer
        self._recorded: dict[tuple[Turns, int], list[Generation]] = {}
        self._taken: dict[tuple[Turns, int], int] = {}
        self._prompt_tokens: dict[Turns, int] = {}
        for turns, max_tokens, generation in _read(trace):
            self._recorded.setdefault((turns, max_tokens), []).append(generation)
            self._prompt_tokens[turns] = generation.prompt_tokens
        self.name = pacer.name if pacer else f"replay of {trace.name}"
        self.context_tokens = pacer.context_tokens if pacer else context_tokens
        self.parallel = pacer.parallel if pacer else 1000

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of a prompt as the pacer counts them; without one as recorded, or the words of an unknown prompt."""
        if self._pacer:
            return self._pacer.count_tokens(messages)
        known = self._prompt_tokens.get(_turns(messages))
        return sum(len(message.content.split()) for message in messages) if known is None else known

    async def generate(self, request: Request, on_text: OnText | None = None) -> Generation:
        """The recorded text. For a prompt recorded several times it is the next one, and the last one from then on.

        Lengths and reason are as recorded, times and ``cached_tokens`` the pacer's.

        Raises:
            InputError: the pacer's context is too small.
            ModelError: the prompt is not in the recording, or the pacer failed.
        """
        recorded = self._next(request)
        shown = _Shown(recorded, on_text)
        timed = await self._pace(request, recorded, shown) if self._pacer else None
        shown.finish()
        if not request.logprobs:
            recorded = replace(recorded, tokens=())
        if timed is None:
            return recorded
        return replace(
            recorded,
            prefill_s=timed.prefill_s,
            decode_s=timed.decode_s,
            queue_s=timed.queue_s,
            cached_tokens=timed.cached_tokens,
        )

    def forget(self) -> None:
        """Drop the pacer's prompts, and begin the recording anew."""
        self._taken.clear()
        if self._pacer:
            self._pacer.forget()

    def close(self) -> None:
        """Free the pacer."""
        if self._pacer:
            self._pacer.close()

    def _next(self, request: Request) -> Generation:
        key = (_turns(request.messages), request.max_tokens)
        if key not in self._recorded:
            raise self._unknown(*key)
        place = self._taken.get(key, 0)
        self._taken[key] = place + 1
        recorded = self._recorded[key]
        return recorded[min(place, len(recorded) - 1)]

    async def _pace(self, request: Request, recorded: Generation, shown: _Shown) -> Generation:
        assert self._pacer
        silent = Request(request.messages, max(recorded.completion_tokens, 1), ignore_eos=True)
        return await self._pacer.generate(silent, lambda _text, count: shown.advance(count))

    def _unknown(self, turns: Turns, max_tokens: int) -> ModelError:
        prompt = " ".join(turns[-1][1].split()) if turns else ""
        begins = prompt if len(prompt) <= _SHOWN_CHARACTERS else f"{prompt[:_SHOWN_CHARACTERS]}…"
        others = sorted({limit for known, limit in self._recorded if known == turns})
        limits = f"; it has it for {', '.join(map(str, others))}" if others else ""
        return ModelError(
            f"The recording {self._trace} has no answer of {max_tokens} tokens to the prompt '{begins}'{limits}.",
            remedy="Replay with the index, pipeline and options of the recording.",
        )


class _Shown:
    """How much of a recorded text was passed on: as much as belongs to the tokens that the pacer has written."""

    def __init__(self, recorded: Generation, on_text: OnText | None) -> None:
        self._text = recorded.text
        self._ends = _ends(recorded)
        self._on_text = on_text
        self._count = 0

    def advance(self, count: int) -> None:
        """Pass on the text of the first ``count`` tokens."""
        count = min(count, len(self._ends))
        if count > self._count:
            self._count = count
            if self._on_text:
                self._on_text(self._text[: self._ends[count - 1]], count)

    def finish(self) -> None:
        """Pass on what is left, token by token."""
        for count in range(self._count + 1, len(self._ends) + 1):
            self.advance(count)


def _ends(recorded: Generation) -> list[int]:
    """Where every token of a text ends; if that was not recorded, as if all were equally long."""
    length = len(recorded.text)
    # A text is shown in any case, even if the record says that it took no token.
    count = max(recorded.completion_tokens, 1 if length else 0)
    if recorded.tokens and len(recorded.tokens) == count:
        return [token.end for token in recorded.tokens[:-1]] + [length]
    return [length * place // count for place in range(1, count + 1)]


def _turns(messages: Sequence[Message]) -> Turns:
    return tuple((message.role, message.content) for message in messages)


def _read(trace: Path) -> Iterator[tuple[Turns, int, Generation]]:
    found = False
    try:
        with trace.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    for value in _field(json.loads(line), "generations", list):
                        yield _recorded(value)
                        found = True
                except ValueError as error:
                    why = error.msg if isinstance(error, json.JSONDecodeError) else error
                    raise _no_recording(f"{trace}, line {number}, is not of a recording: {why}.") from error
    except OSError as error:
        raise wrap_os_error(error, trace) from error
    except UnicodeDecodeError as error:
        raise _no_recording(f"{trace} is no recording: it is not UTF-8 at byte {error.start}.") from error
    if not found:
        raise _no_recording(f"{trace} is no recording: it has no generation.")


def _no_recording(message: str) -> ArtifactError:
    return ArtifactError(message, remedy="Name a file that telerag run --record wrote.")


def _recorded(value: Any) -> tuple[Turns, int, Generation]:
    """One generation of a line; ValueError says what is wrong with it."""
    turns = tuple((_field(turn, "role", str), _field(turn, "content", str)) for turn in _field(value, "messages", list))
    text = _field(value, "text", str)
    reason = _field(value, "finish_reason", str)
    if reason not in ("stop", "length"):
        raise ValueError(f"'finish_reason' is '{reason}', not 'stop' or 'length'")
    stopped_by = value.get("stopped_by")
    generation = Generation(
        text,
        cast("FinishReason", reason),
        prompt_tokens=_count(value, "prompt_tokens"),
        completion_tokens=_count(value, "completion_tokens"),
        prefill_s=0.0,
        decode_s=0.0,
        stopped_by=None if stopped_by is None else _field(value, "stopped_by", str),
        tokens=tuple(_token(entry, len(text)) for entry in _field(value, "tokens", list)),
    )
    return turns, _count(value, "max_tokens"), generation


def _token(entry: Any, length: int) -> Token:
    match entry:
        case [int(start), int(end), int() | float() as logprob] if 0 <= start < end <= length:
            return Token(start, end, float(logprob))
    raise ValueError(f"{entry!r:.40} is no token of a text of {length} characters")


def _count(value: Any, name: str) -> int:
    number = _field(value, name, int)
    if number < 0:
        raise ValueError(f"'{name}' is {number}, which is less than 0")
    return number


def _field(value: Any, name: str, kind: type[T]) -> T:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r:.40} is no JSON object")
    if name not in value:
        raise ValueError(f"'{name}' is missing")
    found = value[name]
    if not isinstance(found, kind):
        raise ValueError(f"'{name}' is {found!r:.40}, not of type {kind.__name__}")
    return found
