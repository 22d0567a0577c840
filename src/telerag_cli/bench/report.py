"""Reports of benchmarks: from a folder of results to a summary, plots and a page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from telerag_cli.bench import plots, tables
from telerag_cli.bench.drawings import drawings_of, slots
from telerag_cli.bench.markdown import markdown
from telerag_cli.bench.page import page
from telerag_cli.bench.results import load_all
from telerag_cli.errors import ResourceError
from telerag_cli.files import wrap_os_error, writing

SUMMARY, PAGE = "report.md", "report.html"


def write(folder: Path, output: Path, advance: Callable[[int], None] = lambda _count: None) -> list[Path]:
    """Write `SUMMARY`, `PAGE` and a PNG for each plot; what else is in ``output`` stays.

    Args:
        folder: with results; see `load_all`.
        output: a folder, made if there is none.
        advance: called with the number of files written since the last call.

    Returns:
        What was written: the page, the summary, the plots.

    Raises:
        ArtifactError: the folder has no result, or one of them is damaged.
        ResourceError: the output cannot be written.
    """
    results = tables.ordered(load_all(folder))
    of_systems = slots(results.values())
    drawings = {stem: drawings_of(result, of_systems) for stem, result in results.items()}
    named = {stem: [(drawing, f"{stem}-{drawing.name}.png") for drawing in these] for stem, these in drawings.items()}
    _make(output)
    written = []
    for drawing, name in (each for these in named.values() for each in these):
        plots.save(drawing, output / name)
        written.append(output / name)
        advance(1)
    # The pages come last, so that they name no plot that is not there.
    for name, text in ((SUMMARY, markdown(results, named)), (PAGE, page(results, drawings))):
        with writing(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        written.append(output / name)
        advance(1)
    return written[:-3:-1] + written[:-2]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ResourceError(
            f"{folder} is a file, and a report is a folder of files.", remedy="Name another with -o."
        ) from error
    except OSError as error:
        raise wrap_os_error(error, folder) from error
