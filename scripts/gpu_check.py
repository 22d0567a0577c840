"""Everything worth knowing about telerag on a GPU, in one command and less than eight minutes.

    python scripts/gpu_check.py [--stages exactness,bandwidth] [--lookahead-data FOLDER] [--model GGUF] [-o RESULT.json]

exactness     searches of the cuda tier against Faiss on the CPU, bit for bit: all storage types and metrics, small and
              large arenas, with lookahead and without, and with a link and a device that fail now and then
bandwidth     lists of 0.2 to 16 MB moved as lookahead moves them, against one copy of as many bytes
scoring       the scoring kernel against a copy within the device
end-to-end    HyDE replayed over a datastore in host memory: Faiss on all cores, no lookahead, by the question, refined;
              and the join alone against Faiss and against moving everything
interference  decoding with lists on their way and without

Times of the LLM are those of a real llama.cpp model, whose weights may be random (--random-model); embeddings are
recorded ones if --lookahead-data names them, else random, and take no time. Results are written after each stage. Where
there is no GPU, --simulated runs the same code, small, on the processor; its times mean nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shlex
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from gpu_hyde import end_to_end
from gpu_stages import Outcome, Row, bandwidth, exactness, interference, scoring
from synthetic_store import Block, Material, make_material, read_material
from telerag_cli.config import Storage
from telerag_cli.errors import ResourceError, TeleragError
from telerag_cli.files import write_json
from telerag_cli.llm.models import resolve_model
from telerag_cli.system import hardware
from telerag_cli.tiers.cuda.gpu import Gpu, find_gpu
from telerag_cli.tiers.cuda.simulated import SimulatedGpu
from telerag_cli.units import format_bytes, parse_bytes

STAGES: dict[str, tuple[Callable[[Bench], Outcome], float]] = {
    "exactness": (exactness, 2.0),
    "bandwidth": (bandwidth, 1.0),
    "scoring": (scoring, 1.5),
    "end-to-end": (end_to_end, 4.0),
    "interference": (interference, 1.0),
}
"""Each stage with its share of the time."""
HUNG = 124
"""The exit status if a stage does not come back."""
SIZES = {
    "vectors": (20_000, 1500),
    "searches": (12, 3),
    "widest": (1500, 3),  # queries of the largest search
    "moved_bytes": (4 << 30, 32 << 20),
    "repeats": (5, 2),
    "scored_bytes": (4 << 30, 4 << 20),
    "list_bytes": (10 << 20, 64 << 10),
    "passage_tokens": (96, 12),
    "answer_tokens": (48, 4),
    "prompt_words": (600, 20),
    "questions": (40, 2),
}
"""How large everything is, for a GPU and for --simulated."""


class Bench:
    """What stages share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.simulated = bool(options.simulated)
        self.gpu: Gpu = SimulatedGpu() if self.simulated else find_gpu(options.device)
        self.sizes: Any = SimpleNamespace(**{name: pair[self.simulated] for name, pair in SIZES.items()})
        self.material: Material = read_material(options.lookahead_data) if options.lookahead_data else make_material()
        self.ends_s: float = time.monotonic() + 60 * options.minutes
        self.stage_ends_s: float = self.ends_s

    @property
    def late(self) -> bool:
        """Whether the stage should come to its end."""
        return time.monotonic() > self.stage_ends_s

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.gpu.device.type == "cuda":
            torch.cuda.synchronize(self.gpu.device)

    @contextlib.contextmanager
    def locked(self, block: Block) -> Iterator[torch.Tensor]:
        """The block as a tensor, page-locked as long."""
        refused = self.gpu.lock(block.memory)
        if refused:
            raise ResourceError(
                f"{format_bytes(len(block.memory))} cannot be page-locked: {refused}.",
                remedy="Raise the limit of locked memory.",
            )
        try:
            yield torch.from_numpy(block.memory)
        finally:
            self.gpu.unlock(block.memory)

    @cached_property
    def llm(self) -> Llm:
        """The model, loaded when first asked for and before the arena takes its memory."""
        options = self.options
        return Llm(options.model, options.random_model, options.n_gpu_layers, self.gpu.device.index)


class Llm:
    """A llama.cpp model that writes so many tokens, whatever they are."""

    def __init__(self, model: str | None, random_size: str | None, gpu_layers: int | None, gpu: int | None) -> None:
        import llama_cpp

        from telerag_cli.llm.llama_model import LlamaModel
        from telerag_cli.llm.llamacpp import LlamaCpp

        path = resolve_model(model, None)
        if gpu_layers is None:
            gpu_layers = -1 if gpu is not None and llama_cpp.llama_supports_gpu_offload() else 0
        with contextlib.ExitStack() as undo:
            if random_size:
                from make_random_model import make

                made = Path(undo.enter_context(tempfile.TemporaryDirectory())) / f"random {random_size} q4_0.gguf"
                make(path, random_size, "q4_0", 0, made)
                path = made
            weights = LlamaModel(path, gpu_layers=gpu_layers, gpu=gpu)
            self._files = undo.pop_all()
        self.name = f"{weights.name} with {'all' if gpu_layers < 0 else gpu_layers} layers on the GPU"
        self._generator = LlamaCpp(weights, context_tokens=2048)
        self._runner = asyncio.Runner()

    def write(self, prompt: str, tokens: int, on_count: Callable[[int], None] = lambda _count: None) -> float:
        """Seconds of decoding ``tokens`` after the first one; a prompt is computed anew each time."""
        from telerag_cli.llm.base import Message, Request

        self._generator.forget()
        request = Request([Message("user", prompt)], tokens, ignore_eos=True)
        written = self._runner.run(self._generator.generate(request, lambda _text, count: on_count(count)))
        return written.decode_s

    def close(self) -> None:
        """Free it."""
        self._generator.close()
        self._runner.close()
        self._files.close()


