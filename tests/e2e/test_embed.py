"""`telerag embed`: what it writes, what it refuses, and that a killed run resumes to the same bytes."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models
from typer.testing import CliRunner

from expect import fails
from telerag_cli.cli.app import app
from telerag_cli.corpus.passages import Passage
from telerag_cli.embedding.encoder import Encoder, EncoderInfo
from telerag_cli.embedding.job import EmbedConfig, embed
from telerag_cli.embedding.shards import METADATA_KEY
from telerag_cli.errors import ArtifactError, InputError, ResourceError, UsageError
from telerag_cli.files import checksum, read_sealed_json, write_sealed_json
from telerag_cli.progress import silent
from vector_files import contents

KILLS = int(os.environ.get("TELERAG_KILLS", "5"))
TELERAG = [sys.executable, "-c", "from telerag_cli.cli.app import main; main()"]


class Letters:
    """Stands in for an encoder where the job is under test: counts letters, and batches as the real one must."""

    doubts = ()

    def __init__(self, model="letters", precision=None):
        self.info = EncoderInfo(model, 4, "mean", True, None, 16, "xxh3:0")
        self.precision = precision
        self.device = "cpu"
        self.calls = []

    def decide(self, texts):
        self.precision = self.precision or "float32"
        return self.precision

    def encode(self, texts, batch_size=None, advance=None):
        self.calls.append(len(texts))
        if advance:
            advance(len(texts))
        return np.array([[text.count(letter) for letter in "abcd"] for text in texts], np.float32)


def corpus(count, start=0):
    return [Passage(str(index), "a" * index + "b", {"n": index}) for index in range(start, start + count)]


def embed_letters(passages, folder, encoder=None, progress=silent, **config):
    return embed(passages, folder, EmbedConfig(**config), encoder=encoder or Letters(), progress=progress)


def read(folder):
    return pq.read_table([str(path) for path in sorted(folder.glob("shard-*.parquet"))])


def test_folder_is_what_the_contract_says(tmp_path):
    done = []

    @contextlib.contextmanager
    def progress(description, total, *, unit=""):
        yield done.append

    report = embed_letters(corpus(10), tmp_path / "e", shard_rows=4, progress=progress)
    assert (report.rows, report.embedded, report.shards, report.precision) == (10, 10, 3, "float32")
    assert sum(done) == 10
    manifest = json.loads((tmp_path / "e/embeddings.json").read_text())
    assert (manifest["complete"], manifest["rows"]) == (True, 10)
    assert [shard["rows"] for shard in manifest["shards"]] == [4, 4, 2]
    for shard in manifest["shards"]:
        path = tmp_path / "e" / shard["name"]
        assert (shard["bytes"], shard["checksum"]) == (path.stat().st_size, checksum(path))
    table = read(tmp_path / "e")
    assert [str(field.type) for field in table.schema] == [*["string"] * 3, "fixed_size_list<element: float>[4]"]
    assert table.column("id").to_pylist() == [str(index) for index in range(10)]
    assert json.loads(table.column("metadata")[3].as_py()) == {"n": 3}
    assert table.column("embedding")[3].as_py() == [3, 1, 0, 0]
    header = json.loads(pq.read_schema(tmp_path / "e/shard-00002.parquet").metadata[METADATA_KEY])
    expected = {"format": "telerag-embeddings", "version": 1, "model": "letters", "dimension": 4, "pooling": "mean"}
    expected |= {"normalized": True, "prompt": None, "max_tokens": 16, "rows": 2, "first_row": 8}
    assert {key: header[key] for key in expected} == expected


def test_float16_is_stored_as_asked(tmp_path):
    embed_letters(corpus(3), tmp_path, dtype="float16")
    assert str(read(tmp_path).schema.field("embedding").type) == "fixed_size_list<element: halffloat>[4]"


@pytest.mark.parametrize(
    ("name", "wrong"), [("dtype", "int8"), ("precision", "int4"), ("batch_size", 0), ("shard_rows", 0), ("limit", 0)]
)
def test_a_config_has_only_values_that_make_sense(name, wrong):
    with fails(UsageError, f"--{name.replace('_', '-')}", wrong):
        EmbedConfig(**{name: wrong})


def test_files_are_read_and_the_limit_kept(tmp_path):
    (tmp_path / "c.jsonl").write_text("".join(f'{{"id": {n}, "text": "{"ab" * n}"}}\n' for n in range(1, 9)))
    encoder = Letters()
    encoder.tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    embed(tmp_path / "c.jsonl", str(tmp_path / "e"), EmbedConfig(limit=3), encoder=encoder)
    assert read(tmp_path / "e").column("embedding").to_pylist() == [[n, n, 0, 0] for n in (1, 2, 3)]


def test_resumes_at_the_shard_and_grows_with_the_corpus(tmp_path):
    embed_letters(corpus(10), tmp_path / "whole", shard_rows=4)

    def dies():
        yield from corpus(7)
        raise InputError("line 8 is bad")

    for _ in range(2):  # the second time there is nothing new to keep
        with pytest.raises(InputError):
            embed_letters(dies(), tmp_path / "e", shard_rows=4)
        assert json.loads((tmp_path / "e/embeddings.json").read_text())["complete"] is False
        assert sorted(path.name for path in (tmp_path / "e").iterdir()) == ["embeddings.json", "shard-00000.parquet"]
    embed_letters(corpus(6), tmp_path / "e", shard_rows=4)
    encoder = Letters()
    report = embed_letters(corpus(10), tmp_path / "e", encoder, shard_rows=4)
    assert encoder.calls == [4, 2]
    assert (report.rows, report.embedded) == (10, 6)
    assert contents(tmp_path / "e") == contents(tmp_path / "whole")
    again = Letters()
    assert embed_letters(corpus(10), tmp_path / "e", again, shard_rows=4).embedded == 0
    assert again.calls == []
    assert contents(tmp_path / "e") == contents(tmp_path / "whole")


def test_resumed_run_computes_in_the_recorded_type(tmp_path):
    embed_letters(corpus(3), tmp_path, Letters(precision="bfloat16"), shard_rows=2)
    assert embed_letters(corpus(5), tmp_path, shard_rows=2).precision == "bfloat16"
    with fails(ArtifactError, "precision bfloat16", "precision float32"):
        embed_letters(corpus(5), tmp_path, Letters(precision="float32"), shard_rows=2)


@pytest.mark.parametrize(
    ("encoder", "config", "rows", "values"),
    [
        (Letters("other"), {}, corpus(6), ["model letters", "model other"]),
        (None, {"dtype": "float16"}, corpus(6), ["dtype float32", "dtype float16"]),
        (None, {"shard_rows": 3}, corpus(6), ["shard_rows 2", "shard_rows 3"]),
        (None, {}, corpus(6, start=1), ["shard-00000.parquet", "rows 0 to 1"]),
        (None, {}, [*corpus(5), Passage("5", "x")], ["shard-00002.parquet", "rows 4 to 5"]),
        (None, {}, corpus(5), ["shard-00002.parquet", "rows 4 to 5"]),
        (None, {}, corpus(4), ["shard-00002.parquet", "4 passages"]),
    ],
)
def test_what_does_not_belong_in_the_folder_is_refused(tmp_path, encoder, config, rows, values):
    embed_letters(corpus(6), tmp_path, shard_rows=2)
    before = contents(tmp_path)
    with fails(ArtifactError, *values) as caught:
        embed_letters(rows, tmp_path, encoder, **{"shard_rows": 2, **config})
    assert caught.value.remedy
    assert contents(tmp_path) == before


def test_empty_corpus_leaves_no_embeddings(tmp_path):
    (tmp_path / "mine").mkdir()
    for folder in (tmp_path / "e", tmp_path / "mine"):
        with pytest.raises(InputError):
            embed_letters([], folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with fails(ArtifactError, tmp_path / "file"):
        embed_letters(corpus(1), tmp_path / "file")
    with fails(ResourceError, "/sys/telerag"):
        embed_letters(corpus(1), Path("/sys/telerag"))
    (tmp_path / "shard-00000.parquet").write_text("")
    with fails(ArtifactError, "embeddings.json"):
        embed_letters(corpus(1), tmp_path)


def test_damaged_shard_is_named(tmp_path):
    embed_letters(corpus(3), tmp_path)
    (tmp_path / "shard-00000.parquet").write_bytes(b"PAR1")
    with fails(ArtifactError, "shard-00000.parquet"):
        embed_letters(corpus(3), tmp_path)


@pytest.mark.parametrize("finished", [True, False])
def test_a_shard_whose_bytes_changed_is_made_again(tmp_path, finished):
    embed_letters(corpus(10), tmp_path / "whole", shard_rows=4)
    whole, count = contents(tmp_path / "whole"), 0
    for place in range(0, len(whole["shard-00001.parquet"]), 97):
        folder = tmp_path / "e"
        shutil.copytree(tmp_path / "whole", folder)
        if not finished:
            known = read_sealed_json(folder / "embeddings.json")
            write_sealed_json(folder / "embeddings.json", {**known, "complete": False})
        data = bytearray(whole["shard-00001.parquet"])
        data[place] ^= 1
        (folder / "shard-00001.parquet").write_bytes(data)
        with contextlib.suppress(ArtifactError):  # what it was made of cannot be read any more
            report = embed_letters(corpus(10), folder, shard_rows=4)
            assert (report.embedded, len(report.notes)) == (4, 1)
            assert contents(folder) == whole
            count += 1
        shutil.rmtree(folder)
    assert count > 5


def test_second_writer_is_refused(tmp_path):
    def rows():
        with fails(ArtifactError, tmp_path):
            embed_letters(corpus(1), tmp_path)
        yield from corpus(2)

    assert embed_letters(rows(), tmp_path).rows == 2


# The command, with the real model.


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "c.jsonl"
    words = ["list", "dict", "set", "tuple", "str", "bytes", "int", "float"]
    rng = random.Random(0)
    rows = [{"id": index, "text": " ".join(rng.choices(words, k=1 + index % 9))} for index in range(48)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def telerag(*arguments, **options):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


@pytest.mark.model
def test_command_prints_the_folder_and_says_the_rate(lines, tmp_path):
    result = telerag("embed", lines, "-o", tmp_path / "e", "--device", "cpu", "--shard-rows", 20)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'e'}\n"
    assert "Embedded 48 passages in" in result.stderr
    assert "passages/s" in result.stderr
    table = read(tmp_path / "e")
    vectors = np.array(table.column("embedding").to_pylist(), np.float32)
    expected = Encoder.load(device="cpu").encode_queries(table.column("text").to_pylist())
    assert (vectors * expected).sum(axis=1).min() >= 0.999
    again = telerag("embed", lines, "-o", tmp_path / "e", "--device", "cpu", "--shard-rows", 20)
    assert again.exit_code == 0
    assert "Already complete: 48 passages in 3 shards" in again.stderr


@pytest.mark.model
def test_command_reads_text_folders_in_chunks_that_fit(tmp_path):
    (tmp_path / "docs").mkdir()
    text = "The quick brown fox jumps over the lazy dog. " * 100
    (tmp_path / "docs/a.txt").write_text(text)
    assert telerag("embed", tmp_path / "docs", "-o", tmp_path / "e").exit_code == 0
    rows = read(tmp_path / "e").drop_columns("embedding").to_pylist()
    encoder = Encoder.load(device="cpu")
    assert len(rows) > 1
    for number, row in enumerate(rows):
        where = json.loads(row["metadata"])
        assert row["id"] == f"a.txt#{number}"
        assert text[where["start"] : where["end"]] == row["text"]
        assert encoder.count_tokens(row["text"]) <= encoder.info.max_tokens


@pytest.mark.model
def test_bad_lines_on_standard_input(tmp_path):
    piped = '{"text": "one"}\noops\n{"text": "two"}\n'
    refused = telerag("embed", "-", "-o", tmp_path / "e", input=piped)
    assert refused.exit_code == 1
    assert "error: <stdin>:2: not JSON" in refused.stderr
    assert refused.stdout == ""
    assert not (tmp_path / "e").exists()
    skipped = telerag("embed", "-", "-o", tmp_path / "e", "--skip-bad", input=piped)
    assert skipped.exit_code == 0
    assert "Left out: 1 bad line or file: <stdin>:2: not JSON" in skipped.stderr
    assert read(tmp_path / "e").column("id").to_pylist() == ["<stdin>:1", "<stdin>:3"]


@pytest.mark.model
def test_limit_then_all_equals_all(lines, tmp_path):
    for folder, limits in (("a", ["--limit", 7]), ("a", []), ("b", [])):
        assert telerag("embed", lines, "-o", tmp_path / folder, "--shard-rows", 5, *limits).exit_code == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_missing_device_is_an_error_before_any_work(lines, tmp_path):
    result = telerag("embed", lines, "-o", tmp_path / "e", "--device", "cuda:99")
    assert result.exit_code == 1
    assert "cuda:99 was asked for" in result.stderr
    assert not (tmp_path / "e").exists()


@pytest.mark.model
def test_disk_that_takes_no_more_keeps_whole_shards_and_resumes(lines, tmp_path):
    command = ["embed", str(lines), "-o", str(tmp_path / "e"), "--shard-rows", "20"]
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    run = subprocess.run(
        [sys.executable, "-c", limited + "from telerag_cli.cli.app import main; main()", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "shard-00000.parquet could not be written: File too large" in run.stderr
    assert "Traceback" not in run.stderr
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["embeddings.json"]
    assert telerag(*command).exit_code == 0
    assert json.loads((tmp_path / "e/embeddings.json").read_text())["complete"] is True


@pytest.mark.model
def test_killed_at_random_moments_resumes_to_the_same_bytes(lines, tmp_path):
    """TELERAG_KILLS sets how often; each run dies at a random moment after it has begun to write."""
    command = [*TELERAG, "embed", str(lines), "--device", "cpu", "--shard-rows", "1", "-o"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    expected = contents(tmp_path / "whole")
    rng = random.Random(1)
    killed, seen = 0, []
    folder = tmp_path / "e"
    for _ in range(KILLS):
        before = contents(folder) if folder.exists() else {}
        if before.keys() >= expected.keys():
            for path in folder.iterdir():  # it was finished before the kill: begin anew
                path.unlink()
            before = {}
        process = subprocess.Popen([*command, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (
            not folder.exists() or {path.name for path in folder.iterdir()} == before.keys()
        ):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.08))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        after = contents(folder)
        seen.append(len(after))
        whole = {name: data for name, data in after.items() if name.startswith("shard-")}
        assert whole.items() <= expected.items()
    subprocess.run([*command, str(folder)], check=True, capture_output=True)
    assert contents(folder) == expected
    assert killed > KILLS // 2, f"{killed} of {KILLS} runs were still going; files seen: {seen}"
