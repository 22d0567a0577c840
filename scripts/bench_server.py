"""What the server gives eight clients at once, beside `python -m llama_cpp.server` with the same model and the same prompts.

    python scripts/bench_server.py INDEX --questions FILE [-o RESULT.json]

Both servers run on this machine with the same GGUF file, all cores, and the same context for a request. Both stay loaded, since
loading one anew for each turn would make it begin cold; the one that nobody asks takes no processor time, which is checked.
In each repeat both get the same questions, now one first and now the other; no question comes twice, so neither
server has read a prompt before. Ours gets questions and finds passages for them; theirs gets the prompts that ours wrote
from (recorded by `telerag run --pipeline naive`): it is spared embedding and searching. Everything is streamed, at
temperature 0; a client asks again as soon as it has its answer.

Tokens are counted the same way for both. A prompt has the tokens that the model's chat template makes of it; our usage must say
the same of each, and theirs (which a stream of theirs lacks) of some that it is asked before the measuring. An answer has the
tokens into which the model's tokenizer cuts its text. A prompt's token counts whether it was computed or taken from a cache, in
both: both keep what they have read, theirs the last prompt, ours those of its slots. How many ours took over is in the result.

What is given to theirs: `--interrupt_requests false`, without which each request breaks off the one before it, and
`--logits_all false`, without which it computes an output for every token of a prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from server_process import Served, get_text, llama_server, post_json, serve_local
from telerag_cli.bench.load_client import LoadClient, Sampling, Server
from telerag_cli.bench.load_metrics import Answer
from telerag_cli.bench.load_names import Backend
from telerag_cli.bench.load_prompts import Prompt
from telerag_cli.bench.results import Ratio
from telerag_cli.bench.statistics import ratio
from telerag_cli.bench_record import record
from telerag_cli.files import write_json
from telerag_cli.generation.base import Message
from telerag_cli.generation.llama_model import LlamaModel
from telerag_cli.generation.models import resolve_model

OURS, THEIRS = "telerag serve-local", "llama_cpp.server"
MODEL = "telerag-naive"
TIMEOUT_S = 600.0
"""For the first token of the last in a queue."""
MOST_IDLE_SHARE = 0.02
"""Of one core, that a server may take while the other is asked."""
NEAR = 0.1
"""By which the mean length of answers may differ: the same model at temperature 0, rounded differently."""
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Recorded:
    """A question, and what our pipeline made of it."""

    question: str
    messages: list[dict[str, Any]]


@dataclass(frozen=True)
class Conversations(Sampling):
    """Requests whose prompt is a number: of a question, or of the messages written for it."""

    asked: tuple[list[dict[str, Any]], ...] = ()

    def body(self, server: Server, model: str, prompt: Prompt) -> bytes:
        """See `Sampling`."""
        body = json.loads(super().body(server, model, prompt))
        return json.dumps(body | {"messages": self.asked[int(prompt.text)]}).encode()


@dataclass(frozen=True)
class System:
    """A server, and what it is asked."""

    name: str
    served: Served
    model: str
    sampling: Conversations

    @property
    def cpu_s(self) -> float:
        """Processor time that it has taken."""
        fields = Path(f"/proc/{self.served.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


@dataclass(frozen=True)
class Turn:
    """What came of one server's answers to one block of questions."""

    answers: list[Answer]
    wall_s: float
    other_cpu_share: float
    """Of one core, taken by the server that was not asked."""


def talk(message: str) -> None:
    """To stderr."""
    print(message, file=sys.stderr)


def recorded(options: argparse.Namespace, folder: Path) -> list[Recorded]:
    """The prompts that the pipeline writes from, in the order of the questions."""
    path = folder / "recording.jsonl"
    command = [
        sys.executable,
        "-m",
        "telerag_cli",
        "run",
        str(options.index),
        "-q",
        str(options.questions),
        "--pipeline",
        "naive",
    ]
    command += [
        "--max-tokens",
        "1",
        "-k",
        str(options.k),
        "--ctx-size",
        str(options.ctx_size),
        "--record",
        str(path),
    ]
    command += ["-o", str(folder / "answers.jsonl"), "--profile", "none"]
    command += ["--model", options.model] if options.model else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"recording the prompts failed\n{done.stderr}")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    by_question = {line["question"]: line["generations"][-1]["messages"] for line in lines}
    with options.questions.open(encoding="utf-8") as questions:
        return [Recorded(question, by_question[question]) for line in questions if (question := line.strip())]


