"""The suite of replicas: what is recorded, measured, simulated and shown; over the small world, without Ray and without a model."""

import contextlib
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from animals import ANIMALS, World
from telerag_cli.bench import drawings, markdown, plots, tables
from telerag_cli.bench.calibrating import Calibration, Kind, calibrate, host_of
from telerag_cli.bench.page import page
from telerag_cli.bench.results import SuiteResult
from telerag_cli.bench.scaling import (
    REPLICAS,
    SIMULATED,
    Batch,
    Extent,
    Fleet,
    Simulator,
    assign_s,
    groups_of,
    handing_s,
    measure_turns,
    outcome,
    record,
    run_batch,
)
from telerag_cli.bench.simulating.work import Ahead, Lookup, Text
from telerag_cli.bench.suites import SUITES, SuiteName
from telerag_cli.cli.bench_scaling import scaling
from telerag_cli.cli.grouped import expanded
from telerag_cli.cli.guard import guarded
from telerag_cli.config import CacheKind, Lookahead, ScheduleName
from telerag_cli.distributed.replicas import Opened, Share
from telerag_cli.engine.scheduler import Schedule, Scheduler
from telerag_cli.engine.workers import Local
from telerag_cli.errors import EXIT_USAGE, ModelError, TeleragError
from telerag_cli.index.artifact import Index
from telerag_cli.pipelines.registry import PipelineName, make_pipeline
from test_simulation import RATES

QUESTIONS = tuple(f"Where do {animal} number {n} live?" for n in range(2) for animal in ANIMALS[:4])
SCHEDULE = Schedule(ScheduleName.SIMILAR, micro_batch=2, max_wait_s=0.01)
TOKEN_S = 0.001


def script(request):
    text = request.messages[-1].content
    if "broken" in text:
        raise ModelError("the model broke")
    if "passage that answers" in text:
        return text.split("Question:")[-1].split("\n")[0].strip() + " in place 8 and eat"
    return f"answer {len(text)}"


def batch_of(questions=QUESTIONS, pipeline=PipelineName.HYDE, lookahead=Lookahead.REFINED, warmups=()):
    return Batch(tuple(warmups), tuple(questions), pipeline, lookahead)


def fleets(engine_of, opened=None, token_s=TOKEN_S):
    """Opens engines of this process, each a replica."""

    @contextlib.contextmanager
    def open_fleet(replicas):
        if opened is not None:
            opened.append(replicas)
        engines = [engine_of(script, token_s=token_s) for _ in range(replicas)]
        workers = [Local(each, make_pipeline(PipelineName.HYDE), "hyde", 4) for each in engines]
        yield Fleet(workers, Scheduler.over(engines[0], SCHEDULE))

    return open_fleet


def recorded(engine_of, lookahead=Lookahead.REFINED, pipeline=PipelineName.HYDE, questions=QUESTIONS):
    engine = engine_of(script, lookahead, token_s=TOKEN_S)
    return engine, record(engine, make_pipeline(pipeline), 4, SCHEDULE, batch_of(questions, pipeline, lookahead))


def extent(measured=(1, 2), simulated=(1, 2, 8), **changes):
    return replace(Extent(measured, simulated, 2, 4, 2, 0), **changes)


def calibration(replicas, index, *, link=1.0):
    rates = replace(RATES, link_bytes_per_s=link * RATES.link_bytes_per_s)
    arena = int(index.list_bytes.sum()) // 2
    return Calibration(replicas, 1, 4, arena, 2, "host", rates, replicas * rates.link_bytes_per_s)


def simulator_of(engine, made, some):
    index = engine.retriever.index
    found = {count: calibration(count, index) for count in some.calibrated}
    return Simulator(index, made, found, some, CacheKind.HOTNESS, 0.001)


def found_of(engine_of, some=None):
    some = some or extent()
    engine, made = recorded(engine_of)
    turns = measure_turns(some, fleets(engine_of), batch_of(), lambda _count: None)
    simulator = simulator_of(engine, made, some)
    simulated = {count: simulator.run(count) for count in some.simulated}
    return outcome(turns, simulated, simulator, len(QUESTIONS)), simulated


