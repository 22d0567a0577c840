"""What a server takes of OpenAI's chat completions, as far as its refusals have told."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from telerag_cli.llm.base import Message, Request
from telerag_cli.llm.turns import merged, without_system

MAX_STOP_TEXTS = 4
"""As many as OpenAI takes."""

SchemaFormat = Literal["json_schema", "json_object"]
"""How a schema is sent to a server: OpenAI's way, or the one before it."""

_DISPENSABLE = ("stream_options", "top_logprobs", "logprobs", "seed", "top_p", "stop", "temperature", "stream")
"""Parameters that a server may do without, those that matter least first."""
_UNNAMED = ("stream_options", "top_logprobs", "logprobs", "seed", "top_p")
"""Those that are left out one by one if a server refuses a parameter and does not name it."""
_NEUTRAL: Mapping[str, float] = {"temperature": 0.0, "top_p": 1.0, "seed": 0}
"""Values that mean little, so that they can be left out where a server does not take them."""
_WORDS = {
    "stream_options": r"stream_options|include_usage",
    "top_logprobs": r"top_logprobs",
    "logprobs": r"(?<!top_)log[ _-]?prob\w*",
    "seed": r"\bseed\b(?!-)",
    "top_p": r"\btop[ _-]p\b",
    "stop": r"""[`'"]stop[`'"]|\bstop (?:sequence|string|text|token|word)s?\b""",
    "temperature": r"\btemperature\b",
    "stream": r"""[`'"]stream[`'"]|\bstream(?:=|ing\b|ed\b| is\b| mode\b| parameter\b| request| response)""",
}
"""How refusals speak of the parameters."""
_REFUSES = re.compile(
    r"unsupported|n[o']t (?:\w+ )?(?:support|permit|allow|accept|available|enabled|implemented|recogni[sz]ed|known)"
    r"|does not (?:take|exist)|unknown|unrecogni[sz]ed|unexpected|\bextra|additional propert|forbidden|disabled"
    r"|deprecated|cannot (?:\w+ )*be (?:used|set|specified|combined)|only (?:\w+ )*(?:allowed|supported|available)"
    r"|invalid (?:parameter|field|argument|key|property|role)|\binstead\b"
    r"|must be (?:false|null|none|empty|omitted|unset)"
)
_SAYS_NOTHING = re.compile(
    r"(?:error code: 4\d\d)?\W*"
    r"(?:(?:400 |422 )?(?:bad|invalid|malformed) request|unprocessable (?:entity|content)|validation error)?\W*"
)
"""A refusal that names no reason at all."""
_OF_VALUE = re.compile(r"\b(?:must|should|range|between|positive|greater|less|minimum|at least|valid)\b")
_OF_PARAMETERS = re.compile(r"\b(?:parameter|field|argument|key|propert|input|option)")
_NO_SYSTEM = re.compile(
    r"system.{0,20}\b(?:role|message|prompt|instruction|turn)|role.{0,40}\bsystem|developer instruction"
    r"|(?:should|must|only) .{0,20}user.{0,20}assistant"
)
_ONLY = re.compile(r"\b(?:should|must|only)\b")
_ALTERNATE = re.compile(r"alternat|roles? in a row|consecutive|same role|multiple .{0,10}user")


