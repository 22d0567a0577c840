"""``telerag bench serve``: load on a running server, with the flags and fields of ``vllm bench serve``."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from telerag_cli.bench.load_names import Backend, DatasetName
from telerag_cli.cli import console
from telerag_cli.cli.keeping import metadata_of, result_path
from telerag_cli.cli.options import BaseUrlOption, TimeoutOption
from telerag_cli.config import DEFAULT_TIMEOUT_S
from telerag_cli.errors import UsageError

if TYPE_CHECKING:
    from telerag_cli.bench.load_prompts import Prompt
    from telerag_cli.bench.results import SuiteResult

DEFAULT_ADDRESS = "http://127.0.0.1:8000"
DEFAULT_RESULT = "serve.json"
_SERVER, _PROMPTS, _LOAD, _RESULT = "The server", "The prompts", "The load", "The result"

TOTALS = {
    "completed": "Successful requests",
    "failed": "Failed requests",
    "duration": "Benchmark duration (s)",
    "total_input_tokens": "Total input tokens",
    "total_output_tokens": "Total generated tokens",
    "request_throughput": "Request throughput (req/s)",
    "request_goodput": "Request goodput (req/s)",
    "output_throughput": "Output token throughput (tok/s)",
    "max_output_tokens_per_s": "Peak output token throughput (tok/s)",
    "max_concurrent_requests": "Peak concurrent requests",
    "total_token_throughput": "Total token throughput (tok/s)",
}
"""vLLM's words, in its order."""


