"""What train_lm.py leaves behind pads batches, ends texts, and is fine-tuned, in a fresh process."""

import json
import subprocess
import sys

import pytest
from transformers import AutoConfig, AutoTokenizer

from hf_efficient.data.byte_tokenizer import byte_tokenizer
from hf_efficient.data.glue import GLUE_TASKS
from hf_efficient.data.token_stream import build_tokenizer, encode
from hf_efficient.data.tokenizers import train_tokenizer
from tests.helpers.processes import ROOT
from tests.training import pretraining_runs
from tests.training.test_finetune_glue import QUICK
from tests.training.test_train_lm import GPT2, SRUPP, arguments, run
from tests.training.tiny_glue import make_rows, write_glue
from training import finetune_glue


LLAMA = "hidden_size=16,intermediate_size=16,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=2"
TEXT = "the old dog sees a red bird\nnear the river\n" * 20


@pytest.fixture(autouse=True)
def _caches(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path_factory.mktemp("metrics"))


@pytest.mark.parametrize("level", ["byte", "char", "word", "subword", "wordpiece", "bpe"])
def test_every_tokenizer_ends_and_pads(level, tmp_path):
    if level in ("wordpiece", "bpe"):
        tokenizer = train_tokenizer([TEXT], algorithm=level, vocab_size=300)
    else:
        tokenizer = build_tokenizer(level, [TEXT], vocab_size=300 if level == "subword" else None)
    size = len(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == size
    assert 0 <= tokenizer.eos_token_id < size
    assert 0 <= tokenizer.pad_token_id < size
    batch = tokenizer(["the old dog", "the"], padding=True)
    assert batch["input_ids"][1][-1] == tokenizer.pad_token_id
    assert batch["attention_mask"][1][-1] == 0
    assert len({len(row) for row in batch["input_ids"]}) == 1
    assert tokenizer.decode(batch["input_ids"][1], skip_special_tokens=True).strip() == "the"
    first, second = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("the old", "dog sees"))
    pair = tokenizer("the old", "dog sees")["input_ids"]
    assert pair in ([*first, tokenizer.eos_token_id, *second], [2, *first, 3, *second, 3])


@pytest.mark.parametrize("level", ["byte", "char"])
def test_ids_of_a_text_are_those_without_end_and_padding(level):
    """Which come after them, so that streams are the same bytes and characters as ever."""
    tokenizer = build_tokenizer(level, [TEXT, "a"])
    stream = encode([TEXT, "a"], tokenizer, level)
    if level == "byte":
        assert stream.tokens.tobytes() == f"{TEXT}\n\na".encode()
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (256, 257, 258)
    else:
        characters = sorted({*TEXT})
        assert stream.tokens.tolist() == [characters.index(character) for character in f"{TEXT}\n\na"]
        assert min(tokenizer.eos_token_id, tokenizer.pad_token_id) == len(characters)


PROGRAM = """
import json, sys, torch
import hf_efficient
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
batch = tokenizer(["the old dog sees", "a"], padding=True, return_tensors="pt")
classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
with torch.no_grad():
    both = classifier(**batch).logits
    alone = [classifier(**tokenizer([text], return_tensors="pt")).logits[0] for text in ("the old dog sees", "a")]
torch.testing.assert_close(both, torch.stack(alone), rtol=1e-4, atol=1e-5)
generate = pipeline("text-generation", model=folder, device="cpu", batch_size=2)
texts = generate(["the old dog", "the"], max_new_tokens=3, do_sample=False)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
start = torch.tensor([[tokenizer.eos_token_id, *tokenizer("the dog")["input_ids"]]])
loss = model(input_ids=start, attention_mask=torch.ones_like(start), labels=start).loss.item()
print(json.dumps({"texts": [text[0]["generated_text"] for text in texts], "loss": loss}))
"""


def write_corpus(path):
    """Sentences, and the words of the rows that are fine-tuned on."""
    pretraining_runs.write_corpus(path, documents=30)
    rows = make_rows(GLUE_TASKS["stsb"], 60, 0)
    path.write_text(path.read_text() + "\n".join(f"{row['sentence1']}\n{row['sentence2']}" for row in rows))


def fine_tune(model, folder, task="stsb"):
    (folder / "glue").mkdir()
    options = ["--model", str(model), "--tasks", task, "--data_dir", str(write_glue(folder / "glue")), *QUICK]
    limits = ["--max_train_samples", "20", "--max_eval_samples", "8", "--max_length", "24"]
    finetune_glue.main([*options, *limits, "--output_dir", str(folder / "scores")])
    return folder / "scores" / task / "seed-42" / "model"


@pytest.mark.parametrize(
    ("level", "changes", "is_tuned"),
    [
        ("byte", {"config_overrides": SRUPP}, True),
        pytest.param("char", {"config_overrides": LLAMA, "model_type": "llama"}, False, marks=pytest.mark.slow),
        pytest.param("word", {"config_overrides": SRUPP}, False, marks=pytest.mark.slow),
        ("subword", {"config_overrides": GPT2, "model_type": "gpt2", "vocab_size": 300}, True),
    ],
    ids=["byte-srupp", "char-llama", "word-srupp", "subword-gpt2"],
)
def test_batches_heads_and_pipelines(level, changes, is_tuned, tmp_path):
    write_corpus(tmp_path / "corpus.txt")
    model = tmp_path / "my-lm"
    run(arguments(tmp_path / "corpus.txt", model, level=level, max_steps=2, sample_tokens=0, **changes))
    done = subprocess.run([sys.executable, "-c", PROGRAM, model], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "pad_token_id" not in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(text.startswith("the") for text in found["texts"])
    assert 0 < found["loss"] < 20
    if is_tuned:
        config = AutoConfig.from_pretrained(fine_tune(model, tmp_path))
        assert config.pad_token_id == AutoTokenizer.from_pretrained(model).pad_token_id


def test_the_end_of_a_text_is_learned_where_it_pads(tmp_path):
    """Embeddings leave the row of a padding id alone, so the config of a model in training names none."""
    (tmp_path / "corpus.txt").write_text(TEXT)
    options = {"config_overrides": LLAMA, "model_type": "llama", "max_steps": 1, "sample_tokens": 0}
    trainer = run(arguments(tmp_path / "corpus.txt", tmp_path / "lm", level="word", **options))
    assert trainer.model.get_input_embeddings().padding_idx is None
    assert AutoConfig.from_pretrained(tmp_path / "lm").pad_token_id is not None


def test_folders_with_tokenizers_of_bytes_alone_are_fine_tuned(tmp_path):
    write_corpus(tmp_path / "corpus.txt")
    byte_tokenizer().save_pretrained(tmp_path / "bytes")
    options = {"tokenizer": tmp_path / "bytes", "max_steps": 1, "sample_tokens": 0}
    run(arguments(tmp_path / "corpus.txt", tmp_path / "old-lm", **options))
    assert AutoConfig.from_pretrained(tmp_path / "old-lm").vocab_size == 256
    fine_tune(tmp_path / "old-lm", tmp_path)
