"""Chunks of an answer: whatever JSON a server sends, its text is text, and nothing breaks."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from telerag_cli.llm.base import Message, Request
from telerag_cli.llm.shapes import Choice
from telerag_cli.llm.streamed_answer import StreamedAnswer

TEXTS = st.sampled_from(["<think>", "</think>", "\ud83d", "\ude00", "\0", "END", "stop", '{"choice": "yes"}'])
ANY = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=2)),
    max_leaves=5,
)


def objects(**fields):
    """Objects that have each of these fields, right or wrong, or do not."""
    return st.one_of(
        st.fixed_dictionaries({}, optional={name: st.one_of(value, ANY) for name, value in fields.items()}), ANY
    )


BYTES = st.lists(st.integers(-1, 256), max_size=3)
TOKENS = st.lists(objects(token=TEXTS, logprob=st.one_of(st.floats(), st.just(10**400)), bytes=BYTES), max_size=2)
DELTA = objects(content=TEXTS, reasoning_content=TEXTS, refusal=TEXTS)
CHOICE = objects(delta=DELTA, message=DELTA, finish_reason=TEXTS, stop_reason=TEXTS, logprobs=objects(content=TOKENS))
USAGE = objects(prompt_tokens=st.integers(), completion_tokens=st.integers(), prompt_tokens_details=ANY)
CHUNK = objects(choices=st.lists(CHOICE, max_size=2), usage=USAGE)


@settings(max_examples=300, deadline=None)
@given(st.lists(CHUNK, max_size=5), st.sampled_from([None, Choice(("yes", "no"))]))
def test_whatever_comes_makes_a_text_or_nothing(chunks, shape):
    seen = []
    answer = StreamedAnswer(
        Request([Message("user", "?")], 8, stop=("END",), shape=shape, logprobs=True),
        lambda text, tokens: seen.append((text, tokens)),
    )
    for chunk in chunks:
        if isinstance(chunk, dict):
            answer.add(chunk)
    answer.has_shape()
    made = answer.generation(0.0, 5)
    for text in (made.text, answer.refusal, *(text for text, _tokens in seen)):
        assert "\0" not in text
        json.dumps(text).encode()
        text.encode()
    assert min(made.prompt_tokens, made.completion_tokens, made.cached_tokens) >= 0
    assert all(0 <= token.start < token.end <= len(made.text) for token in made.tokens)
