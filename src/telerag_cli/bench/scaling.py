"""The suite of replicas: some that really run on this machine, and more of them simulated from what one of those can do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from telerag_cli.arrays import BoolArray, IntArray
from telerag_cli.bench.answering import Outcome
from telerag_cli.bench.calibrating import Calibration, host_of
from telerag_cli.bench.results import Cell, Check, Ratio
from telerag_cli.bench.simulating.deployment import Deployment, Groups, Simulated, simulate
from telerag_cli.bench.simulating.noting import Recorder, Translator
from telerag_cli.bench.simulating.rates import Host, Rates
from telerag_cli.bench.simulating.replica import Tier
from telerag_cli.bench.simulating.work import Question, copies
from telerag_cli.bench.statistics import ratio, short, summary
from telerag_cli.config import CacheKind
from telerag_cli.engine.batch import Outputs, answer_all
from telerag_cli.engine.dispatch import Dispatcher, ReplicaState
from telerag_cli.engine.engine import Answered, Engine
from telerag_cli.engine.micro_batch import MicroBatch
from telerag_cli.engine.placement import make_placement
from telerag_cli.engine.questions import Question as Asked
from telerag_cli.engine.scheduler import Grouping, Schedule, Scheduler
from telerag_cli.engine.workers import Local, Worker
from telerag_cli.errors import TeleragError
from telerag_cli.index.artifact import Index
from telerag_cli.pipelines.base import Pipeline
from telerag_cli.progress import Advance

REPLICAS, SIMULATED = "replicas", "simulated"
"""The two systems."""
WITHIN = 0.1
"""How far a simulated throughput may lie from the measured one."""
ASSIGNMENTS = 5
"""Times that the dispatcher's decisions are timed."""


@dataclass(frozen=True)
class Fleet:
    """Replicas that are ready, and what gives them their questions."""

    workers: Sequence[Worker]
    scheduler: Scheduler


class OpenFleet(Protocol):
    """Opens so many replicas for a while."""

    def __call__(self, replicas: int) -> AbstractContextManager[Fleet]:
        """Each time with empty arenas."""


@dataclass(frozen=True)
class Batch:
    """What is asked."""

    warmups: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Recorded:
    """What the questions asked for, and what giving them out takes; seconds."""

    questions: tuple[Question, ...]
    schedule: Schedule
    cut_s: float
    """For each question, until it is in a micro-batch."""
    took_s: float
    """In which this process alone answered the batch while it was recorded."""


@dataclass(frozen=True)
class Extent:
    """For how many replicas, and how often."""

    measured: tuple[int, ...]
    simulated: tuple[int, ...]
    per_host: int
    """Replicas of one machine, where more than those are simulated."""
    prompts_per_replica: int
    """A larger number of replicas gets a larger batch: so many questions for each, and never fewer than were measured."""
    repeats: int
    seed: int

    def count(self, replicas: int, measured: int) -> int:
        """Questions in a batch for so many replicas."""
        return max(measured, self.prompts_per_replica * replicas)

    @property
    def calibrated(self) -> tuple[int, ...]:
        """Replicas side by side whose rates are needed."""
        beside = [min(count, self.per_host) for count in (*self.measured, *self.simulated)]
        return tuple(sorted({1, *beside}))


@dataclass(frozen=True)
class Turn:
    """One run of the batch by so many replicas."""

    replicas: int
    wall_s: float
    answers: tuple[Answered | None, ...]
    """In the order of the questions; None where one failed."""
    errors: tuple[str, ...]
    waited_s: tuple[float, ...]
    """For each answer, from giving its question to the replica until it came."""

    @property
    def completed(self) -> list[Answered]:
        """The answers that there are."""
        return [answered for answered in self.answers if answered is not None]

    @property
    def handing_s(self) -> float:
        """What passing a question to a replica and its answer back took, beside answering; the median."""
        beside = [
            waited_s - answered.timings["total_s"]
            for waited_s, answered in zip(self.waited_s, self.completed, strict=True)
        ]
        return max(statistics.median(beside), 0.0) if beside else 0.0


