"""Choosing the next token of one request from its logits."""

from __future__ import annotations

import ctypes
from functools import cached_property
from typing import Any

import llama_cpp
import numpy as np

from telerag_cli.errors import InputError, ModelError
from telerag_cli.llm.base import Request
from telerag_cli.llm.llama_model import LlamaModel, Logits

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""llama.cpp's ``llama_token_data``."""
_SEEDS = 2**32 - 1
"""How many seeds there are; llama.cpp takes the number after the last for "any"."""


class Sampler:
    """Temperature, top-p, seed and grammar of one request; the same logits give the same tokens whatever else runs."""

    def __init__(self, model: LlamaModel, request: Request) -> None:
        """Get ready.

        Raises:
            InputError: the grammar is none.
        """
        self._model = model
        self._grammar: Any = None
        self._chain: Any = None
        self._forbidden: Any = None
        if request.shape is not None:
            self._grammar = self._read_grammar(request.shape.grammar)
            # The grammar takes them for the text they are written as, and they would not be in the text.
            self._forbidden = model.marks
        elif request.ignore_eos:
            self._forbidden = model.ends
        if request.temperature > 0:
            self._chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
            for part in (
                llama_cpp.llama_sampler_init_top_p(request.top_p, 1),
                llama_cpp.llama_sampler_init_temp(request.temperature),
                llama_cpp.llama_sampler_init_dist(request.seed % _SEEDS),
            ):
                llama_cpp.llama_sampler_chain_add(self._chain, part)

    def sample(self, logits: Logits) -> int:
        """The next token by these logits, shape (vocab_size,), which are left as they are.

        Raises:
            ModelError: the grammar leaves no token.
        """
        if self._forbidden is not None:
            logits = logits.copy()
            logits[self._forbidden] = -np.inf
        token = self._choose(logits)
        # Asking the grammar of one token is quick, of all of them slow, and mostly the first choice will do.
        if self._grammar and not self._allows(token):
            token = self._choose(self._allowed(logits))
        return token

    def accept(self, token: int) -> None:
        """Note that the token was written; one that ends a generation is not."""
        if self._grammar:
            llama_cpp.llama_sampler_accept(self._grammar, token)

    def close(self) -> None:
        """Free what llama.cpp holds."""
        for sampler in (self._grammar, self._chain):
            if sampler:
                llama_cpp.llama_sampler_free(sampler)
        self._grammar = self._chain = None

    def _read_grammar(self, grammar: str) -> Any:
        sampler = llama_cpp.llama_sampler_init_grammar(self._model.vocab, grammar.encode(), b"root")
        if not sampler:
            raise InputError(
                f"llama.cpp cannot read the grammar '{grammar[:60]}'.",
                remedy="Write it in GBNF, with a rule named root.",
            )
        return sampler

    def _choose(self, logits: Logits) -> int:
        if self._chain is None:
            return int(logits.argmax())
        candidates = self._candidates(logits)
        return int(candidates["id"][_apply(self._chain, candidates).selected])

    def _allows(self, token: int) -> bool:
        one = np.zeros(1, _CANDIDATE)
        one["id"] = token
        _apply(self._grammar, one)
        return bool(np.isfinite(one["logit"][0]))

    def _allowed(self, logits: Logits) -> Logits:
        """The logits, with minus infinity for the tokens that the grammar refuses."""
        candidates = self._candidates(logits)
        _apply(self._grammar, candidates)  # which leaves their order
        masked: Logits = candidates["logit"].copy()
        # llama.cpp ends the process when it is told to accept a token that the grammar refuses.
        if not np.isfinite(masked.max()):
            raise ModelError(
                "The grammar leaves the model no token to go on with.",
                remedy="Use characters in the grammar that the model's vocabulary has.",
            )
        return masked

    def _candidates(self, logits: Logits) -> Any:
        made = self._room
        made["id"] = self._ids
        made["logit"] = logits
        made["p"] = 0
        return made

    @cached_property
    def _room(self) -> Any:
        return np.zeros(self._model.vocab_size, _CANDIDATE)

    @cached_property
    def _ids(self) -> Any:
        return np.arange(self._model.vocab_size, dtype=np.int32)


def log_probability(logits: Logits, token: int) -> float:
    """The natural logarithm of a token's probability: its logit less the logarithm of the sum of all exponentials."""
    highest = logits.max()
    return float(logits[token] - highest - np.log(np.exp(logits - highest).sum()))


def _apply(sampler: Any, candidates: Any) -> Any:
    """Run a sampler over candidates, which it changes in place; returns llama.cpp's array over them."""
    data = candidates.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
    array = llama_cpp.llama_token_data_array(data, len(candidates), -1, False)
    llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
    return array
