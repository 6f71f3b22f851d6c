"""Every way to generate agrees with the plain one: whole forwards, one token at a time."""

import copy

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import CompileConfig, DynamicCache, GenerationConfig, PreTrainedTokenizerFast

from hf_efficient.utils.cache_naming import CACHE_NAME
from tests.helpers.families import TERRAFORMER_LM, subjects


KINDS = {
    "srupp": {
        "all": {},
        "one-head": {"num_attention_heads": 1},
        "last": {"attention_layers": [-1]},
        "none": {"attention_layers": []},
        "sru": {"projection_size": 0, "attention_layers": []},
        "adaptive": {"adaptive_cutoffs": [20, 33], "tie_word_embeddings": True},
    },
    "scaling_transformer": {
        "dense": {},
        "all-sru": {
            "ff_sparsity": 5,
            "ff_rank": 3,
            "attention_type": "multiplicative_conv",
            "attention_sparsity": 6,
            "ff_sru_layers": 1,
            "lm_head_type": "multiplicative",
            "loss_sparsity": 3,
        },
        "conv-output-fixed-base": {
            "attention_type": "multiplicative_conv",
            "attention_sparsity": 6,
            "attention_value_input": "by_module",
            "attention_output": "conv",
            "position_embedding_type": "fixed_base",
            "lm_head_type": "low_rank",
            "lm_head_rank": 5,
        },
    },
    "terraformer_lm": {kind: TERRAFORMER_LM.variants[kind] for kind in ("reformer", "all-sru")},
}
# Fields of a model with one layer, which drafts for the others.
ASSISTANTS = {
    "srupp": {"attention_layers": [], "num_hidden_layers": 1},
    "scaling_transformer": {"num_hidden_layers": 1},
    "terraformer_lm": {"num_decoder_layers": 1},
}
COMPILED = {
    **KINDS,
    "srupp": {kind: {**KINDS["srupp"][kind], "num_hidden_layers": 2} for kind in ("one-head", "adaptive")},
}

every_kind = pytest.mark.parametrize(("family", "fields"), subjects(KINDS))


def make_model(family, fields, **more):
    return family.make_model(family.causal_lm, pad_token_id=0, **fields, **more)


@torch.no_grad()
def greedy(model, ids, steps, mask=None):
    """Whole forwards, without a cache."""
    mask = torch.ones_like(ids) if mask is None else mask
    for _ in range(steps):
        token = model(ids, attention_mask=mask, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.nn.functional.pad(mask, (0, 1), value=1)
    return ids


def generate(model, ids, steps=9, **options):
    # Where a prompt holds the padding id, which is a token too in the original's data, a mask has to say which it is.
    if ids is not None and (ids == model.config.pad_token_id).any():
        options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **{"max_new_tokens": steps, "do_sample": False, **options})


@every_kind
def test_greedy(family, fields):
    model, ids = make_model(family, fields), family.make_ids(3, 7)
    expected = greedy(model, ids, 9)
    assert torch.equal(generate(model, ids), expected)
    assert torch.equal(generate(model, ids, use_cache=False), expected)


@every_kind
def test_left_padding(family, fields):
    model = make_model(family, fields)
    ids, mask = family.make_ids(3, 7), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 0, 0, 0, 0, 0, 1]])
    ids = ids.masked_fill(mask == 0, 0)
    output = generate(model, ids, attention_mask=mask)
    assert torch.equal(output, greedy(model, ids, 9, mask))
    for row in range(3):
        alone = generate(model, ids[row : row + 1, mask[row].bool()])
        assert torch.equal(output[row, 7:], alone[0, -9:])


@every_kind
def test_beams(family, fields):
    model, ids = make_model(family, fields), family.make_ids(2, 5)
    options = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    ours, expected = (generate(model, ids, use_cache=cached, **options) for cached in (True, False))
    assert torch.equal(ours.sequences, expected.sequences)
    torch.testing.assert_close(ours.sequences_scores, expected.sequences_scores)


@every_kind
def test_seeded_sampling(family, fields):
    model, outputs = make_model(family, fields), []
    ids = family.make_ids(2, 5)
    options = {"do_sample": True, "top_k": 9, "temperature": 1.5, "num_return_sequences": 2}
    for cached in (True, False):
        torch.manual_seed(1)
        outputs.append(generate(model, ids, use_cache=cached, **options))
    assert torch.equal(*outputs)


@every_kind
def test_prompt_lookup(family, fields):
    model = make_model(family, fields)
    ids = torch.tensor([[5, 9, 5, 9, 5, 9, 5]])  # repeats, so that candidates are found
    assert torch.equal(generate(model, ids, 15, prompt_lookup_num_tokens=3), greedy(model, ids, 15))


