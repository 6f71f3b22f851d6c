"""Behaviour that replaced tokens and the meta-controller share: batches, padding, sources of samples, saving."""

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from tests.helpers.comparison import assert_gradients_close
from tests.objectives.discriminator_models import KINDS, SAVED, gradients, make_draws, make_objective
from tests.objectives.encoders import CONFIGS, make_batch


pytestmark = pytest.mark.parametrize("kind", KINDS)


def make_samples(kind, batch):
    """Injected samples, in the shape that the objective takes."""
    draws = make_draws(batch)
    return draws if kind == "meta_controller" else draws[..., 0]


@pytest.mark.parametrize("sizes", [[1, 2, 4], [1] * 7])
def test_accumulated_batches_equal_one(kind, sizes):
    """With the samples, since they belong to the rows; the first row has no target."""
    objective = make_objective(kind)
    batch = make_batch(batch=7)
    original = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
    batch["input_ids"][0], batch["labels"][0] = original[0], -100
    columns = [value.split(sizes) for value in batch.values()]
    parts = [dict(zip(batch, values, strict=True)) for values in zip(*columns, strict=True)]
    count = (batch["labels"] != -100).sum()
    whole, expected = gradients(objective, batch, num_items_in_batch=count)
    total, found = gradients(objective, *parts, num_items_in_batch=count)
    assert total == pytest.approx(whole, rel=1e-12)
    assert_gradients_close(found, expected, 1e-8)
    output = objective(**batch)
    weighted = output.generator_loss * count + 50 * 0.15 * output.discriminator_loss * batch["attention_mask"].sum()
    assert whole == pytest.approx((weighted / count).item(), rel=1e-9)
    # Where tokens are counted too, the sum of the two means, as of one batch alone.
    counts = {"num_items_in_batch": count, "num_tokens_in_batch": batch["attention_mask"].sum()}
    alone, expected = gradients(objective, batch)
    total, found = gradients(objective, *parts, **counts)
    assert total == pytest.approx(alone, rel=1e-12)
    assert total == pytest.approx((output.generator_loss + 50 * output.discriminator_loss).item(), rel=1e-12)
    assert_gradients_close(found, expected, 1e-8)


def test_other_inputs_reach_encoder_and_generator(kind):
    objective = make_objective(kind, "bert")
    batch = {**make_batch(), "sampled_ids": make_samples(kind, make_batch())}
    types = torch.ones_like(batch["input_ids"])
    loss, expected = gradients(objective, batch)
    again, found = gradients(objective, batch, token_type_ids=torch.zeros_like(types))
    assert again == loss
    assert_gradients_close(found, expected, 1e-8)
    other = objective(**batch, token_type_ids=types)
    plain = objective(**batch)
    assert other.generator_loss != plain.generator_loss
    assert other.discriminator_loss != plain.discriminator_loss
    small = "generator" if kind == "replaced_token" else "controller"
    _, found = gradients(objective, batch, token_type_ids=types)
    for part in ("encoder", f"{small}.network"):
        gradient = found[f"{part}.embeddings.token_type_embeddings.weight"]
        assert not gradient[0].any()
        assert gradient[1].any()


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0), torch.tensor(5)])
def test_a_batch_without_targets_trains_the_encoder_only(kind, count):
    """As the whole of a step, and as one part of a step that has targets elsewhere."""
    objective = make_objective(kind)
    batch = make_batch()
    batch["labels"].fill_(-100)
    loss, found = gradients(objective, batch, num_items_in_batch=count)
    output = objective(**batch)
    tokens = batch["attention_mask"].sum().item()
    expected = 50 * output.discriminator_loss.item() * (0.15 * tokens / int(count) if count else 1)
    assert loss == pytest.approx(expected, rel=1e-9)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert found["dense.weight"].abs().sum() > 0
    small = "generator" if kind == "replaced_token" else "controller"
    assert found[f"{small}.dense.weight"].abs().sum() == 0
    assert output.generator_loss.isnan()
    assert output.recall_replaced.isnan()
    assert output.replaced_fraction == 0
    objective.enable_discriminator(False)
    loss, found = gradients(objective, batch, num_items_in_batch=count)
    assert loss == 0
    assert not any(gradient.any() for gradient in found.values())


def test_padding_leaves_no_trace(kind):
    objective = make_objective(kind)
    padded = {key: value[1:2] for key, value in make_batch(batch=4, padding=4).items()}
    trimmed = {key: value[:, :7] if value.dim() == 2 else value for key, value in padded.items()}
    assert padded["attention_mask"].sum() == 7
    loss, expected = gradients(objective, trimmed)
    unmasked, _ = gradients(objective, {key: value for key, value in trimmed.items() if key != "attention_mask"})
    again, found = gradients(objective, padded)
    assert again == pytest.approx(loss, rel=1e-12)
    assert unmasked == pytest.approx(loss, rel=1e-12)
    assert_gradients_close(found, expected, 1e-8)


