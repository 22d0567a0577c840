"""``telerag chat``: where its lines come from, and the program itself at a pseudo-terminal and in a pipe."""

import asyncio
import codecs
import io
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import termios
import time

import pytest

from telerag_cli.cli.chat_input import Piped, Typed, history_path
from telerag_cli.cli.chat_session import COMMANDS
from telerag_cli.config import PipelineName
from telerag_cli.errors import InputError
from telerag_cli.pipelines.registry import make_pipeline

NAIVE = make_pipeline(PipelineName.NAIVE)
# Where lines come from


def read_all(stream):
    piped, read = Piped(io.BytesIO(stream)), []
    with asyncio.Runner() as runner:
        while True:
            try:
                line = piped.read(runner)
            except InputError as error:
                line = str(error)
            if line is None:
                return read
            read.append(line)


def test_piped_lines_are_joined_by_backslashes_and_bad_ones_are_told():
    assert read_all(b"\xef\xbb\xbfone\r\n\ntwo\\\nlines\\\nmore\nlast") == ["one", "", "two\nlines\nmore", "last"]
    assert read_all(b"open\\\n") == ["open"]
    bad, good = read_all(b"\xff\xfe\ngood\n")
    assert "<stdin>:1 is not UTF-8" in bad
    assert good == "good"
    assert read_all(b"") == []


def typed(keys, notes):
    """What is read when these keys are pressed."""
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as pipe, create_app_session(pipe, DummyOutput()), asyncio.Runner() as runner:
        lines = Typed({name: command.words for name, command in COMMANDS.items()}, notes.append)
        pipe.send_text(keys)
        read = []
        while (line := lines.read(runner)) is not None:
            read.append(line)
        return read


@pytest.mark.parametrize(
    ("keys", "read"),
    [
        ("one\rtwo\r", ["one", "two"]),
        ("one\\\rtwo\r", ["one\ntwo"]),
        ("one\x1b\rtwo\r", ["one\ntwo"]),
        ("\x1b[200~one\ntwo\x1b[201~\r", ["one\ntwo"]),
        ("gone\x03one\r", ["one"]),
        ("/tim\t\r", ["/timings"]),
        ("/pipeline fl\t\r", ["/pipeline flare"]),
    ],
)
def test_keys(keys, read, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert typed(keys + "\x04", []) == read
    kept = history_path()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert f"+{read[0].splitlines()[0]}\n" in kept.read_text()


def test_a_history_that_cannot_be_kept_is_told_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    notes = []
    assert typed("one\rtwo\r\x04", notes) == ["one", "two"]
    assert len(notes) == 1
    assert "cannot be written" in notes[0]


# The program itself, with the real models


def program(documented, *options):
    return [sys.executable, "-m", "telerag_cli", "chat", str(documented / "index"), "--nprobe", "4", *map(str, options)]


ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")
PROMPT = "\x1b[?2004h"
"""Bracketed paste is switched on when, and only when, the prompt waits for keys."""


class Terminal:
    """A program at a pseudo-terminal of 80 columns."""

    def __init__(self, command, environment):
        self._master, self._slave = pty.openpty()
        termios.tcsetwinsize(self._slave, (24, 80))
        # The shell opens the terminal as the leader of a session, so it becomes the one that Ctrl-C comes from.
        self._process = subprocess.Popen(
            ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(self._slave), *command],
            env=os.environ | environment,
            start_new_session=True,
        )
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._raw = ""
        self._seen = 0

    def expect(self, text, timeout_s=60):
        """Wait until this is shown, after what was expected before; returns what is shown up to it."""
        until_s = time.monotonic() + timeout_s
        while (place := self._raw.find(text, self._seen)) < 0:
            assert self._process.poll() is None, f"it ended: {self._shown(len(self._raw))}"
            assert time.monotonic() < until_s, f"no {text!r} in: {self._shown(len(self._raw))}"
            self._take()
        shown = self._shown(place)
        self._seen = place + len(text)
        return shown

    def type(self, text):
        os.write(self._master, text.encode())

    def ask(self, line, timeout_s=60):
        """Type a line at the prompt; returns all that is shown until the next prompt."""
        self.type(line + "\r")
        return self.expect(PROMPT, timeout_s)

    def wait(self):
        """Its exit code."""
        while self._process.poll() is None:
            self._take()
        return self._process.returncode

    def close(self):
        self._process.kill()
        self._process.wait()
        os.close(self._master)
        os.close(self._slave)

    def _take(self):
        if select.select([self._master], [], [], 0.05)[0]:
            self._raw += self._decoder.decode(os.read(self._master, 65536))

    def _shown(self, end):
        return ESCAPES.sub("", self._raw[self._seen : end])


