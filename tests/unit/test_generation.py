"""What generators have in common, the scripted one, and what needs no compiled llama.cpp."""

import asyncio
import pkgutil
import subprocess
import sys

import pytest

import telerag_cli.llm
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
    words = result.text.split()
    assert (words, result.finish_reason) == (["green", "and", "blue", "and", "red"], "stop")
    assert seen == [(" ".join(words[:count]), count) for count in range(1, 6)]


@pytest.mark.parametrize(("options", "reason"), [({"max_tokens": 2}, "length"), ({"stop": ("blue",)}, "stop")])
def test_the_scripted_generator_ends_where_it_is_told(options, reason):
    result = asyncio.run(ScriptedGenerator({"": "green and blue"}).generate(ask("which colour?", **options)))
    assert (result.text, result.finish_reason) == ("green and", reason)


def test_what_cannot_be_answered_is_refused():
    generator = ScriptedGenerator({"colour": "green"}, context_tokens=10)
    with fails(ModelError, "'which shape?'"):
        asyncio.run(generator.generate(ask("which shape?")))
    with fails(ContextError, 5, 8, 10):
        asyncio.run(generator.generate(ask("a b c d e")))


def test_cut_at_the_first_stop_text():
    assert find_stop("one two three", ["three", "two"]) == (4, "two")
    assert find_stop("one", ["two"]) is None


def test_only_one_module_needs_the_compiled_llama_cpp():
    modules = {f"telerag_cli.llm.{module.name}" for module in pkgutil.iter_modules(telerag_cli.llm.__path__)}
    others = sorted(modules - {"telerag_cli.llm.llama_model"})
    code = f"import sys; sys.modules['llama_cpp'] = None; import {', '.join(others)}"
    subprocess.run([sys.executable, "-c", code], check=True)