class _Noting:
    """A `Worker` that keeps what the one inside answers."""

    def __init__(self, inside: Worker) -> None:
        self.at_once = inside.at_once
        self.kept: dict[str, tuple[Answered, float]] = {}
        """The answer to each question, and what it took."""
        self._inside = inside

    async def answer(self, batch: MicroBatch, place: int) -> Answered:
        """See `Worker`."""
        began_s = time.perf_counter()
        answered = await self._inside.answer(batch, place)
        self.kept[batch.questions[place]] = answered, time.perf_counter() - began_s
        return answered

    def resident(self) -> BoolArray:
        """See `Worker`."""
        return self._inside.resident()


def record(engine: Engine, pipeline: Pipeline, at_once: int, schedule: Schedule, batch: Batch) -> Recorded:
    """Have the engine of this process answer the batch, and note what that asks for.

    Args:
        engine: what answers.
        pipeline: how.
        at_once: questions.
        schedule: how they are put together.
        batch: what is asked.

    Raises:
        TeleragError: a question could not be answered.
    """
    recorder = Recorder()
    worker = Local(engine, at_once, recorder.over(pipeline))
    scheduler = Scheduler.over(engine, schedule)
    scheduler.cut(batch.questions[:2])  # loads what only the first has to load
    began_s = time.perf_counter()
    scheduler.cut(batch.questions)
    cut_s = (time.perf_counter() - began_s) / len(batch.questions)
    turn = run_batch(Fleet([worker], scheduler), batch)
    if turn.errors:
        raise TeleragError(f"What the simulation is to go by could not be recorded: {turn.errors[0]}")
    settings = engine.settings
    noted = {each.question: each for each in recorder.noted}
    kept = [noted[text] for text in batch.questions]
    translator = Translator(engine.embedder, engine.retriever, settings.nprobe, settings.lookahead, kept)
    questions = tuple(translator.question(number, each) for number, each in enumerate(kept))
    return Recorded(questions, schedule, cut_s, turn.wall_s)


def run_batch(fleet: Fleet, batch: Batch) -> Turn:
    """Have the replicas answer the batch once, after a few questions that warm them up.

    Raises:
        TeleragError: none of the questions for warming up could be answered.
    """
    if batch.warmups:
        # Each replica has its share: what they load with their first question is loaded then.
        each = tuple(text for text in batch.warmups for _ in fleet.workers)
        warm = _answer(fleet, replace(batch, questions=each))
        if warm.errors and not warm.completed:
            raise TeleragError(f"No replica can answer '{batch.warmups[0]:.60}': {warm.errors[0]}")
    return _answer(fleet, batch)


def _answer(fleet: Fleet, batch: Batch) -> Turn:
    workers = [_Noting(worker) for worker in fleet.workers]
    errors: list[str] = []
    outputs = Outputs(lambda _line: None, None, errors.append, lambda _count: None)
    asked = [Asked(str(number), text) for number, text in enumerate(batch.questions)]
    summary = answer_all(workers, fleet.scheduler, asked, outputs, answered=set())
    kept = {text: both for worker in workers for text, both in worker.kept.items()}
    found = [kept.get(text) for text in batch.questions]
    return Turn(
        len(workers),
        summary.wall_s,
        tuple(both[0] if both else None for both in found),
        tuple(errors),
        tuple(both[1] for both in found if both),
    )


def measure_turns(extent: Extent, open_fleet: OpenFleet, batch: Batch, advance: Advance) -> list[Turn]:
    """The batch by each number of replicas, as often as is asked for; which goes first rotates, and each begins anew.

    Args:
        extent: how many.
        open_fleet: opens them.
        batch: what is asked.
        advance: told of each turn.
    """
    turns = []
    for repeat in range(extent.repeats):
        first = repeat % max(len(extent.measured), 1)
        for count in (*extent.measured[first:], *extent.measured[:first]):
            with open_fleet(count) as fleet:
                turns.append(run_batch(fleet, batch))
            advance(1)
    return turns


