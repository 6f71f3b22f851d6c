"""Stage one in which the encoder learns too, as a masked language model."""

import logging

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import ElectraConfig, ElectraModel

from hf_efficient.objectives.base import add_frozen_parameters
from hf_efficient.objectives.meta_controller import MetaControllerObjective
from hf_efficient.objectives.replaced_token import ReplacedTokenObjective
from tests.objectives import discriminator_runs
from tests.objectives.encoders import make_batch, make_encoder


def make_objective(kind, **options):
    torch.manual_seed(4)
    options = {"stage_one": "masked_lm", "discriminator_start_step": 3, **options}
    if kind == "replaced_token":
        return ReplacedTokenObjective(encoder=make_encoder("tupe"), **options)
    return MetaControllerObjective(encoder=make_encoder("tupe"), nota_token_id=5, num_candidates=4, **options)


def by_hand(objective, batch):
    """Mean cross-entropy of the encoder at its targets, from the logits of all positions."""
    states = objective.encoder(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    if isinstance(objective, ReplacedTokenObjective):
        hidden = torch.nn.functional.gelu(objective.dense(states))
        hidden = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:])
        bias = objective.generator.bias
    else:
        hidden = objective.norm(torch.nn.functional.gelu(objective.dense(states)))
        bias = objective.bias
    logits = hidden @ objective.encoder.get_input_embeddings().weight.T + bias
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


@pytest.mark.parametrize("kind", ["replaced_token", "meta_controller"])
def test_the_loss_is_that_of_two_masked_language_models(kind):
    objective, batch = make_objective(kind).double(), make_batch(batch=3, length=7)
    output = objective(**batch)
    expected = by_hand(objective, batch)
    assert output.masked_lm_loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert output.loss.item() == pytest.approx(output.generator_loss.item() + expected.item(), abs=1e-12)
    assert output.discriminator_loss is None
    output.loss.backward()
    without = {name for name, parameter in objective.named_parameters() if parameter.grad is None}
    idle = {id(parameter) for parameter in objective.frozen_parameters()}
    assert without == {name for name, parameter in objective.named_parameters() if id(parameter) in idle}
    assert without == ({"discriminator.weight", "discriminator.bias"} if kind == "replaced_token" else set())
    counted = objective(**batch, num_items_in_batch=(batch["labels"] != -100).sum())
    assert counted.loss.item() == pytest.approx(output.loss.item(), abs=1e-12)


@pytest.mark.parametrize("kind", ["replaced_token", "meta_controller"])
def test_the_discriminator_goes_on_from_what_the_encoder_learned(kind, tmp_path, caplog):
    objective = make_objective(kind, discriminator_start_loss=4.0, discriminator_start_step=1000)
    trainer = discriminator_runs.make_trainer(tmp_path, objective, max_steps=14, learning_rate=2e-2)
    with caplog.at_level(logging.INFO, "hf_efficient"):
        trainer.train()
    log = discriminator_runs.history(trainer)
    first = [entry["masked_lm_loss"] for entry in log if "masked_lm_loss" in entry]
    assert 1 < len(first) < 14
    assert first[-1] < 4.0 <= min(first[:-1])
    assert all("discriminator_loss" in entry for entry in log[len(first) :])
    assert "masked_lm_loss is" in caplog.text
    assert objective(**make_batch(batch=2, length=5)).masked_lm_loss is None


def test_no_gradient_reaches_the_table_through_the_encoder_on_request():
    objective = make_objective("replaced_token", embedding_sharing="stop_discriminator_gradient")
    batch = make_batch(batch=2, length=9)
    table = objective.encoder.get_input_embeddings().weight
    whole = torch.autograd.grad(objective(**batch).loss, table)[0]
    objective.config.stage_one = "generator"
    alone = torch.autograd.grad(objective(**batch).loss, table)[0]
    torch.testing.assert_close(whole, alone)


@pytest.mark.parametrize(("label_original", "sign"), [(0, 1), (1, -1)])
def test_the_bias_says_how_much_is_replaced(label_original, sign, tmp_path):
    objective = make_objective("replaced_token", initial_replaced_fraction=0.2, label_original=label_original)
    assert torch.sigmoid(sign * objective.discriminator.bias).item() == pytest.approx(0.2)
    with torch.no_grad():
        objective.discriminator.bias.fill_(0.5)
    objective.save_pretrained(tmp_path)
    assert ReplacedTokenObjective.from_pretrained(tmp_path).discriminator.bias.item() == 0.5
    assert make_objective("replaced_token").discriminator.bias.item() == 0.0


def test_errors():
    narrow = ElectraConfig(
        vocab_size=40,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    with pytest.raises(ValueError, match="compares the states of ElectraModel, 16 wide, with its embeddings, 8 wide"):
        ReplacedTokenObjective(encoder=ElectraModel(narrow), stage_one="masked_lm", discriminator_start_step=1)
    with pytest.raises(Exception, match="stage_one"):
        make_objective("replaced_token", stage_one="both")
    with pytest.raises(StrictDataclassError, match="has no end: give discriminator_start_step"):
        make_objective("replaced_token", discriminator_start_step=None)
    for name in ("discriminator_start_step", "discriminator_warmup_steps"):
        with pytest.raises(StrictDataclassError, match=f"{name} must be at least 0, not -1"):
            make_objective("meta_controller", **{name: -1})
    with pytest.raises(Exception, match="between 0 and 1, not 1"):
        make_objective("replaced_token", initial_replaced_fraction=1.0)


def test_a_stage_without_frozen_parameters_is_no_matter_for_ddp():
    objective = make_objective("meta_controller")
    loss = torch.tensor(1.0)
    assert objective.frozen_parameters() == []
    assert add_frozen_parameters(loss, objective, []) is loss


def test_the_encoder_begins_slowly_as_a_discriminator_too():
    objective = make_objective("replaced_token", discriminator_warmup_steps=3)
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    slow = {names[id(parameter)].split(".")[0] for parameter in objective.discriminator_parameters()}
    assert slow == {"encoder", "dense", "discriminator"}
    assert {names[id(parameter)] for parameter in objective.frozen_parameters()} == {
        "discriminator.weight",
        "discriminator.bias",
    }