def ask_all(system: System, other: System, numbers: Sequence[int], clients: int) -> Turn:
    """Have the questions answered by so many clients, each of which asks again when it has its answer."""

    async def all_of_them() -> list[Answer]:
        answers: list[Answer] = []
        waiting = iter(numbers)

        async def one(client: LoadClient) -> None:
            for number in waiting:
                answers.append(await client.ask(Prompt(str(number))))

        server = Server.find(system.served.url, backend=Backend.CHAT)
        async with LoadClient(server, system.model, system.sampling, TIMEOUT_S) as client:
            await asyncio.gather(*(one(client) for _ in range(clients)))
        return answers

    other_cpu_s, began_s = other.cpu_s, time.perf_counter()
    answers = asyncio.run(all_of_them())
    wall_s = time.perf_counter() - began_s
    failed = [answer.error for answer in answers if answer.error]
    if failed:
        raise SystemExit(f"{system.name}: {len(failed)} requests failed, the first: {failed[0]}")
    return Turn(answers, wall_s, (other.cpu_s - other_cpu_s) / wall_s)


def measures(
    turn: Turn, numbers: Sequence[int], prompt_tokens: Sequence[int], model: LlamaModel
) -> dict[str, float]:
    """The figures of a turn."""
    read = sum(prompt_tokens[number] for number in numbers)
    written = [len(model.tokenize(answer.text)) for answer in turn.answers]
    ttft_s = [answer.ttft_s for answer in turn.answers]
    latency_s = [answer.latency_s for answer in turn.answers]
    return {
        "wall_s": turn.wall_s,
        "prompt_tokens": read,
        "completion_tokens": sum(written),
        "completion_tokens_said": sum(answer.output_tokens for answer in turn.answers),
        "total_tokens_per_s": (read + sum(written)) / turn.wall_s,
        "completion_tokens_per_s": sum(written) / turn.wall_s,
        "requests_per_s": len(turn.answers) / turn.wall_s,
        **{f"ttft_p{share}_s": float(np.percentile(ttft_s, share)) for share in (50, 95)},
        **{f"latency_p{share}_s": float(np.percentile(latency_s, share)) for share in (50, 95)},
        "other_cpu_share": turn.other_cpu_share,
    }


def check_prompts(
    system: System, asked: Sequence[int], prompt_tokens: Sequence[int], *, stream: bool
) -> None:
    """Ask some, which also warms the server up, and compare its usage with what the prompts have.

    Raises:
        SystemExit: the server reads other prompts than we think.
    """
    for number in asked:
        if stream:
            (answer,) = ask_all(system, system, [number], 1).answers
            said = answer.input_tokens
        else:
            body = {
                "model": system.model,
                "messages": system.sampling.asked[number],
                "max_tokens": 1,
                "temperature": 0,
            }
            said = post_json(f"{system.served.url}/v1/chat/completions", body)["usage"]["prompt_tokens"]
        if said != prompt_tokens[number]:
            raise SystemExit(
                f"{system.name} read {said} tokens for prompt {number}, which has {prompt_tokens[number]}"
            )


def cached_tokens(served: Served) -> float:
    """Tokens of prompts that ours took over, by its metrics."""
    lines = get_text(f"{served.url}/metrics").splitlines()
    return sum(
        float(line.rpartition(" ")[2]) for line in lines if line.startswith("telerag_prefix_cache_hits_total")
    )


