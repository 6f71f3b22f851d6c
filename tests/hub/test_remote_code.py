"""An exported folder in other processes: without the package, from the Hub, from the cache, and beside the package."""

import pytest
import torch
from transformers import pipeline

from hf_efficient import TerraformerConfig, TerraformerForConditionalGeneration
from hf_efficient.auto import FAMILIES
from hf_efficient.data.tokenizers import seq2seq_tokenizer
from hf_efficient.hub import export
from hf_efficient.ops.backend import ENVIRONMENT_VARIABLE
from tests.helpers.comparison import assert_close
from tests.hub.remote_client import GREEDY, TEXT, outputs_of


SEQUENCE = "AutoModelForSequenceClassification"


def classified(model, tokenizer) -> dict:
    """What the text-classification pipeline must answer."""
    with torch.no_grad():
        probabilities = model(**tokenizer(TEXT, return_tensors="pt")).logits[0].softmax(-1)
    best = int(probabilities.argmax())
    return {"label": model.config.id2label[best], "score": pytest.approx(probabilities[best].item(), abs=1e-6)}


def test_every_head_loads_from_its_folder_without_the_package(stranger, make_model, tokenizer, tmp_path, monkeypatch):
    """All families in one process, each head in a folder of a name of its own: it names the module."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")  # the stranger has no compiled kernels
    models = {
        family: {auto_class: make_model(auto_class, seed, family) for seed, auto_class in enumerate(row.classes)}
        for family, row in FAMILIES.items()
    }
    folders = {
        family: {
            auto_class: str(export(model, tokenizer, tmp_path / "models" / f"{family}-{auto_class}"))
            for auto_class, model in heads.items()
        }
        for family, heads in models.items()
    }
    answers = stranger("folders_all", families=folders)

    assert not answers["package_seen"]
    assert "[transformers]" not in answers["stderr"], answers["stderr"]  # no warning
    for family, heads in models.items():
        answer = answers[family]
        for auto_class, model in heads.items():
            loaded = answer["loaded"][auto_class]
            assert loaded["module"].startswith("transformers_modules.")
            assert_close(f"{family} {auto_class}", loaded["outputs"], outputs_of(model), 1e-5)
            assert "trust_remote_code=True" in answer["refused"][auto_class]
        assert answer["ids"] == tokenizer(TEXT).input_ids
        assert answer["pipeline"] == classified(heads[SEQUENCE], tokenizer)
        if "AutoModelForCausalLM" in heads:
            ids = heads["AutoModelForCausalLM"].generate(**tokenizer(TEXT, return_tensors="pt"), **GREEDY)
            assert answer["generated"] == ids[0].tolist(), family
        if "AutoModelForSeq2SeqLM" in heads:
            ids = heads["AutoModelForSeq2SeqLM"].generate(**tokenizer(TEXT, return_tensors="pt"), **GREEDY)
            assert answer["summary"] == ids[0].tolist(), family


def test_a_long_document_is_summarised_without_the_package(stranger, tmp_path):
    """16,000 tokens in pieces of at most 500, also by a folder that remote code has saved."""
    text = " ".join(f"The old dog sees bird {number}." for number in range(3000))
    tokenizer = seq2seq_tokenizer([text[:10_000]], 300)
    config = TerraformerConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_attention_heads=2,
        max_position_embeddings=500,
        position_init_scale=0.1,
    )
    model = TerraformerForConditionalGeneration(config).eval()
    folder, options = export(model, tokenizer, tmp_path / "summarizer"), {"max_new_tokens": 4, "batch_size": 8}
    documents = ["The dog sees a bird.", text]
    answer = stranger("summarize", model=str(folder), documents=documents, again=str(tmp_path / "again"), **options)
    assert answer["tokens"] > 16_000
    assert answer["module"].startswith("transformers_modules.")
    assert not answer["package_seen"]
    expected = pipeline("summarization", model=model, tokenizer=tokenizer, device="cpu")(documents, **options)
    assert len(expected[1]["summary_text"]) > len(expected[0]["summary_text"]) > 0
    assert (answer["first"], answer["again"]) == (expected, expected[:1])


def test_from_the_hub_then_offline(stranger, hub, make_model, tokenizer, tmp_path):
    first, second = make_model(SEQUENCE, seed=1), make_model(SEQUENCE, seed=2)
    commits = []
    for mark, model in (("first", first), ("second", second)):
        folder = export(model, tokenizer, tmp_path / mark, name="org/tupe-tiny")
        with (folder / "modeling_tupe.py").open("a") as code:
            code.write(f'\nMARK = "{mark}"\n')
        commits.append(hub.commit("org/tupe-tiny", folder))
    hub.break_off("model.safetensors", after=5000)

    online = stranger("repository", hub=hub, repo_id="org/tupe-tiny", pinned=commits[0])
    downloads = [r for r in hub.requests if r.method == "GET" and r.path.startswith("/storage/")]
    hub.stop()
    offline = stranger("repository", repo_id="org/tupe-tiny", pinned=commits[0], task="text-classification")

    for answer in (online, offline):
        assert not answer["package_seen"]
        for which, model, mark, commit in (
            ("newest", second, "second", commits[1]),
            ("pinned", first, "first", commits[0]),
        ):
            assert_close(which, answer[which]["outputs"], outputs_of(model), 1e-5)
            assert answer[which]["mark"] == mark
            assert commit in answer[which]["module"]
        assert answer["pipeline"] == classified(second, tokenizer)

    # Two files of weights, the first of them in two parts: taken up where it broke off
    assert [request.status for request in downloads] == [200, 206, 200]
    assert downloads[1].path == downloads[0].path
    assert downloads[1].range == "bytes=4608-"  # 9 chunks of 512 bytes lie within the 5,000 that came through
    asked = [request for request in hub.requests if "org/tupe-tiny" in request.path]
    assert {request.error for request in asked} == {None, "EntryNotFound"}  # nothing that the server does not know


def test_beside_the_package(stranger, make_model, tmp_path):
    model = make_model(SEQUENCE)
    folder = export(model, None, tmp_path / "tupe-tiny")
    answer = stranger("both_classes", installed=True, folder=str(folder))
    assert answer["package"]["module"] == "hf_efficient.models.tupe.modeling_tupe"
    assert answer["remote"]["module"].startswith("transformers_modules.")
    assert_close("package", answer["package"]["outputs"], outputs_of(model), 1e-5)
    assert_close("remote", answer["remote"]["outputs"], outputs_of(model), 1e-5)
    assert answer["same_gradients"]
    assert "after `import hf_efficient`" in answer["export_of_remote"]
