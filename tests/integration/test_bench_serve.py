"""Load on a server: its arithmetic, and runs against one on loopback that does what a test tells it to."""

import asyncio
import json
import math
import os
import signal
import socket
import threading
import time
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from telerag_cli.bench import load_client
from telerag_cli.bench.load_client import KEY_VARIABLE, Server
from telerag_cli.bench.load_metrics import (
    METRICS,
    Answer,
    Wanted,
    arrivals_s,
    best_second_tokens,
    figures,
    is_good,
    most_at_once,
    samples_ms,
    spread,
)
from telerag_cli.bench.load_names import Backend
from telerag_cli.bench.load_prompts import Prompt, random_prompts, read_custom, read_sharegpt, shuffled
from telerag_cli.bench.results import SuiteResult
from telerag_cli.bench.serve import About, Load, Run, suite_result
from telerag_cli.cli.bench_serve import serve
from telerag_cli.cli.guard import guarded
from telerag_cli.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, InputError, ModelError, UsageError

ADDRESS = "127.0.0.1"


# Arithmetic


def test_arrivals_end_on_time_and_follow_seed_and_rate():
    times = arrivals_s(50, 4.0, 0.7, 3)
    assert len(times) == 50
    assert (np.diff(times) >= 0).all()
    assert times[-1] == pytest.approx(50 / 4.0, rel=1e-12)
    assert (times == arrivals_s(50, 4.0, 0.7, 3)).all()
    assert (times != arrivals_s(50, 4.0, 0.7, 4)).any()
    assert arrivals_s(50, 8.0, 0.7, 3) == pytest.approx(times / 2, rel=1e-12)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_times_between_arrivals_are_gamma_distributed(burstiness):
    rate, count = 5.0, 40_000
    gaps = np.diff(arrivals_s(count, rate, burstiness, 0), prepend=0.0)
    assert gaps.mean() == pytest.approx(1 / rate, rel=1e-9)
    # Of a gamma distribution of shape k: deviation 1/sqrt(k) of the mean, skewness 2/sqrt(k).
    assert gaps.std() * rate == pytest.approx(burstiness**-0.5, rel=0.03)
    assert (((gaps - gaps.mean()) / gaps.std()) ** 3).mean() == pytest.approx(2 * burstiness**-0.5, rel=0.1)
    if burstiness == 1.0:  # and of the exponential one, by its own distribution function
        for quantile in (0.1, 0.5, 0.9):
            assert (gaps < -math.log(1 - quantile) / rate).mean() == pytest.approx(quantile, abs=0.01)


def test_arrivals_at_the_ends_of_the_scale():
    assert arrivals_s(4, math.inf, 1.0, 0).tolist() == [0, 0, 0, 0]
    assert arrivals_s(4, 2.0, math.inf, 0).tolist() == [0.5, 1.0, 1.5, 2.0]
    assert arrivals_s(1, 2.0, 1.0, 7).tolist() == [0.5]


def answered(sent_s=0.0, text_s=(0.1, 0.2, 0.4), latency_s=0.5, usage=3, inputs=10, error=""):
    return Answer(sent_s, latency_s, tuple(text_s), "text", inputs, usage, error)


