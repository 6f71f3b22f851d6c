"""The small masked LM over a shared table: the same numbers as a plain model that has the projected table inside."""

import pytest
import torch
from transformers import GPT2Config, GPT2Model

import hf_efficient
from hf_efficient.objectives.base import embedding_weight
from hf_efficient.objectives.generator import TiedEmbeddingGenerator
from tests.objectives.encoders import CONFIGS, VOCAB, make_batch, make_encoder, perturb


def make_generator(name, **options):
    encoder = make_encoder(name)
    return encoder, perturb(TiedEmbeddingGenerator(encoder, **options)).eval()


def plain_states(encoder, generator, input_ids, attention_mask):
    """States of a whole model of the small config whose own token embeddings are the projected table."""
    plain = type(encoder)(generator.network.config).eval()
    if getattr(plain, "pooler", None) is not None:
        plain.pooler = None
    result = plain.load_state_dict(generator.network.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert len(result.missing_keys) == 1  # the token table
    plain.get_input_embeddings().weight.data.copy_(generator.project(embedding_weight(encoder)))
    return plain(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


SIDES = [(name, side) for name in CONFIGS for side in ("right", "left") if (name, side) != ("tupe", "left")]


@pytest.mark.parametrize(("name", "side"), SIDES)  # TUPE refuses padding on the left
def test_states_are_those_of_a_plain_model(name, side):
    encoder, generator = make_generator(name)
    batch = make_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if side == "left":
        ids, mask = ids.flip(1), mask.flip(1)
    expected = plain_states(encoder, generator, ids, mask)[mask.bool()]
    table = embedding_weight(encoder)
    assert expected.shape[-1] == 8
    assert expected.std() > 0.01
    torch.testing.assert_close(generator.states(ids, mask, table)[mask.bool()], expected, rtol=1e-4, atol=1e-5)
    projected = generator.states(ids, mask, projected=generator.project(table))
    torch.testing.assert_close(projected[mask.bool()], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_and_the_table_are_trained(name):
    encoder, generator = make_generator(name)
    batch = make_batch()
    table = embedding_weight(encoder)
    states = generator.states(batch["input_ids"], batch["attention_mask"], table)
    logits = generator.transform(states) @ generator.project(table).T + generator.bias
    assert logits.shape == (3, 11, VOCAB)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
    for key, parameter in generator.named_parameters():
        assert parameter.grad is not None, key
        if not key.endswith(("key.bias", "k_proj.bias")):  # softmax does not see these
            assert parameter.grad.abs().sum() > 0, key
    assert all(parameter.shape[0] != VOCAB for key, parameter in generator.named_parameters() if key != "bias")
    assert (table.grad.abs().sum(1) > 0).all()  # through the logits, where a token does not occur
    assert all(parameter.grad is None for parameter in encoder.parameters() if parameter is not table)


def test_sizes():
    encoder = make_encoder("bert")
    for options, expected in [
        ({}, (8, 2, 13, 2)),
        ({"divider": 2}, (12, 3, 20, 2)),
        ({"divider": 5}, (4, 1, 8, 2)),
        ({"hidden_size": 10, "num_hidden_layers": 1}, (10, 5, 16, 1)),
        ({"divider": 1, "num_hidden_layers": 3}, (24, 6, 40, 3)),
    ]:
        config = TiedEmbeddingGenerator(encoder, **options).network.config
        found = (config.hidden_size, config.num_attention_heads, config.intermediate_size, config.num_hidden_layers)
        assert found == expected, options
    assert (encoder.config.hidden_size, encoder.config.num_hidden_layers) == (24, 2)
    assert TiedEmbeddingGenerator(encoder, vocabulary_bias=False).bias is None


def test_dtype_is_the_encoders():
    generator = TiedEmbeddingGenerator(make_encoder("tupe").double())
    assert {parameter.dtype for parameter in generator.parameters()} == {torch.float64}


def test_encoders_that_cannot_have_a_generator_are_refused():
    with pytest.raises(ValueError, match="is causal"):
        TiedEmbeddingGenerator(make_encoder("srupp", bidirectional=False, is_causal=True))
    with pytest.raises(ValueError, match="GPT2Model is causal"):  # which its config does not say
        TiedEmbeddingGenerator(GPT2Model(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)))
    adaptive = hf_efficient.SruppConfig(hidden_size=8, projection_size=4, bidirectional=True, adaptive_cutoffs=[100])
    with pytest.raises(ValueError, match="no single table"):
        TiedEmbeddingGenerator(hf_efficient.SruppModel(adaptive))
    for options in ({"divider": 50}, {"num_hidden_layers": 0}):
        with pytest.raises(ValueError, match="positive width and depth"):
            TiedEmbeddingGenerator(make_encoder("bert"), **options)
    with pytest.raises(ValueError, match=r"width of 8 can't be divided among 3 heads \(generator_num_attention_heads"):
        TiedEmbeddingGenerator(make_encoder("bert"), num_attention_heads=3)
    with pytest.raises(ValueError, match="No generator can be made by scaling down SruppModel"):
        TiedEmbeddingGenerator(make_encoder("srupp"), hidden_size=7)
    generator = TiedEmbeddingGenerator(make_encoder("bert"))
    with pytest.raises(ValueError, match="Give the encoder's `table`"):
        generator.states(torch.zeros(1, 1, dtype=torch.long), None)


def test_the_loss_of_a_low_precision_is_summed_in_float32():
    encoder, generator = make_generator("bert")
    batch = make_batch()
    inputs = [batch[name] for name in ("input_ids", "attention_mask", "labels")]
    exact = generator(*inputs, embedding_weight(encoder), generator.bias)
    encoder.bfloat16()
    generator.bfloat16()
    rough = generator(*inputs, embedding_weight(encoder), generator.bias)
    assert rough.hidden.dtype == torch.bfloat16
    assert rough.loss_sum.dtype == exact.loss_sum.dtype == torch.float32
    logits = torch.nn.functional.linear(rough.hidden, rough.projected, generator.bias).float()
    targets = batch["labels"][batch["labels"] != -100]
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(rough.loss_sum, expected, rtol=1e-5, atol=0)
