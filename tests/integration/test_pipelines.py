"""Every pipeline with a scripted LLM: exact flows, odd answers, failures and cancellation at each call."""

import asyncio
import itertools
import math

import pytest

from animals import TEXTS
from expect import fails
from telerag_cli.config import Lookahead, PipelineName
from telerag_cli.corpus.passages import Passage, Retrieved
from telerag_cli.errors import ModelError, UsageError
from telerag_cli.llm.base import Generation, Token
from telerag_cli.llm.scripted import Reply
from telerag_cli.llm.shapes import Choice, Json, Lines
from telerag_cli.pipelines.base import merge
from telerag_cli.pipelines.flare import doubts
from telerag_cli.pipelines.registry import PIPELINES, make_pipeline, options

QUESTION = "Where do owls live and what do bees eat?"

ANSWERS = {
    "passage that answers": "owls number 3 live in place 8 and eat food 3",
    "whose answers together": "owls number 3 live where\nbees number 4 eat what",
    "look up next": "owls number 3 live in which place",
    "Is this enough": "no",
    "Write only the next sentence": "Owls live in place 8",
    "whose answer is": "owls number 3 live in place what",
    "Would looking something up": "yes",
    "Rate from 1 to 5": "3",
    "": "owls number 3 live in place 8 [1]",
}
"""By a part of the prompt; what fits no other is an answer."""


def kind(request):
    text = "\n".join(message.content for message in request.messages)
    return next(key for key in ANSWERS if key in text)


def script_of(**changed):
    """The usual answers, some replaced: by a text, a `Reply`, or a function of (request, earlier ones of its kind)."""
    answers = ANSWERS | {key.replace("_", " "): value for key, value in changed.items()}
    seen = dict.fromkeys(ANSWERS, 0)

    def script(request):
        key = kind(request)
        answer = answers[key]
        before, seen[key] = seen[key], seen[key] + 1
        return answer(request, before) if callable(answer) else answer

    return script


def run(engine, name, **given):
    return asyncio.run(engine.aask(QUESTION, pipeline=make_pipeline(name, **given)))


def stages(answered):
    return [stage.name for stage in answered.stages]


def queries(answered):
    return [retrieval.queries for retrieval in answered.retrievals]


FLOWS = {
    PipelineName.NAIVE: (["answer"], [(QUESTION,)]),
    PipelineName.HYDE: (["passage", "answer"], [(ANSWERS["passage that answers"],)]),
    PipelineName.SUBQUESTION: (["sub_questions", "answer"], [("owls number 3 live where", "bees number 4 eat what")]),
    PipelineName.ITERATIVE: (
        ["query_1", "step_1", "judge_1", "query_2", "step_2", "judge_2", "query_3", "step_3", "answer"],
        [(ANSWERS["look up next"],)] * 3,
    ),
    PipelineName.ITER_RETGEN: (
        ["draft_1", "draft_2", "answer"],
        [(QUESTION,), (f"{QUESTION} {ANSWERS['']}",), (f"{QUESTION} {ANSWERS['']}",)],
    ),
    PipelineName.FLARE: (["sentence_1"], []),
    PipelineName.SELF_RAG: (
        ["need", *sorted(f"{what}_{number}" for what in ("answer", "critique") for number in (1, 2, 3))],
        [(QUESTION,)],
    ),
}


@pytest.mark.parametrize("name", PipelineName)
def test_the_flow_is_the_papers(engine_of, name):
    engine = engine_of(script_of())
    answered = run(engine, name)
    expected_stages, expected_queries = FLOWS[name]
    if name is PipelineName.SELF_RAG:  # its branches end in any order
        assert sorted(stages(answered)) == sorted(expected_stages)
    else:
        assert stages(answered) == expected_stages
    assert queries(answered) == expected_queries
    assert answered.answer


@pytest.mark.parametrize("name", PipelineName)
def test_answers_are_the_same_with_and_without_lookahead_one_by_one_and_together(engine_of, name):
    asked = [f"{QUESTION} Say it {n} times." for n in range(6)]
    outcomes = []
    for mode in Lookahead:
        for together in (False, True):
            engine = engine_of(script_of(Write_only_the_next_sentence=doubtful), mode, token_s=0.001)

            async def all_of_them(engine=engine, together=together):
                pipeline = make_pipeline(name)
                if together:
                    return await asyncio.gather(*(engine.aask(text, pipeline=pipeline) for text in asked))
                return [await engine.aask(text, pipeline=pipeline) for text in asked]

            done = asyncio.run(all_of_them())
            outcomes.append(
                [(item.answer, [(hit.row, hit.score) for hit in item.found], queries(item)) for item in done]
            )
            moved = sum(join.lists_moved for item in done for join in item.joins)
            if name not in (PipelineName.NAIVE, PipelineName.ITER_RETGEN):
                assert (moved > 0) == (mode is not Lookahead.OFF)
    assert all(outcome == outcomes[0] for outcome in outcomes)


