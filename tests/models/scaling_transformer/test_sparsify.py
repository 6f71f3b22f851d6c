"""A dense model made sparse: as the dense one where nothing need be lost, untouched originals, clear errors."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_efficient import ScalingTransformerConfig, ScalingTransformerForCausalLM
from hf_efficient.data.byte_tokenizer import byte_tokenizer
from hf_efficient.data.token_stream import encode
from hf_efficient.models.scaling_transformer.sparsify import sparsify
from tests.helpers.comparison import assert_equal
from tests.models.scaling_transformer.test_convert_gpt2 import REFUSED, make_gpt2


DENSE = {
    "vocab_size": 31,
    "hidden_size": 12,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 40,
    "dropout": 0.1,
}
QUIET = {"progress": False, "length": 16}


def make_dense(**changes):
    torch.manual_seed(0)
    return ScalingTransformerForCausalLM(ScalingTransformerConfig(**{**DENSE, **changes})).eval()


def make_ids(tokens=600, vocabulary=31):
    return torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(1))


def exclusive_(model, block_size=4):
    """Let units of a layer exclude each other: of each of `block_size` directions and its opposite one fires."""
    with torch.no_grad():
        for layer in model.model.layers:
            block = layer.feed_forward
            half = len(block.up_proj.weight) // 2
            block.up_proj.weight[half:] = -block.up_proj.weight[:half]
            block.up_proj.bias.zero_()
    return model


def logits_of(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def test_nothing_is_lost_where_at_most_one_unit_of_a_pair_is_active():
    model = exclusive_(make_dense(hidden_act="relu"))
    figures = []
    sparse = sparsify(model, make_ids(3000), 2, 12, figures=figures, epochs=20, **QUIET)
    assert [round(one["active_units"], 2) for one in figures] == [0.5, 0.5]
    assert min(one["accuracy"] for one in figures) > 0.9
    ids = make_ids(40).view(2, 20)
    dense = logits_of(model, ids)
    assert (logits_of(sparse, ids) - dense).square().mean() < 0.02 * dense.var()
    random = sparsify(model, make_ids(3000), 2, 12, assignment="random", epochs=20, **QUIET)
    assert (logits_of(random, ids) - dense).square().mean() > 2 * (logits_of(sparse, ids) - dense).square().mean()


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_new", "silu", "gelu_pytorch_tanh", "swish"])
def test_activations(activation):
    sparse = sparsify(make_dense(hidden_act=activation), make_ids(), 3, 5, epochs=1, **QUIET)
    assert sparse.config.hidden_act == {"gelu_pytorch_tanh": "gelu_new", "swish": "silu"}.get(activation, activation)
    assert logits_of(sparse, make_ids(20)[None]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_and_mode_are_kept(dtype):
    sparse = sparsify(make_dense().to(dtype).train(), make_ids(), 4, 5, epochs=1, **QUIET)
    assert sparse.training
    assert {parameter.dtype for parameter in sparse.parameters()} == {dtype}
    assert all(parameter.requires_grad for parameter in sparse.parameters())


def test_on_a_gpu_of_apple_layers_are_fitted_on_the_cpu(monkeypatch):
    """There is none here: a model says that it is on one until it is moved, and is where it was afterwards."""
    places = ["mps"]

    def to(model, device, dtype):
        places.append(device if isinstance(device, str) else device.type)
        return torch.nn.Module.to(model, dtype)

    monkeypatch.setattr(ScalingTransformerForCausalLM, "device", property(lambda model: torch.device(places[-1])))
    monkeypatch.setattr(ScalingTransformerForCausalLM, "to", to)
    sparsify(make_dense(), make_ids(), 4, 5, epochs=1, **QUIET)
    assert places == ["mps", "cpu", "mps"]


def test_gpt2_saved_loaded_and_generating(tmp_path):
    model = make_gpt2()
    sparse = sparsify(model, make_ids(600, 61), 4, 5, epochs=1, **QUIET)
    assert (sparse.config.ff_sparsity, sparse.config.ff_rank, sparse.config.intermediate_size) == (4, 5, 80)
    sparse.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is ScalingTransformerForCausalLM
    ids = make_ids(21, 61)[None]
    assert torch.equal(logits_of(again, ids), logits_of(sparse, ids))
    expected = sparse.generate(ids, max_new_tokens=7, do_sample=False, use_cache=False)
    assert torch.equal(again.generate(ids, max_new_tokens=7, do_sample=False), expected)
    assert sparse.weights_read_per_token() < model.num_parameters()


def test_the_original_is_untouched_and_shares_nothing():
    for model in (make_dense().train(), make_gpt2()):
        before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        fields, training = model.config.to_dict(), model.training
        sparse = sparsify(model, make_ids(), 4, 5, epochs=1, **QUIET)
        with torch.no_grad():
            for parameter in sparse.parameters():
                parameter.zero_()
        assert model.config.to_dict() == fields
        assert model.training == training
        assert torch.equal(torch.get_rng_state(), state)
        after = model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_same_seed_gives_the_same_model():
    first, second, other = (
        sparsify(make_dense(), make_ids(), 4, 3, epochs=2, seed=seed, **QUIET).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


KINDS = {
    "multiplicative-conv": {"attention_type": "multiplicative_conv", "attention_sparsity": 3},
    "recurrences": {"ff_sru_layers": 1, "ff_sru_units": 5},
    "rms-norm": {"layer_norm_center": False},
    "fixed-base": {"position_embedding_type": "fixed_base", "hidden_size": 24},
    "multiplicative-head": {"lm_head_type": "multiplicative", "loss_sparsity": 1},
}


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_other_kinds_of_layers_stay_as_they_are(fields):
    """With the dense units' own sum as its target a layer of all units would be exact; the rest of the model is."""
    model = make_dense(**fields)
    figures = []
    sparse = sparsify(model, make_ids(2000), 2, 12, epochs=2, figures=figures, **QUIET)
    kept = {name for name in model.state_dict() if "up_proj" not in name and "down_proj" not in name}
    found = sparse.state_dict()
    assert all(torch.equal(found[name], model.state_dict()[name]) for name in kept)
    assert max(one["error"] for one in figures) < 0.7
    ids = make_ids(60).view(2, 30)
    dense = logits_of(model, ids)
    assert (logits_of(sparse, ids) - dense).square().mean() < dense.var()


