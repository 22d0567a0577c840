"""What stands beside every measured figure: the machine, the versions, the command."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "telerag-cli",
    "torch",
    "sentence-transformers",
    "faiss-cpu",
    "faiss-gpu",
    "llama-cpp-python",
    "numpy",
    "pyarrow",
)


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, memory in bytes, GPUs if torch is already loaded, system, versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if torch else []
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def record(command: str, **results: Any) -> dict[str, Any]:
    """A result as it goes to ``benchmarks/results``: the command that made it, the hardware, and the figures."""
    return {"command": command, "hardware": hardware(), **results}


def _cpu_model() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            fields = dict(line.split(":", 1) for line in lines if ":" in line)
    except OSError:
        return platform.processor()
    named = {key.strip(): value.strip() for key, value in fields.items()}
    model = named.get("model name", platform.processor())
    instructions = [
        flag
        for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        if flag in named.get("flags", "").split()
    ]
    return (
        f"{model} (family {named.get('cpu family')}, model {named.get('model')}; {', '.join(instructions)})"
    )
