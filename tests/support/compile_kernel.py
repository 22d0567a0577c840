"""Compile the scoring kernel for a GPU that need not be there, and print what came out as JSON.

A program of its own, because where there is no GPU the tests' process has Triton's interpreter in the compiler's place.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from telerag_cli.tiers.cuda import kernel

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
KINDS = {"float32": ("*fp32", False), "float16": ("*fp16", False), "int8": ("*u8", True)}
ARGUMENTS = {
    "queries": "*fp32",
    "low": "*fp32",
    "step": "*fp32",
    "pairs": "*i64",
    "count": "i32",
    "first_tile_of": "*i64",
    "pair_of_tile": "*i64",
    "bounds": "*fp32",
    "width": "i32",
    "relative": "fp32",
    "absolute": "*fp32",
}


def compiled(capability, dimension, storage, l2):
    vectors, int8 = KINDS[storage]
    constants = {"DIMENSION": dimension, "INT8": int8, "L2": l2, "ROWS": kernel.ROWS, "COLUMNS": kernel.COLUMNS}
    signature = {"vectors": vectors, **ARGUMENTS, **dict.fromkeys(constants, "constexpr")}
    names = kernel._score.arg_names
    assert set(names) == set(signature)
    # What torch allocates begins at multiples of 16 bytes, and Triton is told so at a launch.
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if signature[name].startswith("*")
    }
    source = ASTSource(
        kernel._score,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kernel.OPTIONS)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()

        def read(tool, option):
            command = [TOOLS / tool, option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        used = read("cuobjdump", "--dump-resource-usage")
        code = read("nvdisasm", "-c")
    return {
        "capability": capability,
        "dimension": dimension,
        "storage": storage,
        "l2": l2,
        "registers": int(re.search(r"REG:(\d+)", used)[1]),
        "spilled_bytes": int(re.search(r"STACK:(\d+)", used)[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "loads_of_16_bytes": len(re.findall(r"\bLDG\.E\.128", code)),
    }


cases = itertools.product(map(int, sys.argv[1].split(",")), (384, 130), KINDS, (False, True))
json.dump([compiled(*case) for case in cases], sys.stdout)
