"""Scores of what was retrieved, by ir_measures, which asks trec_eval (pytrec_eval-terrier) for all of them."""

from __future__ import annotations

from collections.abc import Sequence

from telerag_cli.errors import needs_extra
from telerag_cli.evaluation.judgements import Judgements, trec_id
from telerag_cli.evaluation.records import Record

with needs_extra("eval", "Measuring retrieved passages"):
    import ir_measures


def score_passages(
    records: Sequence[Record], judgements: Judgements, cutoffs: Sequence[int], *, complete: bool
) -> dict[str, dict[str, float]]:
    """Return scores by measure and question id, each in [0, 1].

    The order of the passages counts, and not their scores, which need not be comparable within a line. A record without
    passages has 0 in everything. Only ``complete`` judgements, which name all relevant passages, allow a recall.
    """
    cut, name = (ir_measures.R, "recall") if complete else (ir_measures.Success, "success")
    wanted = {f"{name}@{cutoff}": cut @ cutoff for cutoff in cutoffs}
    wanted |= {"ndcg@10": ir_measures.nDCG @ 10, "mrr": ir_measures.RR}
    names = {measure: name for name, measure in wanted.items()}
    keys = {trec_id(record.id): record.id for record in records}
    # trec_eval sorts by score, and by id among equals: scores that fall with the rank keep the order.
    ranked = {
        trec_id(record.id): {trec_id(passage.id): -float(rank) for rank, passage in enumerate(record.passages)}
        for record in records
        if record.passages
    }
    scores = {name: dict.fromkeys(keys.values(), 0.0) for name in wanted}
    relevant = {key: judgements[key] for key in ranked}
    for metric in ir_measures.pytrec_eval.iter_calc(list(wanted.values()), relevant, ranked) if ranked else ():
        scores[names[metric.measure]][keys[metric.query_id]] = float(metric.value)
    return scores
