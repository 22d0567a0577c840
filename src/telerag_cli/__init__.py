"""telerag: retrieval-augmented generation with lookahead over datastores too large for fast memory.

    from telerag_cli import Engine, EngineConfig, build_index, embed

Importing the package loads nothing heavy; each of its names is loaded when it is first used. See docs/library.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from telerag_cli.build_config import BuildConfig, EmbedConfig
    from telerag_cli.config import EngineConfig, ScheduleConfig
    from telerag_cli.embedding.job import embed
    from telerag_cli.engine.engine import AskResult, Delta, Engine
    from telerag_cli.errors import TeleragError
    from telerag_cli.index.build import build_index

__version__ = "0.1.0"
__all__ = [
    "AskResult",
    "BuildConfig",
    "Delta",
    "EmbedConfig",
    "Engine",
    "EngineConfig",
    "ScheduleConfig",
    "TeleragError",
    "build_index",
    "embed",
]

_HOMES = {
    "AskResult": "engine.engine",
    "BuildConfig": "build_config",
    "Delta": "engine.engine",
    "EmbedConfig": "build_config",
    "Engine": "engine.engine",
    "EngineConfig": "config",
    "ScheduleConfig": "config",
    "TeleragError": "errors",
    "build_index": "index.build",
    "embed": "embedding.job",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
