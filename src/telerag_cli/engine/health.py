"""What could keep telerag from working here, found by looking: installations, devices, memory, disk, models."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from telerag_cli import __version__
from telerag_cli.config import DEFAULT_EMBEDDER, DEFAULT_GENERATOR, format_bytes
from telerag_cli.errors import TeleragError

FEWEST_BYTES = 2 << 30
"""Of memory with which the bundled models and the default arena fit."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    value: str
    trouble: str | None = None
    mend: str | None = None
    """The command, or what to do."""
    fatal: bool = False
    """Whether embed, build-index and run with their defaults cannot work."""


@dataclass(frozen=True)
class Looked:
    """What to look at, where it can be chosen."""

    folder: Path
    """An index, or a folder to work in."""
    model: str | None = None
    hf_repo: str | None = None
    embedder: str | None = None


def examine(looked: Looked) -> Iterator[Finding]:
    """All findings, in the order in which they depend on each other. Whatever a library does when it is imported is a finding."""
    yield Finding("telerag", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    for check in (_torch, _faiss, _llama):
        yield _guarded(check)
    for module, package in (("sentence_transformers", "sentence-transformers"), ("pyarrow", "pyarrow")):
        yield _guarded(lambda module=module, package=package: _imported(module, package), package)  # type: ignore[misc]
    yield _optional("triton", "the scoring kernel of the cuda tier")
    yield _optional("ray", "several processes or machines")
    yield from _gpus()
    yield _cores_and_memory()
    yield from _locked_memory()
    yield from _disk(looked.folder)
    yield _guarded(lambda: _embedder(looked.embedder), "embedder")
    yield _guarded(lambda: _generator(looked.model, looked.hf_repo), "LLM")
    offline = (
        "offline" if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on") else "online"
    )
    yield Finding(
        "Hugging Face", f"{os.environ.get('HF_HOME') or Path.home() / '.cache' / 'huggingface'}, {offline}"
    )


def _guarded(check: Callable[[], Finding], name: str | None = None) -> Finding:
    name = name or check.__name__.strip("_")
    try:
        return check()
    except TeleragError as error:
        return Finding(name, "not usable", error.message.rstrip("."), error.remedy, fatal=True)
    except Exception as error:  # a broken installation raises anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        package = {"faiss": "faiss-cpu", "llama": "llama-cpp-python"}.get(name, name)
        return Finding(
            name,
            "broken",
            f"it cannot be imported: {reason}",
            f"pip install --force-reinstall {package}",
            fatal=True,
        )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _imported(module: str, package: str) -> Finding:
    if importlib.util.find_spec(module) is None:
        return Finding(package, "missing", "it is not installed", f"pip install {package}", fatal=True)
    importlib.import_module(module)
    return Finding(package, _version(package) or "of no known version")


def _optional(module: str, what_for: str) -> Finding:
    version = _version(module)
    return Finding(module, version or f"not installed; it is for {what_for}")


def _torch() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("torch", "missing", "it is not installed", "pip install torch", fatal=True)
    import torch

    if torch.version.cuda is None:
        return Finding("torch", f"{torch.__version__}, built without CUDA")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    value = f"{torch.__version__}, built for CUDA {torch.version.cuda}, finds {found} GPUs"
    if not found and _driver() is not None:
        return Finding("torch", value, "there is a GPU and its driver, and torch finds none",
                       "nvidia-smi, and a torch for the driver's CUDA: pip install --force-reinstall torch")  # fmt: skip
    return Finding("torch", value)


def _faiss() -> Finding:
    installed = [f"{name} {version}" for name in ("faiss-cpu", "faiss-gpu") if (version := _version(name))]
    value = " and ".join(installed) or "of no known package"
    if importlib.util.find_spec("faiss") is None:
        mend = "pip install faiss-cpu"
        if installed:
            return Finding("faiss", value, f"{value} is installed without its module", f"{mend} --force-reinstall", fatal=True)  # fmt: skip
        return Finding("faiss", "missing", "it is not installed", mend, fatal=True)
    import faiss

    for needed in ("IndexIVFFlat", "IndexIVFScalarQuantizer", "OnDiskInvertedLists"):
        if not hasattr(faiss, needed):
            raise ImportError(f"the module at {getattr(faiss, '__file__', '?')} has no {needed}")
    gpus = f", {faiss.get_num_gpus()} GPUs" if hasattr(faiss, "get_num_gpus") else ""
    if len(installed) > 1:
        return Finding("faiss", value + gpus, "both install the same module, and one has overwritten the other",
                       "pip uninstall -y faiss-cpu faiss-gpu && pip install faiss-cpu")  # fmt: skip
    return Finding("faiss", value + gpus)


def _llama() -> Finding:
    if importlib.util.find_spec("llama_cpp") is None:
        return Finding(
            "llama-cpp-python", "missing", "it is not installed", "pip install llama-cpp-python", fatal=True
        )
    import llama_cpp

    offloads = bool(llama_cpp.llama_supports_gpu_offload())
    value = f"{_version('llama-cpp-python')}, {'can' if offloads else 'cannot'} put layers on a GPU"
    if not offloads and _driver() is not None:
        return Finding("llama-cpp-python", value, "there is a GPU, and it was built without it",
                       "CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-binary :all: llama-cpp-python")  # fmt: skip
    return Finding("llama-cpp-python", value)


def _driver() -> str | None:
    """The version of NVIDIA's driver, if there is one."""
    return next((finding.value for finding in _gpus() if finding.name == "driver"), None)


def _gpus() -> Iterator[Finding]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no library, no driver, or one that does not answer
        yield Finding("GPU", "none that a driver tells of")
        return
    try:
        yield Finding("driver", _text(pynvml.nvmlSystemGetDriverVersion()))
        for number in range(pynvml.nvmlDeviceGetCount()):
            gpu = pynvml.nvmlDeviceGetHandleByIndex(number)
            memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
            slot = f"PCIe {pynvml.nvmlDeviceGetMaxPcieLinkGeneration(gpu)} x{pynvml.nvmlDeviceGetMaxPcieLinkWidth(gpu)}"
            yield Finding(f"GPU {number}", f"{_text(pynvml.nvmlDeviceGetName(gpu))}, {format_bytes(memory.free)} of "
                          f"{format_bytes(memory.total)} free, {slot}")  # fmt: skip
    except pynvml.NVMLError as error:
        yield Finding("GPU", "unknown", f"the driver refuses to tell of it: {error}", "nvidia-smi")
    finally:
        pynvml.nvmlShutdown()


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _cores_and_memory() -> Finding:
    from telerag_cli.tiers.transport import available_bytes

    total, free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), available_bytes()
    value = f"{len(os.sched_getaffinity(0))} cores, {format_bytes(free)} of {format_bytes(total)} available"
    if free < FEWEST_BYTES:
        return Finding("memory", value, f"the bundled models and the default arena take about {format_bytes(FEWEST_BYTES)}",
                       "end other programs, or give run --fast-memory 64MiB --concurrency 1")  # fmt: skip
    return Finding("memory", value)


