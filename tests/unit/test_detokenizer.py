"""Texts out of tokens: characters across tokens, stop texts, spans."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from telerag_cli.llm.base import Token
from telerag_cli.llm.detokenizer import Detokenizer


def write(pieces, stop=(), logprobs=False):
    """The detokenizer, and what was shown on the way."""
    output = Detokenizer(stop)
    shown = []
    for piece in pieces:
        output.add(piece if isinstance(piece, bytes) else piece.encode(), -1.0 if logprobs else None)
        shown.append(output.shown)
        if output.stopped_by is not None:
            break
    return output, shown


def test_a_character_is_shown_when_it_is_whole():
    raw = "né€".encode()
    output, shown = write([raw[:2], raw[2:4], raw[4:]], logprobs=True)
    assert shown == ["n", "né", "né€"]
    _text, tokens = output.finished()
    assert [(token.start, token.end) for token in tokens] == [(0, 1), (1, 2), (2, 3)]
    assert write([raw[:-1]])[1] == ["né"]
    assert write([b"a\xff", b"b"])[1] == ["a\ufffd", "a\ufffdb"]


def test_a_token_within_a_character_has_no_span():
    raw = "a😀b".encode()
    output, _shown = write([raw[:2], raw[2:4], raw[4:]], logprobs=True)
    assert output.finished() == ("a😀b", (Token(0, 1, -1.0), Token(1, 3, -1.0)))


def test_spans_are_of_the_text_without_space_and_without_what_was_cut():
    output, _shown = write(["  ", " one", " two ", "END"], stop=("ND",), logprobs=True)
    assert output.finished() == ("one two E", (Token(0, 3, -1.0), Token(3, 8, -1.0), Token(8, 9, -1.0)))
    assert output.stopped_by == "ND"
    output, _shown = write(["a", " b ", "END"], stop=("END",), logprobs=True)
    assert output.finished() == ("a b", (Token(0, 1, -1.0), Token(1, 3, -1.0)))


def test_a_stop_text_across_tokens_ends_the_text_and_is_never_shown():
    output, shown = write(["one #", "# ", "two #", "#", "# three"], stop=("###", "four"))
    assert (output.text, output.stopped_by) == ("one ## two ", "###")
    assert shown == ["one ", "one ## ", "one ## two ", "one ## two ", "one ## two "]
    assert output.count == 5


def test_the_first_of_several_stop_texts_counts():
    output, _shown = write(["a b c"], stop=("c", "b"))
    assert (output.text, output.stopped_by) == ("a ", "b")


@given(st.text("ab€", max_size=12), st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3), st.data())
def test_what_is_shown_only_grows_and_is_part_of_the_text(text, stop, data):
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    pieces = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    output, shown = write(pieces, stop)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))
    assert output.text.startswith(shown[-1])
    found = any(mark in text for mark in stop)
    assert (output.stopped_by is not None) == found
    assert not any(mark in output.text for mark in stop)
    if not found:
        assert output.text == text
