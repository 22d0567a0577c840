"""The profile that a run plans with: the one named, the one kept, or one made now."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from telerag_cli.cli import console
from telerag_cli.cli.opening import AUTO, NONE, Planned, Warn
from telerag_cli.config import GeneratorKind, parse_bytes
from telerag_cli.errors import ArtifactError, ResourceError

if TYPE_CHECKING:
    from telerag_cli.engine.assemble import Opened, Planning
    from telerag_cli.engine.llm_plan import PlannedLlm
    from telerag_cli.engine.tier_plan import PlannedTier
    from telerag_cli.llm.base import Generator
    from telerag_cli.planning.planner import Planner
    from telerag_cli.planning.profile import Profile
    from telerag_cli.retrieval.retriever import Retriever


def plan_with(
    planned: Planned, opened: Opened, tier: PlannedTier, llm: PlannedLlm, nprobe: int, warn: Warn
) -> Planning:
    """What an engine of these parts plans with.

    Raises:
        ArtifactError: the profile named is missing, no profile, or of something else.
    """
    from telerag_cli.engine.assemble import Planning
    from telerag_cli.engine.survey import Replays, embedder_name, identity_of, rates_for_joins, survey
    from telerag_cli.planning.averages import Averages
    from telerag_cli.planning.planner import Planner
    from telerag_cli.planning.profile import Profile, kept_in

    budget = None if planned.prefetch_budget is None else parse_bytes(planned.prefetch_budget)
    if planned.profile == NONE:
        return Planning(budget_bytes=budget)
    identity, versions = identity_of(opened.index, tier.name, llm, embedder_name(opened.embedder))
    kept = kept_in(identity, versions)
    known: Profile | None = None
    if planned.profile != AUTO:
        known = Profile.load(Path(planned.profile))
        known.check(identity, Path(planned.profile))
    elif kept.exists():
        known = Profile.load(kept)
    averages = Averages(kept.with_suffix(".averages.json"))

    def make_planner(generator: Generator, retriever: Retriever) -> Planner | None:
        profile = known or measured(generator, retriever)
        if profile is None:
            return None
        return Planner(profile, averages, nprobe=nprobe, arena_bytes=retriever.tier.arena_bytes, most_bytes=budget)

    def measured(generator: Generator, retriever: Retriever) -> Profile | None:
        if llm.kind is GeneratorKind.OPENAI:
            warn("A server is not measured unasked, so nothing is predicted; telerag profile measures it.")
            return None
        console.say("Measuring this machine and index to plan with; once, some seconds. --profile none goes without.")
        try:
            with console.progress("measuring", None) as advance:
                profile = survey(
                    opened,
                    tier,
                    retriever,
                    generator,
                    nprobe,
                    Replays(),
                    identity=identity,
                    versions=versions,
                    quick=True,
                    advance=advance,
                    command="telerag run",
                )
            profile.save(kept)
        except (ResourceError, ArtifactError) as error:
            warn(f"Nothing is predicted, because measuring failed: {error}")
            return None
        return profile

    return Planning(rates_for_joins(known) if known else None, budget, averages, make_planner)
