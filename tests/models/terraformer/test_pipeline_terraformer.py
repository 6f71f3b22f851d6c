"""Summaries of documents of any length by `pipeline("summarization")`, with Terraformer and with other models."""

import importlib.util
import json
import subprocess
import sys
import types

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, BartConfig, T5Config, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from hf_efficient import TerraformerConfig, TerraformerForCausalLM, TerraformerForConditionalGeneration
from hf_efficient.data.tokenizers import seq2seq_tokenizer
from hf_efficient.models.terraformer.pipeline_terraformer import TerraformerSummarizationPipeline
from hf_efficient.utils.after_import import after_import
from hf_efficient.utils.text_pieces import split_document
from tests.helpers.processes import ROOT


SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
}
SHORT, LONG = "A bird. It flew.", "The old dog sees a red bird. The bird does not see it! Then it flies away. " * 3


@pytest.fixture(scope="module")
def tokenizer():
    return seq2seq_tokenizer([LONG, "abcdefghijklmnopqrstuvwxyz"], 300)


def make_model(config):
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.generation_config.max_new_tokens = 6
    model.generation_config.min_new_tokens = 2
    return model


@pytest.fixture(scope="module")
def model():
    return make_model(TerraformerConfig(**SIZES))


def expected(model, tokenizer, text, limit=24, separator=" ", **kwargs):
    """The summary of each piece by itself, joined."""
    summaries = []
    for ids in split_document(tokenizer, text, limit):
        output = model.generate(torch.tensor([ids]), **kwargs)[0]
        summaries.append(tokenizer.decode(output, skip_special_tokens=True).strip())
    return {"summary_text": separator.join(summary for summary in summaries if summary)}


def test_documents_one_by_one_and_in_batches(model, tokenizer):
    summarize = pipeline("summarization", model=model, tokenizer=tokenizer, device="cpu")
    assert isinstance(summarize, TerraformerSummarizationPipeline)
    assert len(split_document(tokenizer, LONG, 24)) > 2
    wanted = [expected(model, tokenizer, text) for text in (SHORT, LONG)]
    assert wanted[1]["summary_text"] not in ("", wanted[0]["summary_text"])
    assert summarize(SHORT) == wanted[:1]
    assert summarize(LONG) == wanted[1:]
    for batch_size in (1, 2, 5):
        assert summarize([SHORT, LONG], batch_size=batch_size) == wanted
    assert list(summarize(iter_of([LONG, SHORT]))) == wanted[::-1]


def iter_of(texts):
    yield from texts


def test_settings_of_a_call(model, tokenizer):
    summarize = pipeline("summarization", model=model, tokenizer=tokenizer, device="cpu", num_beams=2)
    assert summarize(SHORT) == [expected(model, tokenizer, SHORT, num_beams=2)]
    wanted = expected(model, tokenizer, LONG, 11, "\n", num_beams=2, max_new_tokens=4)
    assert summarize(LONG, max_source_length=11, separator="\n", max_new_tokens=4) == [wanted]
    assert "\n" in wanted["summary_text"]


@pytest.mark.parametrize(
    ("given", "own", "length"),
    [({}, {}, 128), ({}, {"max_new_tokens": 7}, 7), ({"max_new_tokens": 9}, {"max_new_tokens": 7}, 9)],
    ids=["default", "model", "call"],
)
def test_length_of_a_summary(model, tokenizer, monkeypatch, given, own, length):
    generation_config = type(model.generation_config)(**own)
    monkeypatch.setattr(model, "generation_config", generation_config)
    monkeypatch.setattr(model, "generate", lambda input_ids, **kwargs: calls.append(kwargs) or input_ids)
    calls: list[dict] = []
    TerraformerSummarizationPipeline(model, tokenizer, device="cpu")(SHORT, **given)
    assert calls[0].get("max_new_tokens", own.get("max_new_tokens")) == length


@pytest.mark.parametrize(
    "config",
    [
        T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0),
        BartConfig(
            vocab_size=300,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            max_position_embeddings=24,
        ),
    ],
    ids=["t5", "bart"],
)
def test_models_of_transformers(config, tokenizer):
    """T5 has no table of positions, and reads all at once."""
    model = make_model(config)
    summarize = pipeline("summarization", model=model, tokenizer=tokenizer, device="cpu")
    limit = getattr(config, "max_position_embeddings", None)
    assert summarize([LONG, SHORT], batch_size=2) == [expected(model, tokenizer, text, limit) for text in (LONG, SHORT)]


