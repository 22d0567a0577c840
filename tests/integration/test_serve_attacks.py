"""What others notice of attacks by requests: nothing much, and nothing of them is left."""

import importlib.util
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from served import serving

MAX_HEALTH_S = 0.5
"""Beside what else runs on the machine, the attacker in this very process included. A hundredth of it is usual, and
each of these attacks once took seconds."""
MAX_LOG = 20_000


def load_script():
    path = Path(__file__).parents[2] / "scripts" / "attack_server.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


ATTACKS = load_script()


QUICK = sorted({*ATTACKS.REQUESTS} - {"a question of 900 KB", "multipleOf 99,999,989"})
"""Without one for which the doubles take long themselves, and one of two schemas that take all the time there is."""


@pytest.mark.parametrize("attack", QUICK)
def test_an_attack_stalls_nobody_and_leaves_nothing(engine_of, attack):
    path, body = ATTACKS.REQUESTS[attack]
    engine = engine_of({"": '{"a": 1}'}, max_tokens=20)
    with serving(engine) as running, ThreadPoolExecutor(2) as attackers:
        attacking = [attackers.submit(ATTACKS.send, running.url, path, body) for _ in range(2)]
        health_s = []
        while not all(each.done() for each in attacking) or len(health_s) < 20:
            began_s = time.perf_counter()
            assert ATTACKS.send(running.url, "/health") == 200
            health_s.append(time.perf_counter() - began_s)
            time.sleep(0.01)
        assert {each.result() for each in attacking} <= {200, 400, 500}  # 500: this LLM writes what it is told to
        running.idle()
        assert sorted(health_s)[int(len(health_s) * 0.95)] < MAX_HEALTH_S
        assert sum(map(len, running.lines)) < MAX_LOG
        assert "\x1b" not in "".join(running.lines)
