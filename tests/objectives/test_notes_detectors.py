"""Notes on the objectives that train an encoder on replaced tokens: on the encoder alone, and only where it reads."""

import note_runs
import pytest
import torch
from note_models import CONFIGS, KEYS, MASK, ORIGINAL, SPANS, make_batch
from transformers import AutoModel, TrainerCallback

from hf_efficient.objectives.masking import MaskingCollator
from hf_efficient.objectives.meta_controller import MetaControllerObjective
from hf_efficient.objectives.notes import NoteDictionary, NoteSettings, attach, embedding_norm
from hf_efficient.objectives.replaced_token import ReplacedTokenObjective


OPTIONS = {
    ReplacedTokenObjective: {},
    MetaControllerObjective: {"nota_token_id": 3, "num_candidates": 3},
}
# Drawn back, half drawn back, replaced in a word, and beside words.
SAMPLED = [(0, 2, 11), (0, 7, 16), (0, 8, 30), (0, 4, 33), (0, 6, 35), (1, 2, 16), (2, 5, 21)]
INTACT = (0, 3, 5, 6)


def make_objective(kind, name="tupe", **options):
    torch.manual_seed(0)
    encoder = AutoModel.from_config(CONFIGS[name]())
    objective = kind(encoder=encoder, generator_divider=2, **OPTIONS[kind], **options)
    notes = NoteDictionary(KEYS, 16, NoteSettings(half_window=3), seed=5)
    return objective, notes, attach(objective, notes)


def make_sampled_batch(kind):
    batch = make_batch([(row, column, MASK) for row, column, _ in SAMPLED])
    sampled = ORIGINAL.clone()
    for row, column, seen in SAMPLED:
        sampled[row, column] = seen
    if kind is MetaControllerObjective:
        other = torch.randint(20, 35, (2, *sampled.shape), generator=torch.Generator().manual_seed(0))
        sampled = torch.stack([sampled, *other], dim=-1)
    return {**batch, "sampled_ids": sampled}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("name", ["bert", "modernbert", "tupe"])
def test_the_encoder_has_notes_on_intact_words_and_the_generator_none(kind, name):
    objective, notes, _ = make_objective(kind, name)
    objective.train()
    small = (objective.generator if kind is ReplacedTokenObjective else objective.controller).network
    encoder_inputs, small_states = [], []
    embedding_norm(objective.encoder).register_forward_pre_hook(lambda norm, args: encoder_inputs.append(args[0]))
    small.register_forward_hook(lambda network, args, output: small_states.append(output[0]))
    batch = make_sampled_batch(kind)
    output = objective(**batch)
    objective(**{key: value for key, value in batch.items() if key != "note_spans"})
    mixed, plain = encoder_inputs
    columns = {tuple(cell) for cell in (mixed != plain).any(-1).nonzero().tolist()}
    assert columns == {(SPANS[i][0], column) for i in INTACT for column in range(SPANS[i][1], SPANS[i][2])}
    assert torch.equal(*small_states)
    ((keys, _),) = notes.pending.taken
    assert keys.tolist() == [SPANS[i][3] for i in INTACT]
    assert output.note_hits.item() == pytest.approx(len(INTACT) / 3)
    output.loss.backward()


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_first_phase_takes_no_notes(kind):
    objective, notes, _ = make_objective(kind, detector_start_step=3)
    output = objective.train()(**make_sampled_batch(kind))
    assert output.note_hits.isnan()
    assert not notes.pending.taken


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def make_trainer(folder, kind, callbacks=(), **options):
    objective, _, updates = make_objective(kind)
    masking = MaskingCollator(note_runs.Tokenizer(), probability=0.3, mask_share=1.0, random_share=0.0, draw_seeds=True)
    callbacks = [updates, *objective.callbacks(), *callbacks]
    return note_runs.train_objective(folder, objective, masking, callbacks, save_steps=2, **options)


@pytest.mark.parametrize("kind", OPTIONS)
def test_accumulated_and_resumed_is_one_run(kind, tmp_path):
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole = make_trainer(tmp_path / "whole", kind, **parts)
    whole.train()
    make_trainer(tmp_path / "cut", kind, [StopAt(5)], **parts).train()
    resumed = make_trainer(tmp_path / "cut", kind, **parts)
    resumed.train(resume_from_checkpoint=True)
    assert note_runs.losses(resumed) == note_runs.losses(whole)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    large = make_trainer(tmp_path / "large", kind, per_device_train_batch_size=4)
    large.train()
    assert torch.equal(large.model.notes.updates, whole.model.notes.updates)
    torch.testing.assert_close(large.model.notes.values, whole.model.notes.values, rtol=0, atol=1e-4)
    assert whole.model.notes.updates.sum() > note_runs.STEPS
