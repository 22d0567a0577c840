"""Fixtures that several files use."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is defined, and Triton defines its own as soon as somebody imports it, as transformers does.
    os.environ["TRITON_INTERPRET"] = "1"

# A profile takes seconds and is kept in the user's cache; the tests of profiles say otherwise for themselves.
os.environ["TELERAG_PROFILE"] = "none"

from animals import World


@pytest.fixture
def engine_of(tmp_path):
    """Makes engines over passages about animals; they must leave nothing behind."""
    world = World(tmp_path / "index")
    yield world.engine
    world.close()
