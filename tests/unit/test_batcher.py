"""Continuous batching, with a decoder of a few lines in llama.cpp's place."""

import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telerag_cli.errors import ModelError
from telerag_cli.llm.batcher import MIN_SHARED, Batcher

CHUNK = 64


def next_token(tokens):
    return zlib.crc32(repr(tokens).encode()) % 1000


def alone(prompt, count):
    """What the fake model writes when nobody else is there."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeDecoder:
    """Its next token depends on every token before, so that a wrong one in a slot shows."""

    def __init__(self, slots, can_cut=True):
        self.can_cut = can_cut
        self.held = [[] for _ in range(slots)]
        self.calls = []
        self.copies = []
        self.failing = set()
        """Numbers of calls that break, half of their chunks computed."""

    def decode(self, chunks):
        self.calls.append(chunks)
        numbers = [chunk.slot for chunk in chunks]
        assert numbers == sorted(set(numbers))
        assert sum(len(chunk.tokens) for chunk in chunks) <= CHUNK + len(self.held)
        for place, chunk in enumerate(chunks):
            if len(self.calls) in self.failing and place >= len(chunks) // 2:
                raise ModelError("The decoder broke.")
            assert chunk.start == len(self.held[chunk.slot])
            assert chunk.tokens
            self.held[chunk.slot] += chunk.tokens
        return [list(self.held[chunk.slot]) for chunk in chunks if chunk.wants_output]

    def copy(self, source, target, tokens):
        assert source != target
        assert self.can_cut
        assert tokens <= len(self.held[source])
        self.copies.append((source, target, tokens))
        self.held[target] = self.held[source][:tokens]

    def cut(self, slot, tokens):
        assert tokens == 0 or self.can_cut
        assert tokens <= len(self.held[slot])
        del self.held[slot][tokens:]

    def length(self, slot):
        return len(self.held[slot])

    def sizes(self):
        """{slot: tokens} of each call."""
        return [{chunk.slot: len(chunk.tokens) for chunk in chunks} for chunks in self.calls]


class FakeRequest:
    def __init__(self, prompt, count):
        self.prompt = prompt
        self.count = count
        self.cancelled = False
        self.cached_tokens = None
        self.written = []
        self.outcomes = []

    def begin(self, cached_tokens):
        assert self.cached_tokens is None
        self.cached_tokens = cached_tokens

    def sample(self, output):
        assert not self.outcomes
        assert output == self.prompt + self.written
        self.written.append(next_token(output))
        return self.written[-1] if len(self.written) < self.count else None

    def end(self, error=None):
        if error:
            self.outcomes.append(str(error))
        elif len(self.written) == self.count:
            assert self.written == alone(self.prompt, self.count)
            self.outcomes.append("done")
        else:
            assert self.cancelled
            self.outcomes.append("aborted")


class Bench:
    def __init__(self, slots, **options):
        self.decoder = FakeDecoder(slots, **options)
        self.batcher = Batcher(self.decoder, slots, CHUNK)
        self.tasks = []

    def submit(self, prompt, count=3):
        task = FakeRequest(list(prompt), count)
        self.tasks.append(task)
        self.batcher.submit(task)
        return task

    def step(self, times=1):
        for _ in range(times):
            self.batcher.step()
            self.batcher.check_integrity()

    def finish(self):
        for _ in range(10_000):
            if self.batcher.idle:
                break
            self.step()
        assert self.batcher.idle
        assert [len(task.outcomes) for task in self.tasks] == [1] * len(self.tasks)


def words(seed, length):
    """A prompt that begins like no other."""
    return [seed * 10_000 + place for place in range(length)]


def test_first_come_first_served():
    bench = Bench(2)
    tasks = [bench.submit(words(number, 5), count=2 + number) for number in range(4)]
    bench.step()
    assert (bench.batcher.stats.running, bench.batcher.stats.waiting) == (2, 2)
    assert [task.cached_tokens for task in tasks] == [0, 0, None, None]
    bench.step()
    assert [task.outcomes for task in tasks] == [["done"], [], [], []]
    bench.step()
    assert [task.cached_tokens for task in tasks] == [0, 0, 0, None]
    bench.finish()
    assert [task.outcomes for task in tasks] == [["done"]] * 4


def test_prompts_are_read_in_chunks_beside_answers():
    bench = Bench(2)
    bench.submit(words(1, 10), count=6)
    bench.step()
    bench.submit(words(2, 150), count=2)
    bench.finish()
    assert bench.decoder.sizes() == [{0: 10}, {0: 1, 1: 64}, {0: 1, 1: 64}, {0: 1, 1: 22}, {0: 1, 1: 1}, {0: 1}]
    wanted = [[chunk.wants_output for chunk in chunks] for chunks in bench.decoder.calls]
    assert wanted == [[True], [True, False], [True, False], [True, True], [True, True], [True]]


def test_a_short_prompt_does_not_wait_for_long_ones_nor_these_for_ever():
    bench = Bench(4)
    long = [bench.submit(words(number, 1000), count=1) for number in range(2)]
    bench.step(3)
    short = bench.submit(words(9, 20), count=1)
    bench.step()
    assert short.outcomes == ["done"]
    for number in range(10, 10 + 1000 // (CHUNK // 2)):  # others come without end
        bench.submit(words(number, CHUNK), count=1)
        bench.step()
    assert long[0].outcomes == ["done"]
    bench.finish()


def test_a_conversation_goes_on_in_its_slot():
    bench = Bench(3)
    first = bench.submit(words(1, 50), count=4)
    bench.finish()
    second = bench.submit(first.prompt + first.written + words(2, 10))
    bench.finish()
    # The last token written was never computed.
    assert second.cached_tokens == 50 + 4 - 1
    assert bench.decoder.copies == []
    assert bench.batcher.stats.cached_tokens == 53
    assert bench.batcher.stats.computed_tokens == 50 + 11
    assert bench.batcher.stats.written_tokens == 3 + 2


def test_a_beginning_is_copied_from_a_busy_slot_and_short_ones_are_not():
    bench = Bench(3)
    bench.submit(words(1, 40), count=30)
    bench.step()
    alike = bench.submit(words(1, 30) + words(2, 10))
    little = bench.submit(words(1, MIN_SHARED - 1) + words(3, 10))
    bench.finish()
    assert bench.decoder.copies == [(0, 1, 30)]
    assert (alike.cached_tokens, little.cached_tokens) == (30, 0)


def test_what_a_slot_holds_beyond_a_short_beginning_is_kept():
    bench = Bench(3)
    for number, length in ((1, 300), (2, 50), (3, 50)):
        bench.submit(words(number, length), count=1)
        bench.finish()
    bench.submit(words(1, 40) + words(4, 40), count=1)
    bench.finish()
    # Its slot was used longest ago, and yet it is not taken: it has just been of use.
    assert bench.decoder.copies == [(0, 1, 40)]
    bench.submit(words(5, 50), count=1)
    bench.finish()
    again = bench.submit(words(1, 300), count=1)
    bench.finish()
    assert again.cached_tokens == 299


@pytest.mark.parametrize("shared", [MIN_SHARED, 300, 5 * CHUNK + 1])
def test_a_beginning_that_many_share_is_computed_once(shared):
    bench = Bench(4)
    tasks = [bench.submit(words(0, shared) + words(number, 5)) for number in range(1, 17)]
    bench.finish()
    assert bench.batcher.stats.computed_tokens == shared + 16 * 5
    assert [task.cached_tokens for task in tasks] == [0] + [shared] * 15
    assert {task.outcomes[0] for task in tasks} == {"done"}


def test_who_waits_for_a_beginning_may_be_overtaken():
    bench = Bench(3)
    bench.submit(words(0, 300) + words(1, 5), count=50)
    waits = bench.submit(words(0, 300) + words(2, 5))
    other = bench.submit(words(3, 10), count=2)
    bench.step(2)
    assert (waits.cached_tokens, other.outcomes) == (None, ["done"])
    bench.step(4)
    assert waits.cached_tokens == 300


@pytest.mark.parametrize("end", ["cancelled", "broken"])
def test_who_waits_for_a_beginning_goes_on_when_its_reader_ends(end):
    bench = Bench(3)
    reader = bench.submit(words(0, 300) + words(1, 5))
    others = [bench.submit(words(0, 300) + words(number, 5)) for number in (2, 3)]
    bench.step(2)
    if end == "cancelled":
        reader.cancelled = True
    else:
        bench.decoder.failing = {3}
    bench.finish()
    assert reader.outcomes == (["aborted"] if end == "cancelled" else ["The decoder broke."])
    # What the cancelled one had read is good; what a broken call left is not.
    assert [task.cached_tokens for task in others] == ([2 * CHUNK, 300] if end == "cancelled" else [0, 300])
    assert [task.outcomes for task in others] == [["done"], ["done"]]


def test_the_slot_that_was_used_longest_ago_is_given_away():
    bench = Bench(3)
    for number in (1, 2, 3):
        bench.submit(words(number, 50), count=1)
        bench.finish()
    bench.submit(words(1, 50) + words(4, 5), count=1)  # the first slot is used again
    bench.finish()
    bench.submit(words(5, 50), count=1)  # takes the place of 2
    bench.finish()
    held = {number: bench.submit(words(number, 50), count=1) for number in (1, 3)}
    bench.finish()
    assert {number: task.cached_tokens for number, task in held.items()} == {1: 49, 3: 49}
    gone = bench.submit(words(2, 50), count=1)
    bench.finish()
    assert gone.cached_tokens == 0


def test_busy_slots_stay_neighbours():
    bench = Bench(5)
    tasks = [bench.submit(words(number, 5), count=50) for number in range(5)]
    bench.step(2)
    for number in (0, 1, 3):
        tasks[number].cancelled = True
    bench.step()
    assert set(bench.decoder.sizes()[-1]) == {2, 4}
    bench.submit(words(9, 5), count=9)
    bench.step()
    assert set(bench.decoder.sizes()[-1]) == {2, 3, 4}


def test_a_memory_that_cannot_be_cut_shares_nothing():
    bench = Bench(2, can_cut=False)
    tasks = [bench.submit(words(1, 100)) for _ in range(3)]
    bench.step()
    assert [task.cached_tokens for task in tasks] == [0, 0, None]
    bench.finish()
    assert bench.batcher.stats.computed_tokens == 300


def test_a_call_that_fails_takes_the_request_that_fails_alone_and_no_others():
    bench = Bench(3)
    bench.decoder.failing = {2, 4}  # a call for three, and then for the second of them
    first = bench.submit(words(1, 5), count=9)
    long = bench.submit(words(2, 500), count=2)
    bench.step()
    late = [bench.submit(words(number, 5), count=2) for number in (3, 4)]
    bench.batcher.step()
    assert [first.outcomes, long.outcomes, late[0].outcomes] == [[], ["The decoder broke."], []]
    assert [len(sizes) for sizes in bench.decoder.sizes()[1:]] == [3, 1, 1, 1]
    bench.finish()
    assert [task.outcomes for task in (first, *late)] == [["done"]] * 3


def test_a_memory_that_cannot_be_cut_loses_all_that_were_in_a_call_that_fails():
    bench = Bench(2, can_cut=False)
    bench.decoder.failing = {1}
    tasks = [bench.submit(words(number, 5), count=2) for number in (1, 2, 3)]
    bench.finish()
    assert [task.outcomes for task in tasks] == [["The decoder broke."]] * 2 + [["done"]]


def test_free_slots_can_be_emptied():
    bench = Bench(2)
    bench.submit(words(1, 50), count=1)
    bench.finish()
    bench.submit(words(2, 50), count=9)
    bench.step()
    bench.batcher.forget()
    bench.batcher.check_integrity()
    again = bench.submit(words(1, 50), count=1)
    bench.finish()
    assert again.cached_tokens == 0


PROMPTS = st.builds(
    lambda base, shared, own, length: words(base, shared) + words(own, length),
    st.integers(0, 2),
    st.integers(0, 150),
    st.integers(3, 9),
    st.integers(1, 90),
)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), PROMPTS, st.integers(1, 6)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("step"), st.integers(1, 3)),
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(EVENTS, st.sets(st.integers(1, 40), max_size=4), st.integers(1, 5), st.booleans())
def test_whatever_happens_each_request_ends_once_with_its_own_text(events, failing, slots, can_cut):
    bench = Bench(slots, can_cut=can_cut)  # the fakes check every token
    bench.decoder.failing = failing
    for event in events:
        if event[0] == "submit":
            bench.submit(event[1], event[2])
        elif event[0] == "step":
            bench.step(event[1])
        elif bench.tasks:
            bench.tasks[event[1] % len(bench.tasks)].cancelled = True
    bench.finish()
    assert bench.batcher.stats.running == bench.batcher.stats.waiting == 0
    for task in bench.tasks:
        broke = task.outcomes == ["The decoder broke."]
        assert broke or task.outcomes == ["done"] or (task.cancelled and task.outcomes == ["aborted"])
        assert not broke or failing
