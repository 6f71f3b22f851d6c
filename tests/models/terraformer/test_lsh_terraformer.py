"""Terraformer that attends by hashing: rows beside others, targets with padding, caches, generation and settings."""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from hf_efficient.models.terraformer.configuration_terraformer import TerraformerConfig
from hf_efficient.models.terraformer.modeling_terraformer import TerraformerForConditionalGeneration
from hf_efficient.modules.lsh_layers import LshAttention


SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 30,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 70,
    "dropout": 0.0,
    "activation_dropout": 0.0,
    "lsh_chunk_length": 4,
}
SPARSE = {
    **{"ff_sparsity": 5, "ff_rank": 3, "ff_sru_layers": 1, "ff_sru_units": 5},
    **{"attention_type": "multiplicative_conv", "attention_sparsity": 6},
}
BOTH = {"encoder_long_attention": "lsh", "decoder_long_attention": "lsh"}
KINDS = {
    "dense": BOTH,
    "sparse": {**BOTH, **SPARSE},
    "mixed": {"encoder_long_attention": "mixed", "decoder_long_attention": "mixed", "lsh_full_length": 7, **SPARSE},
    "shared-qk": {"decoder_long_attention": "lsh", "attention_share_qk": True, "lsh_eval_rounds": 3},
    "cross-attention": {
        "encoder_long_attention": "lsh",
        "decoder_type": "cross_attention",
        "attentions_per_layer": 1,
        "share_dropout": False,
    },
}
every_kind = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
MASK = torch.tensor([[1] * 6 + [0] * 7, [0] * 4 + [1] * 9, [1] * 13])
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


def make_model(**fields):
    torch.manual_seed(0)
    model = TerraformerForConditionalGeneration(TerraformerConfig(**{**SIZES, **fields})).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.35)
    return model


def make_ids(batch, length):
    return torch.randint(2, 40, (batch, length), generator=torch.Generator().manual_seed(1))


def rows(ids):
    """Each row's own tokens."""
    return [(slice(row, row + 1), ids[row : row + 1, mask.bool()]) for row, mask in enumerate(MASK)]


@torch.no_grad()
@every_kind
def test_rows_alone_equal_rows_of_a_batch(fields):
    model, source, target = make_model(**fields), make_ids(3, 13), make_ids(3, 6)
    together = model(source, MASK, target, use_cache=False).logits
    vectors = model.get_input_embeddings()(source).masked_fill(MASK[..., None] == 0, torch.nan)
    with_nan = model(attention_mask=MASK, inputs_embeds=vectors, decoder_input_ids=target, use_cache=False).logits
    torch.testing.assert_close(with_nan, together, atol=1e-12, rtol=0)
    for row, own in rows(source):
        alone = model(own, decoder_input_ids=target[row], use_cache=False).logits
        torch.testing.assert_close(together[row], alone, atol=1e-12, rtol=0)


@every_kind
def test_padding_behind_targets_changes_no_loss(fields):
    """As collators of transformers pad them: -100 in the labels, and decoder_input_ids of the same length."""
    model, source, labels = make_model(**fields), make_ids(2, 13), make_ids(2, 6)
    longer = torch.nn.functional.pad(labels, (0, 11), value=-100)
    losses = [
        model(source, labels=labels, use_cache=False).loss,
        model(source, labels=longer, use_cache=False).loss,
        model(
            source,
            decoder_input_ids=model.prepare_decoder_input_ids_from_labels(longer),
            labels=longer,
            use_cache=False,
        ).loss,
    ]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(losses[2], losses[0], atol=1e-12, rtol=0)


@torch.no_grad()
def test_the_loss_is_that_of_the_pass_which_training_takes():
    """And not that of the rule of decoding, by which a model with a cache reads its targets."""
    model, source, labels = make_model(**BOTH), make_ids(1, 40), make_ids(1, 25)
    trained, decoded = (model(source, labels=labels, use_cache=cached) for cached in (False, True))
    output = model(source, labels=labels)
    assert (output.cache if hasattr(output, "cache") else output.past_key_values) is None
    torch.testing.assert_close(output.loss, trained.loss, atol=1e-12, rtol=0)
    assert abs(decoded.loss - trained.loss) > 1e-6


@torch.no_grad()
@every_kind
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generation(fields, search):
    model, source = make_model(**fields), make_ids(3, 13)
    together = model.generate(source, attention_mask=MASK, **GREEDY, **search)
    for row, own in rows(source):
        assert torch.equal(model.generate(own, **GREEDY, **search), together[row])


