"""Everything that can go wrong.

    TeleragError                 exit 1: the work could not be done
    ├── UsageError               exit 2: the command line asked for something impossible
    ├── InputError               exit 1: a source, a question or a line is not what it should be
    │   └── ContextError         the same: a prompt and its answer do not fit the LLM's context together
    ├── ArtifactError            exit 1: embeddings, index or run on disk is missing, torn or of another make
    ├── ModelError               exit 1: a model cannot be found, loaded or used for this
    │   └── ReasoningError       the same: an LLM wrote reasoning and no answer
    ├── ResourceError            exit 1: memory, disk space or a device is not there in the amount asked for
    └── InternalError            exit 1: a bug of telerag's own, said in a sentence

Every class has a stable ``code`` for programs: library callers, output lines and tests.
A message is one sentence with both values (what was found, what was expected); ``remedy`` is what to do.
`assert` is for our own invariants and never for what a user can cause.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_PARTIAL = 3
EXIT_INTERRUPTED = 130


class TeleragError(Exception):
    """Base of all errors shown to a user without a traceback."""

    exit_code = EXIT_FAILED
    code = "failed"

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}" if self.remedy else self.message


class UsageError(TeleragError):
    """The options contradict each other or the data."""

    exit_code = EXIT_USAGE
    code = "usage"


class InputError(TeleragError):
    """A source file, a line of it, or a question cannot be used."""

    code = "input"


class ContextError(InputError):
    """A prompt and its answer are longer than the LLM's context."""

    code = "context_length"


class ArtifactError(TeleragError):
    """An artifact on disk is missing, incomplete, damaged or does not belong here."""

    code = "artifact"


class ModelError(TeleragError):
    """A model is missing, cannot be loaded, or does not fit the artifact."""

    code = "model"


class ReasoningError(ModelError):
    """An LLM used up its tokens, or ended, before it came to an answer."""

    code = "only_reasoning"


class ResourceError(TeleragError):
    """Memory, disk or a device is short of what was asked for."""

    code = "resource"


class InternalError(TeleragError):
    """A bug: its cause is the exception that nobody expected."""

    code = "internal"

    def __init__(self, error: BaseException) -> None:
        super().__init__(
            f"telerag has a bug: {type(error).__name__}: {one_line(str(error)) or 'no message'}.",
            remedy="Run telerag --debug ... for the traceback, and report it.",
        )
        self.__cause__ = error


def invalid_fields(what: str, error: Any, remedy: str) -> ArtifactError:
    """Return the error for a file whose fields are not what they should be; ``error`` is pydantic's `ValidationError`.

    ``what`` is the beginning of the sentence, before the first field that is wrong and why.
    """
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return ArtifactError(f"{what}: {where}: {first['msg'].lower()}.", remedy=remedy)


@contextlib.contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Import optional packages in this block; the error for a missing one names telerag-cli's extra that installs it.

    Raises:
        ResourceError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ResourceError(
            f"{purpose} needs the package {error.name}, which is not installed.",
            remedy=f"Install it with: pip install 'telerag-cli[{extra}]'",
        ) from error


def one_line(text: str, limit: int = 300) -> str:
    """Another program's text as a part of a sentence: on one line, not too long, without the full stop at its end."""
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def connection_cause(error: BaseException) -> str:
    """What the operating system, TLS or the name look-up said about a connection, below the layers that wrap it."""
    import socket
    import ssl

    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.errno:
            # Errors of TLS and of name look-ups have numbers of their own.
            own_numbers = isinstance(inner, ssl.SSLError | socket.gaierror)
            said = str(inner.strerror) if own_numbers else os.strerror(inner.errno)
            return said[:1].lower() + said[1:]
        grouped = inner.exceptions if isinstance(inner, BaseExceptionGroup) else ()
        inner = grouped[0] if grouped else inner.__cause__ or inner.__context__
    return one_line(str(error) or type(error).__name__)
