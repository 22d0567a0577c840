"""How fast a replica and its host are: numbers, and the formulas of simulated time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from telerag_cli.planning import formulas
from telerag_cli.planning.profile import Joins, LlmRates, Moving


@dataclass(frozen=True)
class Rates:
    """One replica in its share of a host, as it is while the host's other replicas are busy."""

    llm: LlmRates
    slots: int
    """Texts that the LLM writes at once."""
    chunk: int
    """Prompt tokens that it reads in a step."""
    llm_apart: bool
    """Whether it runs on something else than embedding and scoring do, as on a GPU beside a CPU."""
    link_bytes_per_s: float
    """Of lists moved while the LLM does nothing, the cost of each transfer aside."""
    beside_llm: float
    """What is left of that rate while the LLM writes, as a share."""
    transfer_s: float
    """What a transfer takes beside its bytes."""
    decoding_slowed: float
    """Seconds of a step while lists are moved, over those of a step alone."""
    scored_bytes_per_s: float
    """Of lists in fast memory, for one query."""
    another_query: float
    """What scoring the same lists for one more query costs, as a share of the first."""
    in_place_bytes_per_s: float
    """Of lists in the slow tier scored where they lie, beside the link; 0 where they must be moved."""
    join_s: float
    """What a query's retrieval takes whatever it probes: the coarse quantizer most of all."""
    query_s: float
    """Embedding a query."""
    sketch_s: float
    """Embedding what lookahead follows."""

    def prefix_s(self, tokens: float) -> float:
        """Seconds to read the first so many tokens of a prompt, the pass over the weights of the first chunk aside."""
        points = [(point.tokens, point.took_s.value) for point in self.llm.prefill]
        (few, few_s), *rest = points
        if tokens <= few:
            return tokens * (few_s - self.pass_s) / few
        (last, last_s), (before, before_s) = points[-1], points[-2] if rest else (0, self.pass_s)
        if tokens > last:
            return last_s - self.pass_s + (tokens - last) * max(last_s - before_s, 0.0) / (last - before)
        return formulas.prefill_s(self.llm, tokens) - self.pass_s

    @property
    def pass_s(self) -> float:
        """Seconds for the weights once, however many tokens: where the first prompts measured meet no tokens at all."""
        points = [(point.tokens, point.took_s.value) for point in self.llm.prefill]
        if len(points) < 2:
            return 0.0
        (few, few_s), (more, more_s) = points[:2]
        return min(max(few_s - few * (more_s - few_s) / (more - few), 0.0), few_s)

    def step_s(self, contexts: Sequence[int], parts: Sequence[tuple[int, int]]) -> float:
        """Seconds for one step of the LLM: a token for each text, and parts of prompts.

        ``step(width) + prompts + a * (contexts - width * context)``, and the pass over the weights if there are only
        prompts. A text's row costs beside a chunk what it costs alone, because it alone needs an output; attention is
        linear in what it looks back on, see `formulas.decode_s`.

        Args:
            contexts: tokens that each text looks back on.
            parts: (first token, tokens) of each prompt.
        """
        width = len(contexts)
        writing_s = formulas.step_s(self.llm, width) if width else self.pass_s if parts else 0.0
        reading_s = sum(self.prefix_s(start + count) - self.prefix_s(start) for start, count in parts)
        looking_s = self.llm.context_step_s * (sum(contexts) - width * self.llm.decode_context)
        return max(writing_s + reading_s + looking_s, 0.0)


@dataclass(frozen=True)
class Host:
    """What the replicas of one machine share."""

    replicas: int
    """On each machine; the last may have fewer."""
    slow_bytes_per_s: float
    """Of the disk, or of the memory behind the links of several GPUs, for all links together."""
    scored_bytes_per_s: float = float("inf")
    """Of lists scored, for all replicas together."""


def rates_of(
    llm: LlmRates,
    moving: Moving,
    joins: Joins,
    *,
    slots: int,
    chunk: int,
    llm_apart: bool,
    another_query: float,
    scores_in_place: bool,
    query_s: float,
    sketch_s: float,
    transfer_s: float = 0.0,
    mean_list_bytes: float = 1.0,
) -> Rates:
    """A replica by what `telerag profile` measures of one.

    Args:
        llm: its LLM.
        moving: its link.
        joins: its retrievals.
        slots: texts that the LLM writes at once.
        chunk: prompt tokens that it reads in a step.
        llm_apart: see `Rates`.
        another_query: see `Rates`.
        scores_in_place: whether its tier can score lists where they lie in the slow tier.
        query_s: see `Rates`.
        sketch_s: see `Rates`.
        transfer_s: of what moving a list takes, what does not depend on its bytes.
        mean_list_bytes: of a list.
    """
    link = moving.alone.value
    return Rates(
        llm=llm,
        slots=slots,
        chunk=chunk,
        llm_apart=llm_apart,
        link_bytes_per_s=1 / (1 / link - transfer_s / mean_list_bytes),
        beside_llm=min(moving.while_decoding.value / link, 1.0),
        transfer_s=transfer_s,
        decoding_slowed=moving.decoding_slowed,
        scored_bytes_per_s=joins.hit_bytes_per_s.value,
        another_query=another_query,
        in_place_bytes_per_s=max(joins.missed_bytes_per_s.value - link, 0.0) if scores_in_place else 0.0,
        join_s=joins.fixed_s,
        query_s=query_s,
        sketch_s=sketch_s,
    )
