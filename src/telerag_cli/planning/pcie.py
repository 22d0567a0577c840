"""The slot of a GPU, as its driver tells it: what a measured bandwidth is to be compared with."""

from __future__ import annotations

from telerag_cli.planning.profile import Pcie

GIGABYTES_PER_LANE = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
"""Gigabytes a second in one direction, encoding taken off; source: the PCI Express base specifications."""


def slot_of(number: int) -> Pcie | None:
    """Generation and width of GPU ``number`` as the driver counts them; None without a driver or such a GPU.

    An idle GPU may report a lower generation than it uses under load, so this belongs right after a transfer.
    """
    try:
        import pynvml
    except ModuleNotFoundError:  # it is part of the extra gpu
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        gpu = pynvml.nvmlDeviceGetHandleByIndex(number)
        return Pcie(
            pynvml.nvmlDeviceGetCurrPcieLinkGeneration(gpu),
            pynvml.nvmlDeviceGetCurrPcieLinkWidth(gpu),
            pynvml.nvmlDeviceGetMaxPcieLinkGeneration(gpu),
            pynvml.nvmlDeviceGetMaxPcieLinkWidth(gpu),
        )
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def slot_bytes_per_s(slot: Pcie) -> float | None:
    """What the slot can carry in one direction: ``lanes * rate per lane``; None for a generation unknown here."""
    lane = GIGABYTES_PER_LANE.get(slot.generation)
    return None if lane is None else lane * 1e9 * slot.width
