"""llama.cpp as a generator: many requests at once, decoded together by one thread."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from telerag_cli.arrays import FloatArray
from telerag_cli.config import DEFAULT_CTX_SIZE
from telerag_cli.errors import ModelError
from telerag_cli.llm.base import FinishReason, Generation, Message, OnText, Request, context_exceeded, is_quick
from telerag_cli.llm.batcher import Batcher, Stats
from telerag_cli.llm.detokenizer import Detokenizer
from telerag_cli.llm.reasoning import only_reasoning

if TYPE_CHECKING:
    from telerag_cli.llm.llama_model import LlamaModel

T = TypeVar("T")


class LlamaCpp:
    """A GGUF model that answers ``parallel`` requests at a time; more of them wait.

    On a CPU, and with weights of the right type, a request's text does not depend on what is decoded beside it, nor on
    what was computed before: see `LlamaDecoder`. Prompts go through the model's own chat template. Safe to use from
    several threads and event loops.
    """

    def __init__(
        self,
        model: LlamaModel,
        *,
        context_tokens: int = DEFAULT_CTX_SIZE,
        parallel: int = 1,
        threads: int | None = None,
        reproducible: bool = True,
    ) -> None:
        """Take the memory for the contexts, and the model, which is freed by `close`.

        A context has at most the tokens that the model was trained for. ``threads`` and ``reproducible`` are as in
        `LlamaDecoder`.

        Raises:
            ResourceError: there is not enough memory.
            UsageError: llama.cpp does not take so many requests at a time.
        """
        self.name = model.name
        self.context_tokens = min(context_tokens, model.trained_tokens)
        self.parallel = parallel
        self._model = model
        self._decoder = model.decoder(parallel, self.context_tokens, threads, reproducible=reproducible)
        self._batcher = Batcher(self._decoder, parallel, self._decoder.chunk)
        # What the worker is to do between two steps; None to end.
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Once there is one, nothing is ordered any more, and nobody touches the model: see `_open`.
        self._refusal: ModelError | None = None
        self._entrance = threading.Condition()
        self._entered = 0
        self._worker = threading.Thread(target=self._work, name="llm", daemon=True)
        self._worker.start()

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of a prompt, chat template included; raises ModelError after `close`."""
        with self._open():
            return self._model.count(messages)

    async def generate(self, request: Request, on_text: OnText | None = None) -> Generation:
        """See `Generator`. What ``on_text`` raises ends this request, and is raised here.

        Raises:
            InputError: the prompt and ``max_tokens`` exceed the context, or the shape's grammar is invalid.
            ModelError: llama.cpp failed, or the model was closed.
        """
        job = await self._submitted(request, on_text)
        future = asyncio.wrap_future(job.result)
        try:
            generation = await asyncio.shield(future)
        except asyncio.CancelledError:
            job.cancelled = True
            await _settled(future)
            raise
        assert generation is not None
        return generation

    def stats(self) -> Stats:
        """What goes on now."""
        now = self._batcher.stats
        return replace(now, waiting=now.waiting + self._orders.qsize())

    def forget(self) -> None:
        """Drop what is kept of earlier prompts, so that the next ones are computed whole: for measuring."""
        self.between_steps(self._batcher.forget)

    def check_integrity(self) -> None:
        """Assert the accounting's invariants."""
        self.between_steps(self._batcher.check_integrity)

    def between_steps(self, function: Callable[[], T]) -> T:
        """Have the decoding thread call a function; returns or raises what it does, or ModelError after `close`.

        Not from ``on_text``, which is called by that thread.
        """
        done: Future[T] = Future()

        def order() -> None:
            try:
                done.set_result(function())
            except Exception as error:
                done.set_exception(error)

        with self._open():
            self._orders.put(order)
        return done.result()

    def close(self) -> None:
        """End what is under way, with an error to those who wait for it, and free the model."""
        with self._entrance:
            if self._refusal is None:
                self._refusal = _closed()
                self._orders.put(None)
        self._worker.join()
        self._decoder.close()
        self._model.close()

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        """Keep the model from being closed meanwhile; raises ModelError if it has been. Several may at a time."""
        with self._entrance:
            if self._refusal is not None:
                raise self._refusal
            self._entered += 1
        try:
            yield
        finally:
            with self._entrance:
                self._entered -= 1
                self._entrance.notify_all()

    async def _submitted(self, request: Request, on_text: OnText | None) -> _RunningRequest:
        """Submit a request; where that may take long, which a schema or a long prompt can, in a thread."""
        if request.shape is None and is_quick(request.messages):
            return self._submit(request, on_text)
        submitted = asyncio.ensure_future(asyncio.to_thread(self._submit, request, on_text))
        try:
            return await asyncio.shield(submitted)
        except asyncio.CancelledError:
            await _settled(submitted)
            if submitted.exception() is None:
                submitted.result().cancelled = True
                await _settled(asyncio.wrap_future(submitted.result().result))
            raise

    def _submit(self, request: Request, on_text: OnText | None) -> _RunningRequest:
        with self._open():
            prompt = self._model.prompt(request.messages)
            if len(prompt) + request.max_tokens > self.context_tokens:
                raise context_exceeded(len(prompt), request.max_tokens, self.context_tokens)
            job = _RunningRequest(prompt, request, on_text, self._model)
            self._orders.put(lambda: self._batcher.submit(job))
        return job

    def _work(self) -> None:
        try:
            while self._obey():
                self._batcher.step()
            end = _closed()
        except Exception as error:  # a bug; whatever it is, nobody may wait for ever
            end = ModelError(f"The thread that decodes broke: {error!r}.", remedy="Report it.")
            end.__cause__ = error
        with self._entrance:
            self._refusal = end
            self._entrance.wait_for(lambda: not self._entered)
        while not self._orders.empty():
            if order := self._orders.get():
                order()
        self._batcher.fail_all(end)

    def _obey(self) -> bool:
        """Carry out what was ordered, waiting for an order if there is nothing else to do. False at the end."""
        wait = self._batcher.idle
        while True:
            try:
                order = self._orders.get(block=wait)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()
            wait = False