def test_errors(model, tokenizer):
    with pytest.raises(ValueError, match="one summary a document"):
        pipeline("summarization", model=model, tokenizer=tokenizer)(SHORT, num_return_sequences=2, num_beams=2)
    summarize = pipeline("summarization", model=model, tokenizer=tokenizer, device="cpu")
    with pytest.raises(ValueError, match="has no text"):
        summarize([" "])
    with pytest.raises(ValueError, match="is a text, not dict"):
        summarize([{"text": SHORT}])
    causal = TerraformerForCausalLM(TerraformerConfig(**SIZES | {"num_encoder_layers": 0}, is_encoder_decoder=False))
    with pytest.raises(ValueError, match="is no encoder-decoder"):
        TerraformerSummarizationPipeline(causal, tokenizer, device="cpu")
    with pytest.raises(ValueError, match="need a tokenizer"):
        TerraformerSummarizationPipeline(model, device="cpu")


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, "must be a number of tokens, from 1, not 0: leave it out"),
        (-3, "must be a number of tokens, from 1, not -3: leave it out"),
        (2.5, "must be a number of tokens, from 1, not 2.5: leave it out"),
        (25, r"max_source_length is 25, but this model's table .* has 24: lower it, or leave it out"),
    ],
)
def test_pieces_that_the_model_cannot_read(model, tokenizer, length, message):
    summarize = pipeline("summarization", model=model, tokenizer=tokenizer, device="cpu")
    with pytest.raises(ValueError, match=message):
        summarize(LONG, max_source_length=length)


def test_tasks_of_transformers_stay(model, tokenizer):
    assert PIPELINE_REGISTRY.supported_tasks["summarization"]["impl"] is TerraformerSummarizationPipeline
    with pytest.raises(KeyError, match="translation"):
        pipeline("translation", model=model, tokenizer=tokenizer)


def test_a_folder_in_a_fresh_process(model, tokenizer, tmp_path):
    """Where the package is imported first, and `transformers.pipelines` not before it is asked for."""
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    program = f"""
import json, sys
import hf_efficient
before = sorted({{"transformers.pipelines", "hf_efficient.models.terraformer.pipeline_terraformer"}} & set(sys.modules))
from transformers import pipeline
found = pipeline("summarization", model={str(tmp_path)!r}, device="cpu")({LONG!r})
print(json.dumps([before, found]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[], [expected(model, tokenizer, LONG)]]


def test_a_model_saved_with_its_code_names_its_pipeline(model, tokenizer, tmp_path):
    """In the folder, and not in the config of a process that has the package, which would ask for trust."""
    from hf_efficient import hub

    folder = hub.export(model, tokenizer, tmp_path / "exported")
    again = TerraformerForConditionalGeneration.from_pretrained(folder)
    again.save_pretrained(tmp_path / "again")
    assert not hasattr(again.config, "custom_pipelines")
    named = [
        json.loads((path / "config.json").read_text())["custom_pipelines"] for path in (folder, tmp_path / "again")
    ]
    assert (
        named[0]
        == named[1]
        == {
            "summarization": {
                "impl": "pipeline_terraformer.TerraformerSummarizationPipeline",
                "pt": ["AutoModelForSeq2SeqLM"],
                "type": "text",
            }
        }
    )
    assert all((path / "pipeline_terraformer.py").is_file() for path in (folder, tmp_path / "again"))
    found = pipeline("summarization", model=str(folder), device="cpu")(SHORT)
    assert found == [expected(model, tokenizer, SHORT)]


def test_heads_without_summaries_name_no_pipeline(tmp_path):
    from hf_efficient import TerraformerForSequenceClassification, hub

    folder = hub.export(TerraformerForSequenceClassification(TerraformerConfig(**SIZES)), None, tmp_path / "head")
    assert "custom_pipelines" not in json.loads((folder / "config.json").read_text())


def test_work_after_an_import(tmp_path, monkeypatch):
    (tmp_path / "imported_later.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[types.ModuleType] = []
    finders = list(sys.meta_path)
    after_import("imported_later", seen.append)
    after_import("imported_later", seen.append)
    assert importlib.util.find_spec("imported_later") is not None, "looking is no import"
    assert seen == []
    import imported_later

    assert seen == [imported_later, imported_later]
    assert sys.meta_path == finders
    after_import("imported_later", seen.append)
    assert len(seen) == 3
    sys.modules.pop("imported_later")
