"""Every objective through `pretrain.py`, alone and with notes: what it logs, leaves behind, and refuses."""

import json
import signal
from unittest.mock import MagicMock

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from hf_efficient.objectives.notes import NoteDictionary
from hf_efficient.trainer.checkpoints import find_last_checkpoint
from tests.training import pretraining_runs
from training import count_rare_words, pretrain


DISCRIMINATORS = ("replaced_token", "meta_controller")
PARTS = {
    "mlm": {"accuracy"},
    "replaced_token": {"generator_loss", "discriminator_loss", "replaced_fraction", "recall_replaced"},
    "meta_controller": {"generator_loss", "discriminator_loss", "replaced_fraction", "accuracy_replaced"},
}
NOTES = {"note_hits", "note_norm", "token_norm", "note_updates"}


@pytest.fixture(scope="module")
def rare_words(tmp_path_factory):
    """A tokenizer with the reject option, and the corpus' words by it."""
    folder = tmp_path_factory.mktemp("rare-words")
    pretraining_runs.write_corpus(folder / "corpus.txt")
    settings = {"objective": "meta_controller", "max_steps": 1, "save_strategy": "no", "validation_size": 0}
    pretraining_runs.run_here(pretraining_runs.arguments(folder, folder / "tokenizer", **settings))
    band = ["--min_count", "5", "--max_count", "500", "--min_tokens", "1", "--validation_size", "0"]
    corpus = ["--corpus", str(folder / "corpus.txt"), "--txt_documents", "blank_line"]
    count_rare_words.main(
        [*corpus, "--tokenizer", str(folder / "tokenizer"), "--output_dir", str(folder / "words"), *band]
    )
    return folder


def settings_of(objective: str, rare_words=None, **changes) -> dict:
    settings = {"objective": objective, "learning_rate": 3e-4, **changes}
    if objective != "mlm":
        settings["objective_overrides"] = "generator_hidden_size=8"
    if rare_words is not None:
        words = rare_words / "words" / "rare_words.json"
        settings |= {"notes": words, "tokenizer": rare_words / "tokenizer", "notes_overrides": "half_window=2"}
    return settings


@pytest.mark.parametrize("with_notes", [False, True], ids=["plain", "notes"])
@pytest.mark.parametrize("objective", PARTS)
def test_from_text_to_an_encoder(objective, with_notes, rare_words, tmp_path):
    settings = settings_of(objective, rare_words if with_notes else None, max_steps=6, eval_steps=3)
    trainer = pretraining_runs.run_here(pretraining_runs.arguments(rare_words, tmp_path, **settings))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    wanted = PARTS[objective] | {"token_variance_fraction"} | (NOTES if with_notes else set())
    assert wanted <= set(logs[-1])
    assert any("eval_loss" in entry for entry in trainer.state.log_history)

    # The product is a plain encoder, and fine-tuning finds it, in a checkpoint too
    encoder, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    early = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6", num_labels=3)
    assert early.config.num_labels == 3
    trained = dict(trainer.model.encoder.named_parameters())
    for model in (encoder, classifier.base_model, early.base_model):
        for name, parameter in model.named_parameters():
            if "pooler" not in name:
                assert torch.equal(parameter, trained[name]), name
    size = len(AutoTokenizer.from_pretrained(tmp_path))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "checkpoint-6")) == size
    assert encoder.config.vocab_size == size
    assert not any("note" in name for name in encoder.state_dict())
    whole, info = type(trainer.model).from_pretrained(tmp_path / "checkpoint-6", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert whole.encoder.config.vocab_size == size
    if with_notes:
        assert torch.equal(NoteDictionary.load(tmp_path).values, trainer.model.notes.values)


@pytest.mark.parametrize("objective", DISCRIMINATORS)
@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "modernbert", "srupp"])
def test_other_encoders(objective, model_type, rare_words, tmp_path):
    changes = {"model_type": model_type, "max_steps": 2, "eval_steps": 2, "save_strategy": "no", "validation_size": 0}
    if model_type == "electra":  # notes want one width
        changes["config_overrides"] = f"{pretraining_runs.OVERRIDES},embedding_size=16"
    if model_type == "srupp":
        sizes = "hidden_size=16,projection_size=8,num_hidden_layers=2,num_attention_heads=2"
        changes["config_overrides"] = f"bidirectional=true,{sizes}"
    settings = settings_of(objective, rare_words, **changes)
    trainer = pretraining_runs.run_here(pretraining_runs.arguments(rare_words, tmp_path, **settings))
    assert trainer.state.global_step == 2
    assert AutoModel.from_pretrained(tmp_path).config.model_type == model_type


