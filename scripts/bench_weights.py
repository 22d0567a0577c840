"""What the type of a model's weights does: the speed of prompts and of answers, and whether neighbours change a text.

The same model with its weights converted, so that only the type differs. llama.cpp multiplies some types in blocks and
others row by row, which is what the speed of prompts depends on, and with it what answering many questions at once gives.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_decode import (
    CONTEXT_TOKENS,
    QUESTIONS,
    close_keeping,
    count_differing,
    decode_rate,
    many,
    reading_rate,
)
from requantize import TYPES, requantize
from telerag_cli.bench_record import record
from telerag_cli.files import write_json
from telerag_cli.generation.llama_model import LlamaDecoder, LlamaModel
from telerag_cli.generation.llamacpp import LlamaCpp
from telerag_cli.generation.models import resolve_model

WIDTH = 16
WIDTHS = (1, 8, WIDTH)
"""Of the comparison of texts."""
DEFAULT_TYPES = ("Q4_0", "Q4_K_M", "Q6_K", "Q8_0", "F16", "BF16")


def measure(path: Path, questions: Sequence[str], tokens: int, repeats: int) -> dict[str, Any]:
    """Speeds of one file, and how many texts change at widths above 1."""
    model = LlamaModel(path)
    generator = LlamaCpp(model, context_tokens=CONTEXT_TOKENS, parallel=WIDTH)
    asked = list(itertools.islice(itertools.cycle(questions), WIDTH))
    rates: dict[str, list[float]] = {"reading": [], "writing_1": [], f"writing_{WIDTH}": []}
    for _ in range(repeats + 1):
        rates["reading"].append(
            generator.between_steps(lambda: reading_rate(model, LlamaDecoder, CONTEXT_TOKENS))
        )
        rates["writing_1"].append(decode_rate(generator, asked[:1], tokens))
        rates[f"writing_{WIDTH}"].append(decode_rate(generator, asked, tokens))
    close_keeping(generator, model)
    differing = count_differing(model, LlamaDecoder, questions, WIDTHS, tokens)
    model.close()
    middle = {f"{name}_tokens_per_s": statistics.median(each[1:]) for name, each in rates.items()}
    return {"bytes": path.stat().st_size, **middle, "differing": differing}


def rows_for_readme(results: Sequence[dict[str, Any]], count: int) -> list[dict[str, str]]:
    """The figures, one type a row."""
    rows = []
    for result in results:
        read, alone, together = (
            result[f"{name}_tokens_per_s"] for name in ("reading", "writing_1", f"writing_{WIDTH}")
        )
        texts = " and ".join(f"{number} of {count}" for number in result["differing"].values())
        rows.append(
            {
                "what": f"{result['weights']} weights, {result['bytes'] / 1e6:.0f} MB: prompts; answers one and {WIDTH} at a time",
                "value": f"{read:.0f}; {alone:.0f}, {together:.0f} tokens/s",
                "against": f"texts that differ from those of width 1, at width 8 and {WIDTH}: {texts}",
            }
        )
    return rows


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="*", default=DEFAULT_TYPES, metavar="TYPE", help="such as Q8_0")
    parser.add_argument("--model", help="a GGUF file; by default the bundled model")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--questions", type=int, default=48, help="texts that are compared")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    if unknown := sorted(set(options.types) - TYPES.keys()):
        parser.error(f"no such type of weights: {', '.join(unknown)}; there are {', '.join(sorted(TYPES))}")

    source = resolve_model(options.model, None)
    questions = many(QUESTIONS.read_text(encoding="utf-8").splitlines(), options.questions)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for weights in ("the file's", *options.types):
            path = source
            if weights in TYPES:
                path = Path(folder) / f"{weights}.gguf"
                requantize(source, weights, path)
            results.append({"weights": weights, **measure(path, questions, options.tokens, options.repeats)})
            print(results[-1])
            if path != source:
                path.unlink()
    if options.output:
        results[0]["weights"] = f"{source.stem}'s"
        write_json(
            options.output,
            record(shlex.join(["python", *sys.argv]), model=source.stem, questions=len(questions),
                   figures=rows_for_readme(results, len(questions)), results=results),
        )  # fmt: skip


if __name__ == "__main__":
    main()