def result_of(found):
    suite = SUITES[SuiteName.SCALING]
    return SuiteResult(
        SuiteName.SCALING.value,
        suite.title,
        suite.stands_for,
        "2001-02-03T04:05:06+00:00",
        1.0,
        "telerag",
        {},
        {},
        {},
        found.systems,
        list(suite.axes),
        found.cells,
        found.ratios,
        found.checks,
        found.notes,
    )


# What is recorded.


def test_a_question_is_recorded_as_its_pipeline_asked(engine_of):
    engine, made = recorded(engine_of)
    assert [each.number for each in made.questions] == list(range(len(QUESTIONS)))
    for question, text in zip(made.questions, QUESTIONS, strict=True):
        ahead, (passage,), (lookup,), (answer,) = question.steps
        assert isinstance(ahead, Ahead)
        assert ahead.with_others
        assert isinstance(passage, Text)
        assert (passage.stage, answer.stage) == ("passage", "answer")
        # Eleven words, and the choice that ends the text.
        assert passage.picks == 12
        assert isinstance(lookup, Lookup)
        query = engine.embedder.encode_queries([f"{text} in place 8 and eat"])
        assert sorted(lookup.probes[0]) == sorted(engine.retriever.nearest(query, engine.settings.nprobe)[0])
        assert question.likely.sum() == engine.settings.nprobe
        # Lookahead follows at shares of eleven tokens, rounded up, each time with an order of all lists.
        assert [follow.at_tokens for follow in passage.follows] == [2, 4, 5, 7, 9, 10]
        assert all(len(np.unique(follow.order)) == len(ahead.order) for follow in passage.follows)
        assert not answer.follows


def test_the_last_order_knows_the_query_better_than_the_first(engine_of):
    engine, made = recorded(engine_of)
    nprobe, first, last = engine.settings.nprobe, 0, 0
    for question in made.questions:
        ahead, (passage,), (lookup,), _answer = question.steps
        first += len(np.intersect1d(ahead.order[:nprobe], lookup.probes[0]))
        last += len(np.intersect1d(passage.follows[-1].order[:nprobe], lookup.probes[0]))
    assert last > first


@pytest.mark.parametrize(
    ("lookahead", "aheads", "follows"),
    [(Lookahead.OFF, False, False), (Lookahead.QUESTION, True, False), (Lookahead.REFINED, True, True)],
)
def test_lookahead_is_recorded_as_it_is_set(engine_of, lookahead, aheads, follows):
    _engine, made = recorded(engine_of, lookahead, questions=QUESTIONS[:2])
    for question in made.questions:
        assert any(isinstance(step, Ahead) for step in question.steps) is aheads
        assert any(call.follows for call in question.calls if isinstance(call, Text)) is follows


def test_calls_at_the_same_time_are_one_step(engine_of):
    _engine, made = recorded(engine_of, pipeline=PipelineName.ITER_RETGEN, questions=QUESTIONS[:2])
    for question in made.questions:
        calls = [step for step in question.steps if not isinstance(step, Ahead)]
        assert all(len(step) == 1 for step in calls)
        assert sum(isinstance(call, Lookup) for call in question.calls) == 3


def test_what_cannot_be_recorded_is_told(engine_of):
    engine = engine_of(script)
    with pytest.raises(TeleragError, match=r"could not be recorded.*the model broke"):
        record(engine, make_pipeline(PipelineName.HYDE), 4, SCHEDULE, batch_of([*QUESTIONS, "a broken one"]))


# What is measured.


def test_replicas_take_turns_and_each_turn_begins_anew(engine_of):
    opened = []
    turns = measure_turns(
        extent(), fleets(engine_of, opened), batch_of(warmups=["Where do owls live?"]), lambda _count: None
    )
    assert opened == [1, 2, 2, 1]
    assert [turn.replicas for turn in turns] == opened
    assert all(len(turn.completed) == len(QUESTIONS) and not turn.errors for turn in turns)
    assert len({tuple(each.answer for each in turn.completed) for turn in turns}) == 1
    assert all(turn.handing_s >= 0 for turn in turns)
    assert handing_s(turns) == pytest.approx((turns[0].handing_s + turns[3].handing_s) / 2)
    assert handing_s([]) == 0.0


def test_a_question_that_fails_is_counted_and_breaks_the_checks(engine_of):
    questions = [*QUESTIONS, "a broken one"]
    with fleets(engine_of)(1) as fleet:
        turn = run_batch(fleet, batch_of(questions))
    assert turn.answers[-1] is None
    assert len(turn.errors) == 1
    engine, made = recorded(engine_of)
    found = outcome([turn], {}, simulator_of(engine, made, extent()), len(questions))
    held = {check.name: check.held for check in found.checks}
    assert held == {"all completed": False, "same answers": False}
    assert found.cells[0].values["failed"] == 1


