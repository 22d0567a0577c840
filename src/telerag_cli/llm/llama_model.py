"""llama.cpp's C functions: a GGUF model, its context and its samplers. No other module needs the compiled library."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llguidance import LLTokenizer

from telerag_cli.arrays import FloatArray, IntArray
from telerag_cli.errors import InputError, ModelError, ResourceError, UsageError
from telerag_cli.llm.base import Message, Request
from telerag_cli.llm.batcher import Chunk
from telerag_cli.llm.chat_template import ChatTemplate
from telerag_cli.llm.constraint import Constraint
from telerag_cli.llm.reasoning import TAG, is_beginning

PADDING = 256
"""llama.cpp rounds a context up to a multiple of so many tokens."""
CHUNK, WIDE_CHUNK, GPU_CHUNK = 64, 256, 512
"""Prompt tokens per step: where texts are reproducible, where they are not, and on a GPU, which wants many. Where they
are, a CPU is no quicker with more at a time."""
REPRODUCIBLE_TYPES = {"2", "3", "7"}
"""llama.cpp's numbers of the file types Q4_0, Q4_1 and Q8_0: the product of such weights with a row is the same bits,
whatever other rows are multiplied beside it; measured."""
_F16, _BF16 = 1, 30
"""ggml's numbers for the types."""
_META_BYTES = 256
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""llama.cpp's ``llama_token_data``."""
_NEVER_TEXT: int = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
"""Kinds of tokens that llama.cpp makes of their spellings only if it is asked to."""
_SEEDS = 2**32 - 1
"""How many seeds there are; llama.cpp takes the number after the last for "any"."""


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
def _no_log(_level: int, _text: bytes, _user_data: ctypes.c_void_p) -> None:
    """llama.cpp logs every tensor; what matters comes back as a null pointer or a status."""


