"""Sentence-transformers models, made fast: short batches of equal length, and bfloat16 where it is exact enough."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch

from telerag_cli import system
from telerag_cli.arrays import FloatArray, IntArray
from telerag_cli.build_config import Precision
from telerag_cli.config import DEFAULT_EMBEDDER
from telerag_cli.embedding.bert import UnpaddedBert
from telerag_cli.embedding.loading import (
    doubts_about,
    find_prompt,
    fingerprint,
    free_tokenizer,
    load_model,
    model_folder,
    model_path,
    pooling_of,
)
from telerag_cli.errors import ModelError, ResourceError, UsageError
from telerag_cli.progress import Advance

Forward = Callable[[dict[str, Any]], dict[str, Any]]
"""Features of a batch to features with ``sentence_embedding``."""

MIN_COSINE = 0.999
"""Least cosine to float32 at which a shorter type is used unasked."""

TRIAL_PASSAGES = 32
TOKENS_PER_PASSAGE = 64
"""A batch of ``batch_size`` holds at most this many tokens for each, so that its activations stay in the cache."""

GROUP_TEXTS = 1024
"""Texts that become tokens at once; batches of similar length are made within them."""

PROBES = ("a", "Texts of several lengths, on which two ways to compute the same model are compared. " * 4)
SAME_COSINE = {torch.float32: 0.99999, torch.bfloat16: 0.995}
"""What two right ways to compute a model in a type do not fall below."""

DEFAULT_MAX_TOKENS = 512
"""For models that state no limit."""


@dataclass(frozen=True)
class EncoderInfo:
    """What a model does to a text: enough to tell whether two sets of vectors may be compared.

    ``weights`` is a fingerprint of the parameters; ``prompt`` is what is put before a passage.
    """

    model: str
    dimension: int
    pooling: str
    normalized: bool
    prompt: str | None
    max_tokens: int
    weights: str


class Encoder:
    """A text embedder on one device. Made by `Encoder.load`; safe to call from several threads."""

    def __init__(self, model: Any, name: str, device: torch.device, precision: Precision | None) -> None:
        self._model = model
        self._device = device
        self.precision = precision
        """The type in which passages are computed; None as long as ``auto`` has seen no text."""
        self._forwards: dict[torch.dtype, Forward] = {}
        self._lock = threading.Lock()
        self.tokenizer = free_tokenizer(model, name)
        self.doubts = doubts_about(model, name, model_folder(name))
        """Sentences about what the model does not say of itself."""
        self._passage_prompt = find_prompt(model, "document", "passage", "corpus")
        self._query_prompt = find_prompt(model, "query")
        limit = model.max_seq_length
        self.info = EncoderInfo(
            model=name,
            dimension=int(model.get_embedding_dimension()),
            pooling=pooling_of(model),
            normalized=any(type(module).__name__ == "Normalize" for module in model),
            prompt=self._passage_prompt,
            max_tokens=int(limit) if limit is not None and np.isfinite(limit) else DEFAULT_MAX_TOKENS,
            weights=fingerprint(model),
        )
        if precision not in (None, "float32") and not self._has_transformer:
            raise ModelError(
                f"The embedder '{name}' has no transformer that could compute in {precision}.",
                remedy="Leave out --precision.",
            )

    @property
    def _has_transformer(self) -> bool:
        return hasattr(self._model[0], "auto_model")

    @classmethod
    def load(
        cls, model: str = DEFAULT_EMBEDDER, *, device: str = "auto", precision: str = "auto", fetch: bool = True
    ) -> Encoder:
        """Load a model; the arguments are as in `EmbedConfig`. Without ``fetch`` the hub is not asked.

        The precision is for passages, and ``auto`` decides on the first of them (`decide`). Queries are always computed
        in float32.

        Raises:
            ModelError: the model cannot be had or is no text encoder.
            ResourceError: the device is not there.
            UsageError: the device or precision is none of these.
        """
        if precision != "auto" and precision not in get_args(Precision):
            raise UsageError(
                f"'{precision}' is not a precision.", remedy=f"Use auto, {', '.join(get_args(Precision))}."
            )
        place = find_device(device)
        folder = model_folder(model)
        name = model if folder is None or model == DEFAULT_EMBEDDER else str(folder)
        try:
            loaded = load_model(model_path(model), place, local=folder is not None or not fetch)
        except torch.cuda.OutOfMemoryError as error:
            raise ResourceError(f"{model} does not fit the memory of {place}.", remedy="Use --device cpu.") from error
        except Exception as error:  # every library below has its own way to say that a model is not there
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise ModelError(
                f"The embedder '{model}' cannot be loaded: {reason}.",
                remedy=f"Give a folder or a sentence-transformers name, or leave out --model for {DEFAULT_EMBEDDER}.",
            ) from error
        return cls(loaded, name, place, None if precision == "auto" else precision)  # type: ignore[arg-type]

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda:N``."""
        return str(self._device)

    def decide(self, texts: Sequence[str]) -> Precision:
        """Settle ``auto``: bfloat16 if the device computes in it and the first passages keep a cosine of 0.999."""
        if self.precision is None:
            trial = list(texts[:TRIAL_PASSAGES])
            self.precision = "float32"
            if trial and computes_bfloat16(self._device) and self._has_transformer:
                tokens = self._tokens(trial).features
                with self._lock, torch.inference_mode():
                    exact = self._vectors(self._model(self._placed(tokens)))
                self.precision = "bfloat16"
                if not min_cosine(exact, self._run(tokens)) >= MIN_COSINE:
                    self.precision = "float32"
        return self.precision

    def count_tokens(self, text: str) -> int:
        """Tokens of a text as the model would see it untruncated, special tokens included."""
        return len(self.tokenizer.encode(text).ids)

    def count_query_tokens(self, text: str) -> int:
        """The same for a query, the model's prompt for queries included."""
        return self.count_tokens(f"{self._query_prompt or ''}{text}")

    def encode(self, texts: Sequence[str], batch_size: int | None = None, advance: Advance | None = None) -> FloatArray:
        """Embed passages, prompt not included; shape (len(texts), dimension).

        The texts are batched by length within 1,024 at a time; the result depends on the texts, the batch size, the
        precision and the machine, and on nothing else. A batch holds ``batch_size`` passages (by default 32, on a GPU
        1,024), or fewer if they are longer than 64 tokens.

        Raises:
            ResourceError: the GPU's memory does not hold a batch.
        """
        self.decide(texts)
        size = batch_size or (1024 if self._device.type == "cuda" else 32)
        out = np.empty((len(texts), self.info.dimension), np.float32)
        for start in range(0, len(texts), GROUP_TEXTS):
            group = self._tokens(texts[start : start + GROUP_TEXTS])
            for rows in batches(group.lengths, size):
                try:
                    out[start + rows] = self._run(group[rows])
                except torch.cuda.OutOfMemoryError as error:
                    raise ResourceError(
                        f"A batch of {len(rows)} passages does not fit the memory of {self.device}.",
                        remedy=f"Use a --batch-size below {size}.",
                    ) from error
                if advance:
                    advance(len(rows))
        return out

    def encode_queries(self, texts: Sequence[str]) -> FloatArray:
        """Embed queries, in float32 and with the model's query prompt, as one batch; shape (len(texts), dimension)."""
        if not texts:
            return np.empty((0, self.info.dimension), np.float32)
        with self._lock:
            return self._query(texts, torch.float32)

    def warm_up(self, *, approximate: bool) -> None:
        """Do now what the first query, and the first sketch if there will be one, would wait for."""
        self.encode_queries(PROBES)
        if approximate:
            self.embed_approx(PROBES[:1])

    def embed_approx(self, texts: Sequence[str]) -> FloatArray:
        """Embed queries roughly, shape (len(texts), dimension), for predictions while an LLM uses the same cores.

        It runs on one thread and, where the device computes in it, in bfloat16. More threads would each take a core
        from the LLM, and its other threads would wait for them all.
        """
        short = computes_bfloat16(self._device) and self._has_transformer
        with self._lock, _threads(1):
            return self._query(texts, torch.bfloat16 if short else torch.float32)

    def _query(self, texts: Sequence[str], dtype: torch.dtype) -> FloatArray:
        with torch.inference_mode():
            features = self._model.preprocess(list(texts), prompt=self._query_prompt, task="query")
            return self._vectors(self._forward(dtype)(self._placed(features)))

    def _tokens(self, texts: Sequence[str]) -> _Tokens:
        with self._lock:
            return _Tokens(self._model.preprocess(list(texts), prompt=self._passage_prompt, task="document"))

    def _run(self, features: dict[str, Any]) -> FloatArray:
        with self._lock, torch.inference_mode():
            dtype = getattr(torch, self.precision or "float32")
            return self._vectors(self._forward(dtype)(self._placed(features)))

    def _forward(self, dtype: torch.dtype) -> Forward:
        """The model computing in this type, made at its first use."""
        if dtype not in self._forwards:
            self._forwards[dtype] = self._made(dtype)
        return self._forwards[dtype]

    def _made(self, dtype: torch.dtype) -> Forward:
        """The model in this type: by our own layers if they compute the same, else by its own."""
        first, *rest = self._model
        native = dtype is torch.float32 or (dtype is torch.bfloat16 and computes_bfloat16(self._device))
        if self._device.type == "cpu" and native and UnpaddedBert.fits(first):
            ours = torch.nn.Sequential(UnpaddedBert(first, dtype), *rest).eval()
            # A relative of BERT may differ in ways that its configuration does not say.
            features = self._model.preprocess(list(PROBES))
            if min_cosine(self._vectors(self._model(features)), self._vectors(ours(features))) >= SAME_COSINE[dtype]:
                return ours
        if dtype is torch.float32:
            return self._model  # type: ignore[no-any-return]
        return torch.nn.Sequential(copy.deepcopy(first).to(dtype), _ToFloat32(), *rest).eval()

    def _placed(self, features: dict[str, Any]) -> dict[str, Any]:
        return {
            key: value.to(self._device) if isinstance(value, torch.Tensor) else value for key, value in features.items()
        }

    @staticmethod
    def _vectors(features: dict[str, Any]) -> FloatArray:
        vectors: FloatArray = features["sentence_embedding"].float().cpu().numpy()
        return vectors


