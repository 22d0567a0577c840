"""``telerag.toml`` and ``TELERAG_*``: every option both ways, from one definition."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import typer
from typer.testing import CliRunner

from telerag_cli.cli.app import app
from telerag_cli.cli.settings import GLOBAL, ITSELF, load, plain, sections_of
from telerag_cli.errors import UsageError

PROGRAM = typer.main.get_command(app)
SECTIONS = sections_of(PROGRAM.commands)
EVERY = [(name, key) for name, section in SECTIONS.items() for key in section.options]
pytestmark = pytest.mark.usefixtures("nothing_set")


def telerag(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write(content, path="telerag.toml"):
    Path(path).write_text(content)


def another(option):
    """A value that the option takes and that is not its default."""
    kinds = get_args(option.annotation) or (option.annotation,)
    if get_origin(option.annotation) is Literal:
        return next(choice for choice in kinds if choice != option.default)
    kind = option.annotation if get_origin(option.annotation) is list else kinds[0]
    if get_origin(kind) is list:
        return [one_of(get_args(kind)[0], None, option)]
    return one_of(kind, option.default, option)


def one_of(kind, default, option):
    if kind is bool:
        return not default
    if kind in (int, float):
        value = kind(option.minimum or 0) + (kind(1) if option.maximum is None else kind(option.maximum / 2))
        return value if value != default else value + 1
    choices = list(kind) if hasattr(kind, "__members__") else []
    return next((plain(choice) for choice in choices if plain(choice) != default), "some/where")


def spelled(value):
    """As the environment has it."""
    return json.dumps(value) if isinstance(value, list) else str(value)


def placed(defaults, name):
    """What a default map has for a command, which may be in a group."""
    for step in SECTIONS[name].path:
        defaults = defaults[step]
    return defaults


def every_command(commands=PROGRAM.commands, path=()):
    for name, command in commands.items():
        if hasattr(command, "commands"):
            yield from every_command(command.commands, (*path, name))
        elif (*path, name) != (ITSELF,):
            yield "-".join((*path, name)), command


COMMANDS = dict(every_command())


def commands_with(name, key):
    shared = SECTIONS[GLOBAL].options.get(key)
    takers = (c for c in SECTIONS if c != GLOBAL and key in SECTIONS[c].options)
    return [name] if name != GLOBAL else [c for c in takers if SECTIONS[c].options[key].means(shared)]


def test_the_sections_are_all_commands_with_all_their_options():
    assert SECTIONS.keys() - {GLOBAL} == COMMANDS.keys()
    for name, command in COMMANDS.items():
        declared = {each.name for each in command.params if each.param_type_name == "option"}
        assert {option.parameter for option in SECTIONS[name].options.values()} == declared


@pytest.mark.parametrize("name", SECTIONS)
def test_every_option_can_be_set_in_the_environment(monkeypatch, name):
    section = SECTIONS[name]
    values = {key: another(option) for key, option in section.options.items()}
    for key, value in values.items():
        monkeypatch.setenv(section.variable(key), spelled(value))
    settings = load(SECTIONS)
    for key, value in values.items():
        for command in commands_with(name, key):
            found = settings.of(command, key)
            assert (found.value, found.origin, found.place) == (value, "environment", section.variable(key))
            assert placed(settings.defaults(), command)[SECTIONS[command].options[key].parameter] == value


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("between", ["_", "-"])
def test_every_option_can_be_set_in_the_file(name, between):
    values = {key: another(option) for key, option in SECTIONS[name].options.items()}
    lines = [f"{key.replace('_', between)} = {json.dumps(value)}" for key, value in values.items()]
    write("\n".join([f"[{name}]", *lines, ""]))
    settings = load(SECTIONS)
    for key, value in values.items():
        for command in commands_with(name, key):
            found = settings.of(command, key)
            assert (found.value, found.origin, found.place) == (value, "file", f"telerag.toml [{name}]")


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_take_what_is_set_for_their_own(name):
    """Through Click: as the option's value, with the default map as its source."""
    command = COMMANDS[name]
    for option in SECTIONS[name].options.values():
        parameter = next(each for each in command.params if each.name == option.parameter)
        value = another(option)
        with command.make_context(name, [], resilient_parsing=True, default_map={option.parameter: value}) as context:
            got, source = parameter.consume_value(context, {})
            assert source.name == "DEFAULT_MAP"
            made = parameter.process_value(context, got)
            assert plain(list(made) if isinstance(value, list) else made) == value


