"""Every way to generate from a batch of unequal sources agrees with the plain one, whole forwards of each source."""

import copy

import pytest
import torch
from transformers import CompileConfig, GenerationConfig, Seq2SeqTrainer, Seq2SeqTrainingArguments

from tests.helpers.families import TERRAFORMER


KINDS = ("dense", "all-sru", "average-one-swap", "half-width", "forgetting", "cross", "cross-sparse", "cross-none-sru")
LENGTHS = [5, 9, 1]


@pytest.fixture(params=KINDS)
def model(request, make_model):
    # No end, so that all rows are equally long.
    return make_model(**TERRAFORMER.variants[request.param], eos_token_id=None)


@torch.no_grad()
def greedy(model, source, steps):
    """Whole forwards of one source, without a cache and padding."""
    ids = torch.tensor([[model.config.decoder_start_token_id]])
    for _ in range(steps):
        logits = model(input_ids=source[None], decoder_input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids[0]


def generate(model, batch, steps=8, **options):
    return model.generate(**batch.source, **{"max_new_tokens": steps, "do_sample": False, **options})


def expected_of(model, batch, steps=8):
    return torch.stack([greedy(model, source, steps) for source in batch.sources])


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy(model, make_batch, side):
    batch = make_batch(LENGTHS, side=side)
    expected = expected_of(model, batch)
    assert torch.equal(generate(model, batch), expected)
    assert torch.equal(generate(model, batch, use_cache=False), expected)


def test_beams_and_several_targets_a_source(model, make_batch):
    """As those of each source alone."""
    batch = make_batch(LENGTHS)
    options = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    found, whole = (generate(model, batch, use_cache=cached, **options) for cached in (True, False))
    assert torch.equal(found.sequences, whole.sequences)
    torch.testing.assert_close(found.sequences_scores, whole.sequences_scores)
    for row, length in enumerate(LENGTHS):
        single = copy.copy(batch)
        single.input_ids = batch.sources[row][None]
        single.attention_mask = torch.ones(1, length).long()
        alone = generate(model, single, **options)
        assert torch.equal(alone.sequences, found.sequences[2 * row : 2 * row + 2])


def test_seeded_sampling_of_several_targets(model, make_batch):
    batch, outputs = make_batch(LENGTHS), []
    options = {"do_sample": True, "top_k": 9, "temperature": 1.5, "num_return_sequences": 2}
    for cached in (True, False):
        torch.manual_seed(1)
        outputs.append(generate(model, batch, use_cache=cached, **options))
    assert torch.equal(*outputs)
    assert len(outputs[0]) == 6


def test_prompt_lookup(model, make_batch):
    """The source holds what is looked up; and a target that repeats itself."""
    batch = make_batch([9])
    start = greedy(model, batch.sources[0], 4)[None]
    expected = greedy(model, batch.sources[0], 15)[None]
    options = {"prompt_lookup_num_tokens": 3, "decoder_input_ids": start}
    assert torch.equal(generate(model, batch, 11, **options), expected)


def test_assistant(model, make_model, make_batch):
    """One that is often right and one that is seldom: both take and roll back candidates."""
    batch = make_batch([9])
    expected = greedy(model, batch.sources[0], 15)[None]
    nearly = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in nearly.lm_head.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    for assistant in (nearly, make_model(num_decoder_layers=1, eos_token_id=None)):
        assert torch.equal(generate(model, batch, 15, assistant_model=assistant), expected)


def test_static_cache(model, make_batch):
    batch = make_batch(LENGTHS)
    expected = expected_of(model, batch)
    options = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(generate(model, batch, **options), expected)
    assert torch.equal(generate(model, batch, **options), expected)  # the cache is used again
    other = make_batch([4, 2, 3])
    assert torch.equal(generate(model, other, **options), expected_of(model, other))


@pytest.mark.parametrize("kind", ["all-sru", "cross-sparse"])
def test_static_cache_in_a_compiled_model(make_model, make_batch, kind):
    """As `generate` does on an accelerator, the step as one graph, but by a backend that is quick to compile."""
    model, batch, graphs = make_model(**TERRAFORMER.variants[kind], eos_token_id=None), make_batch([5, 9]), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compile_config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compile_config._compile_all_devices = True  # a switch that transformers keeps for its own tests
    options = {"cache_implementation": "static", "compile_config": compile_config}
    assert torch.equal(generate(model, batch, 6, **options), expected_of(model, batch, 6))
    assert len(graphs) == 1


def test_a_target_that_is_begun(model, make_batch):
    """By a first call of several tokens, from a prompt of the decoder; and going on with the cache."""
    batch = make_batch([5, 9])
    expected = expected_of(model, batch, 12)
    prompt = expected[:, :5]
    first = generate(model, batch, 3, decoder_input_ids=prompt, return_dict_in_generate=True)
    assert torch.equal(first.sequences, expected[:, :8])
    again = generate(model, batch, 5, decoder_input_ids=first.sequences)
    assert torch.equal(again, expected)


def test_embeddings_as_a_source(model, make_batch):
    batch = make_batch(LENGTHS)
    embeds = model.get_input_embeddings()(batch.input_ids)
    options = {"attention_mask": batch.attention_mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), expected_of(model, batch))


def test_rows_stop_by_themselves(model, make_batch):
    batch = make_batch(LENGTHS)
    plain = expected_of(model, batch, 12)
    stop = int(plain[0, 4])
    config = GenerationConfig(eos_token_id=stop, pad_token_id=0, decoder_start_token_id=0)
    output = generate(model, batch, 12, generation_config=config)
    for row in range(3):
        new = plain[row, 1:].tolist()
        end = new.index(stop) + 1 if stop in new else len(new)
        assert output[row, 1 : 1 + end].tolist() == new[:end]
        assert (output[row, 1 + end :] == 0).all()


def test_early_exit_is_refused(model, make_batch):
    with pytest.raises(ValueError, match="assistant_early_exit does not work with TerraformerForConditionalGeneration"):
        generate(model, make_batch([5]), assistant_early_exit=1)


def test_seq2seq_trainer_predicts_by_generating(make_model, make_batch, tmp_path):
    pytest.importorskip("accelerate")
    model, batch = make_model(dtype=torch.float32, **TERRAFORMER.variants["all-sru"]), make_batch([5, 9])
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        predict_with_generate=True,
        generation_max_length=7,
        use_cpu=True,
        report_to=[],
        per_device_eval_batch_size=1,
    )
    rows = [
        {"input_ids": source, "labels": target} for source, target in zip(batch.sources, batch.targets, strict=True)
    ]
    output = Seq2SeqTrainer(model, arguments).predict(rows)
    for row in range(2):
        predicted = generate(model.eval(), make_batch([5, 9]), 6)[row]
        found = [token for token in output.predictions[row].tolist() if token not in (-100, 0)]
        assert found == [token for token in predicted.tolist() if token not in (-100, 0)]
