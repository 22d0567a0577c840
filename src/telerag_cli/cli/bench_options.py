"""Options that suites of ``telerag bench`` share, and what follows from them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from telerag_cli.bench.suites import SuiteName, SystemName
from telerag_cli.cli.options import Only
from telerag_cli.config import NONE, EngineConfig, Lookahead, PipelineName
from telerag_cli.errors import ResourceError, UsageError
from telerag_cli.files import wrap_os_error
from telerag_cli.setting import Setting


def work(help: str, *names: str, default: str = "", panel: str = "How much", **more: Any) -> Any:  # noqa: A002
    """Return an option that says how much is measured; ``default`` says in words what a declared None stands for."""
    said = f"  \\[default: {default}]" if default else ""
    return typer.Option(*names, help=help + said, show_default=not default, rich_help_panel=panel, **more)


_kept = partial(work, panel="What is kept")


@dataclass(frozen=True)
class ResultOptions:
    """Options of all suites: where results go."""

    result_dir: Annotated[
        Path | None,
        _kept(
            "Write the result there, as SUITE.json; telerag bench report makes a report of them.",
            default="nowhere",
            metavar="DIR",
        ),
    ] = None
    result_filename: Annotated[str | None, _kept("Name of that file.", default="SUITE.json", metavar="NAME")] = None
    save_detailed: Annotated[bool, _kept("Keep every request, not only summaries.", "--save-detailed")] = False
    metadata: Annotated[list[str] | None, _kept("A note to keep with the result; repeatable.", metavar="KEY=VALUE")] = (
        None
    )
    as_json: Annotated[bool, _kept("Print the result as JSON instead of tables.", "--json")] = False

    def path(self, default: str) -> Path | None:
        """Return where the result goes, if anywhere, after making sure that it can be written there."""
        folder, name = self.result_dir, self.result_filename
        if not (folder or name):
            return None
        if name and (Path(name).name != name or not name.endswith(".json")):
            raise UsageError(
                f"--result-filename is '{name}', which does not name a JSON file.",
                remedy="Write it like before.json, and its folder as --result-dir.",
            )
        path = (folder or Path()) / (name or default)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise UsageError(f"--result-dir {folder} is a file, not a folder.", remedy="Name another.") from error
        except OSError as error:
            raise wrap_os_error(error, path.parent) from error
        if not os.access(path.parent, os.W_OK):
            raise ResourceError(f"{path.parent} cannot be written.", remedy="Choose another --result-dir.")
        return path

    def noted(self) -> dict[str, str]:
        """Return the notes; the last of a key counts."""
        found = {}
        for entry in self.metadata or ():
            key, equals, value = entry.partition("=")
            if not (key and equals):
                raise UsageError(
                    f"--metadata is '{entry}', which is not KEY=VALUE.", remedy="Write it like --metadata disk=nvme."
                )
            found[key] = value
        return found


@dataclass(frozen=True)
class BenchOptions:
    """Options of the suites that answer questions."""

    dataset: Annotated[
        list[str] | None,
        work(
            "Questions: a dataset that telerag data prepared, or a file, one a line or JSONL; repeatable.",
            metavar="NAME|FILE",
        ),
    ] = None
    system: Annotated[list[SystemName] | None, work("What is measured, interleaved; repeatable.")] = None
    pipeline: Annotated[list[PipelineName] | None, work("How questions are answered; repeatable.")] = None
    num_prompts: Annotated[int, work("Questions of each dataset.", min=1)] = 8
    num_warmups: Annotated[int, work("Questions asked before, and not measured.", min=0)] = 1
    repeats: Annotated[int, work("Times that each is asked.", min=1)] = 1
    seed: Annotated[int, work("For the choice of questions, and intervals.", min=0)] = 0
    trace: Annotated[
        Path | None,
        work(
            "Give the texts of a recording (telerag run --record), in the time the LLM takes for as many tokens; "
            "without it the LLM writes.",
            metavar="FILE",
        ),
    ] = None

    def questions(self, suite: SuiteName) -> dict[str, list[str]]:
        """Return the questions of each dataset by its name, those for warming up first."""
        if not self.dataset:
            raise UsageError(
                f"bench {suite} needs questions and none are named.",
                remedy="Give --dataset FILE, or the NAME of a prepared dataset.",
            )
        from telerag_cli.datasets.questions import load_questions

        count = self.num_warmups + self.num_prompts
        return {
            (Path(name).stem if Path(name).suffix else name): [
                each.text for each in load_questions(name, limit=count, seed=self.seed)
            ]
            for name in self.dataset
        }

    def extent(self, questions: dict[str, list[str]], pipelines: Sequence[PipelineName]) -> dict[str, Any]:
        """Return how much is asked, and how, as settings of a result."""
        return {
            "datasets": list(questions),
            "num_prompts": max(map(len, questions.values())) - self.num_warmups,
            "num_warmups": self.num_warmups,
            "repeats": self.repeats,
            "seed": self.seed,
            "pipelines": [name.value for name in pipelines],
        }


@dataclass(frozen=True, kw_only=True)
class BenchConfig(EngineConfig):
    """What the engines of all systems of a suite have in common."""

    max_tokens: Annotated[int, Setting("Longest answer, in tokens.", min=1, panel="The LLM")] = 64

    def opened(self, options: BenchOptions, concurrency: int) -> BenchConfig:
        """Return the settings to open what all systems share with."""
        replay = options.trace and options.trace.resolve()
        return replace(self, lookahead=Lookahead.OFF, concurrency=concurrency, replay=replay, profile=NONE)


SharedOptions = Annotated[
    BenchConfig,
    Only(
        *("index", "k", "nprobe", "tier", "fast_memory", "gpu_memory", "require_pinned", "embedder", "device"),
        *("model", "hf_repo", "ctx_size", "n_gpu_layers", "threads", "max_tokens"),
    ),
]
