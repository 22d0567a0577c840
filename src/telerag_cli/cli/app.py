"""The entry point: names the commands and nothing else. Commands import what is heavy when they run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from telerag_cli import __version__
from telerag_cli.cli import bench, data
from telerag_cli.cli.build_index import build_index
from telerag_cli.cli.chat import chat
from telerag_cli.cli.config import apply, config
from telerag_cli.cli.doctor import doctor
from telerag_cli.cli.embed import embed
from telerag_cli.cli.eval import evaluate
from telerag_cli.cli.faiss_files import export_index, import_index
from telerag_cli.cli.guard import DEBUG_VARIABLE, guarded
from telerag_cli.cli.inspect import inspect
from telerag_cli.cli.options import expanded
from telerag_cli.cli.profile import profile
from telerag_cli.cli.quickstart import quickstart
from telerag_cli.cli.run import run
from telerag_cli.cli.search import search
from telerag_cli.cli.serve_local import serve_local
from telerag_cli.cli.settings import wanted
from telerag_cli.system import spin_at_barriers

app = typer.Typer(
    name="telerag",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Retrieval-augmented generation over datastores too large for fast memory: "
    "the index lists a query will need are moved while the LLM is still writing.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"telerag {__version__}")
        raise typer.Exit


def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    settings: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="The settings file.  \\[default: ./telerag.toml, or telerag/telerag.toml in the user's configuration]",
            metavar="FILE",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command."""
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"
    if wanted(os.environ, settings):
        apply(context, settings)


app.callback()(guarded(options))

for command in (
    quickstart,
    expanded(embed),
    expanded(build_index),
    import_index,
    export_index,
    expanded(profile),
    inspect,
    expanded(search),
    expanded(run),
    expanded(chat),
    expanded(serve_local),
    doctor,
    config,
):
    app.command()(guarded(command))
app.command("eval")(guarded(evaluate))
app.add_typer(bench.app)
app.add_typer(data.app)


def main() -> None:
    """Run ``telerag``."""
    spin_at_barriers()
    app()
