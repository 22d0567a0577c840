"""How many passages a prompt holds, and how often it is counted to know that."""

import asyncio
import threading

import pytest

from expect import fails
from telerag_cli.engine.session import fit
from telerag_cli.errors import ContextError
from telerag_cli.llm.base import QUICK_CHARACTERS, Message, counted
from telerag_cli.llm.scripted import ScriptedGenerator

PASSAGES = ["one", "two", "three", "four"]


def prompt(question, found):
    return [Message("user", " ".join([*found, question]))]


def fitted(question, room):
    counts = []

    async def count(messages):
        counts.append(len(messages[0].content.split()))
        return counts[-1]

    messages, kept = asyncio.run(fit(question, PASSAGES, prompt, room, count))
    return messages[0].content, kept, counts


@pytest.mark.parametrize(("room", "kept"), [(9, 4), (5, 4), (4, 3), (2, 1), (1, 0)])
def test_the_best_passages_that_fit_are_kept(room, kept):
    assert fitted("why?", room)[:2] == (" ".join([*PASSAGES[:kept], "why?"]), kept)


def test_a_question_that_cannot_fit_is_counted_with_all_passages_and_with_none():
    with fails(ContextError, 7, 6):
        fitted("why " * 7, 6)
    assert fitted("why?", 1)[2][:2] == [5, 1]


def test_a_long_prompt_is_counted_in_another_thread(monkeypatch):
    generator, threads = ScriptedGenerator({}), []
    count = generator.count_tokens
    monkeypatch.setattr(
        generator, "count_tokens", lambda messages: threads.append(threading.current_thread()) or count(messages)
    )
    for words in (1, QUICK_CHARACTERS):
        assert asyncio.run(counted(generator, [Message("user", "a " * words)])) == words
    assert [thread is threading.main_thread() for thread in threads] == [True, False]
