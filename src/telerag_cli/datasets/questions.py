"""Questions to measure with: of a prepared dataset, or of a file."""

from __future__ import annotations

import random
from pathlib import Path

from telerag_cli.datasets.cache import QUESTIONS, Cached, Manifest
from telerag_cli.datasets.catalogue import Kind, describe, is_dataset
from telerag_cli.engine.questions import Question, read_questions
from telerag_cli.errors import ArtifactError, InputError, UsageError
from telerag_cli.files import wrap_os_error


def load_questions(
    name_or_path: str | Path, cache_dir: Path | None = None, limit: int | None = None, seed: int = 0
) -> list[Question]:
    """Questions of a dataset that was prepared, or of a file with one a line, as text or JSON.

    Args:
        name_or_path: a dataset's name, or a file (a ``Path`` or a text that is no dataset's name).
        cache_dir: below which datasets lie; by default the user's cache.
        limit: as many of them at most, drawn without putting back; fewer if there are no more. Those for a smaller
            limit are the first of those for a larger one.
        seed: of the draw.

    Returns:
        All of them in order, or as many as were drawn, in the order drawn.

    Raises:
        ArtifactError: the dataset is not prepared.
        InputError: the file is missing, holds no question, or has a line that is none.
        UsageError: the dataset has no questions.
    """
    path = _prepared(name_or_path, cache_dir) if _is_name(name_or_path) else Path(name_or_path)
    try:
        with path.open("rb") as lines:
            found = list(read_questions(lines, str(path)))
    except FileNotFoundError as error:
        raise InputError(
            f"{name_or_path} is neither a file nor a dataset.",
            remedy="Check the path; telerag data list shows the datasets.",
        ) from error
    except OSError as error:
        raise wrap_os_error(error, path) from error
    for question in found:
        if question.problem is not None:
            raise InputError(question.problem, remedy="Correct the line or remove it.")
    if not found:
        raise InputError(f"{path} holds no question.", remedy="Give one a line, or JSON objects with a question.")
    if limit is None:
        return found
    random.Random(seed).shuffle(found)
    return found[:limit]


def _is_name(name_or_path: str | Path) -> bool:
    return isinstance(name_or_path, str) and is_dataset(name_or_path)


def _prepared(name: str | Path, cache_dir: Path | None) -> Path:
    dataset = describe(str(name))
    if dataset.kind is Kind.PASSAGES:
        raise UsageError(
            f"{dataset.name} holds passages and no questions.", remedy="telerag data list shows what has questions."
        )
    cached = Cached.of(dataset, cache_dir)
    if Manifest.load(cached.prepared) is None:
        there = all(cached.has(file) for file in dataset.files_of(dataset.split))
        fetch = "" if there else f"{cached.fetching(dataset.split)}, then "
        raise ArtifactError(
            f"The questions of {name} are not prepared in {cached.root}.",
            remedy=f"Run {fetch}telerag data prepare {name}.",
        )
    return cached.prepared / QUESTIONS
