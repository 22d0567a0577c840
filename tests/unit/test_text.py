"""The gate for text: what passes, what is repaired, and what is refused with which reason."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from telerag_cli import text
from telerag_cli.text import TextError


@pytest.mark.parametrize(
    ("value", "reason"),
    [("a\0", "NUL at character 2"), ("é\ud83d", "U+D83D) at character 2"), ("a\udce9", "byte 0xE9 at character 2")],
)
def test_what_no_output_can_hold_is_refused(value, reason):
    with pytest.raises(TextError) as caught:
        text.checked(value)
    assert reason in str(caught.value)


@given(st.text(alphabet=st.characters(exclude_categories=[])))
def test_repaired_text_is_checked_text(value):
    repaired = text.repaired(value)
    assert text.checked(repaired) == repaired
    assert text.repaired(repaired) == repaired


def test_repairing_joins_pairs_and_replaces_halves():
    assert text.repaired("\ud83d\ude00 \ud83d \0") == "😀 \ufffd \ufffd"


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_printable_text_moves_no_cursor(value):
    shown = text.printable(value)
    assert all(char >= " " or char in "\t\n" for char in shown)
    assert text.printable("\x1b[31mred\u202e") == "\\x1b[31mred\\u202e"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"])
def test_encodings_are_found_by_their_marks_or_zeros(encoding):
    data = "Wie sortiere ich eine Liste? Größe, naïveté\n".encode(encoding)
    assert data.decode(text.encoding_of(data)) == data.decode(encoding)


def test_bytes_are_latin_1_only_if_nothing_in_them_is_utf8():
    assert text.encoding_of("café".encode("latin-1"), whole=True) == text.LATIN
    assert text.encoding_of("café ".encode() + b"\xe9") == "utf-8"
    assert text.encoding_of("plain café".encode()[:-1]) == "utf-8"  # the last character is cut off


@pytest.mark.parametrize(
    "value",
    [
        "NaN",
        "[Infinity]",
        "1e400",
        '{"a": [' + "1" * 400 + ".0]}",
        '"\\ud83d"',
        "[" * 100_000,
        "{",
        "",
        "[1] 2",
        "\ud83d",
    ],
)
def test_json_that_is_not_strict_is_refused(value):
    with pytest.raises(TextError):
        text.parse_json(value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(JSON)
def test_strict_json_is_what_json_says(value):
    assert text.parse_json(json.dumps(value)) == value
    assert text.parse_json(json.dumps(value, ensure_ascii=False).encode()) == value
