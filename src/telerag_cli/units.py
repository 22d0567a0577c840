"""Sizes as people write them."""

from __future__ import annotations

import re

from telerag_cli.errors import UsageError

_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SIZE = re.compile(r"(?i)^\s*(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b?)?\s*$")


def parse_bytes(text: str) -> int:
    """Bytes in ``512MiB``, ``2GB``, ``1.5g`` or a bare number; ``Ki``/``Mi``/... are powers of 1024.

    Raises:
        UsageError: the text is not a size.
    """
    match = _SIZE.match(text)
    if not match:
        raise UsageError(f"'{text}' is not a size.", remedy="Write it like 512MiB, 2GB or 1073741824.")
    number, unit, binary = match.groups()
    scale = _UNITS[(unit or "").lower()]
    if binary:
        scale = 1024 ** {"k": 1, "m": 2, "g": 3, "t": 4}.get(unit.lower(), 0)
    return int(float(number) * scale)


def format_bytes(count: float) -> str:
    """``1536`` → ``1.5 KiB``; three significant digits, binary units."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.{2 if abs(count) < 10 else 1}f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
