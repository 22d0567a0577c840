"""Fixtures that several files use."""

import pytest

from animals import World


@pytest.fixture
def engine_of(tmp_path):
    """Makes engines over passages about animals; they must leave nothing behind."""
    world = World(tmp_path / "index")
    yield world.engine
    world.close()
