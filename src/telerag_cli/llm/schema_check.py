"""Whether texts can be held to a client's JSON schema, found out in bounded time and memory.

llguidance compiles most schemas in milliseconds, and some that fit in a line in years: it intersects patterns without
counting. A call of native code cannot be ended, so the first look at a schema is in a process of its own.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from telerag_cli.errors import InputError, one_line

MAX_SCHEMA_BYTES = 128 << 10
MAX_SCHEMA_VALUES = 5_000
"""Properties, choices and subschemas together."""
MAX_SCHEMA_DEPTH = 60
MAX_CPU_S = 2
"""Seconds of a core for looking at one schema; one with `MAX_SCHEMA_VALUES` takes less than half a second."""
MAX_CHECK_S = 30.0
"""Seconds that it may take on a machine that is busy with other things."""
MAX_MEMORY_BYTES = 2 << 30
KEPT = 64
"""Latest schemas whose verdicts are remembered: clients send the same one with every request."""
MAX_REASON = 200

_one_at_a_time = threading.Lock()


def check_schema(schema: Mapping[str, Any]) -> None:
    """Check that texts can be held to a schema; this blocks, for `MAX_CHECK_S` at most, and takes one core at most.

    Raises:
        InputError: it is beyond a limit, not a schema, or has a keyword that cannot be kept, which is named.
    """
    for values, (depth, _value) in enumerate(_walk(schema), 1):
        if depth > MAX_SCHEMA_DEPTH or values > MAX_SCHEMA_VALUES:
            raise InputError(
                f"The schema has more than {MAX_SCHEMA_VALUES:,} values or {MAX_SCHEMA_DEPTH} levels.",
                remedy="Make it smaller.",
            )
    text = json.dumps(schema)
    if len(text) > MAX_SCHEMA_BYTES:
        raise InputError(
            f"The schema has {len(text):,} bytes, and at most {MAX_SCHEMA_BYTES:,} can be followed.",
            remedy="Make it smaller.",
        )
    if reason := _reason(text):
        raise InputError(f"The schema cannot be followed: {reason}.", remedy="Leave that out.")


@functools.lru_cache(KEPT)
def _reason(schema: str) -> str:
    """Why a schema cannot be followed; empty if it can."""
    command = [sys.executable, "-m", __name__]
    try:
        with _one_at_a_time:
            looked = subprocess.run(command, input=schema, capture_output=True, text=True, timeout=MAX_CHECK_S)
    except subprocess.TimeoutExpired:  # raised, and so not remembered: another time the machine may be less busy
        raise InputError(
            f"The schema was not checked within {MAX_CHECK_S:g} s, for the machine is busy.", remedy="Try it again."
        ) from None
    if looked.returncode < 0:  # ended by the system: too much time, memory or stack
        return f"it takes more than {MAX_CPU_S} s or {MAX_MEMORY_BYTES >> 30} GiB to compile"
    if looked.returncode:
        raise RuntimeError(looked.stderr)
    return looked.stdout


def _walk(schema: Any) -> Iterator[tuple[int, Any]]:
    """Yield the values of a JSON value with their depths, without recursion."""
    waiting = [(1, schema)]
    while waiting:
        depth, value = waiting.pop()
        yield depth, value
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        waiting += [(depth + 1, each) for each in inner]


def _look(schema: dict[str, Any]) -> str:
    """Return what `_reason` is to; in a process of its own."""
    from jsonschema.exceptions import best_match

    from telerag_cli.llm.constraint import refusal
    from telerag_cli.llm.json_validation import draft_of

    draft = draft_of(schema)
    if wrong := best_match(draft(draft.META_SCHEMA).iter_errors(schema)):
        return f"at {'/'.join(map(str, wrong.absolute_path)) or 'its top'}, {wrong.message}"
    return refusal(schema)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(10)
    sys.stdout.write(one_line(_look(json.load(sys.stdin)), MAX_REASON))