def handing_s(turns: Sequence[Turn]) -> float:
    """What passing a question to a replica and its answer back took where the fewest ran; 0 if none did."""
    fewest = min((turn.replicas for turn in turns), default=0)
    took_s = [turn.handing_s for turn in turns if turn.replicas == fewest]
    return statistics.fmean(took_s) if took_s else 0.0


def assign_s(recorded: Recorded, index: Index, replicas: int) -> float:
    """What the dispatcher really takes for each micro-batch with so many replicas, on this machine; seconds.

    All of them are free and hold nothing: no assignment looks at more.
    """
    size = recorded.schedule.micro_batch
    likely = [question.likely for question in recorded.questions]
    count = max(replicas, 1)
    batches = [
        MicroBatch(
            number=number,
            lists=np.logical_or.reduce([likely[(number * size + place) % len(likely)] for place in range(size)]),
        )
        for number in range(count)
    ]
    empty = np.zeros(index.manifest.nlist, np.bool_)
    states = [ReplicaState(number, 1, empty) for number in range(count)]
    took_s = []
    for _ in range(ASSIGNMENTS):
        dispatcher = Dispatcher(index.list_bytes, make_placement(recorded.schedule.placement))
        dispatcher.add(batches)
        began_s = time.perf_counter()
        dispatcher.assign(states)
        took_s.append(time.perf_counter() - began_s)
    return statistics.median(took_s) / count


def groups_of(questions: Sequence[Question], schedule: Schedule, list_bytes: IntArray) -> list[Groups]:
    """Micro-batches of each batch that the scheduler looks at, as it would make them."""
    cut: list[Groups] = []
    grouping = Grouping(schedule, list_bytes, int(questions[0].likely.sum()))
    for start in range(0, len(questions), schedule.batch_size):
        some = questions[start : start + schedule.batch_size]
        places = grouping.cut(len(some), np.stack([question.ranked for question in some]))
        cut.append([[start + place for place in group.tolist()] for group in places])
    return cut


@dataclass(frozen=True)
class Simulator:
    """All that simulating any number of replicas takes."""

    index: Index
    recorded: Recorded
    calibrations: Mapping[int, Calibration]
    """By the number of replicas side by side."""
    extent: Extent
    cache: CacheKind
    handing_s: float
    """To a replica and back."""

    def run(self, replicas: int) -> Simulated:
        """So many replicas."""
        rates, host = self.machine(replicas)
        together = self.calibrations[min(replicas, self.extent.per_host)]
        count = self.extent.count(replicas, len(self.recorded.questions))
        questions = copies(self.recorded.questions, count, self.index.list_bytes, self.extent.seed)
        deployment = Deployment(
            index=self.index,
            replicas=replicas,
            rates=rates,
            host=host,
            tier=Tier(together.arena_bytes, together.depth, self.cache),
            placement=self.recorded.schedule.placement,
            at_once=together.at_once,
            cut_s=self.recorded.cut_s,
            assign_s=assign_s(self.recorded, self.index, replicas),
            handing_s=self.handing_s,
        )
        return simulate(deployment, questions, groups_of(questions, self.recorded.schedule, self.index.list_bytes))

    def machine(self, replicas: int) -> tuple[Rates, Host]:
        """A replica's rates, and its host's."""
        return host_of(self.calibrations[1], self.calibrations[min(replicas, self.extent.per_host)])


