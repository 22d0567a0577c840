"""llama.cpp through the low-level API of llama-cpp-python: one sequence at a time, on a thread of its own."""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from telerag_cli.errors import ModelError, ResourceError
from telerag_cli.generation.base import (
    FinishReason,
    Generation,
    Message,
    OnText,
    Request,
    context_exceeded,
    cut_at_stop,
)

DEFAULT_CONTEXT_TOKENS = 4096
PREFILL_TOKENS = 512
"""Prompt tokens evaluated in one call."""


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
def _no_log(_level: int, _text: bytes, _user_data: ctypes.c_void_p) -> None:
    """llama.cpp tells about every tensor; what matters comes back as a null pointer or a status."""


class LlamaCpp:
    """A GGUF model. Every generation starts from an empty context, so an answer does not depend on what came before it."""

    def __init__(self, path: Path, *, context_tokens: int = DEFAULT_CONTEXT_TOKENS, threads: int | None = None,
                 gpu_layers: int = 0) -> None:  # fmt: skip
        """Load the model.

        Args:
            path: a GGUF file.
            context_tokens: tokens that prompt and answer may have together; at most what the model was trained for.
            threads: CPU threads; by default one a core.
            gpu_layers: layers to put on a GPU, -1 for all.

        Raises:
            ModelError: the file cannot be loaded or has no chat template.
            ResourceError: no memory for the context, or no GPU where layers were to go.
        """
        if gpu_layers and not llama_cpp.llama_supports_gpu_offload():
            raise ResourceError(f"{gpu_layers} layers were to go to a GPU and this build of llama.cpp has none.",
                                remedy="Install llama-cpp-python with CUDA, or leave out --n-gpu-layers.")  # fmt: skip
        llama_cpp.llama_log_set(_no_log, ctypes.c_void_p(0))
        self.name = path.stem
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = gpu_layers
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), settings)
        if not self._model:
            raise ModelError(f"llama.cpp cannot load {path}.",
                             remedy="Check that the file is whole and its architecture is known to llama.cpp.")  # fmt: skip
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        trained = llama_cpp.llama_model_n_ctx_train(self._model)
        self.context_tokens = min(context_tokens, trained)
        self._template = self._chat_template(path)
        self._context = self._open_context(threads)
        # One thread owns the context; the event loop stays free to embed, move and serve.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="llm")

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of a prompt, chat template included."""
        return len(self._tokenize(self._render(messages)))

    async def generate(self, request: Request, on_text: OnText | None = None) -> Generation:
        """See `Generator`. If cancelled, decoding ends at the next token."""
        cancelled = [False]
        future = asyncio.get_running_loop().run_in_executor(
            self._worker, self._generate, request, on_text, cancelled
        )
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            cancelled[0] = True
            await asyncio.wait([future])
            raise

    def close(self) -> None:
        """Wait for the worker and free the model."""
        self._worker.shutdown()
        if self._context:
            llama_cpp.llama_free(self._context)
            llama_cpp.llama_model_free(self._model)
            self._context = None

    def _generate(self, request: Request, on_text: OnText | None, cancelled: list[bool]) -> Generation:
        prompt = self._tokenize(self._render(request.messages))
        if len(prompt) + request.max_tokens > self.context_tokens:
            raise context_exceeded(len(prompt), request.max_tokens, self.context_tokens)
        started_s = time.perf_counter()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        sampler = self._sampler(request)
        try:
            for start in range(0, len(prompt), PREFILL_TOKENS):
                self._decode(prompt[start : start + PREFILL_TOKENS])
            first_s = last_s = None
            written = b""
            text = ""
            count = 0
            reason: FinishReason = "length"
            while count < request.max_tokens and not cancelled[0]:
                token = llama_cpp.llama_sampler_sample(sampler, self._context, -1)
                last_s = time.perf_counter()
                first_s = first_s or last_s
                if llama_cpp.llama_vocab_is_eog(self._vocab, token):
                    reason = "stop"
                    break
                count += 1
                written += self._piece(token)
                # A character may span tokens; an unfinished one at the end is not text yet.
                text = written.decode("utf-8", errors="ignore")
                cut = cut_at_stop(text, request.stop)
                if cut is not None:
                    text, reason = cut, "stop"
                    break
                if on_text:
                    on_text(text, count)
                if count < request.max_tokens:
                    self._decode([token])
        finally:
            llama_cpp.llama_sampler_free(sampler)
        ended_s = time.perf_counter()
        first_s = first_s or ended_s
        return Generation(text.strip(), reason, len(prompt), count, first_s - started_s, ended_s - first_s)

    def _decode(self, tokens: list[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        status = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if status:
            raise ModelError(
                f"llama.cpp failed to evaluate {len(tokens)} tokens (status {status}).",
                remedy="Try a smaller --ctx-size.",
            )

    def _sampler(self, request: Request) -> Any:
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        if request.temperature <= 0:
            llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_greedy())
        else:
            llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_top_p(request.top_p, 1))
            llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_temp(request.temperature))
            llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(request.seed))
        return chain

    def _tokenize(self, text: str) -> list[int]:
        raw = text.encode()
        room = len(raw) + 8
        tokens = (llama_cpp.llama_token * room)()
        # The template writes the special tokens, the first one too.
        count = llama_cpp.llama_tokenize(self._vocab, raw, len(raw), tokens, room, False, True)
        assert count >= 0
        return list(tokens[:count])

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        length = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[:length] if length > 0 else b""

    def _render(self, messages: Sequence[Message]) -> str:
        turns: Any = [{"role": message.role, "content": message.content} for message in messages]
        prompt: str = self._template(messages=turns).prompt
        return prompt

    def _chat_template(self, path: Path) -> Jinja2ChatFormatter:
        raw = llama_cpp.llama_model_chat_template(self._model, None)
        if not raw:
            raise ModelError(f"{path.name} has no chat template, so it is no instruct model.",
                             remedy="Choose an instruct or chat model.")  # fmt: skip
        ends = {}
        for name, number in (
            ("bos", llama_cpp.llama_vocab_bos(self._vocab)),
            ("eos", llama_cpp.llama_vocab_eos(self._vocab)),
        ):
            buffer = ctypes.create_string_buffer(256)
            length = (
                llama_cpp.llama_token_to_piece(self._vocab, number, buffer, len(buffer), 0, True)
                if number >= 0
                else 0
            )
            ends[f"{name}_token"] = buffer.raw[: max(length, 0)].decode("utf-8", errors="replace")
        return Jinja2ChatFormatter(raw.decode(), **ends)

    def _open_context(self, threads: int | None) -> Any:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = self.context_tokens
        settings.n_batch = settings.n_ubatch = PREFILL_TOKENS
        settings.n_threads = settings.n_threads_batch = threads or len(os.sched_getaffinity(0))
        context = llama_cpp.llama_init_from_model(self._model, settings)
        if not context:
            raise ResourceError(
                f"There is no memory for a context of {self.context_tokens:,} tokens.",
                remedy="Lower --ctx-size.",
            )
        return context
