"""The losses and parts of objectives with a generator, over many batches."""

import pytest
import torch

from tests.objectives import discriminator_runs
from tests.objectives.discriminator_models import KINDS
from tests.objectives.encoders import make_batch


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_does_not_depend_on_its_batches(kind, tmp_path):
    """Each part is a mean over what it speaks of, targets, tokens, or replaced tokens, of the whole evaluation."""
    found = []
    for rows in (5, 12, 1):
        objective = discriminator_runs.make_objective(kind)
        trainer = discriminator_runs.make_trainer(tmp_path, objective, per_device_eval_batch_size=rows)
        metrics = trainer.evaluate(discriminator_runs.make_rows(12))
        found.append({name: value for name, value in metrics.items() if "time" not in name and "per_sec" not in name})
    first = found[0]
    assert {"eval_loss", "eval_generator_loss", "eval_discriminator_loss", "eval_recall_replaced"} <= first.keys()
    assert first["eval_loss"] == pytest.approx(first["eval_generator_loss"] + 50 * first["eval_discriminator_loss"])
    for other in found[1:]:
        for name in first.keys() - {"eval_token_variance_fraction"}:  # of the states of one batch
            assert other[name] == pytest.approx(first[name], rel=1e-4), name


@pytest.mark.parametrize("kind", KINDS)
def test_parts_say_what_they_are_means_over(kind):
    objective = discriminator_runs.make_objective(kind).eval()
    batch = make_batch()
    output = objective(**batch)
    counts = objective.part_counts(output, batch)
    tokens = int(batch["attention_mask"].sum())
    replaced = round(float(output.replaced_fraction) * tokens)
    assert counts["discriminator_loss"] == counts["replaced_fraction"] == tokens
    assert counts["recall_replaced"] == pytest.approx(replaced)
    assert counts["accuracy_original"] == pytest.approx(tokens - replaced)
    assert set(counts) <= {*output.keys(), "accuracy_replaced"}
    assert not {"loss", "generator_loss", "generator_accuracy"} & set(counts)
    whole = {name: value for name, value in batch.items() if name != "attention_mask"}
    assert objective.part_counts(output, whole)["discriminator_loss"] == batch["input_ids"].numel()


def test_an_evaluation_without_targets_has_the_discriminators_loss(tmp_path):
    trainer = discriminator_runs.make_trainer(tmp_path, discriminator_runs.make_objective())
    metrics = trainer.evaluate([{"input_ids": [0]}, {"input_ids": [0, 2]}])  # special tokens alone
    assert "eval_generator_loss" not in metrics
    assert metrics["eval_loss"] == pytest.approx(50 * metrics["eval_discriminator_loss"])


def test_stage_one_counts_targets_alone():
    objective = discriminator_runs.make_objective(discriminator_start_step=5)
    batch = make_batch()
    output = objective(**batch)
    assert objective.part_counts(output, batch) == {}
    assert objective.loss_of_parts({"generator_loss": 2.0, "masked_lm_loss": 0.5}) == 2.5
    torch.testing.assert_close(output.loss, output.generator_loss)
