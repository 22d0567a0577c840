"""The scripts that make documents: what they write is right, and stale documents are found."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from bench_results import HYDE, WIDE, result, saved
from telerag_cli.bench.results import Cell, Ratio
from telerag_cli.system import hardware

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for the names in their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def figures(tmp_path, monkeypatch):
    module = script("readme_figures")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    marks = "<!-- suites:begin -->\nold\n<!-- suites:end -->\n<!-- figures:begin -->\nold\n<!-- figures:end -->\n"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "benchmarks.md").write_text(f"above\n{marks}below\n")
    return module


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    module.main()


def test_figures_come_from_the_results_and_stale_ones_are_found(figures, tmp_path, monkeypatch):
    made = {
        "command": "python scripts/bench.py --n 3",
        "hardware": hardware(),
        "figures": [{"what": "speed", "value": "5 x", "against": "1 x", "goal": "at least 4 x"}],
    }
    (tmp_path / "benchmarks" / "results" / "speed.json").write_text(json.dumps(made))
    (tmp_path / "benchmarks" / "results" / "raw.json").write_text(json.dumps({"numbers": [1, 2]}))
    with pytest.raises(SystemExit, match="make docs"):
        run(figures, monkeypatch, "--check")
    run(figures, monkeypatch)
    run(figures, monkeypatch, "--check")
    document = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "| speed | 5 x | 1 x | at least 4 x | [speed.json](../benchmarks/results/speed.json) |" in document
    assert f"speed.json: {made['hardware']['cpu']}, {made['hardware']['cores']} cores" in document
    assert document.startswith("above\n")
    assert document.endswith("\nbelow\n")
    assert "old" not in document
    assert "raw.json" not in document


SETTINGS = {
    **{"num_prompts": 4, "repeats": 1, "nprobe": 8, "k": 3, "max_tokens": 48, "fast_memory_bytes": 1 << 30},
    **{"llm": "a model", "index": {"nlist": 64, "lists_bytes": 10**9}},
}


@pytest.mark.parametrize(
    ("ratio", "told"),
    [
        (Ratio(HYDE, "faiss-ondisk", "refined", "e2el_ms", 4, 2.0, 1.0, 3.0), "**2.00** (1.00 to 3.00)"),
        (Ratio(HYDE, "faiss-ondisk", "refined", "e2el_ms", 4, None, 1.0, 3.0, WIDE), WIDE),
    ],
)
def test_suites_have_a_table_a_machine_and_no_number_where_there_is_none(figures, tmp_path, monkeypatch, ratio, told):
    cells = [
        Cell(system, HYDE, {"median_e2el_ms": ms, "hit_share": 0.9})
        for system, ms in (("faiss-ondisk", 4000.0), ("refined", 2000.0))
    ]
    made = result("latency", cells, [ratio], hardware=hardware(), settings=SETTINGS)
    saved(tmp_path / "benchmarks" / "results" / "here", latency=made)
    run(figures, monkeypatch)
    document = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert f"| `hyde` | 4.00 | 2.00 | {told} |  | 90% |" in document
    assert "4 questions one at a time, cold; 8 of 64 lists of an index of 1.0 GB" in document
    assert "(../benchmarks/results/here/report.md)" in document


def test_a_document_without_marks_is_refused(figures, tmp_path, monkeypatch):
    (tmp_path / "docs" / "benchmarks.md").write_text("nothing\n")
    with pytest.raises(SystemExit, match="<!-- figures:begin -->"):
        run(figures, monkeypatch)


def test_the_command_reference_is_written_and_a_stale_one_shown(tmp_path, monkeypatch, capsys):
    module = script("generate_cli_docs")
    target = tmp_path / "cli.md"
    monkeypatch.setattr(module, "TARGET", target)
    run(module, monkeypatch)
    written = target.read_text()
    assert "## `telerag build-index`" in written
    run(module, monkeypatch, "--check")
    target.write_text(written.replace("## `telerag build-index`", "## `telerag make-index`"))
    capsys.readouterr()
    with pytest.raises(SystemExit, match="make docs"):
        run(module, monkeypatch, "--check")
    shown = capsys.readouterr().out
    assert "-## `telerag make-index`" in shown
    assert "+## `telerag build-index`" in shown


@pytest.mark.parametrize("weights", ["q4_0", "q8_0", "f16"])
def test_a_random_model_decodes_and_is_the_same_each_time(tmp_path, monkeypatch, capsys, weights):
    llama_cpp = pytest.importorskip("llama_cpp")
    module = script("make_random_model")
    arguments = ["--size", "tiny", "--type", weights]
    run(module, monkeypatch, *arguments, "-o", str(tmp_path / "one.gguf"))
    run(module, monkeypatch, *arguments, "-o", str(tmp_path / "two.gguf"))
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    assert capsys.readouterr().out == f"{tmp_path / 'one.gguf'}\n{tmp_path / 'two.gguf'}\n"
    model = llama_cpp.Llama(str(tmp_path / "one.gguf"), n_ctx=64, verbose=False)
    assert model.n_embd() == module.SHAPES["tiny"].width
    text = model("What is a tensor?", max_tokens=8)["choices"][0]["text"]
    assert len(set(text)) > 4  # not one token again and again, which equal rows would give
    model.close()


def test_a_random_model_needs_a_tokenizer(tmp_path, monkeypatch):
    module = script("make_random_model")
    broken, output = tmp_path / "broken.gguf", tmp_path / "o.gguf"
    broken.write_bytes(b"GGUF and nothing more" * 10)
    with pytest.raises(SystemExit, match="GGUF"):
        run(module, monkeypatch, "--like", str(broken), "--size", "tiny", "-o", str(output))
    assert not output.exists()