def outcome(
    turns: Sequence[Turn],
    simulated: Mapping[int, Simulated],
    simulator: Simulator,
    measured: int,
    *,
    detailed: bool = False,
) -> Outcome:
    """Everything side by side.

    Args:
        turns: of the real replicas.
        simulated: by their number.
        simulator: what simulated them.
        measured: questions of the batch that the real ones answered.
        detailed: whether to keep every answer, and every simulated one's time.
    """
    counts = sorted({turn.replicas for turn in turns})
    by_count = {count: [turn for turn in turns if turn.replicas == count] for count in counts}
    cells = [_measured_cell(count, by_count, detailed=detailed) for count in counts]
    cells += [_simulated_cell(count, found, simulated, detailed=detailed) for count, found in sorted(simulated.items())]
    cells.sort(key=lambda cell: cell.key["replicas"])
    compared = [count for count in counts if count in simulated and len(simulated[count].answered_s) == measured]
    ratios = list(_ratios(compared, by_count, simulated, simulator.extent.seed))
    checks = list(_checks(by_count, compared, simulated))
    return Outcome(_systems(counts, simulator), cells, ratios, checks, _notes(simulator, measured))


def _throughput(turn: Turn) -> float:
    return len(turn.completed) / turn.wall_s


def _throughput_of(turns: Sequence[Turn]) -> float:
    """Over all repeats."""
    return sum(len(turn.completed) for turn in turns) / sum(turn.wall_s for turn in turns)


def _measured_cell(count: int, by_count: Mapping[int, Sequence[Turn]], *, detailed: bool) -> Cell:
    turns = by_count[count]
    answers = [answered for turn in turns for answered in turn.completed]
    wall_s = sum(turn.wall_s for turn in turns)
    values: dict[str, Any] = {
        "simulated": False,
        "completed": len(answers),
        "failed": sum(len(turn.errors) for turn in turns),
        "duration": short(wall_s),
        "request_throughput": short(_throughput_of(turns)),
        **_relative(count, {each: _throughput_of(some) for each, some in by_count.items()}),
        "hosts": 1,
        **summary("e2el_ms", [1e3 * answered.timings["total_s"] for answered in answers]),
    }
    joins = [join for answered in answers for join in answered.joins]
    if wanted := sum(join.lists_wanted for join in joins):
        values["hit_share"] = short(sum(join.lists_hit for join in joins) / wanted)
        values |= _bytes(
            len(answers),
            **{
                name: sum(getattr(join, name) for join in joins)
                for name in ("bytes_wanted", "bytes_moved", "bytes_missed")
            },
        )
    if errors := [error for turn in turns for error in turn.errors]:
        values["first_error"] = errors[0]
    kept = [
        {
            "repeat": number,
            "wall_ms": short(1e3 * turn.wall_s),
            "answer": answered.answer,
            "e2el_ms": short(1e3 * answered.timings["total_s"]),
        }
        for number, turn in enumerate(turns)
        for answered in turn.completed
    ]
    return Cell(REPLICAS, {"replicas": count}, values, kept if detailed else [])


def _simulated_cell(count: int, found: Simulated, simulated: Mapping[int, Simulated], *, detailed: bool) -> Cell:
    questions = len(found.answered_s)
    values: dict[str, Any] = {
        "simulated": True,
        "completed": questions,
        "failed": 0,
        "duration": short(found.took_s),
        "request_throughput": short(found.questions_per_s),
        **_relative(count, {each: other.questions_per_s for each, other in simulated.items()}),
        "bottleneck": found.bottleneck.value,
        "hosts": found.hosts,
        "hit_share": short(found.hit_share),
        **_bytes(questions, found.bytes_wanted, found.bytes_moved, found.bytes_missed),
        "micro_batches": sum(found.micro_batches),
        "used": {name: short(value) for name, value in asdict(found.used).items()},
    }
    return Cell(
        SIMULATED,
        {"replicas": count},
        values,
        [{"question": number, "answered_s": short(each)} for number, each in enumerate(found.answered_s)]
        if detailed
        else [],
    )


def _relative(count: int, throughputs: Mapping[int, float]) -> dict[str, float]:
    """Against one replica of the same kind, if there is one."""
    if 1 not in throughputs:
        return {}
    speedup = throughputs[count] / throughputs[1]
    return {"speedup": short(speedup), "efficiency_share": short(speedup / count)}


def _bytes(answers: int, bytes_wanted: int, bytes_moved: int, bytes_missed: int) -> dict[str, int]:
    """Of an answer."""
    return {
        "bytes_wanted": bytes_wanted // answers,
        "bytes_moved": bytes_moved // answers,
        "bytes_missed": bytes_missed // answers,
    }


