"""Scores of what was retrieved, by ir_measures, which asks trec_eval (pytrec_eval-terrier) for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from telerag_cli.errors import needs_extra
from telerag_cli.evaluation.judgements import Judgements, trec_id
from telerag_cli.evaluation.records import Found, Record

with needs_extra("eval", "Measuring retrieved passages"):
    import ir_measures

NDCG_CUTOFF = 10


def measures(cutoffs: Sequence[int], *, complete: bool) -> dict[str, ir_measures.Measure]:
    """What is measured, by the names it has in results.

    Args:
        cutoffs: ranks at which the list of passages is cut.
        complete: whether the judgements name all relevant passages there are, so that a recall can be told.
    """
    cut, name = (ir_measures.R, "recall") if complete else (ir_measures.Success, "success")
    return {
        **{f"{name}@{cutoff}": cut @ cutoff for cutoff in cutoffs},
        f"ndcg@{NDCG_CUTOFF}": ir_measures.nDCG @ NDCG_CUTOFF,
        "mrr": ir_measures.RR,
    }


def score_passages(
    records: Sequence[Record], judgements: Judgements, wanted: Mapping[str, ir_measures.Measure]
) -> dict[str, dict[str, float]]:
    """Scores by measure and question id, each in [0, 1].

    The order of the passages is what counts and not their scores, which need not be comparable within a line.

    Args:
        records: those that are judged; one without passages has 0 in everything.
        judgements: for them.
        wanted: measures by name.
    """
    keys = {trec_id(record.id): record.id for record in records}
    ranked = {trec_id(record.id): _by_rank(record.passages) for record in records if record.passages}
    scores = {name: dict.fromkeys(keys.values(), 0.0) for name in wanted}
    names = {measure: name for name, measure in wanted.items()}
    relevant = {key: judgements[key] for key in ranked}
    for metric in ir_measures.pytrec_eval.iter_calc(list(wanted.values()), relevant, ranked) if ranked else ():
        scores[names[metric.measure]][keys[metric.query_id]] = float(metric.value)
    return scores


def _by_rank(passages: Sequence[Found]) -> dict[str, float]:
    """The passages with scores that fall with their ranks: trec_eval sorts by score, and by id among equals."""
    return {trec_id(passage.id): -float(rank) for rank, passage in enumerate(passages)}