def compare(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, Ratio]:
    """Ratios pair by pair, each so that more than 1 is in our favour."""
    made = {}
    for metric in ("total_tokens_per_s", "completion_tokens_per_s", "requests_per_s"):
        pairs = [(each[OURS][metric], each[THEIRS][metric]) for each in rounds]
        made[metric] = ratio({}, OURS, THEIRS, metric, pairs)
    for metric in ("ttft_p50_s", "ttft_p95_s", "latency_p50_s", "latency_p95_s"):
        pairs = [(each[THEIRS][metric], each[OURS][metric]) for each in rounds]
        made[metric] = ratio({}, THEIRS, OURS, metric, pairs)
    return made


def told(found: Ratio) -> str:
    """A ratio with its interval, or why there is none."""
    return (
        f"{found.ratio:.2f} x ({found.low:.2f} to {found.high:.2f})"
        if found.ratio is not None
        else found.note
    )


def middle(rounds: Sequence[dict[str, dict[str, float]]], name: str, metric: str) -> float:
    """The median over the repeats."""
    return float(np.median([each[name][metric] for each in rounds]))


def checks(rounds: Sequence[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """What must hold for the figures to mean anything."""
    written = {name: sum(each[name]["completion_tokens"] for each in rounds) for name in (OURS, THEIRS)}
    apart = abs(written[OURS] / written[THEIRS] - 1)
    idle = max(each[name]["other_cpu_share"] for each in rounds for name in each)
    return [
        {"name": "answers of a length", "held": apart <= NEAR,
         "says": f"Ours have {written[OURS]:.0f} tokens and theirs {written[THEIRS]:.0f}; {NEAR:.0%} apart is allowed."},
        {"name": "the other server idle", "held": idle <= MOST_IDLE_SHARE,
         "says": f"The one that was not asked took at most {idle:.1%} of a core; {MOST_IDLE_SHARE:.0%} is allowed."},
    ]  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("index", type=Path)
    parser.add_argument("--questions", type=Path, required=True, help="one a line, each once")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=16, help="in each turn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmups", type=int, default=2, help="questions asked before the measuring")
    parser.add_argument("--model", help="a GGUF file; by default the bundled model")
    parser.add_argument("-k", type=int, default=5, help="passages in a prompt")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--ctx-size", type=int, default=4096, help="tokens of a request, in both")
    parser.add_argument("--serve-options", default="", help="further options of telerag serve-local")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()

    path = resolve_model(options.model, None)
    cores = len(os.sched_getaffinity(0))
    ours_options: list[object] = [
        "-k",
        options.k,
        "--ctx-size",
        options.ctx_size,
        *shlex.split(options.serve_options),
    ]
    ours_options += ["--model", options.model] if options.model else []
    theirs_options = ["--n_ctx", options.ctx_size, "--n_threads", cores, "--n_threads_batch", cores, "--logits_all", "false",
                      "--interrupt_requests", "false", "--model_alias", path.stem, "--verbose", "false"]  # fmt: skip
    model = LlamaModel(path)
    with tempfile.TemporaryDirectory() as folder:
        talk("recording the prompts")
        known = recorded(options, Path(folder))
        needed = options.warmups + options.repeats * options.requests
        if len(known) < needed:
            raise SystemExit(
                f"{options.questions} has {len(known)} questions and {needed} are needed, for none may come twice"
            )
        prompts = tuple(each.messages for each in known)
        questions = tuple([{"role": "user", "content": each.question}] for each in known)
        tokens = [len(model.prompt([Message(**turn) for turn in messages])) for messages in prompts]
        with (
            serve_local(options.index, *ours_options, log=Path(folder) / "ours") as ours,
            llama_server(path, *theirs_options, log=Path(folder) / "theirs") as theirs,
        ):
            systems = {
                OURS: System(OURS, ours, MODEL, Conversations(options.max_tokens, asked=questions)),
                THEIRS: System(THEIRS, theirs, path.stem, Conversations(options.max_tokens, asked=prompts)),
            }
            check_prompts(systems[OURS], range(options.warmups), tokens, stream=True)
            check_prompts(systems[THEIRS], range(options.warmups), tokens, stream=False)
            before = cached_tokens(ours)
            rounds = measure(systems, options, tokens, model)
            taken_over = cached_tokens(ours) - before
    model.close()

    ratios, held = compare(rounds), checks(rounds)
    prompt_tokens = sum(each[OURS]["prompt_tokens"] for each in rounds)
    for metric, found in ratios.items():
        print(
            f"{metric:24} ours {middle(rounds, OURS, metric):9.3f}   theirs {middle(rounds, THEIRS, metric):9.3f}   {told(found)}"
        )
    print(f"prompt tokens that ours took from its cache: {taken_over:.0f} of {prompt_tokens:.0f}")
    for check in held:
        print(f"{'held' if check['held'] else 'NOT HELD'}: {check['says']}")
    if options.output:
        setting = (f"{options.clients} clients at once, naive, {path.stem}, k {options.k}, answers up to {options.max_tokens} tokens, "
                   f"{options.repeats} x {options.requests} questions")  # fmt: skip
        ttft = {name: middle(rounds, name, "ttft_p95_s") for name in (OURS, THEIRS)}
        total = {name: middle(rounds, name, "total_tokens_per_s") for name in (OURS, THEIRS)}
        written = {name: middle(rounds, name, "completion_tokens_per_s") for name in (OURS, THEIRS)}
        figures = [
            {"what": f"`serve-local`, {setting}: read and written tokens a second",
             "value": f"{total[OURS]:.0f} ({told(ratios['total_tokens_per_s'])})",
             "against": f"`llama_cpp.server`, same prompts: {total[THEIRS]:.0f}", "goal": "at least 1.8 x"},
            {"what": "Written tokens alone", "value": f"{written[OURS]:.0f} ({told(ratios['completion_tokens_per_s'])})",
             "against": f"{written[THEIRS]:.0f}"},
            {"what": "Time to the first token, 95th percentile", "value": f"{ttft[OURS]:.2f} s",
             "against": f"{ttft[THEIRS]:.2f} s, theirs over ours {told(ratios['ttft_p95_s'])}", "goal": "no worse"},
        ]  # fmt: skip
        settings = {"clients": options.clients, "requests": options.requests, "repeats": options.repeats, "k": options.k,
                    "max_tokens": options.max_tokens, "ctx_size": options.ctx_size, "model": path.stem, "threads": cores,
                    "ours": list(map(str, ours_options)), "theirs": list(map(str, theirs_options))}  # fmt: skip
        write_json(options.output, record(shlex.join(["python", *sys.argv]), figures=figures, settings=settings, rounds=rounds,
                                          ratios={metric: vars(found) for metric, found in ratios.items()}, checks=held,
                                          prompt_tokens=prompt_tokens, prompt_tokens_from_cache=taken_over))  # fmt: skip
    if not all(check["held"] for check in held):
        raise SystemExit(1)


def measure(systems: dict[str, System], options: argparse.Namespace, prompt_tokens: Sequence[int],
            model: LlamaModel) -> list[dict[str, dict[str, float]]]:  # fmt: skip
    """Both on each block of questions; what they took, repeat by repeat."""
    rounds = []
    for repeat in range(options.repeats):
        begin = options.warmups + repeat * options.requests
        numbers = range(begin, begin + options.requests)
        names = [OURS, THEIRS] if repeat % 2 == 0 else [THEIRS, OURS]
        turns = {name: ask_all(systems[name], systems[next(other for other in names if other != name)], numbers, options.clients)
                 for name in names}  # fmt: skip
        for answer in turns[OURS].answers:
            if answer.input_tokens is None:
                raise SystemExit(f"{OURS} sent no usage")
        if (said := sum(answer.input_tokens or 0 for answer in turns[OURS].answers)) != (
            wanted := sum(prompt_tokens[number] for number in numbers)
        ):
            raise SystemExit(f"{OURS} read {said} tokens for prompts that have {wanted}")
        rounds.append({name: measures(turns[name], numbers, prompt_tokens, model) for name in (OURS, THEIRS)})
        talk(
            f"{repeat + 1}/{options.repeats}  "
            + "  ".join(f"{name} {turns[name].wall_s:.1f} s" for name in (OURS, THEIRS))
        )
    return rounds


if __name__ == "__main__":
    main()