def nbytes(text: str) -> int:
    """A size such as 8GiB, for argparse."""
    try:
        return parse_bytes(text)
    except TeleragError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main() -> None:
    """Run the stages, write after each, print the table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(STAGES), help="some of them, with commas between")
    parser.add_argument("--simulated", action="store_true", help="the processor in the GPU's place, and small")
    parser.add_argument("--device", default="auto", help="cuda:N [default: the first]")
    parser.add_argument("--bytes", type=nbytes, help="of the datastore [default: 60 GB, or half of the free memory]")
    parser.add_argument("--arena", type=nbytes, help="bytes of it [default: a quarter of the datastore]")
    parser.add_argument("--nprobe", type=int, help="[default: a sixteenth of the lists]")
    parser.add_argument(
        "--storage", choices=[Storage.FLOAT32.value, Storage.FLOAT16.value], default=Storage.FLOAT32.value
    )
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="stages are cut short to end in so many [default: 7]"
    )
    parser.add_argument("--lookahead-data", type=Path, help="folder of recorded embeddings [default: random ones]")
    parser.add_argument("--model", help="GGUF file [default: the bundled model]")
    parser.add_argument("--random-model", metavar="SIZE", help="random weights in the GGUF file's place, such as 8B")
    parser.add_argument("--n-gpu-layers", type=int, help="of the model on the GPU [default: all, if llama.cpp can]")
    parser.add_argument("-o", "--output", type=Path, help="[default: in benchmarks/results, named by the GPU]")
    options = parser.parse_args()
    chosen = options.stages.split(",")
    if unknown := [name for name in chosen if name not in STAGES]:
        parser.error(f"there is no stage '{unknown[0]}'; the stages are {', '.join(STAGES)}")
    if options.random_model:
        from make_random_model import SHAPES

        if options.random_model not in SHAPES:
            parser.error(f"there is no model of the size '{options.random_model}'; the sizes are {', '.join(SHAPES)}")
    try:
        if {"end-to-end", "interference"} & set(chosen):  # rather now than after minutes
            resolve_model(options.model, None)
        bench = Bench(options)
    except TeleragError as error:
        sys.exit(f"error: {error}")
    output = options.output
    if output is None and not options.simulated:
        name = "".join(letter if letter.isalnum() else "_" for letter in bench.gpu.name.lower())
        output = Path(__file__).parent.parent / "benchmarks" / "results" / f"gpu_check_{name}.json"
    watchdog = threading.Timer(60 * options.minutes + 50, _hung)
    watchdog.daemon = True
    watchdog.start()

    stages: dict[str, dict[str, Any]] = {}
    found: list[Outcome] = []
    failed = False
    for place, name in enumerate(chosen):
        run, share = STAGES[name]
        left_s = max(0.0, bench.ends_s - time.monotonic())
        bench.stage_ends_s = time.monotonic() + left_s * share / sum(STAGES[each][1] for each in chosen[place:])
        print(f"{name} ...", file=sys.stderr, flush=True)
        began_s = time.monotonic()
        try:
            outcome = run(bench)
            stages[name] = {"wrong": outcome.wrong, **outcome.raw}
            failed |= outcome.wrong
        except Exception as error:
            traceback.print_exc()
            stages[name] = {"error": f"{type(error).__name__}: {error}"}
            outcome = Outcome(rows=[Row(name, f"failed: {stages[name]['error'].splitlines()[0]}", good=False)])
            failed = True
        found.append(outcome)
        stages[name]["seconds"] = round(time.monotonic() - began_s, 1)
        print(f"{name}: {stages[name]['seconds']} s", file=sys.stderr, flush=True)
        if output:
            _write(output, bench, stages, found)
    if "llm" in vars(bench):
        bench.llm.close()
    watchdog.cancel()
    print_table(found)
    if output:
        print(output)
    sys.exit(1 if failed else 0)


def _hung() -> None:
    print("error: a stage did not come back; what the others found was written.", file=sys.stderr, flush=True)
    os._exit(HUNG)


def _write(output: Path, bench: Bench, stages: dict[str, Any], found: Sequence[Outcome]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    about = {"command": shlex.join(["python", *sys.argv]), "hardware": hardware(), "gpu": bench.gpu.name}
    figures = []
    for outcome in found if not bench.simulated else ():  # a simulation is not a figure
        for row in outcome.rows:
            what = f"{row.what}, {outcome.setting}" if outcome.setting else row.what
            figures.append({"what": what, "value": row.value, "against": row.against, "goal": row.goal})
    kept = {"figures": figures} if figures else {}
    write_json(output, about | {"simulated": bench.simulated, "stages": stages, **kept})


def print_table(found: Sequence[Outcome]) -> None:
    """A line or two for each figure."""
    for outcome in found:
        if outcome.setting:
            print(f"     {outcome.setting}:")
        for row in outcome.rows:
            mark = {True: "ok", False: "MISS", None: ""}[row.good]
            goal = f" [{row.goal}]" if row.goal else ""
            print(f"{mark:4} {row.what}: {row.value}{goal}")
            if row.against:
                print(f"         against {row.against}")


if __name__ == "__main__":
    main()
