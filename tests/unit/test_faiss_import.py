"""Faiss's files in and out: what telerag finds in an imported index, and Faiss in an exported one, is the same."""

import gzip
import shutil

import faiss
import numpy as np
import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from expect import fails
from faiss_files import COUNT, NLIST, faiss_index, imported, same_results, write, write_on_disk, write_passages
from telerag_cli.cli.faiss_files import export_index as export_command
from telerag_cli.cli.faiss_files import import_index as import_command
from telerag_cli.cli.guard import guarded
from telerag_cli.config import Metric, Storage
from telerag_cli.corpus.passages import Passage
from telerag_cli.corpus.sources import find_sources
from telerag_cli.errors import ArtifactError, InputError, ResourceError, UsageError
from telerag_cli.index import faiss_import
from telerag_cli.index.artifact import Index
from telerag_cli.index.build import BuildConfig, build_index
from telerag_cli.index.faiss_export import export_index
from telerag_cli.index.faiss_file import read_faiss
from telerag_cli.index.faiss_import import plan_import
from telerag_cli.index.partial import partial_of
from telerag_cli.index.passages import Passages
from telerag_cli.index.verify import verify
from vector_files import clustered, write_parquet

runner = CliRunner(env={"COLUMNS": "200"})


@pytest.fixture
def files(tmp_path):
    """Faiss's file of an index, and its passages."""
    return write(faiss_index()[0], tmp_path / "f.index"), write_passages(tmp_path / "p.jsonl")


@pytest.mark.parametrize("written", [write, write_on_disk])
@pytest.mark.parametrize("storage", Storage)
@pytest.mark.parametrize("metric", Metric)
def test_an_imported_index_finds_what_faiss_finds_and_so_does_it_exported(tmp_path, metric, storage, written):
    ivf, vectors = faiss_index(metric, storage)
    file = written(ivf, tmp_path / "f.index")
    index = imported(file, write_passages(tmp_path / "p.jsonl"), tmp_path / "index", "some/model")
    assert (index.manifest.metric, index.manifest.storage) == (metric, storage)
    assert (index.manifest.ntotal, index.manifest.nlist) == (COUNT, NLIST)
    assert index.manifest.embedder.model == "some/model"
    assert not verify(index, lambda _count: None)
    assert not partial_of(tmp_path / "index").exists()
    same_results(index, ivf, vectors)
    last = COUNT - 1
    assert Passages.open(index.paths.passages)[[last]] == [
        Passage(f"p{last}", f"Passage {last}.", {"title": f"T{last}"})
    ]
    exported = tmp_path / "out.index"
    assert export_index(index, exported) == exported.stat().st_size
    again = faiss.read_index(str(exported))
    assert type(again) is type(ivf)
    assert (again.ntotal, again.metric_type) == (COUNT, ivf.metric_type)
    same_results(index, again, vectors)
    queries = vectors[7:12]
    again.nprobe = ivf.nprobe = 5
    for ours, theirs in zip(again.search(queries, 9), ivf.search(queries, 9), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dimension=st.integers(1, 33),
    count=st.integers(20, 90),
    nlist=st.integers(1, 20),
    seed=st.integers(0, 999),
    metric=st.sampled_from(Metric),
    storage=st.sampled_from(Storage),
    on_disk=st.booleans(),
)
def test_any_shape_there_and_back(tmp_path, dimension, count, nlist, seed, metric, storage, on_disk):
    for old in tmp_path.iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    ivf, vectors = faiss_index(metric, storage, count=count, dimension=dimension, nlist=nlist, seed=seed)
    file = (write_on_disk if on_disk else write)(ivf, tmp_path / "f.index")
    index = imported(file, write_passages(tmp_path / "p.jsonl", count), tmp_path / "index")
    same_results(index, ivf, vectors, k=5)
    export_index(index, tmp_path / "out.index")
    same_results(index, faiss.read_index(str(tmp_path / "out.index")), vectors, k=5)


def test_a_built_index_is_exported(tmp_path):
    vectors = clustered(900, 10)
    file = write_parquet(tmp_path / "e.parquet", vectors)
    index = build_index(file, tmp_path / "index", BuildConfig(8, Metric.L2, Storage.INT8))
    export_index(index, tmp_path / "out.index")
    ivf = faiss.read_index(str(tmp_path / "out.index"))
    same_results(index, ivf, vectors)
    ivf.nprobe = 8
    assert ivf.search(vectors[:50], 1)[1][:, 0].tolist() == list(range(50))


