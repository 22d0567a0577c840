"""The unpadded forward pass computes what transformers computes, without the padding."""

from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from telerag_cli.embedding.bert import UnpaddedBert

SIZES = {
    "vocab_size": 60,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
HAS_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""oneDNN refuses it on processors without AVX-512, where the encoder does not ask for it either."""
SHORT = torch.bfloat16 if HAS_BFLOAT16 else torch.float32


def module(kind, config, **options):
    """What sentence-transformers' first module is to the class: a config and a model."""
    torch.manual_seed(0)
    model = kind(config(**SIZES, **options)).eval()
    return SimpleNamespace(config=model.config, auto_model=model)


def features():
    torch.manual_seed(1)
    lengths = [17, 3, 1, 29]
    ids = torch.full((4, 29), 1)  # RoBERTa's padding, from which it tells positions
    mask = torch.zeros(4, 29, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, 60, (length,))
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "other": "kept"}


@pytest.mark.parametrize(
    ("dtype", "error"),
    [
        (torch.float32, 1e-5),
        pytest.param(
            torch.bfloat16,
            0.1,
            marks=pytest.mark.skipif(not HAS_BFLOAT16, reason="oneDNN has no bfloat16 on this processor"),
        ),
    ],
)
@pytest.mark.parametrize(("kind", "config"), [(BertModel, BertConfig), (RobertaModel, RobertaConfig)])
@torch.inference_mode()
def test_equals_transformers_to_rounding_and_leaves_the_padding_zero(kind, config, dtype, error):
    given = module(kind, config)
    assert UnpaddedBert.fits(given)
    batch = features()
    exact = given.auto_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    found = UnpaddedBert(given, dtype)(batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found["token_embeddings"][real], exact[real], atol=error, rtol=0)
    assert (found["token_embeddings"][~real] == 0).all()
    assert found["other"] == "kept"
    assert found["token_embeddings"].dtype == torch.float32


@torch.inference_mode()
def test_a_text_does_not_see_its_neighbours():
    unpadded, batch = UnpaddedBert(module(BertModel, BertConfig), SHORT), features()
    before = unpadded(batch)["token_embeddings"]
    batch["input_ids"][1, :3] = 7
    after = unpadded(batch)["token_embeddings"]
    assert not torch.equal(before[1], after[1])
    assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]])


def test_what_it_does_not_compute_does_not_fit():
    assert not UnpaddedBert.fits(module(BertModel, BertConfig, hidden_act="gelu_new"))
    assert not UnpaddedBert.fits(module(BertModel, BertConfig, is_decoder=True))
    assert not UnpaddedBert.fits(SimpleNamespace(config=SimpleNamespace(model_type="mpnet")))
    assert not UnpaddedBert.fits(SimpleNamespace())