class LlamaModel:
    """Weights, vocabulary and chat template. The weights are mapped from the file, not read."""

    def __init__(self, path: Path, *, gpu_layers: int = 0, gpu: int | None = None) -> None:
        """Load a GGUF file.

        ``gpu_layers`` go to the ``gpu`` of this number, or to all there are; -1 is all layers. With none, the model
        does not touch a GPU at all: by default llama.cpp would send it the products of long prompts, over the link and
        with other roundings.

        Raises:
            ModelError: the file cannot be loaded or has no chat template.
            ResourceError: no GPU where layers were to go.
        """
        if gpu_layers and not llama_cpp.llama_supports_gpu_offload():
            raise ResourceError(
                f"{gpu_layers} layers were to go to a GPU and this build of llama.cpp has none.",
                remedy="Install llama-cpp-python with CUDA, or leave out --n-gpu-layers.",
            )
        llama_cpp.llama_log_set(_no_log, ctypes.c_void_p(0))
        self.name = path.stem
        self.gpu_layers = gpu_layers
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = gpu_layers
        no_devices = (ctypes.c_void_p * 1)(None)  # a list that ends where it begins
        if not gpu_layers:
            settings.devices = ctypes.addressof(no_devices)
        elif gpu is not None:
            settings.split_mode = llama_cpp.LLAMA_SPLIT_MODE_NONE
            settings.main_gpu = gpu
        self.handle = llama_cpp.llama_model_load_from_file(os.fsencode(path), settings)
        if not self.handle:
            raise ModelError(
                f"llama.cpp cannot load {path}.",
                remedy="Check that the file is whole and its architecture is known to llama.cpp.",
            )
        self.vocab = llama_cpp.llama_model_get_vocab(self.handle)
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.trained_tokens: int = llama_cpp.llama_model_n_ctx_train(self.handle)
        self.weights_bytes: int = llama_cpp.llama_model_size(self.handle)
        self.can_cut = not (
            llama_cpp.llama_model_is_recurrent(self.handle) or llama_cpp.llama_model_is_hybrid(self.handle)
        )
        """Whether a sequence may be cut back to a prefix: a recurrent state cannot."""
        try:
            self._template = self._chat_template(path)
        except BaseException:
            self.close()
            raise

    @cached_property
    def end_tokens(self) -> IntArray:
        """Tokens that end a generation."""
        return np.array([token for token in range(self.vocab_size) if self.is_eog(token)], np.int64)

    @cached_property
    def constraint_tokenizer(self) -> LLTokenizer:
        """The vocabulary as `Constraint` takes it; made in a quarter of a second."""
        # What is not text begins with a byte that no UTF-8 has, so that no grammar allows it.
        tokens = [
            b"\xff" * bool(llama_cpp.llama_vocab_is_control(self.vocab, token)) + self.piece(token, special=True)
            for token in range(self.vocab_size)
        ]
        return LLTokenizer.from_llamacpp(
            tokens=tokens,
            vocab_ptr=self.vocab,
            tokenize_fptr=ctypes.cast(llama_cpp.llama_cpp._lib.llama_tokenize, ctypes.c_void_p).value,
            eos_token=self.end_tokens.tolist(),
            slices=[],
        )

    @cached_property
    def _reasoning_tags(self) -> dict[int, bytes]:
        """Special tokens that begin or end reasoning, as they are spelled."""
        control = (token for token in range(self.vocab_size) if llama_cpp.llama_vocab_is_control(self.vocab, token))
        return {token: self.piece(token, special=True) for token in control if TAG.fullmatch(self._spelling(token))}

    @cached_property
    def reproducible(self) -> bool:
        """Whether a text can be kept from depending on what is decoded beside it; see `LlamaDecoder`."""
        return not self.gpu_layers and self._meta("general.file_type") in REPRODUCIBLE_TYPES

    def is_eog(self, token: int) -> bool:
        """Whether a token ends a generation."""
        return bool(llama_cpp.llama_vocab_is_eog(self.vocab, token))

    def context_bytes(self, tokens: int) -> int:
        """Size of the keys and values of one sequence, in 16-bit numbers, rounded up as llama.cpp does.

        It is computed as if every layer were like the first and had attention, so it is too much where some have none.
        """
        heads: int = llama_cpp.llama_model_n_head(self.handle)
        length: int = llama_cpp.llama_model_n_embd(self.handle) // max(heads, 1)
        numbers = self._number("attention.key_length", length) + self._number("attention.value_length", length)
        rows: int = llama_cpp.llama_model_n_layer(self.handle) * llama_cpp.llama_model_n_head_kv(self.handle)
        return padded(tokens) * rows * numbers * 2

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation by the model's own chat template; what a turn says is never a special token.

        Raises:
            ModelError: the template does not take such a conversation.
        """
        return [token for tokens in self._tokenized(messages) for token in tokens.tolist()]

    def count(self, messages: Sequence[Message]) -> int:
        """The number of tokens of `prompt`, which takes no list of them."""
        return sum(map(len, self._tokenized(messages)))

    def begins_reasoning(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends with the tag that begins reasoning, so that the text begins within it."""
        end = b"".join(self.piece(token, special=True) for token in prompt[-8:]).decode(errors="replace").rstrip()
        tags = list(TAG.finditer(end))
        return bool(tags) and tags[-1].end() == len(end) and is_beginning(tags[-1][0])

    def written(self, token: int) -> bytes:
        """The bytes that a token adds to an answer; special tokens add none, but tags around reasoning are kept."""
        return self._reasoning_tags.get(token) or self.piece(token)

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of a token; a character may span several."""
        buffer = ctypes.create_string_buffer(_META_BYTES)
        length = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[:length] if length > 0 else b""

    def decoder(self, slots: int, tokens: int, threads: int | None, *, reproducible: bool) -> LlamaDecoder:
        """See `LlamaDecoder`."""
        return LlamaDecoder(self, slots, tokens, threads, reproducible=reproducible)

    def sampler(self, request: Request) -> LlamaSampler:
        """See `LlamaSampler`."""
        return LlamaSampler(self, request)

    def close(self) -> None:
        """Free the weights."""
        if self.handle:
            llama_cpp.llama_model_free(self.handle)
            self.handle = None

    def _number(self, key: str, default: int) -> int:
        """A number of the model's metadata, by its key without the architecture."""
        architecture = self._meta("general.architecture")
        with contextlib.suppress(ValueError):
            return int(self._meta(f"{architecture}.{key}"))
        return default

    def _meta(self, key: str) -> str:
        buffer = ctypes.create_string_buffer(_META_BYTES)
        length = llama_cpp.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace") if length >= 0 else ""

    def _tokenized(self, messages: Sequence[Message]) -> Iterator[npt.NDArray[np.int32]]:
        """The tokens of a prompt, part by part."""
        for segment in self._template.render(messages):
            raw = segment.text.encode(errors="replace")
            tokens = np.empty(len(raw) + 8, np.int32)
            data = tokens.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
            count = llama_cpp.llama_tokenize(self.vocab, raw, len(raw), data, len(tokens), False, segment.special)
            assert count >= 0
            yield tokens[:count]

    def _spelling(self, token: int) -> str:
        return self.piece(token, special=True).decode(errors="replace") if token >= 0 else ""

    def _chat_template(self, path: Path) -> ChatTemplate:
        raw = llama_cpp.llama_model_chat_template(self.handle, None)
        if not raw:
            raise ModelError(
                f"{path.name} has no chat template, so it is not an instruct model.",
                remedy="Choose an instruct or chat model.",
            )
        source = raw.decode(errors="replace")
        special = {}
        for token in range(self.vocab_size):
            kind = llama_cpp.llama_vocab_get_attr(self.vocab, token)
            if kind & _NEVER_TEXT and (spelling := self._spelling(token)):
                special[spelling] = False
            elif kind & llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED:
                spelling = self._spelling(token)  # some models have white space and HTML among these
                if spelling.startswith(("<", "[")) and spelling in source:
                    special[spelling] = True
        bos, eos = llama_cpp.llama_vocab_bos(self.vocab), llama_cpp.llama_vocab_eos(self.vocab)
        return ChatTemplate(source, path.name, bos=self._spelling(bos), eos=self._spelling(eos), special=special)


