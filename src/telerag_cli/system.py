"""This machine: what the system says of its processor and memory, and how threads share the processor."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

NATIVE_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags of processors that multiply bfloat16 themselves; emulated, it is slower than float32."""
PACKAGES = (
    "telerag-cli",
    "torch",
    "sentence-transformers",
    "faiss-cpu",
    "faiss-gpu",
    "triton",
    "llama-cpp-python",
    "numpy",
    "pyarrow",
)
"""Packages whose versions stand beside every measured figure."""

UNLIMITED_BYTES = 1 << 60
"""A control group's limit from here on is none."""


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


def available_bytes() -> int:
    """Memory that can be had without swapping, in bytes, as the kernel and this process's control groups see it."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, StopIteration, ValueError), Path("/proc/meminfo").open(encoding="utf-8") as lines:
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return max(0, min([available, *(limit - used for limit, used in _memory_limits())]))


def memory_limit_bytes() -> int | None:
    """The least limit on memory of this process's control groups, in bytes; None if there is none."""
    return min((limit for limit, _used in _memory_limits()), default=None)


def hardware() -> dict[str, Any]:
    """What stands beside every measured figure: processor, usable cores, memory in bytes, GPUs, system and versions.

    GPUs are listed only if torch is already loaded.
    """
    from importlib import metadata  # takes 20 ms, which no `--help` should

    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    torch = sys.modules.get("torch")
    return {
        "cpu": model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in range(torch.cuda.device_count())] if torch else [],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def give_way(niceness: int) -> None:
    """Let this thread's work yield to that of less nice ones, where the system allows it."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


def spin_at_barriers() -> None:
    """Keep GNU OpenMP's threads from sleeping at short barriers, unless the environment says otherwise.

    torch and llama.cpp share one copy of it. As soon as both have threads there are more than cores, and by default it
    then hardly spins any more: the LLM's threads sleep and wake some thousand times a token. ``GOMP_SPINCOUNT`` is the
    default for as many threads as cores, without which ``active`` would spin for minutes. To be called before either is
    loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "active"
        os.environ["GOMP_SPINCOUNT"] = "300000"


def bound_kernel_caches() -> None:
    """Have oneDNN and torch keep few compiled kernels, unless the environment says otherwise; for servers.

    They keep one for every shape that they meet, of each batch of texts, and for a server there is no end of shapes. To
    be called before torch is loaded.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "32")


def _memory_limits() -> Iterator[tuple[int, int]]:
    """(limit, use) in bytes of each control group with a limit that holds this process; file cache is no use."""
    root = Path("/sys/fs/cgroup")
    groups: list[str] = []
    with contextlib.suppress(OSError):
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    for _number, controllers, group in (line.split(":", 2) for line in groups):
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit_name, use_name, cache_name = names if controllers else ("memory.max", "memory.current", "inactive_file")
        for folder in {top, top / group.lstrip("/")}:
            with contextlib.suppress(OSError, ValueError):  # none there, or "max"
                limit = int((folder / limit_name).read_text())
                if limit < UNLIMITED_BYTES:
                    figures = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    yield limit, int((folder / use_name).read_text()) - int(figures.get(cache_name, 0))
