"""``telerag serve-local`` as a child process: started, awaited, and stopped."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Served:
    """A server that is ready."""

    process: subprocess.Popen
    url: str
    log: Path
    """What it writes to stdout and stderr."""
    api_key: str

    def get(self, path):
        """The text that a GET answers."""
        request = urllib.request.Request(self.url + path, headers={"authorization": f"Bearer {self.api_key}"})
        # Whatever the environment says of proxies.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as response:
            return response.read().decode()

    def state(self):
        return json.loads(self.get("/telerag/state"))


@contextlib.contextmanager
def serve_local(index, *arguments, log, api_key, ready_s=180.0):
    """Run the server on a free port while the block runs."""
    command = [sys.executable, "-m", "telerag_cli", "serve-local", index, "--port", "0", *arguments]
    environment = {**os.environ, "TELERAG_API_KEY": api_key}
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
    try:
        deadline_s = time.monotonic() + ready_s
        while not (ready := re.search(r"Ready at (http://127\.0\.0\.1:\d+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.05)
        yield Served(process, ready[1], log, api_key)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