def test_a_direct_map_is_passed_over(tmp_path):
    ivf, vectors = faiss_index(ids=np.arange(COUNT))
    passages = write_passages(tmp_path / "p.jsonl")
    for kind in (faiss.DirectMap.Array, faiss.DirectMap.Hashtable):
        ivf.set_direct_map_type(kind)
        index = imported(write(ivf, tmp_path / f"{kind}.index"), passages, tmp_path / f"index{kind}")
        same_results(index, ivf, vectors)


@pytest.mark.parametrize("name", ["p.tsv", "p.jsonl.gz", "folder"])
def test_passages_of_other_kinds(tmp_path, name):
    ivf, _ = faiss_index(count=40)
    path = tmp_path / name
    if name == "p.tsv":  # as DPR's psgs_w100.tsv is
        rows = [f"{n + 1}\tPassage {n}.\tT{n}\n" for n in range(40)]
        path.write_text("id\ttext\ttitle\n" + "".join(rows))
    elif name == "folder":
        path.mkdir()
        write_parquet(path / "a.parquet", clustered(25, 4))
        write_parquet(path / "b.parquet", clustered(15, 4))
    else:
        with gzip.open(path, "wt") as handle:
            handle.write(write_passages(tmp_path / "plain.jsonl", 40).read_text())
    index = imported(write(ivf, tmp_path / "f.index"), path, tmp_path / "index")
    found = Passages.open(index.paths.passages)
    assert len(found) == 40
    assert found[[14]][0].text == "Passage 14."


@pytest.mark.parametrize(("count", "said"), [(COUNT - 1, " 299 "), (COUNT + 2, " 302 "), (0, " 0 ")])
def test_passages_must_be_as_many_as_vectors(tmp_path, files, count, said):
    file, _ = files
    passages = write_passages(tmp_path / "p.jsonl", count)
    with fails(InputError, "p.jsonl", said, "f.index", 300):
        imported(file, passages, tmp_path / "index")
    assert not (tmp_path / "index").exists()
    with fails(ArtifactError, "files faiss"):
        imported(file, write_passages(tmp_path / "p.jsonl"), tmp_path / "index")
    imported(file, passages, tmp_path / "index", overwrite=True)


def test_passages_without_rows_are_refused(tmp_path, files):
    text = tmp_path / "text.txt"
    text.write_text("Some text.")
    for where, said in (("-", "--passages"), (str(text), "text.txt")):
        with fails(UsageError, said):
            plan_import(read_faiss(files[0]), find_sources([where]), tmp_path / "index", None)


def test_a_bad_passage_is_named(tmp_path):
    ivf, _ = faiss_index(count=20)
    passages = write_passages(tmp_path / "p.jsonl", 20)
    passages.write_text(passages.read_text().replace('"text": "Passage 7."', '"text": ""'))
    with fails(InputError, "p.jsonl:8"):
        imported(write(ivf, tmp_path / "f.index"), passages, tmp_path / "index")


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (np.arange(1, COUNT + 1), ("id 300", "0 to 299")),
        (np.arange(COUNT) - 1, ("id -1", "0 to 299")),
        (np.arange(COUNT) // 2 * 2, ("twice", "0 to 299")),
    ],
)
def test_ids_must_be_row_numbers(tmp_path, ids, said):
    ivf, _ = faiss_index(ids=ids)
    with fails(InputError, "f.index", *said):
        imported(write(ivf, tmp_path / "f.index"), write_passages(tmp_path / "p.jsonl"), tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_an_interrupted_import_goes_on(tmp_path, monkeypatch):
    ivf, _ = faiss_index(storage=Storage.FLOAT16)
    file, passages = write(ivf, tmp_path / "f.index"), write_passages(tmp_path / "p.jsonl")
    whole = imported(file, passages, tmp_path / "whole")
    root = tmp_path / "index"
    monkeypatch.setattr(faiss_import, "CHECKPOINT_BYTES", 1)
    copy, copied = faiss_import.copy_list, []

    def interrupted(*arguments):
        if len(copied) == 4:
            raise KeyboardInterrupt
        copied.append(1)
        copy(*arguments)

    monkeypatch.setattr(faiss_import, "copy_list", interrupted)
    with pytest.raises(KeyboardInterrupt):
        imported(file, passages, root)
    assert not root.exists()
    assert plan_import(read_faiss(file), find_sources([str(passages)]), root, None).begun
    with fails(ArtifactError, "embedder none", "embedder other"):
        imported(file, passages, root, "other")
    monkeypatch.setattr(faiss_import, "copy_list", lambda *arguments: copied.append(1) or copy(*arguments))
    monkeypatch.setattr(faiss_import, "read_passages", lambda _sources: pytest.fail("they are there already"))
    index = imported(file, passages, root)
    assert len(copied) == NLIST
    for name in index.manifest.files | {"manifest.json": None}:
        assert (root / name).read_bytes() == (whole.paths.root / name).read_bytes()


def test_a_finished_import_is_opened_and_another_refused(tmp_path, files, monkeypatch):
    file, passages = files
    root = imported(file, passages, tmp_path / "index").paths.root
    with monkeypatch.context() as here:
        here.setattr(faiss_import, "read_passages", lambda _sources: pytest.fail("they are there already"))
        imported(file, passages, root)
    changed, _ = faiss_index(seed=1)
    write(changed, file)
    with fails(ArtifactError, "files faiss", "--overwrite"):
        imported(file, passages, root)
    index = imported(file, passages, root, overwrite=True)
    assert (index.centroids == changed.quantizer.reconstruct_n()).all()
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "notes.txt").write_text("mine")
    with fails(ArtifactError, tmp_path / "else"):
        imported(file, passages, tmp_path / "else")


