"""Choices of ``telerag bench serve``, in vLLM's words; apart, so that its options load nothing heavy."""

from __future__ import annotations

from enum import StrEnum


class Backend(StrEnum):
    """What a server is asked for: ``/completions`` or ``/chat/completions``."""

    COMPLETIONS = "openai"
    CHAT = "openai-chat"

    @property
    def path(self) -> str:
        """Below the root of the API."""
        return "/chat/completions" if self is Backend.CHAT else "/completions"


class DatasetName(StrEnum):
    """Where prompts come from."""

    CUSTOM = "custom"
    SHAREGPT = "sharegpt"
    RANDOM = "random"
