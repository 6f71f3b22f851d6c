"""The control of the comparison, BERT with T5's relative bias, against T5's own."""

import pytest
import torch
from transformers import BertConfig, T5Config
from transformers.models.bert.modeling_bert import BertModel
from transformers.models.t5.modeling_t5 import T5Attention

from tests.helpers.comparison import assert_close
from training.benchmarks.pretraining_methods import RelativeBertConfig, RelativeBertModel


SIZES = {
    "vocab_size": 50,
    "hidden_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@pytest.fixture
def model():
    config = RelativeBertConfig(**SIZES, attn_implementation="eager")
    model = RelativeBertModel(config, add_pooling_layer=False).eval()
    torch.nn.init.normal_(model.relative_attention_bias.weight)
    return model


@pytest.mark.parametrize("length", [1, 7, 150])
def test_the_bias_is_that_of_t5(model, monkeypatch, length):
    """An offset is the key's place minus the query's: keys to the right have the upper half of the table."""
    seen = []
    monkeypatch.setattr(
        BertModel, "forward", lambda self, input_ids, attention_mask, **kwargs: seen.append(attention_mask)
    )
    model(torch.zeros(2, length, dtype=torch.long))
    heads = SIZES["num_attention_heads"]
    config = T5Config(d_model=20, d_kv=5, num_heads=heads, is_decoder=False)
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    theirs.relative_attention_bias.load_state_dict(model.relative_attention_bias.state_dict())
    buckets = T5Attention._relative_position_bucket(
        torch.arange(length)[None, :] - torch.arange(length)[:, None], True, model.num_buckets, model.max_distance
    )
    expected = theirs.relative_attention_bias(buckets).permute(2, 0, 1)[None]
    assert_close("bias", seen[0], expected)
    if length == 150:
        table, bias = model.relative_attention_bias.weight, seen[0][0]
        assert torch.equal(bias[:, 3, 4], table[model.num_buckets // 2 + 1])
        assert torch.equal(bias[:, 4, 3], table[1])


def test_padding_changes_nothing(model):
    ids = torch.arange(10, 15)[None]
    padded = torch.nn.functional.pad(ids, (0, 4))
    mask = torch.tensor([[1] * 5 + [0] * 4])
    assert_close("states", model(padded, attention_mask=mask)[0][:, :5], model(ids)[0])


def test_without_a_bias_it_is_bert(model):
    torch.nn.init.zeros_(model.relative_attention_bias.weight)
    plain = BertModel(BertConfig(**SIZES, attn_implementation="eager"), add_pooling_layer=False).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("relative_")})
    ids = torch.arange(10, 17)[None]
    assert_close("states", model(ids)[0], plain(ids)[0])
