"""What every command shares: errors become one sentence and an exit code, a closed pipe becomes silence."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

import typer

from telerag_cli.cli import console
from telerag_cli.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, InternalError, TeleragError
from telerag_cli.files import wrap_os_error

P = ParamSpec("P")

DEBUG_VARIABLE = "TELERAG_DEBUG"
"""Set by ``telerag --debug``: errors come with their traceback."""


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command so that any error ends in a message and the right exit code, a bug too."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader has what it wanted. Python would complain when it flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(EXIT_OK) from None
        except KeyboardInterrupt:
            console.fail("Interrupted; what was finished is kept.")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except (TeleragError, OSError) as error:
            if os.environ.get(DEBUG_VARIABLE):
                raise
            known = error if isinstance(error, TeleragError) else wrap_os_error(error, Path(error.filename or "stdout"))
            console.fail(str(known))
            raise typer.Exit(known.exit_code) from None
        except Exception as error:
            if isinstance(error, typer.Exit | typer.Abort) or os.environ.get(DEBUG_VARIABLE):
                raise
            console.fail(str(InternalError(error)))
            raise typer.Exit(EXIT_FAILED) from None

    return run