class _Tokens:
    """Tokens of many texts, padded to the longest, from which batches are cut that are padded to their own longest."""

    def __init__(self, features: dict[str, Any]) -> None:
        self.features = features
        self._real: torch.Tensor = features["attention_mask"]
        self.lengths: IntArray = self._real.sum(1).numpy()

    def __getitem__(self, rows: IntArray) -> dict[str, Any]:
        chosen = torch.from_numpy(rows)
        used = self._real[chosen].any(0).nonzero()  # padding may be on either side
        columns = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 1)
        return {
            name: value[chosen][:, columns]
            if isinstance(value, torch.Tensor) and value.shape[:2] == self._real.shape
            else value
            for name, value in self.features.items()
        }


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batches(lengths: IntArray, batch_size: int) -> Iterator[IntArray]:
    """Rows in batches of similar length, longest first, so that little is padding and the peak of memory comes first.

    ``lengths`` are in tokens, (n,). A batch has at most ``batch_size`` rows and 64 times as many tokens, or one row.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        rows = order[start : start + max(1, min(batch_size, batch_size * TOKENS_PER_PASSAGE // longest))]
        yield rows
        start += len(rows)


def min_cosine(a: FloatArray, b: FloatArray) -> float:
    """The least cosine between rows of two arrays (n, dimension); not a number if either holds one."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / np.maximum(norms, 1e-12)).min())


def find_device(device: str) -> torch.device:
    """The torch device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ResourceError: it is not there.
        UsageError: it is none of these.
    """
    count = torch.cuda.device_count()
    if device == "auto":
        return torch.device("cuda:0" if count else "cpu")
    kind, _, number = device.partition(":")
    if device != "cpu" and not (kind == "cuda" and (number.isdecimal() or device == "cuda")):
        raise UsageError(f"'{device}' is not a device.", remedy="Use auto, cpu, cuda or cuda:N.")
    if kind == "cuda" and int(number or 0) >= count:
        raise ResourceError(
            f"{device} was asked for and this machine has {count or 'no'} CUDA device{'s' * (count != 1)} "
            "that torch can use.",
            remedy="Use --device cpu, or a torch build and driver for the GPU.",
        )
    return torch.device(f"cuda:{number or 0}" if kind == "cuda" else "cpu")


def computes_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is arithmetic of the device itself; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return system.computes_bfloat16()


class _ToFloat32(torch.nn.Module):
    """Pooling over hundreds of tokens loses in a short type what the layers did not."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return {
            key: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for key, value in features.items()
        }
