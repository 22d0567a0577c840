"""What the tier asks of a GPU: memory, page locks, and copies that say when they have ended."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from telerag_cli.arrays import ByteArray
from telerag_cli.errors import ResourceError, UsageError
from telerag_cli.units import format_bytes

PORTABLE = 1
"""``cudaHostRegisterPortable``: locked for every GPU and not only for the one at hand."""


@dataclass(frozen=True)
class Copy:
    """Bytes of host memory and where on the device they go; both uint8 and of one length."""

    source: torch.Tensor
    target: torch.Tensor


class Event(Protocol):
    """A point in a stream."""

    def passed(self) -> bool:
        """Whether all before it has ended; raises ResourceError if that failed."""

    def wait(self) -> None:
        """Wait, without holding the interpreter, until all before it has ended.

        Raises:
            ResourceError: the device failed at it.
        """


class Stream(Protocol):
    """Copies that run in order, beside everything else that the device does."""

    def copy(self, copies: Sequence[Copy]) -> Sequence[Event]:
        """Start copies and return at once, with an event for each; raises ResourceError if the device refused."""

    def close(self) -> None:
        """Wait for what was started; a failure is reported by its event alone."""


class Gpu:
    """A device with memory of its own, through torch. `SimulatedGpu` is another without the device."""

    def __init__(self, number: int) -> None:
        self.device = torch.device("cuda", number)
        self.name = torch.cuda.get_device_name(number)

    def free_bytes(self) -> int:
        """Memory that can be allocated now."""
        torch.cuda.empty_cache()  # what torch keeps for itself is free too
        free: int = torch.cuda.mem_get_info(self.device)[0]
        return free

    def allocate(self, nbytes: int, option: str) -> torch.Tensor:
        """One block of uint8; ``option`` is what a user would change if it does not fit.

        Raises:
            ResourceError: it does not fit.
        """
        free = self.free_bytes()
        try:
            if nbytes > free:
                raise torch.OutOfMemoryError
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"{format_bytes(nbytes)} do not fit {self.name}, where {format_bytes(free)} are free.",
                remedy=f"Choose a smaller {option}.",
            ) from error

    def lock(self, memory: ByteArray) -> str | None:
        """Page-lock host memory so that the device reads it directly; the reason if that is refused, else None."""
        with torch.cuda.device(self.device):
            status = _cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, PORTABLE)
        if int(status) == 0:
            return None
        # The refusal stays behind as the thread's last error, and the next launch would report it as its own.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self.device)
        return str(_cudart().cudaGetErrorString(status))

    def unlock(self, memory: ByteArray) -> None:
        """Undo `lock`."""
        _cudart().cudaHostUnregister(memory.ctypes.data)

    def stream(self) -> Stream:
        """A stream of its own for copies."""
        return _CudaStream(self.device)

    def working(self) -> contextlib.AbstractContextManager[None]:
        """Around work on the device: its failures become ResourceError."""
        return translated("scoring")


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Say what the device was doing when torch gave up on it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"The GPU ran out of memory while {doing}.", remedy="Lower --gpu-memory.") from error
    except RuntimeError as error:  # torch's class for what CUDA reports
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ResourceError(
            f"The GPU failed while {doing}: {reason}.", remedy="Use --tier host if it goes on."
        ) from error


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class _CudaEvent:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        # Blocking: the thread sleeps until the driver wakes it, and takes no core from the LLM.
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def passed(self) -> bool:
        with translated("moving lists"):
            return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        with translated("moving lists"):
            self._event.synchronize()


class _CudaStream:
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, copies: Sequence[Copy]) -> list[Event]:
        events: list[Event] = []
        with translated("moving lists"), torch.cuda.stream(self._stream):
            for each in copies:
                each.target.copy_(each.source, non_blocking=True)
                events.append(_CudaEvent(self._stream))
        return events

    def close(self) -> None:
        # A device that was lost refuses this too, and then nothing is under way.
        with contextlib.suppress(ResourceError), translated("moving lists"):
            self._stream.synchronize()


def gpu_number(device: str) -> int | None:
    """The N of ``cuda:N``, 0 for ``cuda``, None for ``auto``; raises UsageError if it is none of these."""
    if device == "auto":
        return None
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if not match:
        raise UsageError(
            f"--device is '{device}', which names no GPU.", remedy="Write cuda:0 or auto, or use --tier host."
        )
    return int(match[1] or 0)


def find_gpu(device: str) -> Gpu:
    """The GPU that ``auto``, ``cuda`` or ``cuda:N`` means.

    Raises:
        UsageError: the name is none of these.
        ResourceError: it is not there; says what was found.
    """
    number = gpu_number(device) or 0
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number >= count:
        build = f"torch {torch.__version__}" + ("" if torch.version.cuda else ", a build without CUDA,")
        found = f"{count} GPUs" if count else "no GPU"
        raise ResourceError(
            f"GPU {number} was asked for, and {build} finds {found}.",
            remedy="Use --tier host, or install the driver and a torch with CUDA.",
        )
    return Gpu(number)