def padded(tokens: int) -> int:
    """Tokens rounded up to what llama.cpp allocates."""
    return -(-tokens // PADDING) * PADDING


class LlamaDecoder:
    """The context: the keys and values of ``slots`` sequences, and the step that extends them. A `batcher.Decoder`.

    Each slot is a stream of its own. Where texts are to be reproducible, on a CPU, keys are bfloat16 and values
    float16: with that pair and separate streams, llama.cpp computes attention in one way whatever else is in the batch,
    so a token's logits are the same bits for any number of rows beside it. With equal types, or with a cache that
    all sequences share, it has further ways, with other roundings. The products with the weights keep to it too if
    these are Q4_0, Q4_1 or Q8_0; float16 and the K types have a way of their own for several rows. With those, on a
    GPU, and where it is not wanted, keys and values are float16 and prompts are prefilled in larger chunks, which is
    quicker by half; equality is then up to rounding.
    """

    def __init__(self, model: LlamaModel, slots: int, tokens: int, threads: int | None, *, reproducible: bool) -> None:
        """Take the memory for ``slots`` sequences of so many ``tokens`` each.

        There is by default one CPU thread per core. ``reproducible`` keeps a text from depending on what is decoded
        beside it, if the model's weights allow it.

        Raises:
            ResourceError: there is not enough memory.
            UsageError: llama.cpp does not take so many sequences.
        """
        most: int = llama_cpp.llama_max_parallel_sequences()
        if slots > most:
            raise UsageError(
                f"{slots} requests were to be answered at a time and llama.cpp takes {most}.",
                remedy="Lower --concurrency.",
            )
        self.reproducible = reproducible and model.reproducible
        self.chunk = GPU_CHUNK if model.gpu_layers else CHUNK if self.reproducible else WIDE_CHUNK
        self.can_cut = model.can_cut
        self._model = model
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = slots * padded(tokens)
        settings.n_seq_max = settings.n_outputs_max = slots
        settings.n_batch = settings.n_ubatch = slots + self.chunk
        settings.kv_unified = False
        settings.swa_full = True  # a prefix may be reused only if none of it was dropped
        settings.flash_attn_type = 1
        settings.type_k = _BF16 if self.reproducible else _F16
        settings.type_v = _F16
        settings.n_threads = settings.n_threads_batch = threads or len(os.sched_getaffinity(0))
        self._context = llama_cpp.llama_init_from_model(model.handle, settings)
        if not self._context:
            raise ResourceError(
                f"There is no memory for {slots} contexts of {tokens:,} tokens.",
                remedy="Lower --concurrency or --ctx-size.",
            )
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = _Batch(slots + self.chunk)

    def decode(self, chunks: Sequence[Chunk]) -> list[FloatArray]:
        """See `batcher.Decoder`; the outputs are logits of shape (vocab_size,). Raises ModelError."""
        outputs = self._batch.fill(chunks)
        status = llama_cpp.llama_decode(self._context, self._batch.struct)
        if status:
            raise ModelError(
                f"llama.cpp failed to evaluate {self._batch.struct.n_tokens} tokens (status {status}).",
                remedy="Try a smaller --ctx-size or --concurrency.",
            )
        shape = (self._model.vocab_size,)
        return [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, row), shape) for row in outputs]

    def copy(self, source: int, target: int, tokens: int) -> None:
        """See `batcher.Decoder`."""
        # Between streams only the whole can be copied; the bytes follow with the next call of `decode`.
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        self.cut(target, tokens)

    def cut(self, slot: int, tokens: int) -> None:
        """See `batcher.Decoder`."""
        done = llama_cpp.llama_memory_seq_rm(self._memory, slot, tokens, -1)
        assert done, f"slot {slot} cannot be cut to {tokens} tokens"

    def length(self, slot: int) -> int:
        """See `batcher.Decoder`."""
        last: int = llama_cpp.llama_memory_seq_pos_max(self._memory, slot)
        return last + 1

    def close(self) -> None:
        """Free the context."""
        if self._context:
            llama_cpp.llama_free(self._context)
            self._context = None


