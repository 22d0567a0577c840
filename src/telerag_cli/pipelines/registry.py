"""The pipelines by name: the one place to register a new one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from typing import Any

from telerag_cli.errors import UsageError
from telerag_cli.pipelines.base import Pipeline
from telerag_cli.pipelines.flare import flare
from telerag_cli.pipelines.hyde import hyde
from telerag_cli.pipelines.iter_retgen import iter_retgen
from telerag_cli.pipelines.iterative import iterative
from telerag_cli.pipelines.naive import naive
from telerag_cli.pipelines.self_rag import self_rag
from telerag_cli.pipelines.subquestion import subquestion


class PipelineName(StrEnum):
    """What ``--pipeline`` may say."""

    NAIVE = "naive"
    HYDE = "hyde"
    SUBQUESTION = "subquestion"
    ITERATIVE = "iterative"
    ITER_RETGEN = "iter_retgen"
    FLARE = "flare"
    SELF_RAG = "self_rag"

    @property
    def model(self) -> str:
        """The name by which clients of OpenAI's API ask for it."""
        return f"telerag-{self.value}"


PIPELINES: dict[PipelineName, Callable[..., Any]] = {
    PipelineName.NAIVE: naive,
    PipelineName.HYDE: hyde,
    PipelineName.SUBQUESTION: subquestion,
    PipelineName.ITERATIVE: iterative,
    PipelineName.ITER_RETGEN: iter_retgen,
    PipelineName.FLARE: flare,
    PipelineName.SELF_RAG: self_rag,
}
"""Each takes the `Rag` and the question; its keyword-only parameters are its options."""


def options(name: PipelineName) -> dict[str, Any]:
    """A pipeline's options and their defaults."""
    parameters = inspect.signature(PIPELINES[name]).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def make_pipeline(name: PipelineName, **given: Any) -> Pipeline:
    """A pipeline with these options; None means its own default.

    Raises:
        UsageError: the pipeline has no such option.
    """
    chosen = {option: value for option, value in given.items() if value is not None}
    for option in chosen:
        if option not in options(name):
            takers = [other for other in PipelineName if option in options(other)]
            raise UsageError(
                f"--{option.replace('_', '-')} has no part in the pipeline {name}.",
                remedy=f"Leave it out; it is for {' and '.join(takers)}.",
            )
    return partial(PIPELINES[name], **chosen)