def test_figures_by_hand():
    answers = [
        answered(),
        answered(1.0, (0.3,), 0.4, usage=1, inputs=20),
        answered(1.2, (), 9.0, error="The server is gone.", usage=None, inputs=None),
    ]
    values = figures(answers, 4.0, Wanted(goodput_ms={"ttft": 100.0}))
    expected = {
        "duration": 4.0,
        "completed": 2,
        "failed": 1,
        "total_input_tokens": 30,
        "total_output_tokens": 4,
        "request_throughput": 0.5,
        "request_goodput": 0.25,
        "output_throughput": 1.0,
        "total_token_throughput": 8.5,
        "max_output_tokens_per_s": 3.0,
        "max_concurrent_requests": 2,
        "mean_ttft_ms": 200.0,
        "median_ttft_ms": 200.0,
        "std_ttft_ms": 100.0,
        "p50_ttft_ms": 200.0,
        "p90_ttft_ms": 280.0,
        "p99_ttft_ms": 298.0,
        "mean_tpot_ms": 200.0,  # (0.5 - 0.1) / 2; the other has one token
        "mean_itl_ms": 150.0,
        "std_itl_ms": 50.0,
        "mean_e2el_ms": 450.0,
        "p99_e2el_ms": 499.0,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert set(values) == set(expected) | {
        f"{name}_{metric}_ms" for metric in METRICS for name in ("mean", "median", "std", "p50", "p90", "p99")
    }


def test_what_was_not_measured_has_no_figure():
    values = figures([answered(text_s=(0.1,), usage=None, inputs=None)], 1.0, Wanted())
    assert values["total_output_tokens"] == 1
    assert not {"total_input_tokens", "total_token_throughput", "request_goodput"} & set(values)
    assert not any("tpot" in name or "itl" in name for name in values)
    assert figures([answered(error="Gone.")], 1.0, Wanted())["completed"] == 0
    chosen = figures([answered()], 1.0, Wanted(("e2el",), (99.9,)))
    assert {name for name in chosen if name.endswith("_ms")} == {
        f"{name}_e2el_ms" for name in ("mean", "median", "std", "p99.9")
    }


def test_percentiles_lie_between_neighbours():
    found = spread("ttft", [40.0, 10.0, 20.0, 30.0], [0.0, 50.0, 90.0, 100.0])
    assert found == pytest.approx(
        {
            "mean_ttft_ms": 25.0,
            "median_ttft_ms": 25.0,
            "std_ttft_ms": math.sqrt(125),
            "p0_ttft_ms": 10.0,
            "p50_ttft_ms": 25.0,
            "p90_ttft_ms": 37.0,
            "p100_ttft_ms": 40.0,
        }
    )


def test_times_of_an_answer():
    answer = answered()
    assert answer.itl_s == pytest.approx((0.1, 0.2))
    assert (answer.ttft_s, answer.tpot_s) == pytest.approx((0.1, 0.2))
    empty = answered(text_s=(), usage=0)
    assert (empty.ttft_s, empty.itl_s, empty.tpot_s) == (0.5, (), None)
    assert answered(usage=None).output_tokens == 3
    assert samples_ms("itl", [answer, answer]) == pytest.approx([100, 200, 100, 200])


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({}, True),
        ({"ttft": 100.0}, True),
        ({"ttft": 99.0}, False),
        ({"tpot": 199.0}, False),
        ({"ttft": 100.0, "tpot": 201.0, "e2el": 500.0}, True),
        ({"ttft": 100.0, "e2el": 499.0}, False),
    ],
)
def test_a_good_answer_keeps_every_limit(limits, good):
    assert is_good(answered(), limits) is good


def test_a_single_token_has_a_tpot_of_nothing():
    assert is_good(answered(text_s=(0.1,), usage=1), {"tpot": 0.0})


def test_most_at_once_counts_moments_and_not_seconds():
    times = [(0.0, 0.75), (0.25, 0.25), (0.5, 0.5), (1.0, 0.25)]  # the third begins as the second ends
    assert most_at_once([answered(sent_s, latency_s=latency_s) for sent_s, latency_s in times]) == 2
    assert most_at_once([]) == 0


def test_the_best_second_counts_tokens_and_not_pieces():
    answers = [answered(5.0, (0.5, 0.9), usage=8), answered(5.2, (0.9, 1.1, 1.2), usage=3)]
    assert best_second_tokens(answers) == 8.0
    assert best_second_tokens([answered(text_s=())]) == 0.0


def test_wanted_is_read_as_vllm_writes_it():
    wanted = Wanted.parse("ttft,e2el", "50,99.9", ["ttft:500 e2el:3000", "tpot:20.5"])
    assert wanted == Wanted(("ttft", "e2el"), (50.0, 99.9), {"ttft": 500.0, "e2el": 3000.0, "tpot": 20.5})


