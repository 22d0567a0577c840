"""Reasoning between tags is not the answer, however it is cut into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telerag_cli.llm.detokenizer import Detokenizer
from telerag_cli.llm.reasoning import ReasoningFilter, split


@pytest.mark.parametrize(
    ("text", "answer", "reasoned"),
    [
        ("Blue", "Blue", False),
        ("<think>Sea?</think>Blue", "Blue", True),
        ("<THINK>Sea?</Think> Blue", " Blue", True),
        ("[THINK]Sea?[/THINK]Blue", "Blue", True),
        ("<|START_THINKING|>Sea?<|END_THINKING|>Blue", "Blue", True),
        ("◁think▷Sea?◁/think▷Blue", "Blue", True),
        ("<think></think>Blue", "Blue", False),
        ("<think>Sea", "", True),
        ("Sea?\n</think>\nBlue", "\nBlue", True),
        ("Blue <think>or red?</think>and red", "Blue and red", True),
        ("<think>a</think>Blue</think> red", "Blue red", True),
        ("The tag `<think>` opens and '</think>' closes.", "The tag `<think>` opens and '</think>' closes.", False),
        ("1 < 2 and <thinker>", "1 < 2 and <thinker>", False),
    ],
)
def test_reasoning_is_left_out(text, answer, reasoned):
    assert split(text)[::2] == (answer, reasoned)


def test_a_text_may_begin_within_reasoning():
    assert split("Sea?</think>Blue", inside=True)[::2] == ("Blue", True)
    assert split("Sea?", inside=True)[::2] == ("", True)


@given(st.lists(st.sampled_from(["<think>", "</think>", "blue", "<", "[", "/th", "ink>", "x"]), max_size=8), st.data())
def test_pieces_show_no_part_of_a_tag_and_make_the_same_text(parts, data):
    text = "".join(parts)
    output, seen = Detokenizer(reasoning=True), []
    while text:
        size = data.draw(st.integers(1, len(text)))
        output.add(text[:size].encode(), -1.0)
        seen.append(output.shown)
        text = text[size:]
    whole = "".join(parts)
    answer, tokens = output.finished()
    assert answer == split(whole).answer.strip()
    assert all(0 <= token.start < token.end <= len(answer) for token in tokens)
    if "</think>" not in whole:  # what came before one that nothing opened was taken for the answer
        assert all(split(whole).answer.startswith(text) for text in seen)


def test_places_of_tokens_are_in_the_answer():
    output = Detokenizer(("END",), reasoning=True)
    for piece in ("<think>", "END", "</think>", "\n", "Blue", " sky", "END"):
        output.add(piece.encode(), -1.0)
    answer, tokens = output.finished()
    assert (answer, output.stopped_by, output.count) == ("Blue sky", "END", 7)
    assert [answer[token.start : token.end] for token in tokens] == ["Blue", " sky"]


def test_an_answer_that_is_only_reasoning_is_known():
    output = Detokenizer(reasoning=True)
    output.add(b"<think>Sea")
    assert output.only_reasoned
    output.add(b"</think> Blue")
    assert not output.only_reasoned


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "blue", "<", "'", "/th", "ink>", " "])), st.booleans(), st.data()
)
def test_a_text_that_grows_is_split_as_the_whole_is(parts, inside, data):
    text, growing = "".join(parts), ReasoningFilter(inside=inside)
    while len(growing.whole) < len(text):
        end = data.draw(st.integers(len(growing.whole) + 1, len(text)))
        growing.add(text[len(growing.whole) : end])
        assert growing.split == split(growing.whole, inside=inside)