def serve(
    base_url: BaseUrlOption = None,
    host: Annotated[
        str | None,
        typer.Option(
            help="Its host, instead of --base-url.  \\[default: 127.0.0.1]", show_default=False, rich_help_panel=_SERVER
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help="Its port, instead of --base-url.  \\[default: 8000]",
            show_default=False,
            rich_help_panel=_SERVER,
        ),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="Path that answers.  \\[default: /v1/completions or /v1/chat/completions, by --backend]",
            metavar="PATH",
            show_default=False,
            rich_help_panel=_SERVER,
        ),
    ] = None,
    backend: Annotated[
        Backend | None,
        typer.Option(
            help="openai asks for completions, openai-chat for chat completions.  \\[default: by --endpoint, or openai-chat]",
            show_default=False,
            rich_help_panel=_SERVER,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Its name for the model.  \\[default: the first that it lists]",
            metavar="NAME",
            show_default=False,
            rich_help_panel=_SERVER,
        ),
    ] = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    dataset_name: Annotated[
        DatasetName | None,
        typer.Option(
            help="custom: one prompt a line, or JSONL with prompt or question and perhaps output_tokens. sharegpt: the first "
            "question of each conversation. random: random words.  \\[default: custom with --dataset-path, else random]",
            show_default=False,
            rich_help_panel=_PROMPTS,
        ),
    ] = None,
    dataset_path: Annotated[
        str | None,
        typer.Option(
            help="The file of custom or sharegpt; - is stdin.",
            metavar="FILE|-",
            show_default=False,
            rich_help_panel=_PROMPTS,
        ),
    ] = None,
    random_input_len: Annotated[
        int, typer.Option(min=1, help="Words of a random prompt.", rich_help_panel=_PROMPTS)
    ] = 128,
    random_output_len: Annotated[
        int, typer.Option(min=1, help="Longest answer to a random prompt, in tokens.", rich_help_panel=_PROMPTS)
    ] = 128,
    random_range_ratio: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Both lengths are drawn from this share below to this share above.",
            rich_help_panel=_PROMPTS,
        ),
    ] = 0.0,
    max_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Longest answer to a prompt of a file, in tokens, if it has no output_tokens.",
            rich_help_panel=_PROMPTS,
        ),
    ] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 always takes the likeliest token.", rich_help_panel=_PROMPTS)
    ] = 0.0,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos", help="Ask for answers of full length; vLLM and SGLang know it.", rich_help_panel=_PROMPTS
        ),
    ] = False,
    extra_body: Annotated[
        str | None,
        typer.Option(
            help="Further fields of each request; null takes one of ours away.",
            metavar="JSON",
            show_default=False,
            rich_help_panel=_PROMPTS,
        ),
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests at each rate.", rich_help_panel=_LOAD)] = 100,
    num_warmups: Annotated[
        int, typer.Option(min=0, help="Questions asked before, and not measured.", rich_help_panel=_LOAD)
    ] = 1,
    request_rate: Annotated[
        list[float] | None,
        typer.Option(
            help="Requests a second; inf sends all at once. May be repeated, for one run each.  \\[default: inf]",
            show_default=False,
            rich_help_panel=_LOAD,
        ),
    ] = None,
    burstiness: Annotated[
        float,
        typer.Option(
            help="1: arrivals are a Poisson process; less: in bursts; more: evener (gamma distributed).",
            rich_help_panel=_LOAD,
        ),
    ] = 1.0,
    max_concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Requests under way at once; others wait here, which counts for no latency.  \\[default: no limit]",
            show_default=False,
            rich_help_panel=_LOAD,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Decides arrivals, order and random words.", rich_help_panel=_LOAD)
    ] = 0,
    percentile_metrics: Annotated[
        str, typer.Option(help="Of ttft, tpot, itl, e2el.", metavar="NAMES", rich_help_panel=_RESULT)
    ] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[
        str, typer.Option(help="From 0 to 100.", metavar="NUMBERS", rich_help_panel=_RESULT)
    ] = "50,90,99",
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            help="What a good request has at most, like ttft:500 or e2el:3000 (ms). May be repeated.",
            metavar="METRIC:MS",
            show_default=False,
            rich_help_panel=_RESULT,
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            help="The system's name in the result.  \\[default: the model's]",
            show_default=False,
            rich_help_panel=_RESULT,
        ),
    ] = None,
    save_result: Annotated[
        bool,
        typer.Option(
            "--save-result",
            help="Write the result into this folder, if neither --result-dir nor --result-filename says where.",
            rich_help_panel=_RESULT,
        ),
    ] = False,
    result_dir: Annotated[
        Path | None,
        typer.Option(
            help="Write the result there, as SUITE.json; telerag bench report makes pages of it.  \\[default: nowhere]",
            metavar="DIR",
            show_default=False,
            rich_help_panel=_RESULT,
        ),
    ] = None,
    result_filename: Annotated[
        str | None,
        typer.Option(
            help="Name of that file.  \\[default: SUITE.json]",
            metavar="NAME",
            show_default=False,
            rich_help_panel=_RESULT,
        ),
    ] = None,
    save_detailed: Annotated[
        bool, typer.Option("--save-detailed", help="Keep every request, not only summaries.", rich_help_panel=_RESULT)
    ] = False,
    metadata: Annotated[
        list[str] | None,
        typer.Option(
            help="A note to keep with the result; repeatable.",
            metavar="KEY=VALUE",
            show_default=False,
            rich_help_panel=_RESULT,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout.", rich_help_panel=_RESULT)
    ] = False,
) -> None:
    """Put load on a running server that speaks OpenAI's API, and measure what its users would see."""
    from telerag_cli.bench.load_client import LoadClient, Sampling, Server, first_model
    from telerag_cli.bench.load_metrics import Wanted
    from telerag_cli.bench.serve import About, Load, measure, suite_result

    wanted = Wanted.parse(percentile_metrics, metric_percentiles, goodput or [])
    rates = tuple(request_rate or [math.inf])
    _check_rates(rates, burstiness)
    server = Server.find(_address(base_url, host, port), endpoint, backend)
    dataset = dataset_name or (DatasetName.CUSTOM if dataset_path else DatasetName.RANDOM)
    if (dataset is DatasetName.RANDOM) == bool(dataset_path):
        raise UsageError(
            f"--dataset-name {dataset} {'takes no' if dataset_path else 'needs a'} --dataset-path.",
            remedy="Remove it." if dataset_path else "Name a file.",
        )
    sampling = Sampling(max_tokens, temperature, ignore_eos, _object(extra_body))
    noted = metadata_of(metadata)
    path = result_path(result_dir, result_filename, DEFAULT_RESULT, save=save_result)
    if dataset_path:
        needed = num_warmups + num_prompts * len(rates)
        prompts, notes = _of_file(dataset, dataset_path, seed, needed)
    else:
        from telerag_cli.bench.load_prompts import random_prompts

        prompts = random_prompts(random_input_len, random_output_len, random_range_ratio, seed)
        notes = []
    name = model or first_model(server)
    settings: dict[str, Any] = {
        "base_url": server.root,
        "backend": server.backend.value,
        "model": name,
        "dataset_name": dataset.value,
        "dataset_path": dataset_path,
        "temperature": temperature,
        "ignore_eos": ignore_eos,
        "extra_body": sampling.extra_body,
        "timeout_s": timeout,
    }
    if dataset is DatasetName.RANDOM:
        settings |= {
            "random_input_len": random_input_len,
            "random_output_len": random_output_len,
            "random_range_ratio": random_range_ratio,
        }
    else:
        settings["max_tokens"] = max_tokens
    load = Load(num_prompts, rates, num_warmups, burstiness, max_concurrency, seed)
    about = About(label or name, shlex.join(["telerag", *sys.argv[1:]]), settings, noted, tuple(notes))
    console.say(f"{server.url}, {name}: {num_prompts} requests at {', '.join(f'{rate:g}' for rate in rates)} a second")
    client = LoadClient(server, name, sampling, timeout)
    runs = measure(client, prompts, load, lambda what, count: console.progress(what, count, unit="requests"))
    result = suite_result(runs, load, wanted, about, detailed=save_detailed)
    _show(result, wanted.metrics)
    if path:
        result.save(path)
        console.say(f"Result: {path}")
    if as_json:
        from telerag_cli.bench.results import FORMAT, VERSION

        console.emit_json({"format": FORMAT, "version": VERSION, **asdict(result)}, indent=2)
    if any(run.interrupted for run in runs):
        raise KeyboardInterrupt


