"""The server's own OpenAPI document holds: schemathesis makes right and wrong requests from it and finds nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

from served import serving
from telerag_cli.llm.shapes import Choice

CONFIG = Path(__file__).with_name("schemathesis.toml")


def reply(request):
    """What a grammar would let through."""
    return request.shape.options[0] if isinstance(request.shape, Choice) else "yes"


def test_schemathesis_finds_nothing(engine_of, tmp_path):
    with serving(engine_of(reply), at_once=4, queue=64) as running:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG)),
                *("run", f"{running.url}/openapi.json", "--max-examples", "6", "--seed", "1", "--no-color"),
                *("--phases", "coverage,fuzzing", "--request-timeout", "30"),
            ],
            cwd=tmp_path,
            env={**os.environ, "NO_PROXY": "127.0.0.1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        made, passed = map(int, re.search(r"(\d+) generated, (\d+) passed", done.stdout).groups())
        assert made == passed > 300, done.stdout[-3000:]
        running.idle()
