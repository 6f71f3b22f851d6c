"""The demo with a tiny encoder, what stays when it is called again, and what it says of a folder of another run."""

import json
import re

import pytest
from transformers import AutoTokenizer

from hf_efficient.data.rare_words import RareWords
from hf_efficient.objectives.notes import NoteDictionary
from training import quickstart as script
from training.benchmarks import demo


TINY = "hidden_size=24,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,max_position_embeddings=128"


@pytest.fixture
def quickstart(monkeypatch):
    monkeypatch.setattr(script, "CONFIG", TINY)
    return script


def written(folder):
    """When each file was last written that a finished step leaves."""
    names = ("tokenizer/tokenizer.json", "rare-words/rare_words.json", "pretrained/checkpoint-60/model.safetensors")
    return {name: (folder / name).stat().st_mtime_ns for name in (*names, "finetuned/topic_pairs/seed-0/results.json")}


def test_all_steps_once(quickstart, tmp_path, capfd):
    first = quickstart.main(["--short", "--output_dir", str(tmp_path / "demo")])
    folder = tmp_path / "demo-short"
    said = capfd.readouterr().out
    assert not any(line.lstrip().startswith("{") for line in said.splitlines())
    assert re.search(r"^train +60 +\d", said, re.MULTILINE)
    assert json.loads((folder / "quickstart.json").read_text()) == first
    assert (folder / "pretraining.png").stat().st_size > 10_000
    assert [row["value"] for row in demo.summary_of(first)][-2:] == [
        first["accuracy"],
        first["accuracy_of_always_one_answer"],
    ]
    assert f"pairs come out at {first['accuracy']:.2f} (always one" in demo.headline_of(first, 2)

    tokenizer = AutoTokenizer.from_pretrained(folder / "pretrained")
    words = RareWords.load(folder / "rare-words" / "rare_words.json", tokenizer)
    assert len(words.keys) > 20
    assert min(map(len, words.keys)) >= 2
    assert min(words.counts) >= quickstart.RARE[0]
    assert f"{len(words.keys):,} words of 2 tokens or more" in said
    assert words.report["updates_per_word"] == pytest.approx(60 * 16 * words.report["words_per_row"] / len(words.keys))
    notes = NoteDictionary.load(folder / "pretrained")
    assert [tuple(key) for key in words.keys] == [
        tuple(key.tolist()) for key in notes.key_ids.split(notes.key_lengths.tolist())
    ]
    assert 0 < first["pretraining"]["note_updates"] <= notes.updates.float().mean()

    before = written(folder)
    second = quickstart.main(["--short", "--output_dir", str(tmp_path / "demo")])
    assert written(folder) == before
    assert {**second, "seconds": 0} == {**first, "seconds": 0}
    assert f"the words of {folder / 'rare-words' / 'rare_words.json'} stay" in capfd.readouterr().out


def test_a_folder_of_another_run_is_refused(quickstart, tmp_path):
    folder = tmp_path / "demo-short" / "pretrained"
    (folder / "checkpoint-30").mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps({"block_size": 64}))
    with pytest.raises(ValueError, match="was started otherwise") as refusal:
        quickstart.main(["--short", "--output_dir", str(tmp_path / "demo")])
    message = str(refusal.value)
    assert "\n" not in message
    assert f"{folder} was started otherwise: " in message
    assert "block_size was 64 and is 128 now" in message
    assert message.endswith("choose another output_dir (--output_dir), or remove the folder.")
