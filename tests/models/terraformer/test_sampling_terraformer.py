"""Sampling of several targets a source, from outputs of the encoder too, and caches that hold no keys as they are."""

import pytest
import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, QuantizedLayer

from hf_efficient.models.terraformer.modeling_terraformer import TerraformerForCausalLM
from tests.helpers.families import TERRAFORMER, TERRAFORMER_LM


LSH = {"encoder_long_attention": "lsh", "decoder_long_attention": "lsh", "lsh_chunk_length": 4}
KINDS = {
    "joined": TERRAFORMER.variants["all-sru"],
    "cross": TERRAFORMER.variants["cross-sparse"],
    "hashing": LSH,
    "mixed": {**LSH, "decoder_long_attention": "mixed", "lsh_full_length": 6},
}


@pytest.mark.parametrize("kind", KINDS)
def test_several_targets_are_sampled_of_each_source(make_model, make_batch, kind):
    model, batch = make_model(**KINDS[kind], eos_token_id=None), make_batch([5, 13, 1])
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 6}

    def sampled(**inputs):
        torch.manual_seed(0)
        return model.generate(**inputs, attention_mask=batch.attention_mask, **options)

    found = sampled(input_ids=batch.input_ids)
    assert found.shape == (9, 7)
    assert len({tuple(row) for row in found[:3].tolist()}) > 1
    with torch.no_grad():
        encoded = model.get_encoder()(**batch.source)
    assert torch.equal(sampled(encoder_outputs=encoded), found)
    if "decoder_long_attention" not in KINDS[kind]:  # whose decoding is not the whole forward
        assert torch.equal(sampled(input_ids=batch.input_ids, use_cache=False), found)


class Quantized(QuantizedLayer):
    """A layer of a quantised cache, whose backend is another package."""

    def __init__(self):
        super().__init__(residual_length=2)

    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, tensor):
        return tensor


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_caches_are_refused(make_model, make_batch, kind):
    model, batch = make_model(**KINDS[kind]), make_batch([5, 4])
    with pytest.raises(ValueError, match=r"A quantised cache does not work .*: take the default one"):
        model.generate(**batch.source, cache_implementation="quantized", max_new_tokens=2)
    parts = [DynamicCache(config=model.config) for _ in range(2)]
    parts[1].layers = [Quantized() for _ in parts[1].layers]
    with pytest.raises(ValueError, match="A quantised cache does not work"):
        model(**batch.source, decoder_input_ids=batch.targets, cache=EncoderDecoderCache(*parts))


def test_hashed_prompts_refuse_quantised_caches_too():
    model = TERRAFORMER_LM.make_model(TerraformerForCausalLM, **LSH | {"encoder_long_attention": "none"})
    with pytest.raises(ValueError, match="A quantised cache does not work"):
        model.generate(TERRAFORMER_LM.make_ids(1, 5), cache_implementation="quantized", max_new_tokens=2)