def test_special_tokens_are_targets_on_request(rare_words, tmp_path):
    """As in the released code; and the rows are others then."""
    settings = {"max_steps": 1, "save_strategy": "no", "mlm_probability": 1.0, "eval_steps": 1}
    settings["config_overrides"] = f"{pretraining_runs.OVERRIDES},cls_token_id=null"
    found = {}
    for asked in ("False", "True"):
        folder = tmp_path / asked
        changes = settings_of("replaced_token", **settings, mask_special_tokens=asked)
        trainer = pretraining_runs.run_here(pretraining_runs.arguments(rare_words, folder, **changes))
        labels = trainer.data_collator([trainer.train_dataset[0]])["labels"]
        found[asked] = (labels[0, 0] != -100).item()
    assert found == {"False": False, "True": True}


@pytest.mark.parametrize("objective", PARTS)
def test_killed_and_resumed_with_notes_is_uninterrupted(objective, rare_words, tmp_path):
    """To the bit: losses, their parts, and the notes; the discriminator comes in after the kill."""
    settings = settings_of(objective, rare_words, max_steps=13, eval_steps=6, save_steps=4, logging_steps=3)
    if objective != "mlm":
        settings["objective_overrides"] += ",discriminator_start_step=7"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pretraining_runs.run_here(pretraining_runs.arguments(rare_words, whole, **settings))
    argv = pretraining_runs.arguments(rare_words, broken, **settings)
    assert pretraining_runs.run_in_child(argv, pretraining_runs.at_step(6)) == -signal.SIGKILL
    assert find_last_checkpoint(broken).endswith("checkpoint-4")
    pretraining_runs.run_here([*argv, "--resume"])
    assert pretraining_runs.history(broken) == pretraining_runs.history(whole)
    weights = [load_file(folder / "checkpoint-13" / "model.safetensors") for folder in (whole, broken)]
    assert weights[0].keys() == weights[1].keys()
    assert any(name.startswith("notes.") for name in weights[0])
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_a_changed_notes_file_is_not_resumed_on(rare_words, tmp_path):
    words = tmp_path / "words.json"
    words.write_text((rare_words / "words" / "rare_words.json").read_text())
    settings = settings_of("mlm", rare_words, max_steps=2, save_steps=1, eval_steps=2) | {"notes": words}
    argv = pretraining_runs.arguments(rare_words, tmp_path / "run", **settings)
    pretraining_runs.run_here(argv)
    (tmp_path / "run" / "history.json").unlink()
    content = json.loads(words.read_text())
    words.write_text(json.dumps({**content, "words": content["words"][:-1]}))
    with pytest.raises(ValueError, match=r"was started otherwise: notes_sha256 was '.{64}' and is '.{64}' now"):
        pretraining_runs.run_here([*argv, "--resume"])
    words.write_text((rare_words / "words" / "rare_words.json").read_text())
    assert pretraining_runs.run_here([*argv, "--resume"]).state.global_step == 2


