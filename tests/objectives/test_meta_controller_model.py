"""The meta-controller as a model: what each loss trains, stages, checkpointing, autocast, saving, and mistakes."""

import pytest
import torch

from hf_efficient.objectives.callbacks import StartDiscriminatorCallback
from hf_efficient.objectives.meta_controller import MetaControllerObjective, MetaControllerObjectiveConfig
from tests.helpers.comparison import assert_close, assert_gradients_close
from tests.objectives.discriminator_models import NOTA, gradients, make_draws, make_objective
from tests.objectives.encoders import VOCAB, make_batch, make_encoder


@pytest.mark.parametrize("name", ["tupe", "bert", "electra"])
def test_what_each_loss_trains(name):
    """The controller's loss reaches the table and the bias besides the controller; the encoder's all but that."""
    batch = make_batch()
    both = make_objective("meta_controller", name)
    _, tied = gradients(both, batch)
    table = next(key for key, p in both.named_parameters() if p is both.get_input_embeddings().weight)
    both.enable_discriminator(False)
    _, alone = gradients(both, batch)
    assert set(alone) == {key for key in tied if key.startswith("controller.") or key in ("bias", table)}
    assert {key for key, p in both.named_parameters() if key not in alone} == {
        key for key, parameter in both.named_parameters() if any(parameter is idle for idle in both.frozen_parameters())
    }
    for key in alone:
        same = torch.allclose(alone[key], tied[key], rtol=1e-8, atol=1e-12)
        assert same == key.startswith("controller."), key
    _, stopped = gradients(
        make_objective("meta_controller", name, embedding_sharing="stop_discriminator_gradient"), batch
    )
    assert_close("gradient of the table", stopped.pop(table), alone[table], 1e-10)
    assert_gradients_close(stopped, {key: tied[key] for key in stopped}, 1e-10)


def test_stage_one_runs_no_encoder():
    objective = make_objective("meta_controller", discriminator_start_step=3)
    assert not objective.discriminator_active
    assert any(isinstance(callback, StartDiscriminatorCallback) for callback in objective.callbacks())
    batch = make_batch()
    called = []
    objective.encoder.register_forward_hook(lambda *args: called.append(args))
    output = objective(**batch)
    assert not called
    assert output.loss == output.generator_loss
    assert output.discriminator_loss is None


def test_autocast():
    objective = make_objective("meta_controller").float()
    batch = make_batch()
    plain = objective(**batch, sampled_ids=make_draws(batch))
    torch.manual_seed(1)
    batch = make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = objective(**batch, sampled_ids=make_draws(batch))
        objective(**batch).loss.backward()
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, plain.loss, rtol=0.02, atol=0)
    assert all(parameter.grad.isfinite().all() for parameter in objective.parameters())


def test_a_given_encoder_keeps_its_weights_and_the_rest_starts_as_released():
    encoder = make_encoder("roberta")
    before = {key: value.clone() for key, value in encoder.state_dict().items() if not key.startswith("pooler")}
    objective = MetaControllerObjective(encoder=encoder, nota_token_id=NOTA)
    after = objective.encoder.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(before[key], after[key]) for key in before)
    for linear in (objective.dense, objective.controller.projection, objective.controller.dense):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.2)
        assert not linear.bias.any()
    assert objective.bias.std().item() == pytest.approx(0.02, rel=0.4)


def test_presets_and_mistakes():
    released = MetaControllerObjectiveConfig()
    assert (released.num_candidates, released.loss_weight, released.head) == (10, 50.0, "transform")
    assert released.candidate_replacement
    encoder = make_encoder("tupe")
    paper = MetaControllerObjectiveConfig.preset(
        "paper", encoder_config=encoder.config.to_dict(), nota_token_id=NOTA, num_candidates=20
    )
    assert (paper.num_candidates, paper.loss_weight, paper.head) == (20, 20.0, "dot")
    assert not paper.candidate_replacement
    assert "dense.weight" not in MetaControllerObjective(paper).state_dict()
    with pytest.raises(ValueError, match=r"no preset 'papr'\. Its presets are: paper"):
        MetaControllerObjectiveConfig.preset("papr")
    for token_id in (None, VOCAB, -1):
        with pytest.raises(ValueError, match="nota_token_id must be an id of the encoder's vocabulary of 57"):
            MetaControllerObjective(encoder=encoder, nota_token_id=token_id)
    with pytest.raises(ValueError, match="24 wide, with its embeddings, 10 wide"):
        MetaControllerObjective(encoder=make_encoder("electra"), nota_token_id=NOTA, head="dot")
    with pytest.raises(ValueError, match="MaskingCollator"):
        MetaControllerObjective(paper)(torch.zeros(2, 3, dtype=torch.long))
    for wrong in ({"num_candidates": 1}, {"head": "none"}):
        with pytest.raises(Exception, match=next(iter(wrong))):
            MetaControllerObjectiveConfig(**wrong)