def _ratios(
    compared: Sequence[int], by_count: Mapping[int, Sequence[Turn]], simulated: Mapping[int, Simulated], seed: int
) -> Iterator[Ratio]:
    """Simulated by measured throughput, repeat by repeat."""
    for count in compared:
        pairs = [(simulated[count].questions_per_s, _throughput(turn)) for turn in by_count[count] if turn.completed]
        yield ratio({"replicas": count}, SIMULATED, REPLICAS, "request_throughput", pairs, seed=seed)


def _checks(
    by_count: Mapping[int, Sequence[Turn]], compared: Sequence[int], simulated: Mapping[int, Simulated]
) -> Iterator[Check]:
    turns = [turn for some in by_count.values() for turn in some]
    if turns:
        asked, failed = sum(len(turn.answers) for turn in turns), sum(len(turn.errors) for turn in turns)
        yield Check("all completed", failed == 0, f"{failed} of {asked} questions failed.")
        whole = [[turn.answers[place] for turn in turns] for place in range(len(turns[0].answers))]
        same = sum(None not in some and len({each.answer for each in some if each}) == 1 for some in whole)
        says = f"{same} of {len(whole)} questions have the same answer by all replicas, each time."
        yield Check("same answers", same == len(whole), says)
    if compared:
        said, off = [], []
        for count in compared:
            real, predicted = (_throughput_of(by_count[count]), simulated[count].questions_per_s)
            off.append(abs(predicted / real - 1) if real else float("inf"))
            words = f"{count} {'replica' if count == 1 else 'replicas'}: {predicted:.3g} questions/s simulated, {real:.3g} measured"
            said.append(words + (f" ({predicted / real:.2f})" if real else ""))
        yield Check("simulation within 10 %", max(off) <= WITHIN, "; ".join(said) + ".")


def _systems(counts: Sequence[int], simulator: Simulator) -> dict[str, dict[str, Any]]:
    extent, schedule = simulator.extent, simulator.recorded.schedule
    common = {
        "schedule": schedule.name.value,
        "placement": schedule.placement.value,
        "micro_batch": schedule.micro_batch,
        "batch_size": schedule.batch_size,
    }
    systems: dict[str, dict[str, Any]] = {}
    if counts:
        systems[REPLICAS] = {
            "what": "Ray actors on this machine, each with an LLM, an arena and a share of the cores; measured",
            **common,
        }
    systems[SIMULATED] = {
        "what": "simulated, not run: the product's own scheduler, batcher, lookahead and arenas over clocks whose rates were measured",
        **common,
        "replicas_per_host": extent.per_host,
        "prompts_per_replica": extent.prompts_per_replica,
        "recorded_throughput": short(len(simulator.recorded.questions) / simulator.recorded.took_s),
        "cut_s": short(simulator.recorded.cut_s),
        "handing_s": short(simulator.handing_s),
        "calibrated": {f"{count} side by side": found.described() for count, found in simulator.calibrations.items()},
    }
    return systems


def _notes(simulator: Simulator, measured: int) -> list[str]:
    extent = simulator.extent
    return [
        "Figures of the system 'simulated' were not measured: they are what a discrete-event simulation says. Its rates are measured in "
        "a replica's share of the machine, beside as many busy neighbours; no rate was fitted to a time of whole questions.",
        f"Simulated machines have {extent.per_host} {'replica' if extent.per_host == 1 else 'replicas'} each and nothing in common but the "
        "scheduler.",
        f"The batch has {measured} questions, or {extent.prompts_per_replica} for each replica if that is more; beyond those that were "
        "recorded, they are copies of them on other lists of the same sizes.",
        "efficiency: throughput over that of one replica of the same system, divided by the number of replicas.",
        "used: shares of the time, on average over replicas or hosts; link counts lookahead too, awaiting only what retrievals waited for.",
    ]