# What is simulated.


def test_simulated_cells_say_so_and_name_their_bottleneck(engine_of):
    found, simulated = found_of(engine_of)
    by_system = {(cell.system, cell.key["replicas"]): cell.values for cell in found.cells}
    assert list(by_system) == [(REPLICAS, 1), (SIMULATED, 1), (REPLICAS, 2), (SIMULATED, 2), (SIMULATED, 8)]
    assert all(values["simulated"] is (system == SIMULATED) for (system, _count), values in by_system.items())
    assert "simulated, not run" in found.systems[SIMULATED]["what"]
    for count, each in simulated.items():
        values = by_system[SIMULATED, count]
        assert values["bottleneck"] == each.bottleneck.value
        assert values["used"]["llm"] == pytest.approx(each.used.llm, abs=1e-4)
        assert values["efficiency_share"] == pytest.approx(values["speedup"] / count, rel=1e-3)
    # Two for each machine, four questions for each replica.
    assert (by_system[SIMULATED, 8]["hosts"], by_system[SIMULATED, 8]["completed"]) == (4, 32)


def test_simulated_throughput_is_held_against_the_measured_one(engine_of):
    found, simulated = found_of(engine_of)
    check = next(check for check in found.checks if check.name == "simulation within 10 %")
    measured = {
        cell.key["replicas"]: cell.values["request_throughput"] for cell in found.cells if cell.system == REPLICAS
    }
    off = [abs(simulated[count].questions_per_s / measured[count] - 1) for count in (1, 2)]
    assert check.held is (max(off) <= 0.1)
    assert f"{simulated[2].questions_per_s:.3g} questions/s simulated, {measured[2]:.3g} measured" in check.says
    assert [(ratio.key["replicas"], ratio.over, ratio.under) for ratio in found.ratios] == [
        (count, SIMULATED, REPLICAS) for count in (1, 2)
    ]


def test_only_the_same_batch_is_compared(engine_of):
    found, _simulated = found_of(engine_of, extent(prompts_per_replica=5))
    assert "1 replica" in next(check.says for check in found.checks if "within" in check.name)
    assert [ratio.key["replicas"] for ratio in found.ratios] == [1]


def test_a_slower_simulation_does_not_pass_for_the_measured_machine(engine_of):
    some = extent(measured=(1,), simulated=(1,))
    engine, made = recorded(engine_of)
    turns = measure_turns(some, fleets(engine_of, token_s=0.0), batch_of(), lambda _count: None)
    simulator = simulator_of(engine, made, some)
    found = outcome(turns, {1: simulator.run(1)}, simulator, len(QUESTIONS))
    assert not next(check.held for check in found.checks if check.name == "simulation within 10 %")


def test_micro_batches_are_those_of_the_scheduler(engine_of):
    engine, made = recorded(engine_of)
    scheduler = Scheduler.over(engine, SCHEDULE)
    real = [batch.members for batch, _together in scheduler.cut(QUESTIONS, range(len(QUESTIONS)))]
    list_bytes = engine.retriever.index.list_bytes
    assert [tuple(group) for groups in groups_of(made.questions, SCHEDULE, list_bytes) for group in groups] == real
    small = replace(SCHEDULE, name=ScheduleName.ARRIVAL, batch_size=3)
    assert groups_of(made.questions, small, list_bytes) == [[[0, 1], [2]], [[3, 4], [5]], [[6, 7]]]


def test_giving_out_micro_batches_is_timed(engine_of):
    engine, made = recorded(engine_of)
    assert 0 < assign_s(made, engine.retriever.index, 4) < 0.5


def test_a_link_alone_may_be_faster_than_beside_others(engine_of):
    index = recorded(engine_of)[0].retriever.index
    alone, together = calibration(1, index, link=3.0), calibration(2, index, link=1.0)
    rates, host = host_of(alone, together)
    assert rates.link_bytes_per_s == pytest.approx(3 * RATES.link_bytes_per_s)
    assert (host.replicas, host.slow_bytes_per_s) == (2, pytest.approx(3 * RATES.link_bytes_per_s))


