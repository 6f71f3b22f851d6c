"""The masked-LM objective over five architectures: exact against the full head, and through Trainer."""

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertModel,
    ElectraConfig,
    ModernBertConfig,
    RobertaConfig,
    TrainingArguments,
)

import hf_efficient
from hf_efficient.objectives.diagnostics import ranked_first
from hf_efficient.objectives.masking import MaskingCollator
from hf_efficient.objectives.mlm import MaskedLMObjective, MaskedLMObjectiveConfig
from hf_efficient.trainer import EfficientTrainer
from tests.helpers.comparison import assert_gradients_close, named_gradients
from tests.objectives.notes import note_models


VOCAB = 57
SIZES = {**note_models.SIZES, "vocab_size": VOCAB}
MODERN = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
CONFIGS = {
    "bert": lambda: BertConfig(**SIZES),
    "roberta": lambda: RobertaConfig(**SIZES),
    "electra": lambda: ElectraConfig(**SIZES, embedding_size=8),
    "modernbert": lambda: ModernBertConfig(**SIZES, **MODERN),
    "tupe": lambda: hf_efficient.TupeConfig(**SIZES),
}


class Tokenizer:
    """The part of a tokenizer that the collator uses."""

    pad_token_id, mask_token_id, all_special_ids = 1, 4, [0, 1, 2, 3, 4]

    def __len__(self):
        return VOCAB