def test_replaced_tokens_begin_as_a_masked_lm_unless_told_otherwise(rare_words, tokenizer, tmp_path):
    found = {}
    for i, overrides in enumerate(("generator_divider=2", "preset=electra", "discriminator_start_step=1")):
        settings = settings_of("replaced_token", max_steps=7) | {"objective_overrides": overrides}
        argv = pretraining_runs.arguments(rare_words, tmp_path / str(i), **settings)
        *_, objective = pretraining_runs.build_here(argv, tokenizer)
        config = objective.model.config
        found[overrides] = (config.stage_one, config.discriminator_start_step, config.initial_replaced_fraction)
    assert found == {
        "generator_divider=2": ("masked_lm", 2, 0.1425),
        "preset=electra": ("generator", None, None),
        "discriminator_start_step=1": ("generator", 1, None),
    }


def test_a_preset_masks_as_its_paper_does_and_settings_come_first(rare_words, tokenizer, tmp_path):
    def collator(**changes):
        argv = pretraining_runs.arguments(rare_words, tmp_path, **settings_of("meta_controller") | changes)
        return pretraining_runs.build_here(argv, tokenizer)[-1].collator

    shares = [
        (made.bernoulli, made._settings["mask_replace_prob"], made._settings["random_replace_prob"])
        for made in (
            collator(objective_overrides="num_candidates=10"),
            collator(objective_overrides="preset=paper"),
            collator(objective_overrides="preset=paper", bernoulli="False", mask_replace_prob=0.9),
        )
    ]
    assert shares == [(False, 1.0, 0.0), (True, 0.8, 0.1), (False, 0.9, 0.1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": ""}, "Notes need the tokenizer"),
        ({"load_best_model_at_end": "True", "save_steps": 4}, "--metric_for_best_model discriminator_loss"),
        ({"mask_special_tokens": "True"}, "cls_token_id=null"),
        ({"objective_overrides": "num_candidate=3"}, r"meta_controller has no option num_candidate"),
        ({"objective_overrides": "preset=papr"}, r"no preset 'papr'. Its presets are: paper"),
        ({"objective_overrides": "num_candidates=1"}, "num_candidates must be at least 2"),
        ({"objective": "mlm", "objective_overrides": "x=1"}, "mlm has no options"),
        ({"notes_overrides": "gama=1"}, "Notes have no option gama"),
        ({"notes": "nowhere.json"}, r"no file nowhere.json \(--notes\): make it by training/count_rare_words.py"),
        (
            {"model_type": "electra", "config_overrides": f"{pretraining_runs.OVERRIDES},embedding_size=8"},
            "both widths",
        ),
    ],
    ids=[
        "notes-without-tokenizer",
        "best-model-by-loss",
        "special-tokens",
        "option-of-objective",
        "preset",
        "num-candidates",
        "options-of-mlm",
        "option-of-notes",
        "notes-file",
        "widths-of-electra",
    ],
)
def test_errors_say_what_to_do(rare_words, tmp_path, changes, message):
    settings = settings_of("meta_controller", rare_words) | changes
    with pytest.raises((ValueError, OSError, StrictDataclassError), match=message):
        pretraining_runs.run_here(pretraining_runs.arguments(rare_words, tmp_path / "run", **settings))
    assert not (tmp_path / "run" / "history.json").exists()


@pytest.fixture
def tokenizer(rare_words):
    return AutoTokenizer.from_pretrained(rare_words / "tokenizer")


