"""Where a chat's lines come from: a person at a terminal, or a pipe."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from telerag_cli.errors import InputError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent


class Piped:
    """Each line is one; a backslash at its end joins the next line to it."""

    interactive = False
    """Whether a person sits there, who can ask again."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._number = 0

    def read(self, runner: asyncio.Runner) -> str | None:
        """Return the next line without white space around it, None at the end.

        It is waited for outside of the event loop, where Ctrl-C ends it.

        Raises:
            InputError: it is not text; the next one may be.
        """
        parts: list[str] = []
        while raw := self._stream.readline():
            line = self._text(raw)
            if not line.endswith("\\"):
                return "\n".join([*parts, line]).strip()
            parts.append(line[:-1])
        return "\n".join(parts).strip() if parts else None

    def _text(self, raw: bytes) -> str:
        self._number += 1
        try:
            return raw.decode("utf-8-sig" if self._number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(
                f"<stdin>:{self._number} is not UTF-8: {error.reason} at byte {error.start}.", remedy="Convert it."
            ) from error


class Typed:
    """A prompt, on stderr if that is a terminal, with editing, history and completion of commands."""

    interactive = True

    def __init__(self, arguments: Mapping[str, Sequence[str]], note: Callable[[str], None]) -> None:
        """Open the history; ``note`` is called, at most once, if it cannot be kept.

        ``arguments`` are the commands, and the words that each may be followed by.
        """
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output
        from prompt_toolkit.shortcuts import CompleteStyle

        self._session: PromptSession[str] = PromptSession(
            "\n> ",
            multiline=True,
            prompt_continuation="  ",
            history=_history(note),
            completer=_completer(arguments),
            complete_style=CompleteStyle.READLINE_LIKE,
            key_bindings=_keys(),
            output=create_output(sys.stderr if sys.stderr.isatty() else sys.stdout),
        )

    def read(self, runner: asyncio.Runner) -> str | None:
        """Return what was typed without white space around it, None at the end."""
        try:
            return runner.run(self._session.prompt_async()).strip()
        except EOFError:
            return None


def history_path() -> Path:
    """Where what was typed is kept.

    Raises:
        OSError: this user has no home.
    """
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError as error:
        raise OSError(errno.ENOENT, "this user has no home") from error
    return Path(state) / "telerag" / "chat_history"


def _history(note: Callable[[str], None]) -> History:
    """The history in its file; if it cannot be written, one that ends with the program."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    def lost(error: OSError) -> None:
        file = error.filename or "its file"
        note(f"What you type is not kept for next time: {file} cannot be written ({error.strerror}).")

    class Kept(FileHistory):
        noted = False

        def store_string(self, string: str) -> None:
            try:
                super().store_string(string)
            except OSError as error:  # a full disk must not end the conversation
                if not self.noted:
                    lost(error)
                self.noted = True

    try:
        path = history_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Questions can be private: for the user alone.
        os.close(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600))
    except OSError as error:
        lost(error)
        return InMemoryHistory()
    return Kept(path)


def _completer(arguments: Mapping[str, Sequence[str]]) -> Completer:
    from prompt_toolkit.completion import Completer, Completion

    class Commands(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            return self._fitting(document.text_before_cursor)

        def _fitting(self, text: str) -> Iterator[Completion]:
            command, space, argument = text.partition(" ")
            words, begun = (arguments.get(command, ()), argument) if space else (tuple(arguments), command)
            if text.startswith("/"):
                yield from (Completion(word, -len(begun)) for word in words if word.startswith(begun))

    return Commands()


def _keys() -> KeyBindings:
    """Enter sends; Alt+Enter, or Enter after a backslash, begins a line; Ctrl-C clears what is typed."""
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)  # and not searching the history

    @keys.add("enter", filter=typing)
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=typing)
    @keys.add("<sigint>", filter=typing)
    def clear(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    return keys
