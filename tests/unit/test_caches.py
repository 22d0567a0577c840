"""What is kept between runs is a convenience: without a home, or on a full disk, a run goes on with a warning."""

from pathlib import Path

import pytest

from expect import fails
from telerag_cli.cli.chat_input import history_path
from telerag_cli.errors import ResourceError
from telerag_cli.files import cache_folder
from telerag_cli.planning.averages import Averages


@pytest.fixture
def no_home(monkeypatch):
    """A user whom the system does not know, as in many containers."""

    def home():
        raise RuntimeError("Could not determine home directory.")

    for variable in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", home)


def test_without_a_home_the_cache_is_a_named_error_and_the_history_an_os_error(no_home):
    with fails(ResourceError, "XDG_CACHE_HOME"):
        cache_folder()
    with pytest.raises(OSError, match="home"):
        history_path()


@pytest.mark.parametrize("folder", ["/proc/nothing", "/dev/null"])
def test_averages_that_cannot_be_kept_are_a_warning(folder):
    warnings = []
    averages = Averages(Path(folder) / "kept" / "x.json", warn=warnings.append)
    averages.observe("hyde/passage", "tokens", 3.0)
    averages.save()
    assert len(warnings) == 1
    assert folder in warnings[0]