def doubtful(_request, before):
    """A sentence with two doubtful stretches, then its rewriting, then a repetition of it, which ends the answer."""
    if before == 0:
        return Reply("Owls live in place nine and eat food four", {"nine": 0.2, "food": 0.1, "four": 0.3})
    return "Owls live in place 8 and eat food 3"


def test_flare_asks_about_what_it_doubts_and_writes_the_sentence_again(engine_of):
    engine = engine_of(script_of(Write_only_the_next_sentence=doubtful))
    answered = run(engine, PipelineName.FLARE)
    assert stages(answered) == ["sentence_1", "query", "query", "rewrite_1"]
    asked = [
        request.messages[-1].content for request in engine.generator.requests if kind(request) == "whose answer is"
    ]
    assert ['whose answer is "nine"' in asked[0], 'whose answer is "food four"' in asked[1]] == [True, True]
    assert queries(answered) == [(ANSWERS["whose answer is"],) * 2]
    assert answered.answer == "Owls live in place 8 and eat food 3."
    assert answered.found


def test_flare_goes_on_until_the_model_has_no_more_to_say(engine_of):
    sentences = ["Owls live in place 8. More follows", "Bees eat food 4! More follows", "That is all"]
    engine = engine_of(script_of(Write_only_the_next_sentence=lambda _request, before: sentences[before]))
    answered = run(engine, PipelineName.FLARE)
    assert answered.answer == "Owls live in place 8. Bees eat food 4. That is all."
    written = [request.messages[-1].content for request in engine.generator.requests]
    assert written[1].endswith("Answer so far: Owls live in place 8.")
    short = engine_of(script_of(Write_only_the_next_sentence=lambda _request, before: sentences[before]))
    assert run(short, PipelineName.FLARE, sentences=1).answer == "Owls live in place 8."


def test_flare_needs_probabilities():
    with fails(ModelError, "--pipeline"):
        doubts(Generation("text", "stop", 1, 1, 0.0, 0.0), 0.4)
    tokens = (Token(0, 4, math.log(0.9)), Token(4, 8, math.log(0.3)), Token(8, 12, math.log(0.1)), Token(12, 16, 0.0))
    assert doubts(Generation("one  twothreefour", "stop", 1, 4, 0.0, 0.0, tokens=tokens), 0.4) == ["twothre"]


@pytest.mark.parametrize("listed", ["", "\n \n", "1. \n- "])
def test_an_empty_list_of_sub_questions_means_the_question(engine_of, listed):
    answered = run(engine_of(script_of(whose_answers_together=listed)), PipelineName.SUBQUESTION)
    assert queries(answered) == [(QUESTION,)]


def test_no_more_sub_questions_than_asked_for(engine_of):
    listed = "\n".join(f"{n}. owls number {n}" for n in range(1, 9))
    engine = engine_of(script_of(whose_answers_together=listed))
    answered = run(engine, PipelineName.SUBQUESTION, sub_questions=2)
    assert queries(answered) == [("owls number 1", "owls number 2")]
    assert engine.generator.requests[0].shape == Lines(2)


def test_a_judge_that_is_satisfied_ends_it_and_one_that_never_is_does_not_go_on_for_ever(engine_of):
    engine = engine_of(script_of(Is_this_enough=lambda _request, before: "yes" if before else "no"))
    expected = "query_1 step_1 judge_1 query_2 step_2 judge_2 answer"
    assert stages(run(engine, PipelineName.ITERATIVE, rounds=9)) == expected.split()
    final = engine.generator.requests[-1].messages[-1].content
    assert final.count("A: owls number 3 live in place 8") == 2
    never = run(engine_of(script_of()), PipelineName.ITERATIVE, rounds=2)
    assert stages(never)[-1] == "answer"
    assert len(never.retrievals) == 2


