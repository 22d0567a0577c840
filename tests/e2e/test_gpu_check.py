"""scripts/gpu_check.py, small and with the CPU in the GPU's place: it runs, finds faults, and keeps what it has."""

import dataclasses
import json
import sys

import numpy as np
import pytest

import gpu_check
import gpu_stages
from expect import fails
from make_synthetic import Datastore
from synthetic_store import make_material, read_material, unit
from telerag_cli.config import Storage
from telerag_cli.errors import ArtifactError
from telerag_cli.index.scoring import ListScorer
from telerag_cli.retrieval.retriever import Retriever


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        output = tmp_path / "result.json"
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--simulated", "-o", str(output), *arguments])
        with pytest.raises(SystemExit) as ended:
            gpu_check.main()
        shown = capsys.readouterr()
        return ended.value.code, json.loads(output.read_text()) if output.exists() else None, shown

    return run


@pytest.mark.model
def test_every_stage_runs(check, tmp_path):
    status, result, shown = check("--random-model", "tiny", "--bytes", "8MiB", "--minutes", "2")
    assert status == 0, shown.err
    stages = result["stages"]
    assert set(stages) == set(gpu_check.STAGES)
    exact = stages["exactness"]
    assert exact["searches"] == exact["equal"] == 3 * 2 * 3 * gpu_check.SIZES["searches"][True]
    assert exact["lists_failed"] > 0
    assert exact["lists_in_place"] > 0
    assert {f"{size / 1e6:g} MB" for size in gpu_stages.LIST_SIZES} < set(stages["bandwidth"])
    assert all(entry["gb_per_s"] > 0 for name, entry in stages["scoring"].items() if "quer" in name)
    hyde = stages["end-to-end"]["hyde"]
    assert hyde["same_results"]
    assert hyde["refined"]["hit_share"] > hyde["off"]["hit_share"] == 0
    assert hyde["faiss"]["total_s"] > hyde["faiss"]["retrieval_s"] > 0
    assert stages["interference"]["moved_bytes"] > 0
    assert "figures" not in result  # which would show a simulation among measurements
    assert result["simulated"]
    assert "random tiny q4_0 with 0 layers on the GPU" in shown.out
    assert "ok   Searches whose scores and rows are Faiss's, bit for bit: 54 of 54 [all]" in shown.out
    assert shown.out.endswith(f"{tmp_path / 'result.json'}\n")


def test_a_wrong_result_is_found(check, monkeypatch):
    search = Retriever.search

    def wrong(self, queries, k, nprobe, ahead=None):
        found = search(self, queries, k, nprobe, ahead)
        if k < 10:
            return found
        return dataclasses.replace(found, scores=np.nextafter(found.scores, np.float32(0)))

    monkeypatch.setattr(Retriever, "search", wrong)
    status, result, shown = check("--stages", "exactness")
    assert status == 1
    assert result["stages"]["exactness"]["wrong"]
    assert result["stages"]["exactness"]["equal"] < result["stages"]["exactness"]["searches"]
    assert "MISS Searches" in shown.out


def test_a_stage_that_fails_is_told_and_the_others_go_on(check, monkeypatch):
    def failing(bench):
        raise RuntimeError("no such thing")

    monkeypatch.setitem(gpu_check.STAGES, "bandwidth", (failing, 1.0))
    status, result, shown = check("--stages", "bandwidth,scoring")
    assert status == 1
    assert result["stages"]["bandwidth"]["error"] == "RuntimeError: no such thing"
    assert "float32, 1 queries" in result["stages"]["scoring"]
    assert "MISS bandwidth: failed: RuntimeError: no such thing" in shown.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stages", "exactnes"], ["'exactnes'", "exactness"]),
        (["--bytes", "many"], ["many"]),
        (["--random-model", "9B"], ["'9B'", "8B"]),
    ],
)
def test_options_that_cannot_be_are_refused(check, arguments, said):
    status, result, shown = check(*arguments)
    assert (status, result) == (2, None)
    assert [word for word in said if word not in shown.err] == []


def test_what_is_missing_is_named(check, monkeypatch):
    status, result, _shown = check("--model", "missing.gguf")
    assert "missing.gguf" in status
    assert result is None
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cuda:99"])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert "99" in ended.value.code


@pytest.mark.parametrize("storage", list(Storage))
def test_a_datastore_in_memory_is_an_index(storage):
    material = make_material(questions=8)
    store = Datastore.near(material.base, 4 << 20, 64 << 10, storage)
    index = store.index
    assert 0.9 * (4 << 20) < len(store.memory) <= (4 << 20) + 4096 * index.manifest.nlist
    assert index.sizes.min() < index.sizes.max()  # as k-means cuts, not all alike
    scorer = ListScorer.over(store.memory, index, store.coarse)
    scorer.table[:] = index.table
    lists = np.broadcast_to(np.arange(index.manifest.nlist), (8, index.manifest.nlist))
    scores, rows = scorer.score(material.base[:8], np.ascontiguousarray(lists), 5)
    assert (rows >= 0).all()
    assert (rows < index.manifest.ntotal).all()
    # Copies of a passage are at 1 / sqrt(1 + 0.5^2) = 0.894 from it on average; the nearest of some dozens is nearer.
    assert scores[:, 0] == pytest.approx(0.92, abs=0.05)
    scorer.close()
    store.close()


def test_recorded_embeddings_are_read(tmp_path):
    with fails(ArtifactError, tmp_path):
        read_material(tmp_path)
    vectors = unit(np.random.default_rng(0).standard_normal((20, 16)))
    np.save(tmp_path / "background.npy", vectors.astype(np.float16))
    named = {f"generated_{share}": vectors[:4] for share in (25, 50, 75, 100)}
    np.savez(tmp_path / "embeddings.npz", question=vectors[:4], **named)
    material = read_material(tmp_path)
    assert (material.base.shape, material.base.dtype) == ((20, 16), np.float32)
    assert sorted(material.written) == [0.25, 0.5, 0.75, 1.0]