def _address(base_url: str | None, host: str | None, port: int | None) -> str:
    if base_url and (host or port):
        raise UsageError(
            f"--base-url {base_url} and {'--host' if host else '--port'} both say where the server is.",
            remedy="Give one of them.",
        )
    if base_url or not (host or port):
        return base_url or DEFAULT_ADDRESS
    name = host or "127.0.0.1"
    return f"http://{f'[{name}]' if ':' in name else name}:{port or 8000}"


def _check_rates(rates: Sequence[float], burstiness: float) -> None:
    for rate in rates:
        if not rate > 0:
            raise UsageError(f"--request-rate is {rate:g}, and it should be above 0.", remedy="inf sends all at once.")
    if len(set(rates)) < len(rates):
        twice = next(rate for rate in rates if rates.count(rate) > 1)
        raise UsageError(f"--request-rate {twice:g} is given twice.", remedy="Give each rate once.")
    if not burstiness > 0:
        raise UsageError(f"--burstiness is {burstiness:g}, and it should be above 0.", remedy="1 is a Poisson process.")


def _object(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--extra-body is no JSON: {error}.", remedy="""Write it like '{"top_k": 1}'.""") from error
    if not isinstance(value, dict):
        raise UsageError(f"--extra-body is the JSON {text} and no object.", remedy="""Write it like '{"top_k": 1}'.""")
    return value


def _of_file(dataset: DatasetName, source: str, seed: int, needed: int) -> tuple[Iterator[Prompt], list[str]]:
    """Prompts of a file, as many as are wanted, and what is to be said of them."""
    from telerag_cli.bench.load_prompts import read_custom, read_sharegpt, shuffled
    from telerag_cli.cli.search import open_lines

    notes = []
    with contextlib.ExitStack() as opened_here:
        lines, name = opened_here.enter_context(open_lines(source))
        if dataset is DatasetName.CUSTOM:
            found = read_custom(lines, name)
        else:
            found, without = read_sharegpt(lines, name)
            if without:
                notes.append(f"{name}: {without} conversations begin with no question and are left out.")
    if len(found) < needed:
        notes.append(
            f"{name} has {len(found)} prompts for {needed} requests, so that prompts come again; what the server "
            "keeps of them makes it faster."
        )
    return shuffled(found, seed), notes


def _show(result: SuiteResult, metrics: Sequence[str]) -> None:
    """Print vLLM's table, with a column for each rate."""
    from telerag_cli.bench.load_metrics import METRICS

    rows = [
        (name, *(_cell(cell.values.get(key)) for cell in result.cells))
        for key, name in TOTALS.items()
        if any(key in cell.values for cell in result.cells)
    ]
    for metric in metrics:
        keys = dict.fromkeys(key for cell in result.cells for key in cell.values if key.endswith(f"_{metric}_ms"))
        if keys:
            rows.append((METRICS[metric], *("" for _ in result.cells)))
        rows += [
            (
                f"  {key.split('_')[0].capitalize()} {metric.upper()} (ms)",
                *(_cell(cell.values.get(key)) for cell in result.cells),
            )
            for key in keys
        ]
    columns = ("Request rate (req/s)", *(f"{float(cell.key['request_rate']):g}" for cell in result.cells))
    console.table("Serving Benchmark Result", columns, rows)
    for note in result.notes:
        console.warn(note)
    for check in result.checks:
        if not check.held:
            console.warn(check.says)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