def test_the_nearest_to_the_command_line_wins(monkeypatch):
    def held():
        settings = load(SECTIONS)
        return [settings.of(command, "nprobe").value for command in ("run", "chat")]

    write("[global]\nnprobe = 1\n")
    assert held() == [1, 1]
    write("[global]\nnprobe = 1\n[run]\nnprobe = 2\n")
    assert held() == [2, 1]
    monkeypatch.setenv("TELERAG_NPROBE", "3")
    assert held() == [3, 3]
    monkeypatch.setenv("TELERAG_RUN__NPROBE", "4")
    assert held() == [4, 3]
    shown = telerag("run", "--help").stdout
    assert "--nprobe" in shown


def test_the_command_line_wins_over_all(monkeypatch):
    monkeypatch.setenv("TELERAG_SEARCH__QUERIES", "from-environment.txt")
    write("[search]\nqueries = 'from-file.txt'\n")
    told = json.loads(telerag("config", "--json").stdout)["settings"]
    assert [(row["option"], row["value"]) for row in told] == [("--queries", "from-environment.txt")]
    monkeypatch.setenv("TELERAG_DOCTOR__MODEL", "unset.gguf")
    given = telerag("doctor", "--model", "given.gguf")
    assert "The model given.gguf cannot be read" in given.stdout
    assert "The model unset.gguf" not in given.stdout


def test_what_is_set_reaches_commands(monkeypatch):
    monkeypatch.setenv("TELERAG_SEARCH__QUERIES", "questions.txt")
    assert "as arguments or a file" in telerag("search", "index", "question").stderr
    assert "Missing option '--output'" in telerag("build-index", "nothing").stderr
    write("[embed]\noutput = 'out'\n")
    assert "empty.txt" in telerag("embed", "empty.txt").stderr  # and not that a required option is missing


def test_a_flag_set_in_the_file_is_taken_back_in_the_environment(monkeypatch):
    write("ordered = true\n")
    assert load(SECTIONS).of("run", "ordered").value is True
    monkeypatch.setenv("TELERAG_ORDERED", "false")
    assert load(SECTIONS).defaults()["run"] == {"ordered": False}


def test_what_is_empty_is_not_set(monkeypatch):
    write("nprobe = ''\n")
    monkeypatch.setenv("TELERAG_TIER", "")
    assert load(SECTIONS).values == {}


def test_numbers_are_texts_where_a_text_is_wanted_and_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    write("fast-memory = 1048576\n[build-index]\nnlist = 64\n[run]\noutput = '~/answers.jsonl'\n")
    held = load(SECTIONS).defaults()
    assert held["run"] == {"fast_memory": "1048576", "output": "/home/somebody/answers.jsonl"}
    assert held["build-index"] == {"nlist": "64"}