# Prompts


def test_custom_prompts_are_lines_or_json(tmp_path):
    lines = [b"\xef\xbb\xbfWhy?\n", b"\n", b'{"prompt": " How? ", "output_tokens": 5}\n', b'{"question": "Who?"}']
    assert read_custom(lines, "f") == [Prompt("Why?"), Prompt("How?", 5), Prompt("Who?")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"prompt": ', "f:2 is not JSON"),
        (b'{"answer": "x"}', r"f:2 has \['answer'\] and no text"),
        (b"\xff", "f:2 is not UTF-8"),
        (b'{"prompt": "x", "output_tokens": 0}', "f:2 has output_tokens 0"),
        (b'{"prompt": 5}', "f:2 has"),
    ],
)
def test_a_bad_line_is_named(line, says):
    with pytest.raises(InputError, match=says):
        read_custom([b"fine\n", line], "f")


def test_a_file_without_prompts_is_refused():
    with pytest.raises(InputError, match="f holds no prompt"):
        read_custom([b"\n"], "f")


def sharegpt(tmp_path, value):
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(value))
    return path


def test_sharegpt_gives_first_questions(tmp_path):
    good = {"conversations": [{"from": "human", "value": " Hi "}, {"from": "gpt", "value": "Hello"}]}
    others = [{"conversations": []}, {"conversations": [{"from": "gpt", "value": "x"}]}, {"x": 1}, 5]
    with sharegpt(tmp_path, [good, *others]).open("rb") as lines:
        assert read_sharegpt(lines, "f") == ([Prompt("Hi")], 4)
    with sharegpt(tmp_path, {}).open("rb") as lines, pytest.raises(InputError, match="f is a JSON dict and not"):
        read_sharegpt(lines, "f")


def test_prompts_are_shuffled_by_seed_and_come_again_only_when_all_were_there():
    prompts = [Prompt(str(number)) for number in range(20)]
    first = list(islice(shuffled(prompts, 1), 40))
    assert sorted(int(prompt.text) for prompt in first[:20]) == list(range(20))
    assert first[20:] == first[:20] != prompts
    assert list(islice(shuffled(prompts, 2), 20)) != first[:20]


def test_random_prompts_have_their_lengths():
    same = list(islice(random_prompts(6, 9, 0.0, 0), 50))
    assert {(len(prompt.text.split()), prompt.max_tokens) for prompt in same} == {(6, 9)}
    assert len({prompt.text for prompt in same}) == 50
    assert same == list(islice(random_prompts(6, 9, 0.0, 0), 50))
    assert same != list(islice(random_prompts(6, 9, 0.0, 1), 50))
    varied = list(islice(random_prompts(10, 20, 0.5, 0), 300))
    assert {len(prompt.text.split()) for prompt in varied} == set(range(5, 16))
    assert {prompt.max_tokens for prompt in varied} == set(range(10, 31))


# Addresses


@pytest.mark.parametrize(
    ("base", "endpoint", "backend", "url"),
    [
        ("http://a:1", None, None, "http://a:1/v1/chat/completions"),
        ("http://a:1/v1/", None, Backend.COMPLETIONS, "http://a:1/v1/completions"),
        ("http://a:1/v1", "/v1/completions", None, "http://a:1/v1/completions"),
        ("https://a/api", "v1/chat/completions", Backend.CHAT, "https://a/api/v1/chat/completions"),
        ("http://a:1", "/openai/chat/completions", None, "http://a:1/openai/chat/completions"),
    ],
)
def test_addresses_are_found_with_and_without_v1(base, endpoint, backend, url):
    assert Server.find(base, endpoint, backend).url == url


@pytest.mark.parametrize(
    ("base", "endpoint", "backend", "says"),
    [
        ("a:1", None, None, "does not begin with http"),
        ("http://a:x", None, None, "is no address"),
        ("http://a", "/v1/chat/completions", Backend.COMPLETIONS, "does not end in /completions"),
        ("http://a", "/v1/completions", Backend.CHAT, "does not end in /chat/completions"),
        ("http://a", "/v1/models", None, "does not end in"),
    ],
)
def test_addresses_that_cannot_be(base, endpoint, backend, says):
    with pytest.raises(UsageError, match=says):
        Server.find(base, endpoint, backend)