def test_padding_is_left_out():
    rows, model = make_ids(640).view(40, 16), make_dense()
    padded = torch.cat([torch.full((40, 5), 7), rows], dim=1)
    mask = torch.cat([torch.zeros(40, 5), torch.ones(40, 16)], dim=1).long()
    batches = [{"input_ids": padded[i : i + 8], "attention_mask": mask[i : i + 8]} for i in range(0, 40, 8)]
    first = sparsify(model, batches, 4, 3, epochs=1, progress=False).state_dict()
    second = sparsify(model, rows, 4, 3, epochs=1, progress=False).state_dict()
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-3, rtol=1e-3)


def test_the_forms_of_a_text_are_one():
    tokenizer, model = byte_tokenizer(), make_dense(vocab_size=256)
    text = "The quick brown fox jumps over the lazy dog. " * 20
    ids = torch.tensor(list(text.encode()))
    options = {"epochs": 1, **QUIET}
    states = [
        sparsify(model, given, 4, 3, tokenizer=tokenizer, **options).state_dict()
        for given in (text, [text], ids, ids.numpy())
    ]
    for state in states[1:]:
        assert all(torch.equal(states[0][name], tensor) for name, tensor in state.items())
    rows = ids[:608].view(38, 16)
    expected = sparsify(model, rows, 4, 3, **options).state_dict()
    found = sparsify(model, iter(rows.split(8)), 4, 3, **options).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in found)


def test_a_long_string_is_read_to_its_end_as_the_command_line_reads_it():
    """More than twice the tokens that are fitted to, of which the beginning alone would give another model."""
    tokenizer, model = byte_tokenizer(eos_token="<eos>"), make_dense(vocab_size=257)
    texts = ["The quick brown fox jumps over the lazy dog. " * 40, "0 1 2 3 4 5 6 7 8 9. " * 60, "Ende"]
    options = {"epochs": 1, "max_tokens": 400, **QUIET}
    found = sparsify(model, texts, 4, 3, tokenizer=tokenizer, **options).state_dict()
    stream = encode(texts, tokenizer, "subword")
    expected = sparsify(model, stream.tokens.astype("int64"), 4, 3, **options).state_dict()
    assert_equal("weights", dict(found), dict(expected))
    beginning = sparsify(model, texts[0], 4, 3, tokenizer=tokenizer, **options).state_dict()
    assert not torch.equal(
        found["model.layers.0.feed_forward.sparse.down"], beginning["model.layers.0.feed_forward.sparse.down"]
    )


def test_no_more_than_the_budget_is_read():
    def endless():
        for number in range(100):
            assert number < 4
            yield make_ids(16)[None].expand(3, 16)

    sparsify(make_dense(), endless(), 4, 3, max_tokens=150, epochs=1, progress=False)


FAULTS = {
    "block-size": ({"block_size": 5}, "block_size must divide the 24 units .* Near it: 2, 3, 4, 6"),
    "block-of-one": ({"block_size": 1}, "at least 2"),
    "rank": ({"rank": 0}, "rank must be at least 1"),
    "assignment": ({"assignment": "best"}, "coactivation, random, not 'best'"),
    "short-text": ({"text": make_ids(15)}, "15 tokens, fewer than one window of 16"),
    "few-tokens": ({"text": make_ids(20)}, "16 tokens for layers of 24 units"),
    "no-tokens": ({"text": iter(())}, "0 tokens for layers of 24 units"),
    "no-tokenizer": ({"text": "words"}, "needs a tokenizer"),
    "length": ({"length": 41}, "from 1 to 40"),
    "three-dimensions": ({"text": torch.zeros(2, 3, 4)}, r"shape \(2, 3, 4\)"),
    "number": ({"text": 5}, "got a int"),
    "batch-without-ids": ({"text": [{"labels": make_ids(9)}]}, "holds labels"),
}


@pytest.mark.parametrize(("changes", "message"), FAULTS.values(), ids=FAULTS)
def test_what_does_not_fit_is_said(changes, message):
    arguments = {"text": make_ids(), "block_size": 4, "rank": 3, **QUIET, **changes}
    with pytest.raises(ValueError, match=message):
        sparsify(make_dense(), **arguments)


def test_other_models_are_refused():
    for build, message in (REFUSED["llama"], REFUSED["opt"]):
        with pytest.raises(ValueError, match=message):
            sparsify(build(), make_ids(), 4, 3)
    with pytest.raises(ValueError, match="sparse already"):
        sparsify(make_dense(ff_sparsity=4, ff_rank=3), make_ids(), 4, 3)
    with pytest.raises(ValueError, match="no activation 'tanh'"):
        sparsify(make_dense(hidden_act="tanh"), make_ids(), 4, 3)


def test_a_layer_of_adapters_is_refused_by_name():
    model = make_dense()
    model.model.layers[1].feed_forward.down_proj = torch.nn.Bilinear(24, 1, 12)
    with pytest.raises(ValueError, match=r"layers\.1\.feed_forward\.down_proj is a Bilinear"):
        sparsify(model, make_ids(), 4, 3)
