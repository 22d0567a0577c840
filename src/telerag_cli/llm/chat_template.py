"""Chat templates: a conversation as the text that a model was trained to continue.

A template comes with a model and is a program of its own: it may refuse roles, drop turns or loop for ever. And what
a turn says must stay text, even if it spells a token that begins or ends turns.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from telerag_cli.errors import ModelError, one_line
from telerag_cli.llm.base import Message
from telerag_cli.llm.turns import merged, without_system
from telerag_cli.text import printable

T = TypeVar("T")

TIME_LIMIT_S = 5.0
"""Longest time that a template may take; they take less than a millisecond."""
MAX_PRODUCT = 1_000_000
"""Longest list or text that a template may make by multiplying."""
_OPEN, _CLOSE = "\ud800", "\udc00"
"""What encloses the number of a token that stands in a turn's text: halves of pairs, which no text holds."""
_MARK = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
_Arrange = Callable[[Sequence[Message]], Sequence[Message]]
_ARRANGEMENTS: tuple[_Arrange, ...] = (list, merged, without_system)
"""Forms of a conversation, in the order in which a template is offered them."""


class Segment(NamedTuple):
    """A part of a prompt."""

    text: str
    special: bool
    """Whether the spellings of special tokens in it are these tokens, and not text."""


class ChatTemplate:
    """A model's chat template."""

    def __init__(
        self, source: str, name: str, *, bos: str = "", eos: str = "", special: Mapping[str, bool] | None = None
    ) -> None:
        """Compile a template in Jinja's language, and try it.

        Args:
            source: the template.
            name: the model's, for messages.
            bos: how the token that begins a text is spelled.
            eos: how the token that ends a text is spelled.
            special: the spellings of tokens that are never text, and whether the tokenizer makes such a token of its
                spelling even in text without special tokens.

        Raises:
            ModelError: it is not a template, does not end, or takes no conversation.
        """
        self._name = name
        self._tokens = list(special or {})
        self._numbers = {token: number for number, token in enumerate(self._tokens)}
        self._stubborn = {token for token, stubborn in (special or {}).items() if stubborn}
        self._special = re.compile(f"({_any_of(self._tokens)})") if self._tokens else None
        self._forms: dict[tuple[str, ...], tuple[_Arrange, bool]] = {}
        self._variables = {"bos_token": bos, "eos_token": eos}
        try:
            self._template = _Environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise self._unusable(f"is not valid: {_said(error)}") from error
        self._form([Message("system", "Be brief."), Message("user", "Which?")])

    def render(self, messages: Sequence[Message]) -> list[Segment]:
        """Return the prompt that the model is to continue, in parts that are tokenized one by one.

        System messages become part of the user's turn, and neighbouring turns of one role become one, only if the
        template does not take them as they are.

        Raises:
            ModelError: the template does not take this conversation, or does not end.
        """
        arrange, typed = self._form(messages)
        masked = [Message(message.role, self._masked(message.content)) for message in arrange(messages)]
        try:
            return self._segments(self._text(masked, typed=typed))
        except ModelError:
            raise
        except Exception as error:
            raise self._unusable(f"fails: {_said(error)}") from error

    def _form(self, messages: Sequence[Message]) -> tuple[_Arrange, bool]:
        """How the template takes such a conversation: every turn must be in the prompt. Found once for each."""
        roles = tuple(message.role for message in messages)
        if roles in self._forms:
            return self._forms[roles]
        probes = [Message(message.role, f"turn{number}of{len(roles)}") for number, message in enumerate(messages)]
        said = ""
        for typed, arrange in itertools.product((False, True), _ARRANGEMENTS):
            try:
                text = self._text(arrange(probes), typed=typed)
            except ModelError:
                raise
            except Exception as error:
                said = said or _said(error)
                continue
            if all(probe.content in text for probe in probes):
                return self._forms.setdefault(roles, (arrange, typed))
        raise self._unusable(f"takes no conversation of {', '.join(roles)}: {said or 'it leaves out a turn'}")

    def _text(self, messages: Sequence[Message], *, typed: bool) -> str:
        """What the template makes of these turns; ``typed`` is for templates that want them as lists of parts."""
        turns = [
            {"role": message.role, "content": [{"type": "text", "text": message.content}] if typed else message.content}
            for message in messages
        ]
        variables = {
            "messages": turns,
            "add_generation_prompt": True,
            # What a model writes for a program to read has no room for thinking aloud.
            "enable_thinking": False,
            **dict.fromkeys(("functions", "function_call", "tools", "tool_choice")),
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }
        try:
            return _within(TIME_LIMIT_S, lambda: self._template.render(variables | self._variables))
        except TimeoutError as error:
            raise self._unusable(f"does not end within {TIME_LIMIT_S:g} s") from error

    def _masked(self, content: str) -> str:
        if self._special is None:
            return content
        return self._special.sub(lambda found: f"{_OPEN}{self._numbers[found[0]]}{_CLOSE}", content)

    def _segments(self, text: str) -> list[Segment]:
        """Cut a prompt so that each text of a turn that spells a token lies in parts without special tokens.

        A tokenizer cuts at special tokens too, so a part is tokenized as it would be within the whole.
        """
        if _OPEN not in text or self._special is None:
            return [Segment(text, True)]
        segments = [Segment("", True)]
        for part in self._special.split(text):
            if _OPEN in part:
                segments += [Segment(piece, False) for piece in self._unmasked(part)] + [Segment("", True)]
            else:
                segments[-1] = Segment(segments[-1].text + part, True)
        return [segment for segment in segments if segment.text]

    def _unmasked(self, part: str) -> list[str]:
        """The text behind the marks, cut within the tokens that the tokenizer would make even here."""
        pieces = [""]
        for place, text in enumerate(_MARK.split(part)):
            token = self._tokens[int(text)] if place % 2 else ""
            if token in self._stubborn:
                pieces[-1] += token[:1]
                pieces.append(token[1:])
            else:
                pieces[-1] += token or text
        return pieces

    def _unusable(self, problem: str) -> ModelError:
        return ModelError(
            f"The chat template of {self._name} {problem}.", remedy="Choose another instruct or chat model."
        )


