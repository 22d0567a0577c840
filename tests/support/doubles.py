"""Doubles that several tests use: a link whose delays and failures they choose, and a run in one process."""

import random
import threading
import time

import numpy as np

from telerag_cli.config import PAGE_BYTES, ScheduleName
from telerag_cli.engine.admission import Local
from telerag_cli.engine.batch import answer_all
from telerag_cli.engine.scheduler import Schedule, Scheduler
from telerag_cli.errors import ArtifactError
from telerag_cli.pipelines.registry import make_pipeline


def answer_with(engine, name, questions, outputs, schedule, *, concurrency=4, answered=(), ordered=False):
    """A run of one worker."""
    workers = [Local(engine, concurrency, make_pipeline(name))]
    return answer_all(
        workers, Scheduler.over(engine, schedule), questions, outputs, answered=set(answered), ordered=ordered
    )


def answer_in_order(engine, name, questions, outputs, **how):
    """A run that takes questions as they come."""
    return answer_with(engine, name, questions, outputs, Schedule(ScheduleName.ARRIVAL, max_wait_s=0.01), **how)


class ChosenLink:
    """Copies from the file's image in threads, after a delay; what it reads of the lists in ``broken`` is torn."""

    note = None

    def __init__(self, path, memory, *, depth=2, longest_s=0.0, seed=0, broken=()):
        self.depth = depth
        self.broken = set(broken)
        self.moves = []
        self._image, self._memory = np.fromfile(path, np.uint8), memory
        self._longest_s, self._random = longest_s, random.Random(seed)
        self._threads = []

    def submit(self, moves, arrived):
        for move in moves:
            self.moves.append(move)
            delay_s = self._random.random() * self._longest_s
            self._threads.append(threading.Thread(target=self.work, args=(move, arrived, delay_s)))
            self._threads[-1].start()

    def work(self, move, arrived, delay_s):
        """Make one move after the delay; in a thread of its own."""
        time.sleep(delay_s)
        torn = move.list_no in self.broken
        nbytes = move.nbytes // 2 if torn else move.nbytes
        self._memory[move.target : move.target + nbytes] = self._image[move.source : move.source + nbytes]
        arrived([move], ArtifactError(f"list {move.list_no} cannot be read") if torn else None)

    def close(self):
        for thread in self._threads:
            thread.join()


class StubTier:
    """Starts moves and leaves their end to the test."""

    def __init__(self, nlist, depth, full=False):
        self.nlist, self.depth, self.full = nlist, depth, full
        self.list_bytes = np.full(nlist, PAGE_BYTES)
        self.gone = np.ones(nlist, np.bool_)
        self.started = []

    def absent(self):
        return self.gone

    def prefetch(self, lists, protected, priority, arrived):
        if self.full:
            return [], True
        self.gone[lists] = False
        self.started.extend((list_no, arrived) for list_no in lists)
        return list(lists), False

    def finish(self, position):
        list_no, arrived = self.started[position]
        arrived([list_no], None)
