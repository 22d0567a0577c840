"""Where a benchmark's result goes, and what is noted with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from telerag_cli.errors import ResourceError, UsageError


def result_path(folder: Path | None, name: str | None, default: str, *, save: bool = False) -> Path | None:
    """Where the result goes, if anywhere; a folder that cannot be had is found out before measuring and not after it.

    Args:
        folder: ``--result-dir``.
        name: ``--result-filename``.
        default: its name without one.
        save: whether it is kept even if neither says where.

    Raises:
        UsageError: the name is none of a JSON file.
        ResourceError: the folder cannot be made or written.
        ArtifactError: it is below something that is no folder.
    """
    if not (save or folder or name):
        return None
    if name and (Path(name).name != name or not name.endswith(".json")):
        raise UsageError(
            f"--result-filename is '{name}', which is no name of a JSON file.",
            remedy="Write it like before.json, and its folder as --result-dir.",
        )
    path = (folder or Path()) / (name or default)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UsageError(f"--result-dir {folder} is a file and no folder.", remedy="Name another.") from error
    except OSError as error:
        from telerag_cli.files import wrap_os_error

        raise wrap_os_error(error, path.parent) from error
    if not os.access(path.parent, os.W_OK):
        raise ResourceError(f"{path.parent} cannot be written.", remedy="Choose another --result-dir.")
    return path


def metadata_of(given: Sequence[str] | None) -> dict[str, str]:
    """``--metadata KEY=VALUE``, as often as it was given; the last of a key counts.

    Raises:
        UsageError: one is none.
    """
    found = {}
    for entry in given or ():
        key, equals, value = entry.partition("=")
        if not (key and equals):
            raise UsageError(
                f"--metadata is '{entry}', which has no KEY=VALUE.", remedy="Write it like --metadata disk=nvme."
            )
        found[key] = value
    return found