@torch.no_grad()
def test_calls_of_several_tokens_are_steps():
    model, source, target = make_model(**KINDS["sparse"]), make_ids(3, 13), make_ids(3, 7)
    found = []
    for lengths in ([1] * 7, [3, 1, 2, 1], [7]):
        cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
        parts = [model(source, MASK, part, cache=cache).logits for part in target.split(lengths, 1)]
        found.append(torch.cat(parts, 1))
    torch.testing.assert_close(found[1], found[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(found[2], found[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("inference", [False, True], ids=["no-grad", "inference-mode"])
def test_a_static_cache_that_is_reset_forgets_the_source(inference):
    model, target = make_model(**BOTH), make_ids(1, 3)
    first, second = make_ids(2, 13).split(1)

    def read(source, cache):
        parts = [model(source, decoder_input_ids=one, cache=cache).logits for one in target.split(1, 1)]
        return torch.cat(parts, 1)

    def new_cache():
        parts = (StaticCache(config=model.config, max_cache_len=length) for length in (8, 13))
        return EncoderDecoderCache(*parts)

    with torch.inference_mode(inference), torch.no_grad():
        used = new_cache()
        read(first, used)
        used.reset()
        torch.testing.assert_close(read(second, used), read(second, new_cache()), atol=1e-12, rtol=0)


def test_each_attention_hashes_by_directions_of_its_own():
    found = [module.rotations for module in make_model(**BOTH).modules() if isinstance(module, LshAttention)]
    assert len(found) == 2 + 2 * 2
    size = min(one.shape[-1] for one in found)
    for place, one in enumerate(found):
        assert not any(torch.equal(one[..., :size], other[..., :size]) for other in found[:place])


@torch.no_grad()
def test_the_layout_of_a_model_may_be_changed():
    changed, made = make_model(**BOTH, lsh_layout="original"), make_model(**BOTH)
    source, target = make_ids(2, 13), make_ids(2, 6)
    with pytest.raises(ValueError, match="lsh_layout='original' has no decoding"):
        changed(source, decoder_input_ids=target, use_cache=True)
    changed.config.lsh_layout = "packed"
    expected = made(source, decoder_input_ids=target, use_cache=False).logits
    torch.testing.assert_close(changed(source, decoder_input_ids=target, use_cache=False).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("fields", [KINDS["dense"], KINDS["sparse"], KINDS["mixed"]], ids=["dense", "sparse", "mixed"])
def test_padding_before_targets_in_the_original_layout(fields):
    """One chunk holds all, so that what padding takes of its places hides nothing."""
    model = make_model(**{**fields, "lsh_full_length": 64}, lsh_chunk_length=32, lsh_layout="original")
    source, target = make_ids(3, 13), make_ids(3, 6)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[:, :3] = 0
    padded = torch.nn.functional.pad(target, (3, 0))
    found = model(source, MASK, padded, mask, use_cache=False).logits[:, 3:]
    torch.testing.assert_close(found, model(source, MASK, target, use_cache=False).logits, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["packed", "original"])
def test_hidden_states_of_both_layouts(layout):
    model, source, target = make_model(**BOTH, lsh_layout=layout), make_ids(2, 13), make_ids(2, 6)
    outputs = model(source, decoder_input_ids=target, use_cache=False, output_hidden_states=True)
    assert len(outputs.encoder_hidden_states) == len(outputs.decoder_hidden_states) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lsh_buckets": [512, 512]}, "262,144 buckets, but keys that are held in 16 bits tell 65,536 apart"),
        ({"lsh_buckets": [4, 5]}, r"lsh_buckets must be even numbers, .*; got \[4, 5\]"),
        ({"lsh_buckets": []}, r"lsh_buckets must be even numbers, .*; got \[\]"),
        ({"lsh_chunk_length": 71}, r"lsh_chunk_length \(71\) is more than max_position_embeddings \(70\).*Lower it"),
        ({"lsh_eval_rounds": 0}, "lsh_eval_rounds must be at least 1, not 0"),
        ({"decoder_type": "cross_attention", "attentions_per_layer": 1}, "decoder_long_attention wants"),
        ({"head_dim": 5, **SPARSE}, "head_dim goes with attention_type='dense'"),
    ],
    ids=["buckets", "odd", "no-buckets", "chunk", "rounds", "cross-attention", "head-dim"],
)
def test_settings_that_do_not_fit(fields, message):
    with pytest.raises(Exception, match=message):
        TerraformerConfig(**{**SIZES, **BOTH, **fields})
