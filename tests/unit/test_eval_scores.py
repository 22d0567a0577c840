"""What answers and retrieved passages score, and how sure a mean and a difference are."""

import math

import numpy as np
import pytest

from telerag_cli.evaluation.answers import contains, normalized, score_answer
from telerag_cli.evaluation.bootstrap import MIN_QUESTIONS, Sampling, difference, estimate
from telerag_cli.evaluation.judgements import trec_id
from telerag_cli.evaluation.passages import score_passages
from telerag_cli.evaluation.records import Record, RetrievedPassage, names_of


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "f1", "contained"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1, 1),  # articles, case and punctuation do not count
        ("an  apple\na day", ["Apple day."], 1, 1, 1),
        ("in Paris, France", ["Paris"], 0, 2 * (1 / 3) / (1 / 3 + 1), 1),
        ("Paris", ["Paris, the capital of France"], 0, 2 * (1 / 4) / (1 + 1 / 4), 0),  # four words remain
        ("Denver Broncos", ["Carolina Panthers", "Denver Broncos"], 1, 1, 1),  # the best of several
        ("Denver", ["Carolina", "the Broncos of Denver", "Denver Broncos"], 0, 2 / 3, 0),
        ("fear fear", ["fear"], 0, 2 * (1 / 2) / (1 / 2 + 1), 1),  # a word counts as often as both have it
        ("London", ["Paris"], 0, 0, 0),
        ("", ["Paris"], 0, 0, 0),
        ("the", ["a"], 1, 1, 0),  # both are empty once normalised, and nothing is contained
    ],
)
def test_scores_of_an_answer_are_squads(answer, gold, exact, f1, contained):
    found = score_answer(answer, gold)
    assert (found.exact_match, found.contains_answer) == (exact, contained)
    assert found.f1 == pytest.approx(f1, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "answer", "is_contained"),
    [
        ("It was in 1976, they say.", "1976", True),
        ("It was in 19760.", "1976", False),  # whole words only
        ("Call f.cache_clear() then.", "f.cache_clear()", True),
        ("The cat sat on a mat", "sat on the mat", True),
        ("cat", "the", False),
        ("none", "no", False),
    ],
)
def test_containment(text, answer, is_contained):
    assert contains(normalized(text), [normalized(answer)]) is is_contained


def record(key, ids, score=None):
    return Record(key, passages=tuple(RetrievedPassage(each, score, None) for each in ids))


def test_measures_of_passages_computed_by_hand():
    judged = {"q": {"a": 2, "b": 1, "c": 1, "x": 0}, "none": {"a": 1}}
    scores = score_passages([record("q", "xab"), record("none", "")], judged, [1, 2, 3], complete=True)
    gained = 2 / math.log2(3) + 1 / math.log2(4)
    best = 2 / math.log2(2) + 1 / math.log2(3) + 1 / math.log2(4)
    assert {name: found["q"] for name, found in scores.items()} == pytest.approx(
        {"recall@1": 0, "recall@2": 1 / 3, "recall@3": 2 / 3, "ndcg@10": gained / best, "mrr": 1 / 2}
    )
    assert {found["none"] for found in scores.values()} == {0.0}


def test_success_where_not_all_relevant_passages_are_known():
    scores = score_passages([record("q", "xab")], {"q": {"x": 0, "a": 1, "b": 1}}, [1, 3], complete=False)
    best = 1 + 1 / math.log2(3)
    assert {name: found["q"] for name, found in scores.items()} == pytest.approx(
        {"success@1": 0, "success@3": 1, "ndcg@10": (1 / math.log2(3) + 1 / 2) / best, "mrr": 1 / 2}
    )


@pytest.mark.parametrize("ids", ["ab", "ba"])
def test_equal_scores_do_not_change_the_runs_order(ids):
    """trec_eval would sort them by id."""
    scores = score_passages([record("q", ids, 0.5)], {"q": {ids[0]: 1}}, [1], complete=True)
    assert scores["mrr"]["q"] == scores["recall@1"]["q"] == 1


def test_ndcg_counts_ten_passages():
    ids = [f"p{number:02}" for number in range(11)]
    scores = score_passages([record("q", ids)], {"q": {"p10": 1}}, [10, 11], complete=True)
    assert [scores[name]["q"] for name in ("ndcg@10", "recall@10", "recall@11")] == [0, 0, 1]
    assert scores["mrr"]["q"] == pytest.approx(1 / 11)


def test_an_interval_is_that_of_the_binomial():
    """Of 400 questions half are right: the mean's standard error is 0.5 / sqrt(400) = 0.025."""
    found = estimate([0.0, 1.0] * 200, Sampling(resamples=4000))
    assert found.value == 0.5
    assert found.questions == 400
    assert found.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.006)
    assert found.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.006)


def test_the_seed_decides():
    scores = list(np.random.default_rng(7).random(50))
    again, other = (estimate(scores, Sampling(500, seed)) for seed in (1, 2))
    assert estimate(scores, Sampling(500, 1)) == again != other


def test_a_pair_is_compared_question_by_question():
    """A small but constant advantage shows, although each run's own interval is wide."""
    first = list(np.random.default_rng(7).random(50))
    second = [score + 0.01 for score in first]
    own = estimate(first, Sampling())
    found = difference(first, second, Sampling())
    assert own.high - own.low > 0.1
    assert found.value == pytest.approx(0.01)
    assert found.differs is True
    assert difference(first, first, Sampling()).differs is False
    assert difference(second, first, Sampling()).value == pytest.approx(-0.01)


def test_noise_is_no_difference():
    generator = np.random.default_rng(3)
    assert difference(list(generator.random(40)), list(generator.random(40)), Sampling()).differs is False


def test_few_questions_allow_no_verdict():
    few = difference([0.0] * (MIN_QUESTIONS - 1), [1.0] * (MIN_QUESTIONS - 1), Sampling())
    assert (few.value, few.low, few.high, few.differs) == (1.0, None, None, None)
    assert difference([0.0] * MIN_QUESTIONS, [1.0] * MIN_QUESTIONS, Sampling()).differs is True


def test_ids_and_names():
    assert trec_id("topic:with/The with\tstatement%") == "topic:with/The%20with%09statement%"
    assert trec_id(trec_id("a b")) == trec_id("a b")
    assert names_of(["x/off/a.jsonl", "x/on/a.jsonl", "-"]) == ["off/a.jsonl", "on/a.jsonl", "<stdin>"]
    assert names_of(["x/a.jsonl", "y/b.jsonl"]) == ["a.jsonl", "b.jsonl"]