def _closed() -> ModelError:
    return ModelError("The model was closed.", remedy="Open it again.")


async def _settled(future: asyncio.Future[Any]) -> None:
    """Wait for a future, however often that is cancelled, and ignore its error."""
    while not future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([future])
    future.exception()


class _RunningRequest:
    """A request under way: a `BatchRequest` that samples, detokenizes and answers its caller."""

    def __init__(self, prompt: list[int], request: Request, on_text: OnText | None, model: LlamaModel) -> None:
        self.prompt = prompt
        self.cancelled = False
        self.result: Future[Generation | None] = Future()
        """None if it was cancelled."""
        self.result.set_running_or_notify_cancel()  # only the worker ends it
        self._request = request
        self._on_text = on_text
        self._model = model
        self._sampler = model.sampler(request)
        # A shape leaves no room for reasoning, and of a text without an end only the length is of interest.
        reasoning = request.shape is None and not request.ignore_eos
        self._output = Detokenizer(
            request.stop, reasoning=reasoning, inside=reasoning and model.begins_reasoning(prompt)
        )
        self._shown = ("", 0)
        self._outcome: Generation | Exception | None = None
        self._cached_tokens = 0
        self._came_s = self._began_s = time.perf_counter()
        self._first_s: float | None = None

    def begin(self, cached_tokens: int) -> None:
        """See `BatchRequest`."""
        self._began_s = time.perf_counter()
        self._cached_tokens = cached_tokens

    def sample(self, output: FloatArray) -> int | None:
        """See `BatchRequest`."""
        try:
            token = self._sampler.sample(output)
            self._first_s = self._first_s or time.perf_counter()
            reason = self._add(token, output)
            if reason is None:
                self._show(self._output.shown)
                return token
            self._outcome = self._generation(reason)
            self._show(self._output.text)
        except Exception as error:  # it concerns this request alone: its grammar, or its listener
            self._outcome = error
        return None

    def end(self, error: Exception | None = None) -> None:
        """See `BatchRequest`."""
        self._sampler.close()
        outcome = error or self._outcome
        if isinstance(outcome, Exception):
            self.result.set_exception(outcome)
        else:
            self.result.set_result(outcome)

    def _add(self, token: int, logits: FloatArray) -> FinishReason | None:
        """Add a token to the text; why it has ended, if it has."""
        output, request = self._output, self._request
        if self._model.is_eog(token):
            return "stop"
        if output.count < request.max_tokens:
            self._sampler.accept(token)
            output.add(self._model.written(token), log_probability(logits, token) if request.logprobs else None)
        if output.stopped_by is not None:
            return "stop"
        return "length" if output.count >= request.max_tokens else None

    def _show(self, text: str) -> None:
        shown = (text, self._output.count)
        if self._on_text and shown != self._shown:
            self._shown = shown
            self._on_text(*shown)

    def _generation(self, reason: FinishReason) -> Generation:
        now_s = time.perf_counter()
        first_s = self._first_s or now_s
        text, tokens = self._output.finished()
        if self._output.only_reasoned:
            raise only_reasoning(self._model.name, self._output.count)
        shape = self._request.shape
        if shape is not None and reason == "stop" and not shape.allows(text):
            raise ModelError(
                f"The model wrote {text!r:.80}, which is not {shape.description()}.",
                remedy="Leave out oneOf, of which any alternative is taken.",
            )
        return Generation(
            text,
            reason,
            len(self.prompt),
            self._output.count,
            prefill_s=first_s - self._began_s,
            decode_s=now_s - first_s,
            queue_s=self._began_s - self._came_s,
            cached_tokens=self._cached_tokens,
            stopped_by=self._output.stopped_by,
            tokens=tokens,
        )


def log_probability(logits: FloatArray, token: int) -> float:
    """The natural logarithm of a token's probability: its logit less the logarithm of the sum of all exponentials."""
    highest = logits.max()
    return float(logits[token] - highest - np.log(np.exp(logits - highest).sum()))
