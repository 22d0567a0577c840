"""The processor of this machine: what the system says of it, and how a thread leaves it to others."""

from __future__ import annotations

import contextlib
import os
import platform
import threading
from functools import cache
from pathlib import Path

NATIVE_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags of processors that multiply bfloat16 themselves; emulated, it is slower than float32."""


@cache
def described() -> dict[str, str]:
    """The fields that ``/proc/cpuinfo`` gives for the last core; empty where there is none."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            fields = (line.split(":", 1) for line in lines if ":" in line)
            return {name.strip(): value.strip() for name, value in fields}
    except OSError:
        return {}


def flags() -> set[str]:
    """Instruction sets."""
    found = described()
    return set((found.get("flags") or found.get("Features") or "").split())


def model() -> str:
    """Name, family and model, and the instruction sets that decide how fast we are."""
    found = described()
    name = found.get("model name", platform.processor())
    matter = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags()]
    return f"{name} (family {found.get('cpu family')}, model {found.get('model')}; {', '.join(matter)})"


def computes_bfloat16() -> bool:
    """Whether bfloat16 is arithmetic of the processor itself."""
    return bool(NATIVE_BFLOAT16 & flags())


def give_way(niceness: int) -> None:
    """Let this thread's work yield to that of less nice ones, where the system allows it."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


def spin_at_barriers() -> None:
    """Keep GNU OpenMP's threads from sleeping at barriers that last microseconds, unless the environment says otherwise.

    torch and llama.cpp share one copy of it. As soon as both have threads there are more than cores, and by default it
    then hardly spins any more: the LLM's threads sleep and wake some thousand times a token. ``GOMP_SPINCOUNT`` is the
    default for as many threads as cores, without which ``active`` would spin for minutes. To be called before either is
    loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "active"
        os.environ["GOMP_SPINCOUNT"] = "300000"


def bound_kernel_caches() -> None:
    """Have oneDNN and torch keep few compiled kernels, unless the environment says otherwise: for a process that is to run for long.

    They keep one for every shape that they meet, of each batch of texts, and for a server there is no end of shapes. To
    be called before torch is loaded.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "32")