@pytest.fixture
def terminal(tmp_path):
    opened = []

    def start(command):
        environment = {"XDG_STATE_HOME": str(tmp_path / "state"), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        opened.append(Terminal(command, environment))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


@pytest.mark.model
def test_at_a_terminal(documented, terminal, tmp_path):
    chat = terminal(program(documented, "--max-tokens", 64, "--pipeline", "naive"))
    assert "LLM context" in chat.expect(PROMPT)
    chat.type("Write a very long list of all numbers.\r")
    chat.expect("reading passages...")
    chat.expect("\r\x1b[K")  # it makes place for the answer's first words
    chat.type("\x03")
    interrupted = chat.expect(PROMPT, 20)
    assert re.search(r"\w+\S*\nInterrupted; this question is not part of the conversation\.", interrupted)
    assert "[1]" not in interrupted
    chat.type("thrown away\x03")
    assert "Pipeline: hyde" in chat.ask("/pipeline hyde")
    shown = chat.ask("How do I find the median of numbers?")
    assert "rewriting" not in shown  # the interrupted one does not count
    assert "writing passage..." in shown
    assert re.search(r"\n  \[1\] statistics\.median\w*", shown)
    assert "Pipeline: naive" in chat.ask("/pipeline naive")
    shown = chat.ask("And the lower one?")
    assert "rewriting the question..." in shown
    assert re.search(r"\n  \[5\] \S+", shown)
    shown = chat.ask("/timings")
    assert re.search(r"\nLLM +rewrite─", shown)
    assert re.search(r"\njoin ", shown)
    assert "the nearest is /timings" in chat.ask("/timing")
    assert "the nearest is /timings" in chat.ask("\x12/tim\r")  # found by searching what was typed
    chat.ask(f"/save {tmp_path}/talk.md")
    assert (tmp_path / "talk.md").read_text().startswith("## How do I find the median of numbers?\n")
    chat.type("\x04")
    assert chat.wait() == 0
    history = (tmp_path / "state" / "telerag" / "chat_history").read_text()
    assert "+How do I find the median of numbers?\n" in history
    assert "thrown away" not in history


@pytest.mark.model
def test_from_a_pipe(documented):
    lines = "How do I find the median\\\n of numbers?\n/nope\nAnd the lower one?\n/sources 1\n"
    done = subprocess.run(
        program(documented, "--max-tokens", 12, "--pipeline", "naive"), input=lines, text=True, capture_output=True
    )
    assert done.returncode == 3, done.stderr
    assert "There is no command /nope" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    first, last = re.findall(r"\n  \[1\] (\S+)", done.stdout)
    assert first == "statistics.median"
    # What /sources 1 shows is the first passage of the last answer.
    assert re.search(rf"\n  \[5\] \S+.*\n\n\[1\] -?\d\.\d+  {re.escape(last)}\n    ", done.stdout)
    assert "rewriting" not in done.stderr  # the status line is for terminals


@pytest.mark.model
def test_ctrl_c_while_a_pipe_is_silent_ends_the_program(documented):
    process = subprocess.Popen(
        program(documented, "--max-tokens", 4, "--pipeline", "naive"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(b"What is a median?\n")
    process.stdin.flush()
    assert process.stdout.readline()
    while not process.stdout.readline().startswith(b"  [5] "):
        pass
    process.send_signal(signal.SIGINT)
    _out, talk = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Interrupted" in talk
    assert b"Traceback" not in talk
    assert b"never retrieved" not in talk
