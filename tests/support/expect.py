"""What tests expect of errors: the class, its stable code and the message's values, never the English around them."""

import contextlib

import pytest

from telerag_cli.errors import TeleragError


@contextlib.contextmanager
def fails(kind: type[TeleragError], *values: object):
    """The block raises an error of this class whose text holds all of these values."""
    with pytest.raises(kind) as caught:
        yield caught
    text = str(caught.value)
    assert type(caught.value) is kind, f"{type(caught.value).__name__}: {text}"
    assert [str(value) for value in values if str(value) not in text] == [], text