def test_too_little_disk_is_said_before(tmp_path, files, monkeypatch):
    index = imported(*files, tmp_path / "index")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with fails(ResourceError, tmp_path / "other", "1000 B"):
        imported(*files, tmp_path / "other")
    with fails(ResourceError, tmp_path / "out.index", "1000 B"):
        export_index(index, tmp_path / "out.index")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.index", "index", "p.jsonl"]


def test_lists_that_end_early_leave_no_file(tmp_path, files):
    index = imported(*files, tmp_path / "index")
    with index.paths.lists.open("r+b") as handle:
        handle.truncate(5000)
    with fails(ArtifactError, "lists.bin", "5,000"):
        export_index(index, tmp_path / "out.index")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.index", "index", "p.jsonl"]


def program():
    small = typer.Typer()
    small.command("import-index")(guarded(import_command))
    small.command("export-index")(guarded(export_command))
    return small


def test_commands(tmp_path):
    ivf, vectors = faiss_index()
    file, passages = write(ivf, tmp_path / "f.index"), write_passages(tmp_path / "p.jsonl")
    root, out = tmp_path / "index", tmp_path / "out.index"
    arguments = ["import-index", str(file), "--passages", str(passages), "-o", str(root)]
    done = runner.invoke(program(), arguments)
    assert (done.exit_code, done.stdout) == (0, f"{root}\n")
    assert "300 vectors of 12 dimensions in 9 lists of float32, ip" in " ".join(done.stderr.split())
    assert "name it with --embedder" in done.stderr
    same_results(Index.open(root), ivf, vectors)
    assert "is already imported" in runner.invoke(program(), arguments).stderr
    other_model = runner.invoke(program(), [*arguments, "--model", "m"])
    assert other_model.exit_code == 1
    assert "was built with embedder none, and this asks for embedder m." in other_model.stderr.replace("\n", " ")
    done = runner.invoke(program(), ["export-index", str(root), "-o", str(out)])
    assert (done.exit_code, done.stdout) == (0, f"{out}\n")
    assert "300 vectors in 9 lists of float32, ip" in done.stderr
    same_results(Index.open(root), faiss.read_index(str(out)), vectors)
    again = runner.invoke(program(), ["export-index", str(root), "-o", str(out)])
    assert again.exit_code == 1
    assert f"{out} exists. Choose another output or add --overwrite." in again.stderr.replace("\n", " ")
    assert runner.invoke(program(), ["export-index", str(root), "-o", str(out), "--overwrite"]).exit_code == 0
    nothing = runner.invoke(
        program(), ["import-index", str(tmp_path / "no.index"), "--passages", str(passages), "-o", str(root)]
    )
    assert nothing.exit_code == 1
    assert "no.index does not exist" in nothing.stderr.replace("\n", "")