def test_an_option_named_like_a_command_is_told_from_its_table(monkeypatch):
    write("profile = 'none'\n")
    assert load(SECTIONS).defaults()["run"] == {"profile": "none"}
    write("[profile]\nquick = true\n[global]\nprofile = 'auto'\n")
    held = load(SECTIONS).defaults()
    assert (held["profile"], held["run"]) == ({"quick": True}, {"profile": "auto"})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("nprob = 3\n", ["[global] has 'nprob'", "the nearest is nprobe"]),
        ("[rum]\nnprobe = 3\n", ["the table [rum]", "the nearest is run"]),
        ("[run]\nnlist = 3\n", ["[run] has 'nlist', which is no option there"]),
        ("output = 'x'\n", ["has 'output', which is no option there for all commands", "[embed]", "[run]"]),
        ("nprobe = 'many'\n", ["[global] nprobe is 'many'", "integer"]),
        ("nprobe = 1.5\n", ["nprobe is 1.5", "integer"]),
        ("nprobe = true\n", ["nprobe is True", "should not be true or false"]),
        ("[run]\nnprobe = 0\n", ["[run] nprobe is 0", "greater than or equal to 1", "It is --nprobe"]),
        ("top-p = 1.5\n", ["top_p is 1.5", "less than or equal to 1"]),
        ("[run]\ntier = 'moon'\n", ["[run] tier is 'moon'", "'host'", "'cuda'"]),
        ("tier = ['host']\n", ["tier is ['host']"]),
        ("[run]\nordered = 'perhaps'\n", ["[run] ordered is 'perhaps'", "boolean"]),
        ("[config]\ninit = true\n", ["the table [config]"]),
        ("[global\n", ["are no TOML"]),
    ],
)
def test_what_is_wrong_in_the_file_is_named(content, words):
    write(content)
    shown = telerag("config")
    assert shown.exit_code == 2
    assert shown.stderr.count("\n") == 1
    assert all(word in shown.stderr for word in ["error: ", "telerag.toml", *words]), shown.stderr
    with pytest.raises(UsageError):
        load(SECTIONS)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("TELERAG_NPROBE", "0", ["is '0'", "greater than or equal to 1"]),
        ("TELERAG_RUN__TIMEOUT", "soon", ["is 'soon'", "number"]),
        ("TELERAG_BUILD_INDEX__METRIC", "cosine", ["is 'cosine'", "'ip' or 'l2'"]),
    ],
)
def test_what_is_wrong_in_the_environment_is_named(monkeypatch, variable, value, words):
    write("nprobe = 5\n")
    monkeypatch.setenv(variable, value)
    shown = telerag("inspect", "nothing")
    assert shown.exit_code == 2
    assert all(word in shown.stderr for word in [f"error: {variable} ", *words])


def test_a_variable_that_is_no_option_is_a_warning(monkeypatch):
    for name in ("TELERAG_NPROB", "TELERAG_MODEL", "TELERAG_DEBUG", "TELERAG_KILLS"):
        monkeypatch.setenv(name, "3")
    shown = telerag("config")
    assert shown.exit_code == 0
    assert "warning: TELERAG_NPROB is no option; the nearest is TELERAG_NPROBE.\n" in shown.stderr
    assert "TELERAG_EMBED__MODEL or" in shown.stderr  # which differs from the model of run
    assert "KILLS" not in shown.stderr
    assert "DEBUG" not in shown.stderr


def test_help_comes_with_broken_settings_and_what_helps_with_them_runs(monkeypatch):
    write("[global\n")
    monkeypatch.setattr(sys, "argv", ["telerag", "run", "--help"])
    shown = telerag("run", "--help")
    assert (shown.exit_code, "warning: " in shown.stderr) == (0, True)
    monkeypatch.setattr(sys, "argv", ["telerag"])
    assert telerag("run", "--help").exit_code == 2
    assert telerag("config", "--path").stdout == "telerag.toml\n"


def test_a_named_file_must_be_there_and_an_unnamed_one_need_not(monkeypatch, tmp_path):
    missing = telerag("--config", tmp_path / "none.toml", "search", "a", "b")
    assert missing.exit_code == 2
    assert "none.toml cannot be read: no such file" in missing.stderr
    monkeypatch.setenv("TELERAG_CONFIG", str(tmp_path))
    folder = telerag("config")
    assert folder.exit_code == 2
    assert "cannot be read: is a directory" in folder.stderr
    write("k = 2\n", "named.toml")
    told = json.loads(telerag("--config", "named.toml", "config", "--json").stdout)
    assert told["file"] == "named.toml"
    assert [row["value"] for row in told["settings"]] == [2]


def test_the_users_own_file_counts_where_there_is_none_here(tmp_path):
    own = tmp_path / "home" / "telerag" / "telerag.toml"
    own.parent.mkdir(parents=True)
    own.write_text("[run]\nk = 3\n")
    assert telerag("config", "--path").stdout == f"{own}\n"
    assert json.loads(telerag("config", "--json").stdout) == {
        "file": str(own),
        "settings": [{"option": "-k", "commands": ["run"], "value": 3, "origin": "file", "place": f"{own} [run]"}],
    }
    write("[run]\nk = 4\n")
    assert telerag("config", "--path").stdout == "telerag.toml\n"