class _GenerationTag(Extension):
    """The tag ``generation`` of Transformers, which only matters for training."""

    tags = {"generation"}  # noqa: RUF012  Jinja declares it so

    def parse(self, parser: Parser) -> list[Node]:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as Transformers has it, without ways to fill memory by one multiplication."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self.filters["tojson"] = _tojson

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Multiply, if the product is not too large."""
        sizes = [number.bit_length() if isinstance(number, int) else 0 for number in (left, right)]
        if operator == "**":
            too_large = isinstance(right, int) and max(sizes[0], 1) * abs(right) > MAX_PRODUCT
        elif isinstance(left, int) and isinstance(right, int):
            too_large = sum(sizes) > MAX_PRODUCT
        else:
            count = next((number for number in (left, right) if isinstance(number, int)), 0)
            many = left if isinstance(right, int) else right
            too_large = hasattr(many, "__len__") and len(many) * count > MAX_PRODUCT
        if too_large:
            raise SecurityError(f"a product of more than {MAX_PRODUCT:,}")
        return super().call_binop(context, operator, left, right)


class _InterruptError(BaseException):
    """Ends a template that does not end by itself."""


def _within(seconds: float, function: Callable[[], T]) -> T:
    """Call a function in a thread; raises TimeoutError, and ends it, if it takes longer."""
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=work, name="chat template", daemon=True)
    thread.start()
    try:
        return outcome.result(seconds)
    except TimeoutError:
        if thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_InterruptError))
        raise


def _any_of(texts: Iterable[str]) -> str:
    """A pattern for the longest of these texts, which looks at each character once, however many texts there are."""
    by_first: dict[str, list[str]] = {}
    ends = False
    for text in texts:
        if text:
            by_first.setdefault(text[0], []).append(text[1:])
        else:
            ends = True
    branches = [re.escape(first) + _any_of(rests) for first, rests in by_first.items()]
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)}){'?' * ends}" if ends or len(branches) > 1 else branches[0]


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _said(error: BaseException) -> str:
    return one_line(printable(str(error) or type(error).__name__))