class _Batch:
    """llama.cpp's ``llama_batch`` over arrays of NumPy, which are filled chunk by chunk."""

    def __init__(self, rows: int) -> None:
        self._tokens, self._positions, self._slots = (np.zeros(rows, np.int32) for _ in range(3))
        self._wanted = np.zeros(rows, np.int8)
        self._ones = np.ones(rows, np.int32)
        # Each row points to the one slot it belongs to.
        self._pointers = self._slots.ctypes.data + 4 * np.arange(rows, dtype=np.uintp)
        arrays = (self._tokens, None, self._positions, self._ones, self._pointers, self._wanted)
        kinds = [kind for _name, kind in llama_cpp.llama_batch._fields_[1:]]
        pairs = zip(arrays, kinds, strict=True)
        self.struct = llama_cpp.llama_batch(
            0, *(None if array is None else array.ctypes.data_as(kind) for array, kind in pairs)
        )

    def fill(self, chunks: Sequence[Chunk]) -> list[int]:
        """Take the chunks; returns the rows whose outputs are wanted."""
        wanted = []
        end = 0
        for chunk in chunks:
            begin, end = end, end + len(chunk.tokens)
            self._tokens[begin:end] = chunk.tokens
            self._positions[begin:end] = range(chunk.start, chunk.start + len(chunk.tokens))
            self._slots[begin:end] = chunk.slot
            self._wanted[begin:end] = 0
            if chunk.wants_output:
                self._wanted[end - 1] = 1
                wanted.append(end - 1)
        self.struct.n_tokens = end
        return wanted


class LlamaSampler:
    """Temperature, top-p, seed and shape of one request; the same logits give the same tokens whatever else runs."""

    def __init__(self, model: LlamaModel, request: Request) -> None:
        """Get ready; raises InputError if the shape cannot be followed."""
        self._constraint: Constraint | None = None
        self._chain: Any = None
        self._forbidden: IntArray | None = None
        if request.shape is not None:
            self._constraint = Constraint(model.constraint_tokenizer, request.shape.grammar())
        elif request.ignore_eos:
            self._forbidden = model.end_tokens
        if request.temperature > 0:
            self._chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
            for part in (
                llama_cpp.llama_sampler_init_top_p(request.top_p, 1),
                llama_cpp.llama_sampler_init_temp(request.temperature),
                llama_cpp.llama_sampler_init_dist(request.seed % _SEEDS),
            ):
                llama_cpp.llama_sampler_chain_add(self._chain, part)

    def sample(self, logits: FloatArray) -> int:
        """Return the next token by these logits, shape (vocab_size,), which are left unchanged.

        Raises:
            InputError: the shape leaves no token.
        """
        if self._forbidden is not None:
            logits = logits.copy()
            logits[self._forbidden] = -np.inf
        token = self._choose(logits)
        # One token is checked more quickly than all, and mostly the first choice will do.
        if self._constraint and not self._constraint.allows(token):
            allowed = self._constraint.allowed()
            if not allowed.any():
                raise InputError("The schema leaves the model no token to go on with.", remedy="Make it less strict.")
            token = self._choose(np.where(allowed, logits, -np.inf).astype(np.float32, copy=False))
        return token

    def accept(self, token: int) -> None:
        """Note that the token was written; one that ends a generation is not."""
        if self._constraint:
            self._constraint.accept(token)

    def close(self) -> None:
        """Free what llama.cpp holds."""
        if self._chain:
            llama_cpp.llama_sampler_free(self._chain)
        self._chain = None

    def _choose(self, logits: FloatArray) -> int:
        if self._chain is None:
            return int(logits.argmax())
        candidates = np.zeros(len(logits), _CANDIDATE)
        candidates["id"], candidates["logit"] = np.arange(len(logits)), logits
        data = candidates.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
        array = llama_cpp.llama_token_data_array(data, len(candidates), -1, False)
        llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(candidates["id"][array.selected])