def test_config_shows_what_is_set_and_where(monkeypatch):
    nothing = telerag("config")
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert "Nothing is set" in nothing.stderr
    monkeypatch.setenv("TELERAG_NPROBE", "7")
    write("[run]\nordered = true\n")
    shown = telerag("config", "--show").stdout
    assert re.search(r"--nprobe +.*search, run, chat.* +7 +environment: TELERAG_NPROBE", shown)
    assert re.search(r"--ordered +run +true +file: telerag.toml \[run\]", shown)
    assert "--ctx-size" not in shown
    every = json.loads(telerag("config", "--all", "--json").stdout)["settings"]
    flags = {option.flag for section in SECTIONS.values() for option in section.options.values()}
    assert {row["option"] for row in every} == flags
    assert telerag("config", "--path", "--init").exit_code == 2


@pytest.mark.parametrize("how", [[], ["--json"], ["--all"]])
def test_config_shows_that_there_is_a_key_and_not_which(monkeypatch, how):
    monkeypatch.setenv("TELERAG_API_KEY", "open-sesame")
    done = CliRunner().invoke(app, ["config", *how])
    assert done.exit_code == 0
    assert "(hidden)" in done.stdout
    assert "sesame" not in done.output


def test_config_path_says_where_a_file_would_be_looked_for(tmp_path):
    none = telerag("config", "--path")
    assert (none.exit_code, none.stdout) == (1, "")
    assert f"neither telerag.toml nor {tmp_path / 'home/telerag/telerag.toml'}" in none.stderr
    assert telerag("--config", "none.toml", "config", "--path").exit_code == 2


def test_init_writes_a_file_once(tmp_path):
    assert telerag("config", "--init").stdout == "telerag.toml\n"
    again = telerag("config", "--init")
    assert again.exit_code == 1
    assert f"telerag.toml is there already and has {(tmp_path / 'telerag.toml').stat().st_size:,} bytes" in again.stderr
    assert telerag("--config", "named.toml", "config", "--init").stdout == "named.toml\n"
    assert load(SECTIONS).values == {}


def test_what_init_writes_stands_at_the_defaults():
    telerag("config", "--init")
    text = Path("telerag.toml").read_text()
    write(re.sub(r"(?m)^#(?! )", "", text))
    held = tomllib.loads(Path("telerag.toml").read_text())
    assert {key.replace("-", "_") for table in held.values() for key in table} == {key for _name, key in EVERY}
    settings = load(SECTIONS)
    for name, key in EVERY:
        if name != GLOBAL:
            found = settings.of(name, key)
            assert (found.value if found else None) == SECTIONS[name].options[key].default, (name, key)


def test_a_full_disk_and_a_closed_pipe_are_as_for_every_command():
    program = f"{sys.executable} -m telerag_cli config --all"
    full = subprocess.run(["sh", "-c", f"{program} > /dev/full"], capture_output=True, text=True, check=False)
    assert full.returncode == 1
    assert full.stderr.startswith("error: The disk is full")
    closed = subprocess.run(
        ["bash", "-c", f"{program} | true; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=False
    )
    assert (closed.stdout, closed.stderr) == ("0\n", "")


def test_a_file_of_the_folder_is_named_and_does_not_redirect_the_key(monkeypatch, tmp_path):
    write('base-url = "http://elsewhere.example/v1"')
    command = ("run", tmp_path / "index", "-q", "none")
    assert f"Settings: {tmp_path / 'telerag.toml'}" in "".join(telerag(*command).stderr.split("\n"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    refused = telerag(*command)
    assert refused.exit_code == 2
    assert "http://elsewhere.example/v1" in refused.stderr
    assert "sk-secret" not in refused.stderr
    assert telerag("--config", "telerag.toml", *command).exit_code == 1  # it was named: only the index is missing
    monkeypatch.setenv("TELERAG_BASE_URL", "http://localhost:1/v1")
    assert telerag(*command).exit_code == 1
