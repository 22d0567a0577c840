"""The pipelines by name: the one place to register a new one."""

from __future__ import annotations

from enum import StrEnum

from telerag_cli.pipelines.base import Pipeline
from telerag_cli.pipelines.hyde import hyde
from telerag_cli.pipelines.naive import naive


class PipelineName(StrEnum):
    """What ``--pipeline`` may say."""

    NAIVE = "naive"
    HYDE = "hyde"


PIPELINES: dict[PipelineName, Pipeline] = {PipelineName.NAIVE: naive, PipelineName.HYDE: hyde}
