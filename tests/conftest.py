"""Fixtures that several files use."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is defined, and Triton defines its own as soon as somebody imports it, as transformers does.
    os.environ["TRITON_INTERPRET"] = "1"

from animals import World


@pytest.fixture
def engine_of(tmp_path):
    """Makes engines over passages about animals; they must leave nothing behind."""
    world = World(tmp_path / "index")
    yield world.engine
    world.close()
