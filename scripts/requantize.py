"""Give a GGUF model weights of another type, to see what the type does.

Precision that the file has lost stays lost, so for answers get a file that was made from the original weights.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from pathlib import Path

import llama_cpp

from telerag_cli.files import writing
from telerag_cli.llm.models import resolve_model

TYPES: dict[str, int] = {
    name.removeprefix("LLAMA_FTYPE_MOSTLY_"): number
    for name, number in vars(llama_cpp).items()
    if name.startswith("LLAMA_FTYPE_MOSTLY_")
}
"""llama.cpp's numbers for types of weights."""


def requantize(source: Path, weights: str, target: Path) -> None:
    """Write the model anew with weights of a type in `TYPES`; it appears whole or not at all."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = TYPES[weights]
    settings.allow_requantize = True
    target.parent.mkdir(parents=True, exist_ok=True)
    with writing(target) as partial:
        status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(partial), ctypes.byref(settings))
        if status:
            sys.exit(f"error: llama.cpp cannot make {weights} of {source} (status {status}).")


def main() -> None:
    """Read arguments, convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a GGUF file; by default the bundled model")
    parser.add_argument("weights", choices=sorted(TYPES), metavar="TYPE", help="such as Q8_0")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    requantize(resolve_model(options.model, None), options.weights, options.output)


if __name__ == "__main__":
    main()
