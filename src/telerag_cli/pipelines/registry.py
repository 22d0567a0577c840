"""The pipelines by name: the one place to register a new one."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from telerag_cli.config import PipelineName
from telerag_cli.errors import UsageError
from telerag_cli.pipelines.base import Answer, Pipeline
from telerag_cli.pipelines.flare import flare
from telerag_cli.pipelines.hyde import hyde
from telerag_cli.pipelines.iter_retgen import iter_retgen
from telerag_cli.pipelines.iterative import iterative
from telerag_cli.pipelines.naive import naive
from telerag_cli.pipelines.self_rag import self_rag
from telerag_cli.pipelines.subquestion import subquestion

PIPELINES: dict[PipelineName, Callable[..., Awaitable[Answer]]] = {
    PipelineName(function.__name__): function
    for function in (naive, hyde, subquestion, iterative, iter_retgen, flare, self_rag)
}
"""Each takes the `Rag` and the question; its keyword-only parameters are its options."""


def options(name: PipelineName) -> dict[str, Any]:
    """A pipeline's options and their defaults."""
    parameters = inspect.signature(PIPELINES[name]).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def make_pipeline(name: PipelineName, **given: Any) -> Pipeline:
    """Return a pipeline with these options; None means its own default.

    Raises:
        UsageError: the pipeline has no such option.
    """
    chosen = {option: value for option, value in given.items() if value is not None}
    for option in chosen:
        if option not in options(name):
            takers = [other for other in PipelineName if option in options(other)]
            raise UsageError(
                f"--{option.replace('_', '-')} cannot be combined with --pipeline {name}.",
                remedy=f"Leave it out; it is for {' and '.join(takers)}.",
            )
    return Pipeline(name.value, partial(PIPELINES[name], **chosen))


def make_pipelines(given: Mapping[str, Any]) -> dict[PipelineName, Pipeline]:
    """Return every pipeline, each with those of the options that it has; None means its own default."""
    return {
        name: make_pipeline(name, **{option: given.get(option) for option in options(name)}) for name in PipelineName
    }
