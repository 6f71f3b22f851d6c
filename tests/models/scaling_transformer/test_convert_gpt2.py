"""The dense twin of a GPT-2: the same logits and texts, from every option that GPT-2 has."""

import copy
import logging

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from hf_efficient import from_gpt2


SIZES = {"vocab_size": 61, "n_embd": 20, "n_layer": 3, "n_head": 5, "n_positions": 70}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
OPTIONS = {
    "plain": {},
    "n_inner-relu": {"n_inner": 37, "activation_function": "relu"},
    "other-activation": {"activation_function": "quick_gelu"},
    "untied": {"tie_word_embeddings": False},
    "unscaled": {"scale_attn_weights": False},
    "scaled-by-layer": {"scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True, "attn_implementation": "eager"},
    "eps": {"layer_norm_epsilon": 0.3},
}


def make_gpt2(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**{**SIZES, **IDS, **changes})).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too
            parameter.normal_(0.1, 0.3)
    return model


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 63), (2, 70)])
def test_logits_are_those_of_gpt2(options, batch, length):
    model = make_gpt2(**options)
    twin = from_gpt2(model)
    ids = torch.randint(61, (batch, length))
    with torch.no_grad():
        torch.testing.assert_close(twin(ids).logits, model(ids).logits, atol=2e-5, rtol=2e-5)
    assert twin.config.intermediate_size == options.get("n_inner", 80)
    assert twin.config._attn_implementation == model.config._attn_implementation
    assert (twin.lm_head.weight is twin.model.embed_tokens.weight) == options.get("tie_word_embeddings", True)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.05), (torch.float16, 0.01)], ids=str
)
def test_dtype_is_kept(dtype, tolerance):
    model = make_gpt2(dtype)
    twin = from_gpt2(model)
    assert {parameter.dtype for parameter in twin.parameters()} == {dtype} == {twin.dtype, twin.config.dtype}
    ids = torch.randint(61, (2, 31))
    with torch.no_grad():
        expected, found = model(ids).logits, twin(ids).logits
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_padding_and_generation_are_those_of_gpt2():
    model = make_gpt2()
    model.generation_config.max_new_tokens = 9
    model.generation_config.num_beams = 3
    twin = from_gpt2(model)
    ids = torch.randint(4, 61, (3, 12))
    mask = torch.ones_like(ids)
    ids[1, :5], mask[1, :5] = 3, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
        found = twin(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=2e-5)
    assert twin.generation_config.num_beams == 3
    assert twin.generate(ids, attention_mask=mask).tolist() == model.generate(ids, attention_mask=mask).tolist()


def test_a_saved_twin_comes_back_the_same(tmp_path):
    twin = from_gpt2(make_gpt2())
    twin.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(61, (1, 33))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, twin(ids).logits)
    assert [again.config.bos_token_id, again.config.eos_token_id, again.config.pad_token_id] == [1, 2, 3]


def test_the_original_is_neither_changed_nor_shared():
    model = make_gpt2(scale_attn_by_inverse_layer_idx=True).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    twin = from_gpt2(model)
    assert twin.training
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for parameter in twin.parameters():
            assert parameter.requires_grad
            parameter.zero_()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_rates_of_dropout_are_taken_over_and_a_difference_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        same = from_gpt2(make_gpt2(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.3)).config
        assert (same.dropout, same.attention_dropout, same.activation_dropout) == (0.2, 0.3, 0.0)
        assert not caplog.records
        from_gpt2(make_gpt2(resid_pdrop=0.2, embd_pdrop=0.0))
    assert "embd_pdrop" in caplog.text


SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 19}
REFUSED = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)), "LlamaForCausalLM has gated"),
    "mistral": (
        lambda: MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2)),
        "MistralForCausalLM has gated",
    ),
    "opt": (
        lambda: OPTForCausalLM(
            OPTConfig(
                hidden_size=8,
                ffn_dim=12,
                num_hidden_layers=1,
                num_attention_heads=2,
                vocab_size=19,
                word_embed_proj_dim=8,
            )
        ),
        "not a OPTForCausalLM, and opt is another architecture",
    ),
    "no-head": (lambda: GPT2Model(GPT2Config(**SIZES)), "not a GPT2Model"),
    "two-heads": (lambda: GPT2DoubleHeadsModel(GPT2Config(**SIZES)), "not a GPT2DoubleHeadsModel"),
    "cross-attention": (lambda: make_gpt2(add_cross_attention=True), "cross-attention"),
    "no-model": (lambda: "gpt2", "not a str"),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_other_models_are_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        from_gpt2(build())


def test_a_layer_that_is_no_conv1d_is_refused_by_name():
    model = make_gpt2()
    model.transformer.h[1].mlp.c_fc = torch.nn.Linear(20, 80)
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp\.c_fc is a Linear"):
        from_gpt2(model)