def _locked_memory() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = " of at most ".join(
        "unlimited" if each == resource.RLIM_INFINITY else format_bytes(each) for each in (soft, hard)
    )
    if soft == resource.RLIM_INFINITY or _driver() is None:
        yield Finding("locked memory", shown)
        return
    trouble = "an index beyond this is not page-locked, and its lists move at a fraction of the link's speed"
    yield Finding("locked memory", shown, trouble, "ulimit -l unlimited")


def _disk(folder: Path) -> Iterator[Finding]:
    from telerag_cli.tiers.transport import reads_directly

    lists = folder / "lists.bin"
    where = folder if folder.is_dir() else folder.parent
    try:
        free = shutil.disk_usage(where).free
        direct = reads_directly(lists if lists.exists() else where)
    except (OSError, TeleragError) as error:
        yield Finding("disk", str(folder), f"it cannot be used: {error}", "name another folder")
        return
    value = f"{where}: {format_bytes(free)} free, {_file_system(where)}, {'with' if direct else 'without'} O_DIRECT"
    if direct:
        yield Finding("disk", value)
    else:
        yield Finding("disk", value, "lists are read through the page cache, which is slower and takes the processor from the LLM",
                      "move the index to ext4, xfs or another file system on a disk: mv INDEX /another/disk/")  # fmt: skip


def _file_system(folder: Path) -> str:
    """The type of the file system that a folder is on, as the kernel mounts it."""
    found, longest = "of an unknown type", -1
    try:
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
            before, _, after = line.partition(" - ")
            place = before.split()[4]
            if folder.resolve().is_relative_to(place) and len(place) >= longest:
                found, longest = after.split()[0], len(place)
    except (OSError, IndexError):
        return found
    return found


def _embedder(name: str | None) -> Finding:
    from telerag_cli.embedding.encoder import model_path

    wanted = name or DEFAULT_EMBEDDER
    path = model_path(wanted)
    if path == wanted and not Path(path).exists():
        return Finding("embedder", f"{wanted}, which is fetched from Hugging Face when it is needed")
    return Finding("embedder", wanted)


def _generator(model: str | None, hf_repo: str | None) -> Finding:
    from telerag_cli.generation.models import resolve_model

    if hf_repo is not None:
        return Finding("LLM", f"{hf_repo}, which is fetched from Hugging Face when it is needed")
    path = resolve_model(model, None)
    return Finding("LLM", f"{model or DEFAULT_GENERATOR}, {format_bytes(path.stat().st_size)}")