def test_self_rag_keeps_the_best_rated_answer_and_may_not_look_up_at_all(engine_of):
    answered = run(engine_of(answering_by_row), PipelineName.SELF_RAG)
    best = max(answered.retrievals[0].found, key=lambda hit: rating_of(hit.row))
    assert rating_of(best.row) > min(rating_of(hit.row) for hit in answered.retrievals[0].found)
    assert answered.found == [best]
    assert answered.answer == f"row {best.row}"
    none = run(engine_of(script_of(Would_looking_something_up="no")), PipelineName.SELF_RAG)
    assert stages(none) == ["need", "answer"]
    assert none.retrievals == []
    silent = run(engine_of(script_of(Rate_from_1_to_5="")), PipelineName.SELF_RAG)
    assert silent.found == silent.retrievals[0].found[:1]


def rating_of(row):
    return row % 5 + 1


def answering_by_row(request):
    """Answers name the passage's row, and the row decides their rating."""
    text = request.messages[-1].content
    if kind(request) == "Would looking something up":
        return "yes"
    row = next(n for n, passage in enumerate(TEXTS) if passage in text)
    return str(rating_of(row)) if kind(request) == "Rate from 1 to 5" else f"row {row}"


@pytest.mark.parametrize("name", PipelineName)
def test_a_generator_that_fails_in_the_middle_of_any_call_leaves_nothing(engine_of, name):
    calls = len(stages(run(engine_of(script_of(Write_only_the_next_sentence=doubtful)), name)))
    for broken in range(calls):
        usual, count = script_of(Write_only_the_next_sentence=doubtful), iter(range(calls))

        def script(request, usual=usual, count=count, broken=broken):
            answer = usual(request)
            if next(count) == broken:
                return Reply(answer.text if isinstance(answer, Reply) else answer, fails_after=0)
            return answer

        engine = engine_of(script, token_s=0.0005)
        with fails(ModelError, 0):
            run(engine, name)
        assert engine.generator.running == engine.retriever.prefetches == 0


@pytest.mark.parametrize("name", PipelineName)
def test_cancelling_in_any_call_leaves_nothing_and_the_next_question_is_answered(engine_of, name):
    usual = script_of(Write_only_the_next_sentence=doubtful)
    calls = len(stages(run(engine_of(usual), name)))
    for cancelled in range(calls):
        asking, count = [], itertools.count()
        usual = script_of(Write_only_the_next_sentence=doubtful)

        def script(request, usual=usual, asking=asking, count=count, cancelled=cancelled):
            if next(count) == cancelled:
                asking[0].cancel()  # takes effect at the generator's next wait
            return usual(request)

        engine = engine_of(script, token_s=0.0005)

        async def cancel(engine=engine, asking=asking):
            asking.append(asyncio.create_task(engine.aask(QUESTION, pipeline=make_pipeline(name))))
            with pytest.raises(asyncio.CancelledError):
                await asking[0]
            assert engine.generator.running == 0
            assert engine.retriever.tier.occupancy().references == 0
            return await engine.aask(QUESTION, pipeline=make_pipeline(PipelineName.HYDE))

        assert asyncio.run(cancel()).found


def test_options_are_a_pipelines_own():
    assert options(PipelineName.FLARE) == {"flare_threshold": 0.4, "sentences": 4}
    assert options(PipelineName.HYDE) == {}
    with fails(UsageError, "--rounds", "hyde", "iterative and iter_retgen"):
        make_pipeline(PipelineName.HYDE, rounds=2)
    assert make_pipeline(PipelineName.HYDE, rounds=None)
    assert set(PIPELINES) == set(PipelineName)


def test_merge_takes_everyones_first_and_each_passage_once():
    def hits(*rows):
        return [Retrieved(Passage(str(row), "", {}), row, 1.0) for row in rows]

    assert [hit.row for hit in merge(hits(1, 2, 3), hits(4, 1), hits())] == [1, 4, 2, 3]
    assert merge() == []


def test_lines_are_read_without_their_numbers_and_each_once():
    shape = Lines(3)
    assert shape.read("1. a b\n- c\n\n  a b \n* d\ne") == ["a b", "c", "d"]
    assert shape.finished("a\nb") == ["a"]
    assert shape.finished("a") == []


def test_what_an_endpoint_replies_is_turned_into_the_grammars_text():
    assert Lines(3).plain('{"lines": ["a  b", "c \\"d\\"", "e\\u00') == 'a b\nc "d"\ne'
    assert Lines(3).plain('{"li') == ""
    assert Choice(("yes", "no")).plain('{"choice": "yes"}') == "yes"
    assert Choice(("yes", "no")).json_schema()["properties"]["choice"]["enum"] == ["yes", "no"]
    assert Json({"type": "object"}).plain("{}") == "{}"