@pytest.mark.parametrize(
    ("measured", "simulated", "per_host", "expected"),
    [((1, 2), (1, 2, 64), 2, (1, 2)), ((), (1, 64), 1, (1,)), ((4,), (16,), 8, (1, 4, 8)), ((), (8,), 3, (1, 3))],
)
def test_rates_are_measured_for_every_number_side_by_side(measured, simulated, per_host, expected):
    assert extent(measured, simulated, per_host=per_host).calibrated == expected


# What is shown.


def test_reports_say_what_is_simulated(engine_of, tmp_path):
    result = result_of(found_of(engine_of)[0])
    result.save(tmp_path / "scaling.json")
    assert SuiteResult.load(tmp_path / "scaling.json") == result
    table = tables.headline_table(result)
    assert table.columns[-1].name == "bottleneck"
    rows = [row for row in table.rows if row[1] == SIMULATED]
    assert len(rows) == 3
    assert all(row[-1] != tables.NONE for row in rows)
    drawn = drawings.drawings_of(result, drawings.slots([result]))
    curve = next(drawing for drawing in drawn if drawing.name == "curve")
    styles = {entry.label: entry.style for entry in curve.legend}
    assert styles == {REPLICAS: plots.STYLES[0], SIMULATED: plots.STYLES[1]}
    assert len(curve.panels) == 2
    assert "simulated" in curve.alt
    for drawing in drawn:
        plots.save(drawing, tmp_path / f"{drawing.name}.png")
        assert (tmp_path / f"{drawing.name}.png").stat().st_size > 5000
    text = markdown.markdown({"scaling": result}, {"scaling": [(curve, "curve.png")]})
    assert "simulated, not run" in text
    assert "were not measured" in text
    html = page({"scaling": result}, {"scaling": drawn})
    assert "simulated, not run" in html
    assert "stroke-dasharray" in html


# What is calibrated.


@dataclass(frozen=True)
class WorldOpens:
    """A replica that needs no model."""

    index: Index | None
    at_once: int | None = 4

    def open(self, _share):
        if self.index is None:
            raise ModelError("There is no world.", remedy="Make one.")
        engine = World.over(self.index).engine(script, token_s=0.002)
        return Opened(Local(engine, make_pipeline(PipelineName.HYDE), "hyde", self.at_once), "host")


def test_replicas_are_calibrated_in_processes_of_their_own(engine_of, monkeypatch):
    index = engine_of(script).retriever.index
    told = []
    found = calibrate(WorldOpens(index), Share(1.0, 0, 2), 2, Kind(64, llm_apart=False), QUESTIONS, told.append)
    assert (found.replicas, found.threads, found.at_once) == (2, 1, 4)
    assert sum(told) == 2 * 6
    rates = found.rates
    steps = {point.width: point.step_s.value for point in rates.llm.decode}
    assert set(steps) == {1, 2, 4, 8, 16, 32, 64}
    assert steps[1] > 0.002
    assert found.links_bytes_per_s > rates.link_bytes_per_s > 0
    assert all(math.isfinite(value) and value >= 0 for value in (rates.scored_bytes_per_s, rates.join_s, rates.query_s))
    assert 0 < rates.beside_llm <= 1
    described = found.described()
    assert set(described["step_s"]) == {str(width) for width in steps}


def test_what_goes_wrong_with_one_that_is_calibrated_comes_back():
    with pytest.raises(ModelError, match="There is no world"):
        calibrate(WorldOpens(None), Share(1.0, 0, 1), 1, Kind(64, llm_apart=False), QUESTIONS, lambda _count: None)


# The command.

app = typer.Typer()
app.command("scaling")(guarded(expanded(scaling)))


@app.callback()
def _main() -> None:
    """So that the command has its name."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--system", "fetch"], "--system has no part in bench scaling"),
        (["--simulate-only", "--replicas", "2"], "--replicas has no part in --simulate-only"),
        (["--pipeline", "hyde", "--pipeline", "naive"], "bench scaling is for one pipeline and 2 are named"),
        ([], "bench scaling needs questions and none are named"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(tmp_path, arguments, message):
    done = CliRunner().invoke(app, ["scaling", str(tmp_path), *arguments])
    assert done.exit_code == EXIT_USAGE
    assert message in " ".join(done.stderr.split())
    assert not done.stdout
