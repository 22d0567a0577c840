"""Questions to measure with: of a prepared dataset, or of a file."""

from __future__ import annotations

import random
from pathlib import Path

from telerag_cli.datasets.cache import QUESTIONS, Cached, PreparedManifest
from telerag_cli.datasets.catalogue import DatasetKind, describe, names
from telerag_cli.engine.questions import Question, read_questions
from telerag_cli.errors import ArtifactError, InputError, UsageError
from telerag_cli.files import wrap_os_error


def load_questions(
    name_or_path: str | Path, cache_dir: Path | None = None, limit: int | None = None, seed: int = 0
) -> list[Question]:
    """Read the questions of a prepared dataset, or of a file with one question a line, as text or JSON.

    With a ``limit`` so many are sampled without replacement; those of a smaller limit are the first of those of a
    larger one. Datasets are looked for in ``cache_dir``, by default the user's cache.

    Raises:
        ArtifactError: the dataset is not prepared.
        InputError: the file is missing, holds no question, or has a line that is not one.
        UsageError: the dataset has no questions.
    """
    is_name = isinstance(name_or_path, str) and name_or_path in names()
    path = _prepared(str(name_or_path), cache_dir) if is_name else Path(name_or_path)
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
    problem = next((question.problem for question in found if question.problem is not None), None)
    if problem is not None:
        raise InputError(problem, remedy="Correct the line or remove it.")
    if not found:
        raise InputError(f"{path} holds no question.", remedy="Give one a line, or JSON objects with a question.")
    if limit is not None:
        random.Random(seed).shuffle(found)
    return found[:limit]


def _prepared(name: str, cache_dir: Path | None) -> Path:
    dataset = describe(name)
    if dataset.kind is DatasetKind.PASSAGES:
        raise UsageError(f"{name} holds passages and no questions.", remedy="telerag data list shows what has some.")
    cached = Cached.of(dataset, cache_dir)
    if PreparedManifest.load(cached.prepared) is None:
        fetched = all(cached.has(file) for file in dataset.files_of(dataset.split))
        first = "" if fetched else f"{cached.fetch_command(dataset.split)}, then "
        raise ArtifactError(
            f"The questions of {name} are not prepared in {cached.root}.",
            remedy=f"Run {first}telerag data prepare {name}.",
        )
    return cached.prepared / QUESTIONS
