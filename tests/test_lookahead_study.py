"""The study's replay moves what the product's planner would move, and reads what pipelines recorded."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parent.parent / "scripts" / "lookahead_study.py"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("lookahead_study", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the names in their annotations
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("rate", [0.6, 1.0, 2.5])
def test_the_replay_is_the_planners(study, rate):
    random = np.random.default_rng(3)
    queries, nlist, nprobe = 20, 60, 8
    probed = np.zeros((queries, nlist), np.bool_)
    for row in probed:
        row[random.choice(nlist, nprobe, replace=False)] = True
    store = study.Store(random.integers(1, 9, nlist) * 4096.0, probed)
    begins = (
        np.zeros(queries),
        np.full(queries, 0.3),
        np.full(queries, 0.5),
        random.uniform(0.6, 1.3, queries),
    )
    stages = [
        study.Stage(when, np.stack([random.permutation(nlist)[:reach] for _ in range(queries)]), patient)
        for when, reach, patient in zip(begins, (4, 8, 10, 14), (True, False, True, True), strict=True)
    ]
    outcome = study.follow(stages, store, rate)
    assert outcome.lists == pytest.approx(study.follow_planned(stages, store, rate), abs=1e-12)
    assert 0 < outcome.lists < 1
    assert outcome.moved <= rate + 9 / nprobe  # at most one list too many


def test_what_is_not_known_to_the_link_is_lost_while_it_waits(study):
    store = study.Store(np.full(10, 4096.0), np.arange(10)[None] < 4)
    early, late = np.arange(10)[None, ::-1], np.arange(10)[None]
    waits = [study.Stage(np.zeros(1), early[:, :1], True), study.Stage(np.full(1, 0.5), late[:, :4], True)]
    found = study.follow(waits, store, 1.0)
    assert (found.lists, found.moved, found.looks) == (0.5, 0.75, 1.0)
    hasty = [study.Stage(np.zeros(1), early[:, :1], True), study.Stage(np.full(1, 0.5), late[:, :4], False)]
    assert study.follow(hasty, store, 1.0).looks == 0.0


def test_a_beginning_keeps_lines_and_has_a_word(study):
    text = "one two\nthree  four"
    assert study.beginning(text, 0.75) == "one two\nthree"
    assert study.beginning(text, 0.01) == "one"
    assert study.beginning("", 0.5) == ""


def test_each_search_is_put_to_the_text_before_it(study, tmp_path):
    def line(pipeline, texts, searches):
        stages = [{"stage": stage, "text": text} for stage, text in texts.items()]
        return json.dumps({"question": "Q", "pipeline": pipeline, "generations": stages,
                           "retrievals": [{"queries": queries} for queries in searches]})  # fmt: skip

    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join((
        json.dumps({"id": "1", "error": "x"}),
        line("hyde", {"passage": "P"}, [["P"]]),
        line("iterative", {"query_1": "A", "query_2": "B"}, [["A"], ["B"]]),
        line("iter_retgen", {"draft_1": "D"}, [["Q"], ["Q D"]]),
        line("flare", {"sentence_1": "S", "sentence_2": "T", "rewrite_2": "U"}, [["why"]]),
    )))  # fmt: skip
    found = list(study.recorded(path))
    assert [(each.start, each.text, list(each.searched)) for each in found] == [
        ("Q", "P", ["P"]), ("Q", "A", ["A"]), ("A", "B", ["B"]), ("Q", "D", ["Q D"]), ("S", "T", ["why"])]  # fmt: skip
    assert found[3].expect("half") == ["Q half"]
