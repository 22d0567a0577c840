"""The program around the commands: help, exit codes, pipes and signals."""

import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from telerag_cli import __version__, errors
from telerag_cli.cli import console
from telerag_cli.cli.app import app
from telerag_cli.cli.guard import DEBUG_VARIABLE, guarded

ROOT = Path(__file__).parents[2]
PROGRAM = typer.main.get_command(app)


@pytest.fixture
def runner():
    return CliRunner(env={"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"})


def program(command):
    """A program of one guarded command beside an idle one, as the real one is made."""
    small = typer.Typer()
    small.command("work")(guarded(command))
    small.command("idle")(lambda: None)
    return small


def failing(error):
    def command() -> None:
        raise error

    return program(command)


def test_help_names_every_command(runner):
    shown = runner.invoke(app, ["--help"])
    assert shown.exit_code == errors.EXIT_OK
    assert [name for name in PROGRAM.commands if not re.search(rf"\b{name}\b", shown.stdout)] == []


@pytest.mark.parametrize("command", PROGRAM.commands)
def test_every_command_and_option_says_what_it_is_for(runner, command):
    assert runner.invoke(app, [command, "--help"]).exit_code == errors.EXIT_OK
    found = PROGRAM.commands[command]
    assert found.help
    for parameter in found.params:
        assert parameter.help or parameter.param_type_name == "argument", f"{command} {parameter.name}"


def test_version_is_the_packages(runner):
    assert runner.invoke(app, ["--version"]).stdout == f"telerag {__version__}\n"
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__


@pytest.mark.parametrize(
    ("arguments", "says"),
    [([], "Usage: telerag"), (["build-indx"], "build-index"), (["run", "--no-such-option"], "--no-such-option")],
)
def test_a_command_line_that_is_not_one_is_a_usage_error(runner, arguments, says):
    shown = runner.invoke(app, arguments)
    assert shown.exit_code == errors.EXIT_USAGE
    assert says in shown.output


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.TeleragError, 1),
        (errors.UsageError, 2),
        (errors.InputError, 1),
        (errors.ArtifactError, 1),
        (errors.ModelError, 1),
        (errors.ResourceError, 1),
    ],
)
def test_an_error_is_one_sentence_and_its_exit_code(runner, kind, code):
    shown = runner.invoke(failing(kind("It has 3 and needs 4.", remedy="Give one more.")), ["work"])
    assert shown.exit_code == code
    assert shown.stderr == "error: It has 3 and needs 4. Give one more.\n"
    assert shown.stdout == ""


def test_debug_shows_the_traceback(runner):
    shown = runner.invoke(failing(errors.InputError("Bad.")), ["work"], env={DEBUG_VARIABLE: "1"})
    assert isinstance(shown.exception, errors.InputError)


def test_our_own_bugs_are_a_sentence_and_with_debug_their_traceback(runner, monkeypatch):
    shown = runner.invoke(failing(ZeroDivisionError("by us")), ["work"])
    assert shown.exit_code == errors.EXIT_FAILED
    assert "ZeroDivisionError: by us" in shown.stderr
    monkeypatch.setenv("TELERAG_DEBUG", "1")
    assert isinstance(runner.invoke(failing(ZeroDivisionError()), ["work"]).exception, ZeroDivisionError)


def test_interruption_exits_130_and_says_so(runner):
    shown = runner.invoke(failing(KeyboardInterrupt()), ["work"])
    assert shown.exit_code == errors.EXIT_INTERRUPTED
    assert "Interrupted" in shown.stderr


ENDLESS = """
import itertools, sys, time, typer
from telerag_cli.cli import console
from telerag_cli.cli.guard import guarded
def work() -> None:
    for number in itertools.count():
        console.emit(str(number))
        time.sleep(float(sys.argv[2]))
app = typer.Typer()
app.command("work", context_settings={"allow_extra_args": True})(guarded(work))
app.command("idle")(lambda: None)
app()
"""


def endless(pause):
    """A command that counts until it is stopped, waiting ``pause`` seconds in between."""
    command = [sys.executable, "-c", ENDLESS, "work", pause]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_closed_pipe_is_no_error():
    """What `telerag run ... | head -1` does."""
    with endless("0") as process:
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert process.wait(timeout=30) == errors.EXIT_OK
        assert process.stderr.read() == ""


def test_ctrl_c_ends_a_running_command_with_130():
    with endless("0.01") as process:
        assert process.stdout.readline() == "0\n"
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    assert process.returncode == errors.EXIT_INTERRUPTED
    assert told == "error: Interrupted; what was finished is kept.\n"


def test_reserved_stdout_keeps_native_chatter_out_of_the_data():
    code = (
        "import os\n"
        "from telerag_cli.cli import console\n"
        "with console.stdout_reserved():\n"
        "    os.write(1, b'chatter of a C library\\n')\n"
        "    print('and of one in Python')\n"
        "    console.emit('data')\n"
        "console.emit('after')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "data\nafter\n"
    assert done.stderr == "chatter of a C library\nand of one in Python\n"


def test_progress_is_silent_when_stderr_is_no_terminal(capsys):
    with console.progress("embedding", 10, unit="passages") as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "passive"}, {"GOMP_SPINCOUNT": "7"}])
def test_openmp_spins_at_barriers_unless_the_environment_says_otherwise(given):
    policy = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    script = (
        "import os; from telerag_cli.system import spin_at_barriers; spin_at_barriers();"
        f"print([os.environ.get(name) for name in {policy}])"
    )
    bare = {name: value for name, value in os.environ.items() if name not in policy}
    printed = subprocess.run(
        [sys.executable, "-c", script], env={**bare, **given}, capture_output=True, text=True, check=True
    ).stdout
    wanted = [given.get(name) for name in policy] if given else ["active", "300000"]
    assert printed.strip() == str(wanted)
