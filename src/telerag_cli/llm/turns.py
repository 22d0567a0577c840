"""Conversations for models that do not take every order of turns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from telerag_cli.llm.base import Message


def merged(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation with neighbouring turns of one role as one turn, so that roles alternate."""
    return [
        Message(role, "\n\n".join(message.content for message in turns))
        for role, turns in itertools.groupby(messages, lambda message: message.role)
    ]


def without_system(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation with system messages in the user's turns, so that roles alternate and none is system."""
    return merged([replace(message, role="user") if message.role == "system" else message for message in messages])
