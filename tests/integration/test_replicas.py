"""Replicas: real Ray actors over the engine tests' small world, with a scripted LLM; they die, and nothing is lost."""

import os
import signal
import sys
import threading
from dataclasses import dataclass

import pytest

pytest.importorskip("ray")

from animals import ANIMALS, World
from expect import fails
from telerag_cli.config import PlacementName, ScheduleName
from telerag_cli.distributed.replicas import open_replicas, share_of
from telerag_cli.distributed.session import Cluster, joined
from telerag_cli.engine.admission import Local
from telerag_cli.engine.batch import Outputs, answer_all
from telerag_cli.engine.questions import Question
from telerag_cli.engine.scheduler import Schedule, Scheduler
from telerag_cli.errors import ModelError, UsageError
from telerag_cli.index.artifact import Index

QUESTIONS = [Question(f"{animal}-{n}", f"Where do {animal} number {n} live?") for n in range(4) for animal in ANIMALS]


def script(request):
    text = request.messages[-1].content
    if "broken" in text:
        raise ModelError("the model broke")
    return (
        text.split("Question:")[-1].split("\n")[0].strip() if "passage that answers" in text else f"answer {len(text)}"
    )


@dataclass(frozen=True)
class WorldRecipe:
    """A replica that needs no model."""

    index: Index | None
    token_s: float = 0.002

    def __call__(self, _share):
        if self.index is None:
            raise ModelError("There is no world.", remedy="Make one.")
        return World.over(self.index).engine(script, token_s=self.token_s, concurrency=4)


class Lines:
    def __init__(self, wanted=None):
        self.lines, self.told = [], []
        self.reached = threading.Event()
        self._wanted = wanted

    def outputs(self):
        tell = lambda name, error: self.told.append(f"{name}: {error}")  # noqa: E731
        return Outputs(self.write, None, tell, lambda _count: None)

    def write(self, line):
        self.lines.append(line)
        if self._wanted is not None and len(self.lines) >= self._wanted:
            self.reached.set()

    def by_id(self):
        assert len({line["id"] for line in self.lines}) == len(self.lines), "a question was answered twice"
        return {
            line["id"]: (line.get("answer"), [hit["id"] for hit in line.get("passages", [])]) for line in self.lines
        }


@pytest.fixture(scope="module", autouse=True)
def findable():
    """Workers import this file and its neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = World(tmp_path_factory.mktemp("world") / "index")
    yield made
    made.close()


@pytest.fixture(scope="module")
def scheduler_of(world):
    engine = world.engine(script)

    def make(placement=PlacementName.CACHE_AWARE, name=ScheduleName.SIMILAR):
        schedule = Schedule(name, placement, 20, 2)
        return Scheduler(schedule, engine.embedder, engine.retriever.nearest, world.index.list_bytes, 4, 2)

    return make


@pytest.fixture(scope="module")
def alone(world, scheduler_of):
    """What one process answers."""
    lines = Lines()
    worker = Local(world.engine(script), 4)
    answer_all([worker], scheduler_of(), QUESTIONS, lines.outputs(), answered=set())
    return lines.by_id()


@pytest.fixture(scope="module")
def cluster():
    with joined(cpus=3) as here:
        yield here


@pytest.fixture(scope="module")
def replicas(world, cluster):
    with open_replicas(WorldRecipe(world.index), 2, cluster, world.index.manifest.nlist) as opened:
        yield opened


def run(workers, scheduler, questions, lines):
    return answer_all(workers, scheduler, questions, lines.outputs(), answered=set())


def test_replicas_answer_what_one_process_answers_and_say_what_they_hold(replicas, scheduler_of, alone):
    assert len({replica.about.pid for replica in replicas} - {os.getpid()}) == 2
    for placement in PlacementName:
        lines = Lines()
        summary = run(replicas, scheduler_of(placement), QUESTIONS, lines)
        assert (summary.asked, summary.failed, lines.told) == (len(QUESTIONS), 0, [])
        assert lines.by_id() == alone
    assert all(replica.resident().any() for replica in replicas)


def test_a_question_that_fails_on_a_replica_is_told_in_its_own_words(replicas, scheduler_of):
    lines = Lines()
    summary = run(replicas, scheduler_of(), [QUESTIONS[0], Question("bad", "broken"), QUESTIONS[1]], lines)
    assert (summary.asked, summary.failed) == (3, 1)
    assert lines.told == ["question bad: the model broke"]


@pytest.mark.parametrize("after", [1, 11])
def test_a_killed_replica_loses_nothing_and_doubles_nothing(replicas, scheduler_of, alone, after):
    lines = Lines(wanted=after)
    pid = replicas[after % 2].pid()

    def kill():
        assert lines.reached.wait(30)
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    summary = run(replicas, scheduler_of(), QUESTIONS, lines)
    killer.join()
    assert (summary.asked, summary.failed, lines.told) == (len(QUESTIONS), 0, [])
    assert lines.by_id() == alone
    assert replicas[after % 2].pid() != pid


def test_what_cannot_be_opened_is_told(cluster):
    with fails(ModelError, "world"), open_replicas(WorldRecipe(None), 3, cluster, 4):
        pass


@pytest.mark.parametrize(
    ("cluster_has", "asked", "count", "cpus", "gpus", "beside"),
    [
        (Cluster(1, 2, 0, True), 2, 2, 1.0, 0, 2),
        (Cluster(1, 2, 0, True), 3, 3, 0.6666, 0, 3),  # never more than there are, together
        (Cluster(2, 32, 8, False), None, 8, 4.0, 1, 4),
        (Cluster(3, 12, 0, False), None, 3, 4.0, 0, 1),
    ],
)
def test_the_share_of_a_replica(cluster_has, asked, count, cpus, gpus, beside):
    made, share = share_of(cluster_has, asked)
    assert (made, share.cpus, share.gpus, share.on_its_machine) == (count, cpus, gpus, beside)
    assert share.threads == max(1, int(cpus))


def test_more_replicas_than_gpus_are_refused():
    with fails(UsageError, "--replicas", 9, 8):
        share_of(Cluster(2, 32, 8, False), 9)