# Runs against a server


class Fake:
    """A server on loopback. ``reply`` is a function of what came; by default it streams two words."""

    def __init__(self):
        self.reply = stream("Blue", " sky", usage=(7, 2))
        self.bodies, self.keys, self.paths, self.arrived_s = [], [], [], []
        self.connections = self.running = self.most = 0
        self.loop = asyncio.new_event_loop()
        ready = threading.Event()
        self.thread = threading.Thread(target=self._work, args=(ready,))
        self.thread.start()
        assert ready.wait(10)

    def _work(self, ready):
        async def listen():
            server = await asyncio.start_server(self._talk, ADDRESS, 0)
            self.port = server.sockets[0].getsockname()[1]
            self.stop = asyncio.Event()
            ready.set()
            await self.stop.wait()
            server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(listen())

    async def _talk(self, reader, writer):
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                fields = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                self.paths.append(head[0].split()[1])
                if self.paths[-1].endswith("/models"):
                    write(writer, json.dumps({"data": [{"id": "first"}, {"id": "second"}]}).encode())
                    writer.write(b"0\r\n\r\n")
                    continue
                self.bodies.append(json.loads(await reader.readexactly(int(fields["content-length"]))))
                self.arrived_s.append(time.perf_counter())
                self.keys.append(fields.get("authorization"))
                self.running += 1
                self.most = max(self.most, self.running)
                try:
                    await self.reply(writer, self.bodies[-1])
                finally:
                    self.running -= 1
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    @property
    def url(self):
        return f"http://{ADDRESS}:{self.port}"

    @property
    def prompts(self):
        return [body["messages"][0]["content"] for body in self.bodies]

    def close(self):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join()


def write(writer, data, status="200 OK"):
    """A response's head and its first piece."""
    writer.write(f"HTTP/1.1 {status}\r\ntransfer-encoding: chunked\r\n\r\n".encode())
    piece(writer, data)


def piece(writer, data):
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


def event(text=None, finish=None, **more):
    """A piece of an answer of either backend."""
    delta = {"role": "assistant"} if text is None else {"content": text}
    value = {"choices": [{"index": 0, "delta": delta, "text": text or "", "finish_reason": finish}], **more}
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def usage_event(prompt, completion):
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    return b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"


