"""Recorded texts in a model's time."""

import asyncio
import json
import time

import pytest

from expect import fails
from telerag_cli.errors import ArtifactError, ContextError, ModelError
from telerag_cli.llm.base import Message, Request, Token
from telerag_cli.llm.replay import Replay
from telerag_cli.llm.scripted import ScriptedGenerator

CHATTER = " ".join(f"word{n}" for n in range(200))


def generation(question="Which colour?", text="green and blue", **changes):
    return {
        "stage": "answer",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}],
        "max_tokens": 16,
        "text": text,
        "finish_reason": "stop",
        "stopped_by": None,
        "prompt_tokens": 11,
        "completion_tokens": 3,
        "tokens": [],
        "took_s": 0.5,
    } | changes


@pytest.fixture
def trace(tmp_path):
    """Writes a recording: a line for every list of generations."""

    def write(*questions):
        path = tmp_path / "trace.jsonl"
        lines = [
            {"id": "1", "question": "?", "generations": generations, "retrievals": []} for generations in questions
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write


def ask(question="Which colour?", max_tokens=16, **options):
    return Request([Message("system", "Be brief."), Message("user", question)], max_tokens, **options)


def replay_of(path, **pace):
    """At the pace of a model that writes as many words as it may."""
    return Replay(path, ScriptedGenerator({"": CHATTER}, **pace))


def run(replay, request, on_text=None):
    return asyncio.run(replay.generate(request, on_text))


def test_what_was_recorded_is_given(trace):
    replay = replay_of(trace([generation(stopped_by="\n", finish_reason="stop")]), context_tokens=77)
    assert (replay.count_tokens([Message("user", "What is new?")]), replay.context_tokens) == (3, 77)
    seen = []
    result = run(replay, ask(stop=("\n",)), lambda text, tokens: seen.append((text, tokens)))
    assert (result.text, result.finish_reason, result.stopped_by) == ("green and blue", "stop", "\n")
    assert (result.prompt_tokens, result.completion_tokens, result.tokens) == (11, 3, ())
    assert (result.prefill_s, result.decode_s, result.queue_s, result.cached_tokens) == (0, 0, 0, 0)
    assert seen == [("gree", 1), ("green and", 2), ("green and blue", 3)]


def test_recorded_tokens_are_given_and_set_the_pace(trace):
    spans = [[0, 5, -0.1], [5, 9, -0.2], [9, 14, -1]]
    replay = replay_of(trace([generation(tokens=spans)]))
    seen = []
    result = run(replay, ask(logprobs=True), lambda text, _tokens: seen.append(text))
    assert result.tokens == (Token(0, 5, -0.1), Token(5, 9, -0.2), Token(9, 14, -1.0))
    assert seen == ["green", "green and", "green and blue"]
    assert run(replay, ask()).tokens == ()


def test_the_pacer_sees_the_prompt_and_sets_the_time(trace):
    pacer = ScriptedGenerator({"": CHATTER}, token_s=0.02, context_tokens=100)
    replay = Replay(trace([generation(completion_tokens=5)]), pacer)
    started_s = time.perf_counter()
    seen = []
    request = ask(temperature=0.7, stop=("word1",), logprobs=True)
    result = run(replay, request, lambda text, tokens: seen.append((time.perf_counter() - started_s, text, tokens)))
    assert pacer.requests == [Request(request.messages, 5, ignore_eos=True)]
    assert [text for _s, text, _tokens in seen] == ["gr", "green", "green an", "green and b", "green and blue"]
    assert all(at_s >= 0.0199 * tokens for at_s, _text, tokens in seen)
    assert seen[0][0] < 0.08  # long before the last
    assert (result.text, result.completion_tokens, result.prompt_tokens) == ("green and blue", 5, 11)
    assert result.prefill_s == pytest.approx(0.02)
    assert result.decode_s == pytest.approx(0.08)
    assert (replay.name, replay.context_tokens, replay.parallel) == ("scripted", 100, 1000)
    assert replay.count_tokens(request.messages) == 4


def test_a_pacer_that_ends_early_leaves_nothing_unsaid(trace):
    replay = Replay(trace([generation()]), ScriptedGenerator({"": "one two"}))
    seen = []
    run(replay, ask(), lambda text, tokens: seen.append((text, tokens)))
    assert seen == [("gree", 1), ("green and", 2), ("green and blue", 3)]


def test_an_empty_text_takes_the_time_of_one_token(trace):
    pacer = ScriptedGenerator({"": CHATTER}, token_s=0.02)
    replay = Replay(trace([generation(text="", completion_tokens=0)]), pacer)
    seen = []
    result = run(replay, ask(), lambda text, _tokens: seen.append(text))
    assert (result.text, seen, pacer.requests[0].max_tokens) == ("", [], 1)
    assert result.prefill_s == pytest.approx(0.02)


def test_equal_prompts_are_answered_in_the_order_of_the_recording(trace):
    replay = replay_of(trace([generation(text="one"), generation("Other?", "else")], [generation(text="two")]))
    assert [run(replay, ask()).text for _ in range(3)] == ["one", "two", "two"]
    assert run(replay, ask("Other?")).text == "else"


def test_the_length_asked_for_belongs_to_the_prompt(trace):
    path = trace([generation(), generation(max_tokens=64, text="a longer text", completion_tokens=9)])
    replay = replay_of(path)
    assert run(replay, ask(max_tokens=64)).text == "a longer text"
    with fails(ModelError, path, 32, "'Which colour?'", "16, 64"):
        run(replay, ask(max_tokens=32))


def test_a_prompt_that_was_not_recorded(trace):
    path = trace([generation()])
    pacer = ScriptedGenerator({"": CHATTER})
    with fails(ModelError, path, 16, "'Which shape is it", "…'"):
        run(Replay(path, pacer), ask("Which\nshape " + "is it " * 20))
    assert pacer.requests == []


def test_what_the_pacer_says_goes_through(trace):
    path = trace([generation(completion_tokens=50)])
    with fails(ContextError, 50, 20):
        run(Replay(path, ScriptedGenerator({"": CHATTER}, context_tokens=20)), ask())
    pacer = ScriptedGenerator({"": CHATTER}, token_s=0.01)
    replay = Replay(path, pacer)
    seen = []

    async def cancel():
        task = asyncio.create_task(replay.generate(ask(), lambda text, _tokens: seen.append(text)))
        while len(seen) < 3:
            await asyncio.sleep(0.005)
        assert pacer.running == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pacer.running == 0

    asyncio.run(cancel())
    assert len(seen) < 10


@pytest.mark.parametrize(
    ("second", "values"),
    [
        ("nonsense", ()),
        ("[1, 2]", ()),
        ('{"id": "1"}', ("generations",)),
        (json.dumps({"generations": 5}), ("generations",)),
        (json.dumps({"generations": [generation(text=None)]}), ("generations: 0: text",)),
        (json.dumps({"generations": [generation(messages=["hello"])]}), ("messages: 0",)),
        (json.dumps({"generations": [generation(finish_reason="end")]}), ("finish_reason", "'stop'", "'length'")),
        (json.dumps({"generations": [generation(completion_tokens=-1)]}), ("completion_tokens",)),
        (json.dumps({"generations": [generation(tokens=[[3, 99, -1.0]])]}), (3, 99, 14)),
    ],
)
def test_a_damaged_line_is_named(trace, second, values):
    path = trace([generation()])
    with path.open("a") as lines:
        lines.write(second + "\n")
    with fails(ArtifactError, f"{path}, line 2", *values):
        replay_of(path)


def test_a_file_that_is_no_recording(trace, tmp_path):
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.jsonl", trace([]), binary):
        with fails(ArtifactError, path):
            replay_of(path)


@pytest.mark.model
def test_a_real_model_sets_the_time(trace):
    from telerag_cli.llm.llama_model import LlamaModel
    from telerag_cli.llm.llamacpp import LlamaCpp
    from telerag_cli.llm.models import resolve_model

    short, long = (generation("Short?", "a b c", completion_tokens=2), generation("Long?", completion_tokens=60))
    pacer = LlamaCpp(LlamaModel(resolve_model(None, None)), context_tokens=256, parallel=2)
    replay = Replay(trace([short, long]), pacer)
    seen = []
    try:
        result = run(replay, ask("Long?"), lambda text, tokens: seen.append((text, tokens)))
        quick = run(replay, ask("Short?"))
    finally:
        replay.close()
    assert [tokens for _text, tokens in seen] == list(range(1, 61))
    assert seen[-1][0] == result.text == "green and blue"
    assert result.prefill_s > 0
    assert result.decode_s > quick.decode_s > 0
