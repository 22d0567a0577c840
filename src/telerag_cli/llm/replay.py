"""A recorded run again: its texts, in the time that a model takes for as many tokens.

Two ways of retrieving can so be compared over the very same texts, whatever the model would write today.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

from pydantic import BaseModel, NonNegativeInt, ValidationError, model_validator

from telerag_cli.errors import ArtifactError, ModelError
from telerag_cli.files import wrap_os_error
from telerag_cli.llm.base import FinishReason, Generation, Generator, Message, OnText, Request, Token

_SHOWN_CHARACTERS = 60

_Prompt = tuple[Message, ...]


class Replay:
    """A generator that writes what was recorded for the same messages and the same ``max_tokens``."""

    def __init__(self, trace: Path, pacer: Generator) -> None:
        """Read what ``telerag run --record`` wrote.

        The pacer is the model whose time it takes: it gets the same prompts and writes as many tokens as recorded,
        which nobody sees.

        Raises:
            ArtifactError: the file is missing or not a recording.
        """
        self._trace = trace
        self._pacer = pacer
        self._recorded: dict[tuple[_Prompt, int], list[Generation]] = defaultdict(list)
        self._replayed: Counter[tuple[_Prompt, int]] = Counter()
        for call in _read(trace):
            self._recorded[tuple(call.messages), call.max_tokens].append(call.generation())
        self.name = pacer.name
        self.context_tokens = pacer.context_tokens
        self.parallel = pacer.parallel

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of a prompt as the pacer counts them."""
        return self._pacer.count_tokens(messages)

    async def generate(self, request: Request, on_text: OnText | None = None) -> Generation:
        """The recorded text. For a prompt recorded several times it is the next one, and the last one from then on.

        Lengths and reason are as recorded, times and ``cached_tokens`` the pacer's.

        Raises:
            InputError: the pacer's context is too small.
            ModelError: the prompt is not in the recording, or the pacer failed.
        """
        recorded = self._next(request)
        ends = _token_ends(recorded)
        shown = 0

        def show(count: int) -> None:
            nonlocal shown
            if shown < count <= len(ends):
                shown = count
                if on_text:
                    on_text(recorded.text[: ends[count - 1]], count)

        silent = Request(request.messages, max(recorded.completion_tokens, 1), ignore_eos=True)
        timed = await self._pacer.generate(silent, lambda _text, count: show(min(count, len(ends))))
        for count in range(shown + 1, len(ends) + 1):
            show(count)
        return replace(
            recorded,
            prefill_s=timed.prefill_s,
            decode_s=timed.decode_s,
            queue_s=timed.queue_s,
            cached_tokens=timed.cached_tokens,
            tokens=recorded.tokens if request.logprobs else (),
        )

    def forget(self) -> None:
        """Drop the pacer's prompts, and begin the recording anew."""
        self._replayed.clear()
        self._pacer.forget()

    def close(self) -> None:
        """Free the pacer."""
        self._pacer.close()

    def _next(self, request: Request) -> Generation:
        messages, max_tokens = key = (tuple(request.messages), request.max_tokens)
        if recorded := self._recorded.get(key):
            place = min(self._replayed[key], len(recorded) - 1)
            self._replayed[key] += 1
            return recorded[place]
        prompt = " ".join(messages[-1].content.split()) if messages else ""
        begins = prompt if len(prompt) <= _SHOWN_CHARACTERS else f"{prompt[:_SHOWN_CHARACTERS]}…"
        others = sorted({limit for known, limit in self._recorded if known == messages})
        limits = f"; it has it for {', '.join(map(str, others))}" if others else ""
        raise ModelError(
            f"The recording {self._trace} has no answer of {max_tokens} tokens to the prompt '{begins}'{limits}.",
            remedy="Replay with the index, pipeline and options of the recording.",
        )


class _Call(BaseModel, strict=True):
    """One LLM call of a recording."""

    messages: list[Message]
    max_tokens: NonNegativeInt
    text: str
    finish_reason: FinishReason
    stopped_by: str | None = None
    prompt_tokens: NonNegativeInt
    completion_tokens: NonNegativeInt
    tokens: list[tuple[int, int, float]]

    @model_validator(mode="after")
    def _places_are_in_the_text(self) -> Self:
        for start, end, _logprob in self.tokens:
            if not 0 <= start < end <= len(self.text):
                raise ValueError(
                    f"characters {start} to {end} are not a token of a text of {len(self.text)} characters"
                )
        return self

    def generation(self) -> Generation:
        return Generation(
            self.text,
            self.finish_reason,
            self.prompt_tokens,
            self.completion_tokens,
            prefill_s=0.0,
            decode_s=0.0,
            stopped_by=self.stopped_by,
            tokens=tuple(Token(*token) for token in self.tokens),
        )


class _Line(BaseModel):
    generations: list[_Call]


def _token_ends(recorded: Generation) -> list[int]:
    """Where every token of a text ends; if that was not recorded, as if all were equally long."""
    length = len(recorded.text)
    # A text is shown in any case, even if the record says that it took no token.
    count = max(recorded.completion_tokens, 1 if length else 0)
    if recorded.tokens and len(recorded.tokens) == count:
        return [token.end for token in recorded.tokens[:-1]] + [length]
    return [length * place // count for place in range(1, count + 1)]


def _read(trace: Path) -> Iterator[_Call]:
    found = False
    try:
        with trace.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                for call in _calls(line, f"{trace}, line {number},"):
                    yield call
                    found = True
    except OSError as error:
        raise wrap_os_error(error, trace) from error
    except UnicodeDecodeError as error:
        raise _not_recorded(f"{trace} is not a recording: it is not UTF-8 at byte {error.start}.") from error
    if not found:
        raise _not_recorded(f"{trace} is not a recording: it has no generation.")


def _calls(line: str, place: str) -> list[_Call]:
    try:
        return _Line.model_validate_json(line).generations
    except ValidationError as error:
        first = error.errors()[0]
        fields = [*map(str, first["loc"]), first["msg"]]
        raise _not_recorded(f"{place} is not of a recording: {': '.join(fields)}.") from error


def _not_recorded(message: str) -> ArtifactError:
    return ArtifactError(message, remedy="Name a file that telerag run --record wrote.")
