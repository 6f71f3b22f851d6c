"""Training of Terraformer by the Seq2SeqTrainer of transformers, and by that of this package."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_efficient import TerraformerConfig, TerraformerForConditionalGeneration
from hf_efficient.data.pairs import PairEncoder
from hf_efficient.data.tokenizers import seq2seq_tokenizer
from hf_efficient.trainer import EfficientSeq2SeqTrainer


WORDS = ["red", "blue", "green", "old"]
ROWS = {
    "document": [f"the {WORDS[i % 4]} dog sees {'the old house and ' * (i % 3)}a bird" for i in range(19)],
    "summary": [f"{WORDS[i % 4]} dog" for i in range(19)],
}


@pytest.fixture(scope="module")
def tokenizer():
    return seq2seq_tokenizer(ROWS["document"] * 3, 290)


@pytest.fixture(scope="module")
def rows(tokenizer):
    return Dataset.from_dict(PairEncoder(tokenizer, 30, 10).encode(ROWS))


def make_trainer(kind, tokenizer, rows, folder, metrics=None, **changes):
    torch.manual_seed(0)
    config = TerraformerConfig(
        vocab_size=292,
        hidden_size=16,
        intermediate_size=24,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        position_init_scale=0.1,
        dropout=0.0,
        ff_sparsity=4,
        ff_rank=3,
        attention_type="multiplicative_conv",
        attention_sparsity=4,
        lm_head_type="multiplicative",
        loss_sparsity=4,
    )
    model = TerraformerForConditionalGeneration(config)
    args = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 120,
            "per_device_train_batch_size": 5,
            "per_device_eval_batch_size": 4,
            "learning_rate": 0.02,
            "logging_steps": 40,
            "save_strategy": "no",
            "predict_with_generate": True,
            "generation_max_length": 12,
            "generation_num_beams": 2,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            **changes,
        },
    )
    return kind(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=metrics,
    )


def texts(tokenizer, ids):
    return [tokenizer.decode([i for i in row if i >= 0], skip_special_tokens=True) for row in ids.tolist()]


def test_the_trainer_of_transformers(tokenizer, rows, tmp_path):
    """It needs nothing but the model and the usual collator."""
    predictions = []

    def metrics(prediction):
        predictions.extend(texts(tokenizer, prediction.predictions))
        right = [a == b for a, b in zip(predictions, texts(tokenizer, prediction.label_ids), strict=True)]
        return {"exact": sum(right) / len(right)}

    trainer = make_trainer(Seq2SeqTrainer, tokenizer, rows, tmp_path, metrics)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 4
    assert trainer.evaluate()["eval_exact"] > 0.9
    assert len(predictions) == len(rows)


def evaluated(kind, tokenizer, rows, folder, **changes):
    found = {}

    def metrics(prediction):
        found["labels"] = texts(tokenizer, prediction.label_ids)
        found["predictions"] = prediction.predictions
        return {}

    trainer = make_trainer(kind, tokenizer, rows, folder, metrics, **changes)
    before = copy.deepcopy(trainer.model.generation_config)
    found["loss"] = trainer.evaluate()["eval_loss"]
    assert kind is Seq2SeqTrainer or trainer.model.generation_config == before
    return found, trainer.model


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_rows_are_evaluated_in_the_order_of_the_data(tokenizer, rows, tmp_path, strategy):
    found, model = evaluated(EfficientSeq2SeqTrainer, tokenizer, rows, tmp_path, train_sampling_strategy=strategy)
    assert found["labels"] == ROWS["summary"]
    for row, ids in zip(rows, found["predictions"], strict=True):
        own = model.generate(torch.tensor([row["input_ids"]]), max_length=12, num_beams=2)[0].tolist()
        kept = [i for i in ids.tolist() if i >= 0]
        assert kept[: len(own)] == own
        assert set(kept[len(own) :]) <= {0}


def test_the_loss_is_the_mean_over_all_targets(tokenizer, rows, tmp_path):
    """That of transformers, with generation, is a mean over batches."""
    found, model = evaluated(EfficientSeq2SeqTrainer, tokenizer, rows, tmp_path)
    nats = count = 0
    for row in rows:
        with torch.no_grad():
            loss = model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.item()
        nats, count = nats + loss * len(row["labels"]), count + len(row["labels"])
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5)


def test_labels_can_be_missing_or_all_that_is_asked_for(tokenizer, rows, tmp_path):
    trainer = make_trainer(EfficientSeq2SeqTrainer, tokenizer, rows, tmp_path)
    output = trainer.predict(rows.select_columns(["input_ids"]))
    assert output.label_ids is None
    assert len(output.predictions) == len(rows)
    trainer.args.predict_with_generate = False
    assert trainer.evaluate()["eval_loss"] > 0
