"""How reports write the names and numbers of a result."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from telerag_cli.units import format_bytes

NONE = "\N{EN DASH}"
"""Stands for a figure that was not measured."""

_STATISTIC = re.compile(r"(mean|median|std|min|max|p\d+(?:\.\d+)?)_(.+)")
_QUANTITIES = {
    "e2el": "end to end",
    "ttft": "first token",
    "request_throughput": "requests/s",
    "output_throughput": "output tokens/s",
    "duration": "duration (s)",
    "stage": "time by stage",
    "wall": "wall time",
    "nprobe": "lists probed (nprobe)",
    "budget": "bytes moved, in multiples of the probed bytes",
    "batch_size": "batch size",
    "cache_fraction": "cache, as a share of fast memory",
    "speedup": "speed-up over one replica",
    "efficiency_share": "efficiency against one replica",
    "skew": "skew (Zipf exponent)",
}
_UNITS = {"_bytes_per_s": "B/s", "_per_s": "1/s", "_ms": "ms", "_s": "s"}


def number(value: object) -> float | None:
    """Return a finite number as a float, and None for anything else, booleans included."""
    is_finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_finite else None  # type: ignore[arg-type]


def statistic(name: str) -> tuple[str, str]:
    """Split ``p99_e2el_ms`` into ``("p99", "e2el_ms")``; the first part is empty where a name has none."""
    found = _STATISTIC.fullmatch(name)
    return (found[1], found[2]) if found else ("", name)


def label(name: str) -> str:
    """Return a field's name in words: ``end to end, median (ms)`` for ``median_e2el_ms``."""
    if name in _QUANTITIES:
        return _QUANTITIES[name]
    which, quantity = statistic(name)
    quantity = quantity.removesuffix("_bytes") or quantity
    unit = next((ending for ending in _UNITS if quantity.endswith(ending)), "")
    stem = quantity.removesuffix(unit)
    words = _QUANTITIES.get(stem, stem.replace("_", " ").strip() or quantity)
    return words + (f", {which}" if which else "") + (f" ({_UNITS[unit]})" if unit else "")


def is_bytes(name: str) -> bool:
    """Tell whether a field is a number of bytes."""
    name = name.rpartition(".")[2]
    return name == "bytes" or name.endswith("_bytes") or (name.startswith("bytes_") and not name.endswith("_per_s"))


def is_time(name: str) -> bool:
    """Tell whether a field is a duration, so that less is better."""
    return name == "duration" or (name.endswith(("_ms", "_s")) and not name.endswith("_per_s"))


def is_share(name: str) -> bool:
    """Tell whether a field is a share of a whole, 0 to 1."""
    return name.endswith("_share")


def short(name: str, value: object) -> str:
    """Write a figure with four digits, a share in per cent, bytes with their unit."""
    if (figure := number(value)) is None:
        return plain(value)
    if is_bytes(name):
        return format_bytes(figure)
    if is_share(name):
        return f"{100 * figure:.1f} %"
    return plain(value) if isinstance(value, int) else digits(figure, 4)


def column(name: str, values: Sequence[object]) -> list[str]:
    """Write figures that stand below each other like `short`, all with the same number of decimal places.

    The places give the largest figure four digits and the smallest two.
    """
    figures = [abs(figure) for value in values if (figure := number(value))]
    whole = all(isinstance(value, int) for value in values if number(value) is not None)
    if not figures or whole or is_bytes(name) or is_share(name):
        return [short(name, value) for value in values]
    places = max(3 - math.floor(math.log10(max(figures))), 1 - math.floor(math.log10(min(figures))), 0)
    return [plain(value) if number(value) is None else f"{value:,.{min(places, 6)}f}" for value in values]


def digits(figure: float, count: int) -> str:
    """Write a figure with so many significant digits, and all digits of its whole part."""
    if figure == 0:
        return "0"
    places = count - 1 - math.floor(math.log10(abs(figure)))
    if places > count + 4:
        return f"{figure:.{count - 1}e}"
    text = f"{figure:,.{max(places, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def times(ratio: float) -> str:
    """Write a ratio with three digits: ``1.50``, ``12.3``."""
    return f"{ratio:,.{max(0, min(4, 2 - math.floor(math.log10(ratio))))}f}" if ratio > 0 else plain(ratio)


def plain(value: object) -> str:
    """Write any value: whole numbers in full, others with six digits, `NONE` for what is missing."""
    match value:
        case None:
            return NONE
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return "inf" if value == math.inf else digits(value, 6) if math.isfinite(value) else NONE
        case list() | tuple():
            return ", ".join(plain(each) for each in value) or "none"
        case dict():
            return ", ".join(f"{name} {plain(each)}" for name, each in value.items()) or "none"
    return str(value)


def duration(seconds: float) -> str:
    """Write seconds as ``2 h 5 min``, ``3 min 20 s`` or ``4.2 s``."""
    if seconds < 60:
        return f"{plain(round(seconds, 1))} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one with dotted names; empty tables stay, so that nothing is lost."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def described(values: Mapping[str, Any]) -> list[list[str]]:
    """Return names and values of nested tables in words; bytes with their unit and in full."""
    rows = []
    for name, value in flattened(values).items():
        text = plain(value)
        if is_bytes(name) and (figure := number(value)) is not None:
            text = f"{format_bytes(figure)} ({text})"
        elif isinstance(value, int) and value < 10_000:
            text = text.replace(",", "")
        rows.append([name, text])
    return rows
