"""Make a GGUF model of the size of a known one, with random weights, to measure the time of an LLM without having it.

It is of the architecture "llama". Tokenizer and chat template, and so the size of the vocabulary, are those of a real
model. It decodes as fast as a real model of its sizes, and what it writes has no meaning. Equal arguments give equal
bytes.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from telerag_cli.errors import ModelError, TeleragError
from telerag_cli.files import check_disk, writing
from telerag_cli.llm.models import resolve_model
from telerag_cli.units import format_bytes

DEVIATION = 0.02
"""Of the weights, around 0: as models begin their training."""
POOL_ROWS = 2**14 - 3
"""Random rows of 1,024 weights that are drawn, and then repeated. A prime, so that the rows of a matrix begin at
different places: with equal rows, tokens would have equal logits."""


@dataclass(frozen=True)
class Shape:
    """A model's sizes. ``tied``: the output layer is the embedding of the tokens."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    tied: bool


SHAPES = {
    "8B": Shape(32, 4096, 32, 8, 14336, tied=False),
    "3B": Shape(28, 3072, 24, 8, 8192, tied=True),
    "1B": Shape(16, 2048, 32, 8, 8192, tied=True),
    "tiny": Shape(2, 64, 4, 2, 128, tied=False),
}
"""Those of Llama 3, and one for tests."""

NORMS = ("attn_norm", "ffn_norm")
"""Of each layer, float32 vectors of the model's width."""
TYPES = {
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "f16": gguf.GGMLQuantizationType.F16,
}


def matrices(shape: Shape, vocabulary: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield names and (rows, columns) of all tensors but the norms."""
    width, kv = shape.width, shape.width // shape.heads * shape.kv_heads
    yield "token_embd", (vocabulary, width)
    if not shape.tied:
        yield "output", (vocabulary, width)
    layer_matrices = {
        "attn_q": (width, width),
        "attn_k": (kv, width),
        "attn_v": (kv, width),
        "attn_output": (width, width),
        "ffn_gate": (shape.ffn, width),
        "ffn_up": (shape.ffn, width),
        "ffn_down": (width, shape.ffn),
    }
    for layer in range(shape.layers):
        for name, matrix in layer_matrices.items():
            yield f"blk.{layer}.{name}", matrix


def add_tokenizer(writer: gguf.GGUFWriter, like: Path) -> int:
    """Copy a model's metadata about its tokenizer and return the number of its tokens; raises ModelError."""
    try:
        fields = gguf.GGUFReader(like).fields
    except (ValueError, IndexError, KeyError) as error:
        raise ModelError(f"{like} is no GGUF file that can be read.", remedy="Check that it is whole.") from error
    for name, field in fields.items():
        if name.startswith("tokenizer."):
            inner = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    if "tokenizer.ggml.tokens" not in fields:
        raise ModelError(f"{like} has no tokens.", remedy="Name a model with a tokenizer.")
    return len(fields["tokenizer.ggml.tokens"].data)


def make(like: Path, size: str, weights: str, seed: int, target: Path) -> int:
    """Write the model, which appears whole or not at all, and return its bytes."""
    shape, kind = SHAPES[size], TYPES[weights]
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_name(f"Random {size} {weights}")
    vocabulary = add_tokenizer(writer, like)
    writer.add_context_length(131072)
    writer.add_block_count(shape.layers)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_rope_freq_base(500000.0)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{weights.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    held = [(name, gguf.quant_shape_to_byte_shape(matrix, kind)) for name, matrix in matrices(shape, vocabulary)]
    for name, matrix in held:
        writer.add_tensor_info(f"{name}.weight", matrix, np.dtype(np.uint8), math.prod(matrix), kind)
    one = np.ones(shape.width, np.float32)
    norms = ["output_norm", *(f"blk.{layer}.{name}" for layer in range(shape.layers) for name in NORMS)]
    for name in norms:
        writer.add_tensor_info(f"{name}.weight", one.shape, one.dtype, one.nbytes)

    target.parent.mkdir(parents=True, exist_ok=True)
    check_disk(target, sum(math.prod(matrix) for _, matrix in held), "Free space or choose another output.")
    drawn = np.random.default_rng(seed).standard_normal((POOL_ROWS, 1024), np.float32) * np.float32(DEVIATION)
    pool = gguf.quantize(drawn, kind).view(np.uint8).ravel()
    with writing(target) as partial:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        begin = 0
        for _, matrix in held:
            # From another place of the pool, so that no layer is like another.
            writer.write_tensor_data(np.resize(np.roll(pool, -begin), math.prod(matrix)))
            begin = (begin + math.prod(matrix)) % len(pool)
        for _ in norms:
            writer.write_tensor_data(one)
        writer.close()
    return target.stat().st_size


def main() -> None:
    """Read arguments, write, say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", help="the GGUF file whose tokenizer is taken; by default the bundled model")
    parser.add_argument("--size", choices=SHAPES, required=True)
    parser.add_argument("--type", choices=TYPES, default="q4_0", help="of the weights [default: q4_0]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    began = time.monotonic()
    try:
        like = resolve_model(options.like, None)
        size = make(like, options.size, options.type, options.seed, options.output)
    except TeleragError as error:
        sys.exit(f"error: {error}")
    print(f"{format_bytes(size)} in {time.monotonic() - began:.1f} s.", file=sys.stderr)
    print(options.output)


if __name__ == "__main__":
    main()