CONFIGS = sorted(
    path
    for path in (pretraining_runs.TRAINING / "configs").glob("*.json")
    if not path.name.startswith(("srupp", "scaling", "terraformer"))
)
# Of the papers' presets: rows in a step, steps, learning rate, and parameters of encoder and objective.
PAPERS = {
    # Clark et al. 2020 and google-research/electra.
    "electra_small": (128, 1_000_000, 5e-4, 13_483_008, 14_224_955),
    # Xu et al. 2020; the original has no token types, ours a row in each network.
    "mcbert_base": (256, 1_000_000, 1e-4, 110_616_576 + 768, 121_113_856 + 768 + 256),
    # Without the transform of the head.
    "mcbert_base_paper": (256, 1_000_000, 1e-4, 110_617_344, 121_113_856 + 768 + 256 - 768 * 768 - 3 * 768),
    # Ke et al. 2021, and what Wu et al. 2021 share with it.
    "tnf_base": (256, 1_000_000, 1e-4, None, None),
    "tupe_base": (256, 1_000_000, 1e-4, None, None),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_preset_builds_what_it_names(path, rare_words, tokenizer, tmp_path):
    preset = json.loads(path.read_text())
    notes = ["--notes", str(rare_words / "words" / "rare_words.json")] if "notes" in preset else []
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    sizes |= {"embedding_size": 8} if preset["model_type"] == "electra" else {}
    argv = [str(path), "--output_dir", str(tmp_path), *notes]
    settings, args, objective = pretraining_runs.build_here(argv, tokenizer, **sizes)
    for name, value in preset.items():
        if name not in ("notes", "config_overrides"):
            assert getattr(settings, name, getattr(args, name, None)) == value, name
    model, options = objective.model, dict(preset.get("objective_overrides", {}))
    named = options.pop("preset", None)
    for name, value in {**model.config_class.preset_fields(named), **options}.items() if named else options.items():
        assert getattr(model.config, name) == value, name
    for name, value in preset.get("notes_overrides", {}).items():
        assert getattr(model.notes.settings, name) == value, name
    rows = [{"input_ids": [2, *range(5, 25), 3], "word_ids": [-1, *range(20), -1]} for _ in range(3)]
    assert model.train()(**objective.collator(rows)).loss.isfinite()
    if path.stem in PAPERS:
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        assert (step, args.max_steps, args.learning_rate) == PAPERS[path.stem][:3]


@pytest.mark.parametrize("name", [name for name, facts in PAPERS.items() if facts[-1]])
def test_a_papers_preset_has_its_size(name, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "MaskingCollator", MagicMock())  # which has tensors that need values
    preset = pretraining_runs.TRAINING / "configs" / f"{name}.json"
    vocab_size = 30522 if name == "electra_small" else 32768
    argv = [str(preset), "--output_dir", str(tmp_path)]
    with torch.device("meta"):
        _, _, objective = pretraining_runs.build_here(argv, tokenizer, vocab_size=vocab_size)
    sizes = [model.num_parameters() for model in (objective.product, objective.model)]
    assert sizes == list(PAPERS[name][3:])


def test_presets_of_an_objective_and_changes_to_them(tokenizer, tmp_path):
    def build(**settings):
        argv = [part for name, value in settings.items() for part in (f"--{name}", value)]
        overrides = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        return pretraining_runs.build_here([*argv, "--output_dir", str(tmp_path)], tokenizer, **overrides)[-1]

    changed = {
        "objective_overrides": "preset=paper,loss_weight=30",
        "mask_replace_prob": "0",
        "random_replace_prob": "0",
    }
    paper = build(objective="meta_controller", **changed)
    fields = ("num_candidates", "loss_weight", "candidate_replacement", "head")
    assert [getattr(paper.model.config, name) for name in fields] == [10, 30, False, "dot"]
    assert paper.model.config.nota_token_id == tokenizer.convert_tokens_to_ids("[NOTA]")
    assert "[NOTA]" in tokenizer.all_special_tokens, "what is not special is masked, and drawn as a random token"
    rows = [{"input_ids": [2, *range(5, 25), 3]}]
    batch = paper.collator(rows)
    assert (batch["labels"] != -100).any()
    assert batch["input_ids"].tolist() == [rows[0]["input_ids"]]  # no target is hidden
    baseline = build(objective="replaced_token", objective_overrides="preset=mcbert_baseline")
    assert (baseline.model.config.label_original, baseline.model.config.discriminator_weight) == (1, 50.0)
    assert baseline.model.dense is None
    batch = baseline.collator(rows)
    assert (batch["input_ids"][batch["labels"] != -100] == tokenizer.mask_token_id).all()