def stream(*texts, usage=None, finish="stop", pause_s=0.0):
    """An answer; ``pause_s`` comes before every text, and the role before all."""

    async def reply(writer, _body):
        write(writer, event())
        for text in texts:
            if pause_s:
                await writer.drain()
                await asyncio.sleep(pause_s)
            piece(writer, event(text))
        if finish:
            piece(writer, event("", finish))
        if usage:
            piece(writer, usage_event(*usage))
        piece(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")

    return reply


def raw(*data, status="200 OK", end=True):
    async def reply(writer, _body):
        write(writer, data[0], status)
        for each in data[1:]:
            piece(writer, each)
        if end:
            writer.write(b"0\r\n\r\n")
        else:
            writer.close()
            raise ConnectionResetError

    return reply


async def silent(_writer, _body):
    await asyncio.sleep(60)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    made = Fake()
    yield made
    made.close()


def bench(*arguments, url=None):
    program = typer.Typer()
    program.command("serve")(guarded(serve))
    program.command("idle")(lambda: None)
    where = ["--base-url", url] if url else []
    return CliRunner(env={"NO_COLOR": "1", "TERM": "dumb"}).invoke(program, ["serve", *where, *map(str, arguments)])


def measured(fake, *arguments, code=EXIT_OK):
    """The result of a run with ``--json``, and what it printed."""
    done = bench("--json", "--num-warmups", 0, "--save-detailed", *arguments, url=fake.url)
    assert done.exit_code == code, done.output
    return json.loads(done.stdout), " ".join(done.stderr.split())


def test_a_chat_request_is_what_openai_knows(fake, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    measured(fake, "--num-prompts", 1, "--random-input-len", 3, "--random-output-len", 4, "--temperature", 0.5)
    (body,) = fake.bodies
    assert len(body.pop("messages")[0]["content"].split()) == 3
    assert body == {
        "model": "first",
        "max_tokens": 4,
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert fake.keys == ["bearer secret"]
    assert fake.paths == ["/v1/models", "/v1/chat/completions"]


def test_a_completion_request_and_further_fields(fake, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Why \\ud83d\\ude00?", "output_tokens": 9}\n')
    result, _ = measured(
        fake,
        "--backend",
        "openai",
        "--model",
        "mine",
        "--dataset-path",
        path,
        "--num-prompts",
        1,
        "--ignore-eos",
        "--extra-body",
        '{"top_k": 3, "temperature": null}',
    )
    assert fake.bodies == [
        {
            "model": "mine",
            "prompt": "Why 😀?",
            "max_tokens": 9,
            "ignore_eos": True,
            "top_k": 3,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    assert fake.paths == ["/v1/completions"]
    assert fake.keys == [None]
    assert result["cells"][0]["detailed"][0]["generated_text"] == "Blue sky"


def test_times_begin_with_text_and_cannot_be_shorter_than_the_servers(fake):
    fake.reply = stream("a", "b", "c", usage=(11, 3), pause_s=0.05)
    result, _ = measured(fake, "--num-prompts", 3)
    (cell,) = result["cells"]
    for each in cell["detailed"]:
        assert each["ttft"] > 0.045  # the role came at once
        assert sum(each["itl"], each["ttft"]) > 0.14
        assert each["e2el"] >= sum(each["itl"], each["ttft"]) - 1e-9
        assert len(each["itl"]) == 2
        assert (each["input_len"], each["output_len"], each["error"]) == (11, 3, "")
        assert each["generated_text"] == "abc"
    values = cell["values"]
    assert (values["completed"], values["failed"]) == (3, 0)
    assert (values["total_input_tokens"], values["total_output_tokens"]) == (33, 9)
    assert values["duration"] >= max(each["start_time"] + each["e2el"] for each in cell["detailed"]) - 1e-6
    assert values["mean_ttft_ms"] == pytest.approx(1e3 * np.mean([each["ttft"] for each in cell["detailed"]]))
    assert values["median_itl_ms"] == pytest.approx(
        1e3 * np.median([gap for each in cell["detailed"] for gap in each["itl"]])
    )


def test_reasoning_is_text_too(fake):
    fake.reply = raw(
        b'data: {"choices": [{"delta": {"reasoning_content": "Hm", "reasoning": "Hm"}}]}\r\n\r\n',
        b": a comment\n\nda",
        b'ta:{"choices": [{"delta": {"content": "Blue"}, "finish_reason": "stop"}]}',
    )
    result, _ = measured(fake, "--num-prompts", 1)
    assert result["cells"][0]["detailed"][0]["generated_text"] == "HmBlue"


def test_requests_start_whatever_became_of_those_before(fake):
    count = 12

    async def reply(writer, body):
        while len(fake.bodies) < count:  # nobody is answered before everybody has asked
            await asyncio.sleep(0.01)
        await stream("a", usage=(1, 1))(writer, body)

    fake.reply = reply
    result, _ = measured(fake, "--num-prompts", count, "--request-rate", 200)
    values = result["cells"][0]["values"]
    assert (values["completed"], values["max_concurrent_requests"]) == (count, count)
    assert values["p99_start_lag_ms"] >= 0
    # No request came before it was due, and the last was due at count / rate.
    due_s = arrivals_s(count, 200, 1.0, 0)
    started_s = [each["start_time"] for each in result["cells"][0]["detailed"]]
    assert (np.array(started_s) >= due_s - 1e-6).all()


def test_so_many_are_under_way_and_no_more(fake, monkeypatch):
    monkeypatch.setattr(load_client, "KEPT_S", 60.0)
    fake.reply = stream("a", "b", usage=(1, 2), pause_s=0.01)
    result, _ = measured(fake, "--num-prompts", 8, "--max-concurrency", 2)
    assert fake.most == 2
    assert fake.connections == 3  # one of them asked for the model
    assert result["cells"][0]["values"]["max_concurrent_requests"] <= 2
    assert result["cells"][0]["values"]["completed"] == 8


def test_a_stream_that_is_not_closed_ends_with_its_answer(fake, monkeypatch):
    monkeypatch.setattr(load_client, "DRAIN_S", 0.05)

    async def reply(writer, _body):
        write(writer, event("a", "stop") + b"data: [DONE]\n\n")
        await asyncio.sleep(60)

    fake.reply = reply
    result, _ = measured(fake, "--num-prompts", 1)
    assert result["cells"][0]["values"]["completed"] == 1


TROUBLES = {
    "limited": (
        raw(b'{"error": {"message": "Slow down."}}', status="429 Too Many Requests"),
        "answers 429: Slow down.",
    ),
    "broken": (raw(b"Out of\nmemory", status="500 Oops"), "answers 500: Out of memory."),
    "later": (raw(b'data: {"error": {"message": "Burnt down.", "code": 503}}\n\n'), "answers 503: Burnt down."),
    "garbled": (raw(b"data: {oops\n\n"), "sent a stream that cannot be read: Expecting property"),
    "strange": (raw(b'data: {"hello": 1}\n\n'), "is no chunk of a completion."),
    "number": (raw(b"data: 5\n\n"), "5 is no chunk of a completion."),
    "web": (raw(b"<html>Hello</html>"), "it has no piece of an answer."),
    "hollow": (raw(b"data: [DONE]\n\n"), "it has no piece of an answer."),
    "interrupted": (stream("Blu", finish=None), "ended its stream without saying that the answer is complete."),
    "unfinished": (raw(event("Blu")), "ended its stream without saying that the answer is complete."),
    "aborted": (raw(event("Blu"), event("", "abort")), "ended the answer with 'abort'."),
    "cut": (raw(event("Blu"), end=False), "broke the connection: "),
}


def test_each_failure_is_told_and_the_rest_go_on(fake, tmp_path):
    async def reply(writer, body):
        trouble = TROUBLES.get(body["messages"][0]["content"])
        await (trouble[0] if trouble else stream("Blue", usage=(7, 1)))(writer, body)

    fake.reply = reply
    path = tmp_path / "prompts.txt"
    texts = [*TROUBLES, "fine", "fine too"]
    path.write_text("\n".join(texts))
    count = len(texts)
    result, told = measured(
        fake, "--num-prompts", count, "--dataset-path", path, "--max-concurrency", 4, "--goodput", "e2el:60000"
    )
    (cell,) = result["cells"]
    order = list(islice(shuffled([Prompt(text) for text in texts], 0), count))
    for prompt, each in zip(order, cell["detailed"], strict=True):
        says = TROUBLES[prompt.text][1] if prompt.text in TROUBLES else ""
        assert says in each["error"], prompt
        assert bool(each["error"]) is bool(says)
        assert not says or each["error"].startswith(f"The server at {fake.url}/v1 ")
        assert not says or each["error"].endswith(".")
    values = cell["values"]
    assert (values["completed"], values["failed"], values["total_output_tokens"]) == (2, len(TROUBLES), 2)
    assert values["request_goodput"] == pytest.approx(values["request_throughput"])
    assert f"{len(TROUBLES)} of {count} requests failed. 2 x: " in result["notes"][0]
    held = {check["name"]: check["held"] for check in result["checks"]}
    assert held["requests answered"] is False
    assert f"2 of {count} requests brought a whole answer" in told


def test_silence_ends_at_its_limit(fake):
    fake.reply = silent
    done = bench("--num-prompts", 2, "--num-warmups", 0, "--timeout", 0.2, url=fake.url)
    assert done.exit_code == EXIT_FAILED
    assert f"The first: The server at {fake.url}/v1 sent nothing for 0.2 s." in done.stderr


def test_when_all_fail_there_is_no_result(fake, tmp_path):
    fake.reply = TROUBLES["limited"][0]
    done = bench("--num-prompts", 2, "--num-warmups", 0, "--result-dir", tmp_path, url=fake.url)
    assert done.exit_code == EXIT_FAILED
    assert f"All requests failed (2). The first: The server at {fake.url}/v1 answers 429: Slow down." in done.stderr
    assert list(tmp_path.iterdir()) == []
    fake.bodies.clear()
    done = bench("--num-prompts", 9, "--num-warmups", 2, url=fake.url)
    assert done.exit_code == EXIT_FAILED
    assert "answers 429: Slow down. It was the warm-up" in done.stderr
    assert len(fake.bodies) == 2


def test_no_server_at_all():
    with socket.create_server((ADDRESS, 0)) as taken:
        port = taken.getsockname()[1]
    done = bench("--host", ADDRESS, "--port", port)
    assert done.exit_code == EXIT_FAILED
    assert f"The server at http://{ADDRESS}:{port}/v1 cannot be reached: connection refused." in done.stderr
    done = bench("--port", port, "--model", "m", "--num-warmups", 0, "--num-prompts", 3)
    assert "All requests failed (3). The first: " in done.stderr
    assert "cannot be reached: connection refused." in done.stderr


def test_without_usage_pieces_are_counted_and_it_says_so(fake):
    fake.reply = stream("a", "b", "c")
    result, told = measured(fake, "--num-prompts", 2)
    values = result["cells"][0]["values"]
    assert values["total_output_tokens"] == 6
    assert "total_input_tokens" not in values
    assert "sent no usage for 2 of 2 answers" in told
    assert result["cells"][0]["detailed"][0]["input_len"] is None


def test_empty_answers_are_told(fake):
    fake.reply = stream(usage=(4, 0))
    result, told = measured(fake, "--num-prompts", 2)
    assert result["cells"][0]["values"]["total_output_tokens"] == 0
    assert "2 of 2 answers were empty" in told


def test_every_rate_is_a_cell_and_asks_what_was_not_asked_before(fake, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"prompt {number}" for number in range(9)))
    folder = tmp_path / "results" / "deep"
    done = bench(
        "--num-prompts",
        4,
        "--num-warmups",
        1,
        "--request-rate",
        400,
        "--request-rate",
        "inf",
        "--dataset-path",
        path,
        "--result-dir",
        folder,
        "--label",
        "ours",
        "--metadata",
        "gpu=none",
        "--json",
        "--seed",
        5,
        url=fake.url,
    )
    assert done.exit_code == EXIT_OK, done.output
    assert len(fake.prompts) == len(set(fake.prompts)) == 9
    result = SuiteResult.load(folder / "serve.json")
    assert json.loads(done.stdout) == json.loads((folder / "serve.json").read_text())
    assert (result.suite, result.axes, result.metadata) == ("serve", ["request_rate"], {"gpu": "none"})
    assert [(cell.system, cell.key) for cell in result.cells] == [
        ("ours", {"request_rate": 400.0}),
        ("ours", {"request_rate": "inf"}),
    ]
    assert all(cell.values["completed"] == 4 and cell.detailed == [] for cell in result.cells)
    assert "p99_start_lag_ms" in result.cells[0].values
    assert "p99_start_lag_ms" not in result.cells[1].values
    assert (result.settings["seed"], result.settings["model"], result.settings["max_tokens"]) == (5, "first", 128)
    assert result.notes == []
    for name in ("Successful requests", "Request throughput (req/s)", "P99 E2EL (ms)", *METRICS.values()):
        assert name in done.stderr


def test_prompts_that_come_again_are_told(fake, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\n")
    _, told = measured(fake, "--num-prompts", 3, "--dataset-path", path)
    assert "has 2 prompts for 3 requests" in told


def test_an_interruption_keeps_what_ended(fake, tmp_path):
    async def reply(writer, body):
        if len(fake.bodies) < 3:
            await stream("a", usage=(1, 1))(writer, body)
        else:
            os.kill(os.getpid(), signal.SIGINT)
            await silent(writer, body)

    fake.reply = reply
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may have it ignored
    try:
        done = bench(
            "--num-prompts",
            5,
            "--num-warmups",
            0,
            "--max-concurrency",
            1,
            "--request-rate",
            "inf",
            "--request-rate",
            1000,
            "--result-dir",
            tmp_path,
            "--result-filename",
            "part.json",
            url=fake.url,
        )
        assert done.exit_code == EXIT_INTERRUPTED
        assert "Interrupted" in done.stderr
        result = SuiteResult.load(tmp_path / "part.json")
        (cell,) = result.cells
        assert (cell.values["completed"], cell.values["failed"]) == (2, 0)
        assert "was interrupted when 2 of 5 requests had ended; 3 more had been due" in result.notes[0]
        done = bench("--num-prompts", 1, "--num-warmups", 0, "--result-dir", tmp_path, url=fake.url)
        assert done.exit_code == EXIT_INTERRUPTED
        assert not (tmp_path / "serve.json").exists()
    finally:
        signal.signal(signal.SIGINT, before)


def test_only_an_interruption_makes_a_result_of_nothing_but_failures():
    about = About("ours", "telerag", {})
    run = Run(2.0, 0.0, 1.0, [answered(error="Gone.")], [0.0, 0.0], [], 4, interrupted=True)
    result = suite_result([run], Load(4, (2.0,)), Wanted(), about, detailed=False)
    assert (result.cells[0].values["completed"], result.cells[0].values["failed"]) == (0, 1)
    assert "interrupted when 1 of 4 requests had ended; 1 more had been due" in result.notes[0]
    with pytest.raises(ModelError, match=r"All requests failed \(1\)\. The first: Gone\."):
        suite_result([replace(run, interrupted=False)], Load(4, (2.0,)), Wanted(), about, detailed=False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--base-url", "http://a", "--port", 5], "both say where the server is"),
        (["--dataset-name", "custom"], "custom needs a"),
        (["--dataset-name", "random", "--dataset-path", "x"], "random takes no"),
        (["--request-rate", 0], "--request-rate is 0"),
        (["--request-rate", 2, "--request-rate", 2], "given twice"),
        (["--burstiness", 0], "--burstiness is 0"),
        (["--request-rate", "nan"], "--request-rate is nan"),
        (["--goodput", "itl:5"], "has 'itl', which is none of"),
        (["--goodput", "ttft"], "no METRIC:MILLISECONDS"),
        (["--goodput", "ttft:-1"], "has '-1'"),
        (["--goodput", "ttft:x"], "has 'x'"),
        (["--metric-percentiles", "50,101"], "has '101', which is not a number from 0 to 100"),
        (["--percentile-metrics", "x"], "has 'x'"),
        (["--extra-body", "{"], "is no JSON"),
        (["--extra-body", "[]"], "no object"),
        (["--metadata", "x"], "no KEY=VALUE"),
        (["--result-filename", "a/b.json"], "no name of a JSON file"),
        (["--backend", "tgi"], "tgi"),
        (["--backend", "openai", "--endpoint", "/v1/chat/completions"], "does not end in /completions"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(options, says):
    done = bench(*options)
    assert done.exit_code == EXIT_USAGE
    assert says in done.stderr


def test_a_result_that_could_not_be_written_is_refused_before_the_load(fake, tmp_path):
    (tmp_path / "file").touch()
    done = bench("--result-dir", tmp_path / "file", url=fake.url)
    assert (done.exit_code, fake.paths) == (EXIT_USAGE, [])
    assert "is a file and no folder" in done.stderr
    done = bench("--dataset-path", tmp_path / "absent", url=fake.url)
    assert (done.exit_code, fake.paths) == (EXIT_FAILED, [])
    assert "absent cannot be read" in done.stderr
