"""BERT's forward pass on a CPU, over texts laid end to end: no padding is multiplied and no score masked."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch.nn import functional

FAMILY = ("bert", "roberta", "xlm-roberta")
"""Architectures that differ in their embeddings alone."""


class UnpaddedBert(torch.nn.Module):
    """A sentence-transformers ``Transformer`` module of BERT's family, computed in float32 or bfloat16.

    The layers are those of Devlin et al., *BERT* (arXiv 1810.04805): attention, addition and normalisation, two linear
    maps with GELU between them, addition and normalisation. Every step but attention treats tokens one by one, so the
    tokens of all texts of a batch are one matrix, and attention takes one text at a time: it is shorter that way than
    with a mask, and its scores stay in the cache. Weights are laid out once as oneDNN multiplies them, with GELU and
    addition fused in; in float32 too that is faster than torch's own products, on some processors twice.
    """

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        super().__init__()
        model = module.auto_model
        self._dtype = dtype
        self._embeddings = model.embeddings
        self._layers = [_Layer(layer, dtype) for layer in model.encoder.layer]

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether this class computes what the module does, with fused operations of this torch on this processor."""
        config: Any = getattr(module, "config", None)
        return (
            getattr(config, "model_type", None) in FAMILY
            and config.hidden_act == "gelu"
            and not config.is_decoder
            and getattr(config, "position_embedding_type", None) in (None, "absolute")
            and platform.machine() == "x86_64"  # where this was tried
            and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
            and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        )

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Add ``token_embeddings``, float32 (texts, width, dimension) with zeros in the padding, to the features.

        ``input_ids`` and ``attention_mask`` are (texts, width).
        """
        given = {name: features[name] for name in ("input_ids", "token_type_ids") if name in features}
        real = features["attention_mask"].bool()
        lengths: list[int] = real.sum(1).tolist()
        embedded = self._embeddings(**given)
        tokens = embedded[real].to(self._dtype)
        for layer in self._layers:
            tokens = layer(tokens, lengths)
        states = torch.zeros(embedded.shape, dtype=torch.float32)
        states[real] = tokens.float()
        return {**features, "token_embeddings": states}


class _Layer:
    """One layer, its weights packed."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        def linear(*parts: Any) -> _Linear:
            return _Linear(torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts]), dtype)

        attention = layer.attention.self
        self._heads: int = attention.num_attention_heads
        self._project = linear(attention.query, attention.key, attention.value)
        self._mix = linear(layer.attention.output.dense)
        self._widen = linear(layer.intermediate.dense)
        self._narrow = linear(layer.output.dense)
        self._norm_attention = _Norm(layer.attention.output.LayerNorm, dtype)
        self._norm_output = _Norm(layer.output.LayerNorm, dtype)

    def __call__(self, tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        attended = self._attend(self._project(tokens), lengths)
        tokens = self._norm_attention(self._mix.plus(attended, tokens))
        return self._norm_output(self._narrow.plus(self._widen.gelu(tokens), tokens))

    def _attend(self, projected: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Queries, keys and values side by side (tokens, 3 * dimension) to their mixture (tokens, dimension)."""
        count, dimension = projected.shape[0], projected.shape[1] // 3
        size = dimension // self._heads
        mixed = projected.new_empty(count, self._heads, size)
        none = projected.new_zeros(1, 1, 1)
        for part, out in zip(torch.split(projected, lengths), torch.split(mixed, lengths), strict=True):
            query, key, value = part.view(-1, 3, self._heads, size).permute(1, 2, 0, 3).contiguous()
            scores = torch.baddbmm(none, query, key.transpose(1, 2), beta=0, alpha=size**-0.5)
            torch.softmax(scores, -1, out=scores)
            out.copy_(torch.bmm(scores, value).transpose(0, 1))
        return mixed.view(count, dimension)


class _Linear:
    """A linear map with what follows it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype))
        self._bias = bias.detach().to(dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "gelu", [], "none")
        return out

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self._weight, self._bias, "add")
        return out


class _Norm:
    """Normalisation of each token."""

    def __init__(self, norm: Any, dtype: torch.dtype) -> None:
        self._weight, self._bias = norm.weight.detach().to(dtype), norm.bias.detach().to(dtype)
        self._eps: float = norm.eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, self._weight.shape, self._weight, self._bias, self._eps)
