"""What generators have in common, and the scripted one."""

import asyncio

from expect import fails
from telerag_cli.errors import ContextError, ModelError
from telerag_cli.llm.base import Message, Request, find_stop
from telerag_cli.llm.scripted import ScriptedGenerator


def ask(text, max_tokens=8, **options):
    return Request([Message("user", text)], max_tokens, **options)


def test_the_scripted_generator_streams_and_stops():
    generator = ScriptedGenerator({"colour": "green and blue and red"})
    seen = []
    result = asyncio.run(generator.generate(ask("which colour?"), lambda text, tokens: seen.append((text, tokens))))
    assert result.text == "green and blue and red"
    assert result.finish_reason == "stop"
    assert seen == [
        ("green", 1),
        ("green and", 2),
        ("green and blue", 3),
        ("green and blue and", 4),
        ("green and blue and red", 5),
    ]
    cut = asyncio.run(generator.generate(ask("which colour?", max_tokens=2)))
    assert (cut.text, cut.finish_reason) == ("green and", "length")
    stopped = asyncio.run(generator.generate(ask("which colour?", stop=("blue",))))
    assert (stopped.text.strip(), stopped.finish_reason) == ("green and", "stop")
    with fails(ModelError, "'which shape?'"):
        asyncio.run(generator.generate(ask("which shape?")))


def test_cut_at_the_first_stop_text():
    assert find_stop("one two three", ["three", "two"]) == (4, "two")
    assert find_stop("one", ["two"]) is None


def test_a_prompt_beyond_the_context_is_refused():
    generator = ScriptedGenerator({"": "yes"}, context_tokens=10)
    with fails(ContextError, 5, 8, 10):
        asyncio.run(generator.generate(ask("a b c d e")))