def test_sources_of_draws_and_their_order(kind):
    objective = make_objective(kind)
    batch = make_batch()
    seeds = batch.pop("sample_seeds")
    samples = make_samples(kind, batch)
    losses = {
        objective(**batch, sample_seeds=seeds).loss.item(),
        objective(**batch, sample_seeds=seeds + 1).loss.item(),
        objective(**batch, generator=torch.Generator().manual_seed(0)).loss.item(),
        objective(**batch, generator=torch.Generator().manual_seed(1)).loss.item(),
        objective(**batch, sampled_ids=samples, sample_seeds=seeds).loss.item(),
    }
    assert len(losses) == 5
    assert objective(**batch, sampled_ids=samples).loss.item() in losses
    assert objective(**batch, sample_seeds=seeds, generator=torch.Generator().manual_seed(9)).loss.item() in losses
    assert objective(**batch, generator=torch.Generator().manual_seed(1)).loss.item() in losses
    torch.manual_seed(5)
    first = objective(**batch).loss
    torch.manual_seed(5)
    assert objective(**batch).loss == first
    with pytest.raises(ValueError, match="`sampled_ids` must have the shape"):
        objective(**batch, sampled_ids=samples[:, 1:])


def test_gradient_checkpointing_changes_nothing(kind):
    objective = make_objective(kind, "bert")
    batch = make_batch()
    loss, expected = gradients(objective, batch)
    objective.gradient_checkpointing_enable({"use_reentrant": False})
    objective.train()
    again, found = gradients(objective, batch)
    assert again == pytest.approx(loss, rel=1e-12)
    assert_gradients_close(found, expected, 1e-8)


def test_a_new_encoder_is_in_float32_whatever_its_config_says(kind):
    objective, options = KINDS[kind]
    config = objective.config_class(encoder_config={**CONFIGS["tupe"]().to_dict(), "dtype": "bfloat16"}, **options)
    assert {parameter.dtype for parameter in objective(config).parameters()} == {torch.float32}


def test_a_sampled_padding_token_moves_no_position(kind):
    """RoBERTa by itself would count none for it, and move all that follow."""
    objective = make_objective(kind, "roberta")
    seen = []
    objective.encoder.embeddings.position_embeddings.register_forward_hook(
        lambda table, args, output: seen.append(args[0])
    )
    batch = make_batch()
    samples = torch.where(batch["labels"] == -100, 7, 1)  # 1 is padding
    if kind == "meta_controller":
        samples = torch.stack([samples, *[torch.full_like(samples, 9)] * 4], dim=-1)
    objective(**batch, sampled_ids=samples)
    expected = torch.where(batch["attention_mask"].bool(), batch["attention_mask"].cumsum(1) + 1, 1)
    assert torch.equal(seen[-1].expand_as(expected), expected)


@pytest.mark.parametrize("name", ["bert", "tupe"])
def test_compiled(kind, name):
    objective = make_objective(kind, name, discriminator_start_step=3)
    batch = make_batch()
    compiled = torch.compile(objective, backend="aot_eager")
    for on in (False, True):
        objective.enable_discriminator(on)
        torch.testing.assert_close(compiled(**batch).loss, objective(**batch).loss)


def test_attention_is_that_which_was_asked_for(kind, tmp_path):
    make_objective(kind, "bert").save_pretrained(tmp_path)
    for implementation in ("eager", "sdpa"):
        again = KINDS[kind][0].from_pretrained(tmp_path, attn_implementation=implementation)
        assert again.encoder.config._attn_implementation == implementation
        assert again.generator.network.config._attn_implementation == implementation


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_whole_and_read_again(kind, name, tmp_path):
    objective = make_objective(kind, name, **SAVED[kind]).float()
    objective.enable_discriminator(True)
    batch = make_batch()
    objective.save_pretrained(tmp_path / "objective")
    again, info = type(objective).from_pretrained(tmp_path / "objective", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again(**batch).loss == objective(**batch).loss
    assert again.discriminator_active

    objective.encoder.save_pretrained(tmp_path / "encoder")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    expected = objective.encoder(**inputs).last_hidden_state
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "encoder").eval()(**inputs).last_hidden_state, expected)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder").eval()
    assert torch.equal(classifier.base_model(**inputs).last_hidden_state, expected)
