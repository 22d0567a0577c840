"""A server's life: it listens, loads, answers, and ends when a signal says so. And what is said meanwhile."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import pytest
from typer.testing import CliRunner

from expect import fails
from served import assembled
from telerag_cli.cli import console
from telerag_cli.cli.app import app as telerag
from telerag_cli.engine.scheduler import Schedule, Scheduler
from telerag_cli.errors import ArtifactError, ResourceError, UsageError
from telerag_cli.server.server import Serving, address_of, bind, notify

BODY = {"model": "telerag-naive", "messages": [{"role": "user", "content": "cats"}], "stream": True}


class Life:
    """A server that lives in this thread, and somebody in another who does things to it."""

    def __init__(self, load, *, drain_s=5.0):
        self.service, app = assembled(lambda _line: None)
        self.said = []
        self.serving = Serving(app, self.service, load, drain_s=drain_s, tell=self.said.append)
        self.wrong = []

    def when_it_listens(self):
        for _ in range(500):
            with contextlib.suppress(httpx2.ConnectError):
                assert self.client.get("/health").status_code == 200
                return
            time.sleep(0.01)
        raise AssertionError("it does not listen")

    def run(self, act):
        with bind("127.0.0.1", 0) as listening:
            self.client = httpx2.Client(base_url=address_of(listening), timeout=10, trust_env=False)

            def acting():
                try:
                    if act:
                        self.when_it_listens()
                        act()
                except BaseException as error:
                    self.wrong.append(error)
                    self.serving.end(signal.SIGTERM)

            actor = threading.Thread(target=acting)
            actor.start()
            try:
                return self.serving.run(listening)
            finally:
                actor.join(10)
                self.client.close()
                assert not self.wrong, self.wrong


def loading(engine, *, before=lambda: None, closed=None):
    @contextlib.contextmanager
    def load():
        before()
        yield engine, Scheduler.over(engine, Schedule(micro_batch=1, max_wait_s=0.0))
        if closed is not None:
            closed.append(threading.current_thread())

    return load


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_what_is_under_way_end(engine_of, monkeypatch, tmp_path, number):
    engine = engine_of({"Hello": "yes", "Question:": "word " * 30}, token_s=0.01, max_tokens=40)
    closed, may_load, lines = [], threading.Event(), []
    life = Life(loading(engine, before=lambda: may_load.wait(10), closed=closed))
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "notify"))
    manager.settimeout(5)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

    def act():
        assert life.client.get("/ready").status_code == 503
        may_load.set()
        assert manager.recv(64) == b"READY=1"
        assert life.client.get("/ready").status_code == 200
        with life.client.stream("POST", "/v1/chat/completions", json=BODY) as response:
            pieces = response.iter_lines()
            next(pieces)
            os.kill(os.getpid(), number)
            assert manager.recv(64) == b"STOPPING=1"
            lines.extend(line for line in pieces if line)

    with manager:
        assert life.run(act) is number
    assert lines[-1] == "data: [DONE]"
    assert closed == [threading.main_thread()]
    assert life.said[0].startswith("Ready at http://127.0.0.1:")
    assert "1 requests under way" in life.said[1]


def test_a_second_signal_ends_it_at_once(engine_of):
    engine = engine_of({"Hello": "yes", "Question:": "word " * 3000}, token_s=0.01, max_tokens=1900)
    life = Life(loading(engine), drain_s=60.0)

    def act():
        while life.client.get("/ready").status_code != 200:
            pass
        with (
            contextlib.suppress(httpx2.HTTPError),
            life.client.stream("POST", "/v1/chat/completions", json=BODY) as response,
        ):
            pieces = response.iter_lines()
            next(pieces)
            os.kill(os.getpid(), signal.SIGINT)
            # Two signals of a kind that come together are one.
            while not life.service.draining:
                next(pieces)
            os.kill(os.getpid(), signal.SIGINT)
            list(pieces)

    assert life.run(act) is signal.SIGINT
    assert life.said[-1] == "Ending at once."


@pytest.mark.parametrize("times", [1, 2])
def test_those_for_whom_the_time_is_too_short_are_told_in_json(engine_of, times):
    engine = engine_of({"Hello": "yes", "Question:": "word " * 3000}, token_s=0.01, max_tokens=1900)
    life = Life(loading(engine), drain_s=0.3 if times == 1 else 60.0)
    outcomes, sending = [], threading.Barrier(9)

    def ask(number):
        body = json.dumps({**BODY, "stream": number % 2 == 1}).encode()

        def pieces():
            sending.wait(20)
            yield body[:10]
            if number < 2:  # these have not said what they want when the server ends
                time.sleep(3)
            yield body[10:]

        content = pieces()
        headers = {"content-type": "application/json"}
        with contextlib.suppress(httpx2.WriteError):
            response = life.client.post("/v1/chat/completions", content=content, headers=headers)
            events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
            outcomes.append((response.status_code, json.loads(events[-1])["error"]["code"]))

    def act():
        while life.client.get("/ready").status_code != 200:
            pass
        clients = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for each in clients:
            each.start()
        sending.wait(20)
        while life.service.under_way < 6:
            time.sleep(0.01)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGTERM)
            while not life.service.draining:
                time.sleep(0.01)
        for each in clients:
            each.join(20)

    life.run(act)
    assert len(outcomes) >= 6
    assert {code for _status, code in outcomes} == {"stopping"}
    assert {status for status, _code in outcomes} <= {200, 503}  # 200 of streams that had begun


def test_what_cannot_be_loaded_ends_it(engine_of):
    @contextlib.contextmanager
    def load():
        raise ArtifactError("The index is torn.")
        yield

    with fails(ArtifactError, "torn"):
        Life(load).run(None)


def test_a_port_that_is_taken_is_said_with_its_number():
    with bind("127.0.0.1", 0) as taken:
        taken.listen(1)
        port = taken.getsockname()[1]
        with fails(ResourceError, "127.0.0.1", port):
            bind("127.0.0.1", port)
    with fails(UsageError, "--host nowhere.invalid"):
        bind("nowhere.invalid", 0)


def test_nobody_is_notified_where_nobody_manages(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/at/all")
    notify("READY=1")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org", "192.168.1.2"])
def test_other_machines_are_let_in_with_a_key_only(tmp_path, host):
    done = CliRunner().invoke(telerag, ["serve-local", str(tmp_path), "--host", host])
    assert done.exit_code == 2
    assert f"--host {host} can be reached from other machines, and there is no API key" in done.stderr


def test_talk_is_json_if_programs_listen(capsys):
    with console.talking(as_json=True):
        console.say("Ready.")
        console.warn('"quoted"\nand more')
        console.fail("torn")
        console.table("Memory", ("what", "size"), [("arena", 3)])
        with console.progress("loading", 3) as advance:
            advance(1)
        console.emit("data stays data")
    console.say("text again")
    captured = capsys.readouterr()
    assert captured.out == "data stays data\n"
    *lines, last = captured.err.splitlines()
    told = [json.loads(line) for line in lines]
    assert [(each["level"], each["event"]) for each in told] == [
        ("info", "message"),
        ("warning", "message"),
        ("error", "message"),
        ("info", "table"),
    ]
    assert told[1]["message"] == '"quoted"\nand more'
    assert told[3]["rows"] == [{"what": "arena", "size": "3"}]
    assert last == "text again"


def test_work_goes_on_when_nobody_reads_the_talk():
    code = (
        "import sys, time\n"
        "from telerag_cli.cli import console\n"
        "console.say('first'); sys.stdin.readline()\n"
        "for _ in range(3): console.say('nobody reads this'); console.table('nor', ('this',), [('x',)])\n"
        "with console.talking(as_json=True): console.say('nor that')\n"
        "console.emit('data')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as one:
        assert one.stderr.readline() == "first\n"
        one.stderr.close()
        one.stdin.write("\n")
        one.stdin.flush()
        assert one.stdout.read() == "data\n"
        one.stdin.close()
        assert one.wait(20) == 0