@every_kind
def test_assistant(family, fields):
    """An assistant that is often right and one that is seldom: both take and roll back candidates."""
    model, ids = make_model(family, fields), family.make_ids(1, 6)
    expected = greedy(model, ids, 15)
    nearly = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in nearly.lm_head.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    other = make_model(family, ASSISTANTS[family.name])
    for assistant in (nearly, other):
        assert torch.equal(generate(model, ids, 15, assistant_model=assistant), expected)


@every_kind
def test_static_cache(family, fields):
    model = make_model(family, fields)
    ids, mask = family.make_ids(2, 7), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    expected = greedy(model, ids, 9, mask)
    options = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(generate(model, ids, attention_mask=mask, **options), expected)
    # A second time: the cache is used again
    assert torch.equal(generate(model, ids, attention_mask=mask, **options), expected)


@pytest.mark.parametrize(("family", "fields"), subjects(COMPILED))
def test_static_cache_in_a_compiled_model(family, fields):
    """As `generate` does on an accelerator, the step as one graph, but by a backend that is quick to compile."""
    model = make_model(family, fields)
    ids, mask = family.make_ids(2, 7), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    expected = greedy(model, ids, 5, mask)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compile_config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compile_config._compile_all_devices = True  # a switch that transformers keeps for its own tests
    options = {"cache_implementation": "static", "compile_config": compile_config}
    assert torch.equal(generate(model, ids, 5, attention_mask=mask, **options), expected)
    assert len(graphs) == 1


@every_kind
def test_chunked_prefill(family, fields):
    model = make_model(family, fields)
    ids, mask = family.make_ids(2, 11), torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 11])
    output = generate(model, ids, attention_mask=mask, prefill_chunk_size=4)
    assert torch.equal(output, greedy(model, ids, 9, mask))


@every_kind
def test_going_on_from_a_cache(family, fields):
    model = make_model(family, fields)
    ids, more = family.make_ids(2, 5), family.make_ids(2, 4)
    first = generate(model, ids, 6, return_dict_in_generate=True)
    prompt = torch.cat([first.sequences, more], 1)
    again = generate(model, prompt, 6, cache=getattr(first, CACHE_NAME))
    assert torch.equal(again, greedy(model, prompt, 6))


@every_kind
def test_going_on_from_a_cache_that_was_filled_by_hand(family, fields):
    model, ids = make_model(family, fields), family.make_ids(2, 7)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :5], cache=cache)
    assert torch.equal(generate(model, ids, cache=cache), greedy(model, ids, 9))


@every_kind
def test_embeddings_as_a_prompt(family, fields):
    model, ids = make_model(family, fields), family.make_ids(2, 5)
    output = generate(model, None, inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(output, greedy(model, ids, 9)[:, 5:])


@every_kind
def test_several_documents_stop_by_themselves(family, fields):
    """A row that has ended is padded while others go on, and its pads change nothing in these."""
    model, ids = make_model(family, fields), family.make_ids(3, 5)
    plain = greedy(model, ids, 12)
    stop = int(plain[0, 8])
    config = GenerationConfig(eos_token_id=stop, pad_token_id=0)
    output = generate(model, ids, 12, generation_config=config)
    for row in range(3):
        new = plain[row, 5:].tolist()
        end = new.index(stop) + 1 if stop in new else len(new)
        assert output[row, 5 : 5 + end].tolist() == new[:end]
        assert (output[row, 5 + end :] == 0).all()


@every_kind
def test_early_exit_is_refused(family, fields):
    model = make_model(family, fields)
    with pytest.raises(ValueError, match=f"assistant_early_exit does not work with {family.causal_lm.__name__}"):
        generate(model, family.make_ids(1, 5), assistant_early_exit=1)


@every_kind
def test_a_stop_string_ends_a_text(family, fields):
    """`generate` hands the tokenizer, which it needs for that, on to the forward pass."""
    model, ids = make_model(family, fields), family.make_ids(1, 4)
    written = model.generate(ids, max_new_tokens=6, do_sample=False)[0, 4:].tolist()
    vocabulary = {f"<{index}>": index for index in range(family.sizes["vocab_size"])}
    # transformers finds what tokens add to a text behind this one.
    words = Tokenizer(WordLevel({**vocabulary, "abcdef": len(vocabulary)}, unk_token="<0>"))
    tokenizer, stop = PreTrainedTokenizerFast(tokenizer_object=words), f"<{written[2]}>"
    stopped = model.generate(ids, max_new_tokens=6, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    assert stopped[0, 4:].tolist() == written[: written.index(written[2]) + 1]
