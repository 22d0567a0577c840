"""What stands beside every measured figure: the machine, the versions, the command."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any

from telerag_cli import system

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
        "cpu": system.model(),
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