def make_model(name, **overrides):
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.update(overrides)
    model = AutoModelForMaskedLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def make_batch():
    torch.manual_seed(1)
    ids = torch.randint(5, VOCAB, (4, 13))
    ids[:, 0] = 0
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    ids[1, 9:] = 1
    labels = torch.full_like(ids, -100)
    for row, column, label in [(0, 3, 7), (1, 5, 8), (2, 12, 9), (2, 1, 11), (3, 2, 40)]:
        labels[row, column] = label
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("name", CONFIGS)
def test_head_at_targets_equals_the_full_head(name):
    model = make_model(name).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    objective = MaskedLMObjective(model=model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    batch = make_batch()
    labels = batch.pop("labels")
    objective(**batch, labels=labels).loss.backward()
    ours = named_gradients(model)
    model.zero_grad()
    logits = model(**batch).logits
    assert logits.shape == (4, 13, VOCAB)  # the head is whole again outside of the objective
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    assert_gradients_close(ours, model)
    at_targets, ids, states = objective.target_logits(labels, **batch)
    torch.testing.assert_close(at_targets, logits[labels != -100])
    assert ids.tolist() == [7, 8, 11, 9, 40]
    assert states.shape == (4, 13, 16)


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load_keep_ties_and_values(name, tmp_path, caplog):
    objective = MaskedLMObjective(model=make_model(name)).eval()
    batch = make_batch()
    objective.save_pretrained(tmp_path / "objective")
    again, info = MaskedLMObjective.from_pretrained(tmp_path / "objective", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(again(**batch).loss, objective(**batch).loss)
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight

    objective.model.save_pretrained(tmp_path / "model")
    labels = batch.pop("labels")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(model(**batch).logits[labels != -100], objective.target_logits(labels, **batch)[0])


def test_a_new_model_is_in_float32_whatever_its_config_says():
    model_config = {**CONFIGS["tupe"]().to_dict(), "dtype": "bfloat16"}
    objective = MaskedLMObjective(MaskedLMObjectiveConfig(model_config=model_config))
    assert {parameter.dtype for parameter in objective.parameters()} == {torch.float32}


def test_special_tokens_as_targets_train_tupe():
    """[CLS] may be hidden then, so the check of the layout is switched off in the config."""
    collator = MaskingCollator(Tokenizer(), mlm_probability=1.0, mask_special_tokens=True)
    batch = collator([{"input_ids": [0, *range(5, 5 + length), 2]} for length in (9, 4)])
    assert (batch["input_ids"][:, 0] != 0).any()
    with pytest.raises(ValueError, match="cls_token_id"):
        MaskedLMObjective(model=make_model("tupe"))(**batch)
    objective = MaskedLMObjective(model=make_model("tupe", cls_token_id=None))
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    loss = objective(**batch).loss
    loss.backward()
    optimizer.step()
    assert objective(**batch).loss < loss


def test_loss_parts_add_up_and_no_target_costs_nothing():
    objective = MaskedLMObjective(model=make_model("tupe")).eval()
    batch = make_batch()
    whole = objective(**batch)
    parts = [
        objective(**{key: value[rows] for key, value in batch.items()}, num_items_in_batch=torch.tensor(5))
        for rows in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss)
    nothing = objective(**{**batch, "labels": torch.full_like(batch["labels"], -100)})
    nothing.loss.backward()
    assert nothing.loss == 0
    assert nothing.accuracy.isnan()
    with pytest.raises(ValueError, match="shape of `input_ids`"):
        objective(batch["input_ids"], batch["attention_mask"])


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="no encoder under"):
        MaskedLMObjective(model=BertModel(CONFIGS["bert"]()))
    with pytest.raises(ValueError, match="Give MaskedLMObjective"):
        MaskedLMObjective()


@pytest.mark.parametrize("name", ["tupe", "bert"])
def test_checkpointing_and_autocast(name):
    objective = MaskedLMObjective(model=make_model(name, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    batch = make_batch()
    plain = objective(**batch)
    plain.loss.backward()
    expected = named_gradients(objective)
    objective.zero_grad()
    objective.gradient_checkpointing_enable()
    objective.train()
    objective(**batch).loss.backward()
    assert_gradients_close(objective, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = objective(**batch)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, plain.loss, rtol=0.02, atol=0)


def test_through_trainer(tmp_path, caplog):
    batch = make_batch()
    rows = [{key: value[i % 4] for key, value in batch.items()} for i in range(12)]
    args = TrainingArguments(
        str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=2,
        save_steps=3,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = EfficientTrainer(MaskedLMObjective(model=make_model("bert")), args, train_dataset=rows, eval_dataset=rows)
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert all(0 < entry["token_variance_fraction"] <= 1 and 0 <= entry["accuracy"] <= 1 for entry in logs)
    assert {"eval_loss", "eval_accuracy", "eval_token_variance_fraction"} <= set(trainer.evaluate())

    resumed = EfficientTrainer(MaskedLMObjective(model=make_model("bert")), args, train_dataset=rows)
    caplog.clear()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "missing keys" not in caplog.text
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == [e["loss"] for e in logs]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tupe", "bert"])
def test_compiled(name):
    objective = MaskedLMObjective(model=make_model(name)).eval()
    batch = make_batch()
    expected = objective(**batch)
    compiled = torch.compile(objective, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch).loss, expected.loss)
    batch["labels"][3, 4] = 12  # another number of targets
    torch.testing.assert_close(compiled(**batch).loss, objective(**batch).loss)


def test_ranked_first_is_argmax_with_ties():
    logits = torch.randn(63, 31).mul(2).round().bfloat16()  # many are equal
    targets = torch.where(torch.rand(63) < 0.6, logits.argmax(-1), torch.randint(31, (63,)))
    assert torch.equal(ranked_first(logits, targets), logits.argmax(-1) == targets)
    assert ranked_first(logits[:0], targets[:0]).shape == (0,)


@pytest.mark.parametrize("name", ["bert", "tupe"])
def test_padding_has_no_part_in_the_variance_of_tokens(name):
    """States at padding are all alike, so that counting them would look like a collapse."""
    objective = MaskedLMObjective(model=make_model(name)).eval()
    batch = make_batch()
    with torch.no_grad():
        found = objective(**batch).token_variance_fraction
        states = objective.encoder(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    real = states[batch["attention_mask"].bool()]
    expected = (real - real.mean(0)).square().sum() / real.square().sum()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def _library_objective(kind):
    sizes = {"vocab_size": 31, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"bert": BertConfig, "roberta": RobertaConfig}[kind](**sizes, intermediate_size=8)
    torch.manual_seed(0)
    return MaskedLMObjective(model=AutoModelForMaskedLM.from_config(config)).eval()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_ids_of_padding_may_be_anything(kind, side):
    objective = _library_objective(kind)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    mask = mask if side == "right" else mask.flip(1)
    ids = torch.arange(5, 15).view(2, 5)
    labels = ids.masked_fill(mask == 0, -100)
    padding = 1 if kind == "roberta" else 0
    padded = ids.masked_fill(mask == 0, padding)
    expected = objective.model(input_ids=padded, attention_mask=mask, labels=labels).loss
    for filling in (padding, -7, 31, 9):
        given = ids.masked_fill(mask == 0, filling)
        for real in (mask, mask.bool(), mask.float()):
            torch.testing.assert_close(objective(given, real, labels).loss, expected)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"attention_mask": torch.full((2, 5), 2)}, ValueError, "attention_mask of torch.int64 .* holds 2"),
        ({"attention_mask": torch.ones(2, 5, 5)}, ValueError, r"attention_mask must have shape \(2, 5\)"),
        ({"attention_mask": torch.ones(2, 4)}, ValueError, r"attention_mask has shape \(2, 4\)"),
        ({"attention_mask": [[1] * 5] * 2}, TypeError, "attention_mask must be a torch.Tensor, not list"),
        ({"input_ids": torch.full((2, 5), -7)}, ValueError, "input_ids holds -7, outside the vocabulary of 31"),
        ({"input_ids": torch.full((2, 5), 31)}, ValueError, "input_ids holds 31, outside the vocabulary of 31"),
        ({"input_ids": torch.ones(2, 5)}, ValueError, "input_ids must be of torch.int64 or torch.int32"),
        ({"input_ids": [[1] * 5] * 2}, TypeError, "input_ids must be a torch.Tensor, not list"),
        ({"labels": torch.full((2, 5), 31)}, ValueError, "labels hold 31, outside"),
        ({"labels": torch.ones(2, 5).long().to_sparse()}, ValueError, "labels must be a dense tensor"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_input_that_a_model_of_the_library_would_not_check(given, error, message):
    call = {"input_ids": torch.ones(2, 5).long(), "attention_mask": torch.ones(2, 5), "labels": torch.ones(2, 5).long()}
    with pytest.raises(error, match=message):
        _library_objective("bert")(**{**call, **given})