class Dialect:
    """How requests are put to one server."""

    def __init__(self) -> None:
        """Begin with OpenAI's own way."""
        self.schema_format: SchemaFormat = "json_schema"
        self._max_tokens = "max_tokens"
        self._left_out: set[str] = set()
        self._left_out_if_neutral: set[str] = set()
        self._arrange: Callable[[Sequence[Message]], Sequence[Message]] = list

    def body(self, model: str, request: Request) -> dict[str, Any]:
        """Return the request as this server takes it."""
        shape = request.shape
        body: dict[str, Any] = {
            "model": model,
            "messages": [
                {"role": message.role, "content": message.content} for message in self._arrange(request.messages)
            ],
            self._max_tokens: request.max_tokens + (shape.json_tokens() if shape else 0),
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if shape is not None:
            # No stop texts: they are meant for the text, and would end the JSON around it.
            if self.schema_format == "json_object":
                body["response_format"] = {"type": "json_object", "schema": shape.json_schema()}
            else:
                schema = {"name": "answer", "schema": shape.json_schema(), "strict": True}
                body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif request.stop:
            body["stop"] = list(request.stop[:MAX_STOP_TEXTS])
        if request.logprobs:
            body |= {"logprobs": True, "top_logprobs": 1}  # some servers send none without the second
        return {name: value for name, value in body.items() if not self._leaves_out(name, value)}

    def learn(
        self, body: Mapping[str, Any], said: str, param: str | None = None, *, broken: bool = False
    ) -> str | None:
        """Take a refusal of ``body`` into account.

        Args:
            body: what was refused.
            said: the server's words.
            param: the parameter that the server names apart from its words.
            broken: whether the server calls it a failure of its own, which its words may only seem to explain.

        Returns:
            What is different from now on, as the end of a sentence; empty if that is known since ``body`` was sent, and
            None if nothing in the refusal tells what to do.
        """
        said = said.lower()
        learnt = self._learn_schema(body, said)
        if learnt is None:
            learnt = self._learn_roles(body, said)
        return self._learn_parameter(body, said, param, broken=broken) if learnt is None else learnt

    def _leaves_out(self, name: str, value: Any) -> bool:
        if name == "stream_options" and "stream" in self._left_out:
            return True
        if name == "top_logprobs" and "logprobs" in self._left_out:
            return True
        return name in self._left_out or (name in self._left_out_if_neutral and value == _NEUTRAL[name])

    def _learn_schema(self, body: Mapping[str, Any], said: str) -> str | None:
        asked = body.get("response_format", {}).get("type")
        if asked != "json_schema" or "json_schema" not in said or "json_object" not in said:
            return None
        self.schema_format, known = "json_object", self.schema_format == "json_object"
        return "" if known else "does not know json_schema; schemas go to it with json_object"

    def _learn_roles(self, body: Mapping[str, Any], said: str) -> str | None:
        roles = [message["role"] for message in body["messages"]]
        alternate = bool(_ALTERNATE.search(said))
        if alternate and _repeats(roles):
            known = self._arrange is not list
            self._arrange = self._arrange if known else merged
            return "" if known else "wants roles to alternate; neighbouring turns of one role go to it as one"
        refused = _NO_SYSTEM.search(said) and (_REFUSES.search(said) or _ONLY.search(said))
        if "system" in roles and (refused or alternate):
            self._arrange, known = without_system, self._arrange is without_system
            return "" if known else "does not take system messages; they go to it in the user's turn"
        return None

    def _learn_parameter(self, body: Mapping[str, Any], said: str, param: str | None, *, broken: bool) -> str | None:
        silent = bool(_SAYS_NOTHING.fullmatch(said))
        if not silent and not _REFUSES.search(said):
            return None if broken else self._learn_value(body, said, param)
        if "max_tokens" in body and (param == "max_tokens" or "max_tokens" in said or "max_completion_tokens" in said):
            known, self._max_tokens = self._max_tokens != "max_tokens", "max_completion_tokens"
            return "" if known else "does not take max_tokens; max_completion_tokens is sent instead"
        mentioned = [name for name in _DISPENSABLE if name == param] or _mentioned(said)
        if not mentioned and not broken and (silent or _OF_PARAMETERS.search(said)):
            mentioned = list(_UNNAMED)
        name = next((name for name in mentioned if name in body), None)
        if name is None or (broken and name == "stream"):
            return None
        known = name in self._left_out
        self._left_out.add(name)
        if name == "stream":
            return "" if known else "does not stream; answers come whole"
        return "" if known else f"does not take {name}; it is left out"

    def _learn_value(self, body: Mapping[str, Any], said: str, param: str | None) -> str | None:
        name = next((name for name in _NEUTRAL if name == param or name in _mentioned(said)), None)
        if name is None or body.get(name) != _NEUTRAL[name] or not _OF_VALUE.search(said):
            return None
        known = name in self._left_out_if_neutral
        self._left_out_if_neutral.add(name)
        return "" if known else f"does not take {name} {body[name]:g}; it is left out"


def _mentioned(said: str) -> list[str]:
    """The parameters that a refusal speaks of, those that matter least first."""
    return [name for name in _DISPENSABLE if re.search(_WORDS[name], said)]


def _repeats(roles: Sequence[str]) -> bool:
    """Whether two neighbouring turns have the same role."""
    return any(first == second for first, second in itertools.pairwise(roles))
