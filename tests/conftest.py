"""Fixtures that several files use."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is defined, and Triton defines its own as soon as somebody imports it, as transformers does.
    os.environ["TRITON_INTERPRET"] = "1"

# A profile takes seconds and is kept in the user's cache; the tests of profiles say otherwise for themselves.
os.environ["TELERAG_PROFILE"] = "none"

import json

from typer.testing import CliRunner

from animals import World
from library import passages
from telerag_cli.cli.app import app


@pytest.fixture
def nothing_set(monkeypatch, tmp_path):
    """No settings, and an empty working folder."""
    for name in [name for name in os.environ if name.startswith("TELERAG_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def animal_index(tmp_path_factory):
    """The index of passages about animals, read only."""
    return World(tmp_path_factory.mktemp("animals") / "index").index


@pytest.fixture
def engine_of(animal_index):
    """Makes engines over passages about animals; they must leave nothing behind."""
    world = World.over(animal_index)
    yield world.engine
    world.close()


@pytest.fixture(scope="session")
def documented(tmp_path_factory):
    """A folder with ``corpus.jsonl``, its ``embeddings`` and an ``index`` of 24 lists, made by commands, read only."""
    root = tmp_path_factory.mktemp("documented")
    (root / "corpus.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in passages()))
    for command in (
        ["embed", root / "corpus.jsonl", "-o", root / "embeddings"],
        ["build-index", root / "embeddings", "-o", root / "index", "--nlist", 24],
    ):
        made = CliRunner().invoke(app, list(map(str, command)))
        assert made.exit_code == 0, made.stderr
    return root
