"""Fixtures that several files of this folder use."""

import pytest

from scripted_endpoint import scripted, without_garbage


@pytest.fixture(scope="module")
def collected():
    with without_garbage():
        yield


@pytest.fixture
def server(monkeypatch, collected):
    with scripted(monkeypatch) as script:
        yield script
