"""The engine's state in numbers."""

import threading
import time

import numpy as np

from doubles import ChosenLink
from telerag_cli.engine.snapshot import snapshot
from telerag_cli.llm.batcher import Stats


def test_a_snapshot_says_what_moves_what_is_there_and_who_uses_it(engine_of):
    gate = threading.Event()

    class Held(ChosenLink):
        def submit(self, moves, arrived):
            def later():
                gate.wait(10)
                super(Held, self).submit(moves, arrived)

            threading.Thread(target=later).start()

    engine = engine_of({}, arena=1.0, link=lambda path, memory: Held(path, memory, depth=3))
    retriever, list_bytes = engine.retriever, engine.retriever.tier.list_bytes
    empty = snapshot(engine)
    assert (empty.lists_resident, empty.resident_bytes, empty.lists_moving, empty.references) == (0, 0, 0, 0)
    assert (empty.slots, empty.running, empty.waiting, empty.written_tokens) == (1000, 0, 0, 0)
    query = engine.embedder.encode_queries(["Where do owls live?"])
    ahead = retriever.prefetch(query, 4)
    moving = ~retriever.tier.absent() & (list_bytes > 0)
    state = snapshot(engine)
    assert (state.lists_moving, state.moving_bytes) == (3, list_bytes[moving].sum())
    assert (state.rounds, state.lists_resident, state.resident_bytes) == (1, 0, 0)
    searching = threading.Thread(target=retriever.search, args=(query, 3, 4, ahead))
    searching.start()
    while not (used := snapshot(engine)).references:
        time.sleep(0.001)
    assert used.references == 4
    gate.set()
    searching.join()
    while (after := snapshot(engine)).lists_moving:
        time.sleep(0.001)
    resident = np.flatnonzero(~retriever.tier.absent() & (list_bytes > 0))
    assert (after.lists_resident, after.resident_bytes) == (len(resident), list_bytes[resident].sum())
    assert (after.moving_bytes, after.references, after.rounds) == (0, 0, 0)
    assert after.arena_bytes == retriever.tier.arena_bytes >= after.resident_bytes


def test_a_snapshot_has_the_tokens_of_a_generator_that_counts_them(engine_of):
    engine = engine_of({})
    stats = Stats(running=1, waiting=2, computed_tokens=3, cached_tokens=4, written_tokens=5)
    engine.generator.stats = lambda: stats
    state = snapshot(engine)
    assert (state.running, state.waiting) == (1, 2)
    assert (state.computed_tokens, state.cached_tokens, state.written_tokens) == (3, 4, 5)
