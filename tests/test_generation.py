"""Generators: the scripted one, and llama.cpp with the bundled model."""

import asyncio
import time

import pytest

from telerag_cli.errors import InputError, ModelError
from telerag_cli.generation.base import Message, Request, cut_at_stop
from telerag_cli.generation.scripted import ScriptedGenerator


def ask(text, max_tokens=8, **options):
    return Request([Message("user", text)], max_tokens, **options)


def test_the_scripted_generator_streams_and_stops():
    generator = ScriptedGenerator({"colour": "green and blue and red"})
    seen = []
    result = asyncio.run(
        generator.generate(ask("which colour?"), lambda text, tokens: seen.append((text, tokens)))
    )
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
    with pytest.raises(ModelError, match="no answer to 'which shape"):
        asyncio.run(generator.generate(ask("which shape?")))


def test_cut_at_the_first_stop_text():
    assert cut_at_stop("one two three", ["three", "two"]) == "one "
    assert cut_at_stop("one", ["two"]) is None


def test_a_prompt_beyond_the_context_is_refused():
    generator = ScriptedGenerator({"": "yes"}, context_tokens=10)
    with pytest.raises(InputError, match=r"has 5 tokens and the answer up to 8; the context holds 10"):
        asyncio.run(generator.generate(ask("a b c d e")))


@pytest.fixture(scope="module")
def llama():
    from telerag_cli.generation.llamacpp import LlamaCpp
    from telerag_cli.generation.models import resolve_model

    generator = LlamaCpp(resolve_model(None, None), context_tokens=512)
    yield generator
    generator.close()


@pytest.mark.model
def test_llama_streams_what_it_answers_and_answers_the_same_again(llama):
    seen = []
    first = asyncio.run(
        llama.generate(ask("Name a colour.", 12), lambda text, tokens: seen.append((text, tokens)))
    )
    other = asyncio.run(llama.generate(ask("Count to three.", 12)))
    again = asyncio.run(llama.generate(ask("Name a colour.", 12)))
    assert first.text == again.text  # nothing is left of the answer between
    assert other.text != first.text
    assert [tokens for _text, tokens in seen] == list(range(1, first.completion_tokens + 1))
    assert seen[-1][0].strip() == first.text
    assert first.prompt_tokens == llama.count_tokens([Message("user", "Name a colour.")])


@pytest.mark.model
def test_llama_samples_by_seed_and_stops_at_texts(llama):
    texts = [
        asyncio.run(llama.generate(ask("Tell a story.", 16, temperature=1.5, seed=seed))).text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    whole = asyncio.run(llama.generate(ask("Name a colour.", 12))).text
    word = whole.split()[1]
    cut = asyncio.run(llama.generate(ask("Name a colour.", 12, stop=(word,))))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.split(word)[0].strip()


@pytest.mark.model
def test_llama_refuses_what_does_not_fit_and_ends_when_cancelled(llama):
    with pytest.raises(InputError, match="the context holds 512"):
        asyncio.run(llama.generate(ask("word " * 600)))

    async def cancel():
        counted = []
        task = asyncio.create_task(
            llama.generate(ask("Tell a long story.", 450), lambda _text, tokens: counted.append(tokens))
        )
        while len(counted) < 3:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        at_end = len(counted)
        await asyncio.sleep(0.1)
        return at_end, len(counted)

    before, after = asyncio.run(cancel())
    assert before == after < 450
    started_s = time.perf_counter()
    asyncio.run(llama.generate(ask("Name a colour.", 2)))
    assert time.perf_counter() - started_s < 30


@pytest.mark.model
def test_a_file_that_is_no_model(tmp_path):
    from telerag_cli.generation.llamacpp import LlamaCpp

    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(ModelError, match="cannot load"):
        LlamaCpp(broken)
