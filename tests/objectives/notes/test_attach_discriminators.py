"""Notes on the objectives that train an encoder on replaced tokens: on the encoder alone, and only where it reads."""

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_efficient.objectives.notes import NoteDictionary, NoteSettings, attach, note_insertion_point
from tests.helpers.comparison import assert_close, named_gradients
from tests.objectives.notes.note_models import (
    DISCRIMINATORS,
    KEYS,
    MASK,
    ORIGINAL,
    SPANS,
    make_batch,
    make_discriminator,
)


# Drawn back, half drawn back, replaced in a word, and beside words.
SAMPLED = [(0, 2, 11), (0, 7, 16), (0, 8, 30), (0, 4, 33), (0, 6, 35), (1, 2, 16), (2, 5, 21)]
INTACT = (0, 3, 5, 6)


def make_objective(kind, name="tupe", **options):
    objective = make_discriminator(kind, name, **options)
    notes = NoteDictionary(KEYS, 16, NoteSettings(half_window=3), seed=5)
    attach(objective, notes)
    return objective.train(), notes


def make_sampled_batch(kind):
    batch = make_batch([(row, column, MASK) for row, column, _ in SAMPLED])
    sampled = ORIGINAL.clone()
    for row, column, seen in SAMPLED:
        sampled[row, column] = seen
    if kind == "meta_controller":
        other = torch.randint(20, 35, (2, *sampled.shape), generator=torch.Generator().manual_seed(0))
        sampled = torch.stack([sampled, *other], dim=-1)
    return {**batch, "sampled_ids": sampled}


@pytest.mark.parametrize("kind", DISCRIMINATORS)
@pytest.mark.parametrize("name", ["bert", "modernbert", "tupe"])
def test_the_encoder_has_notes_on_intact_words_and_the_generator_none(kind, name):
    objective, notes = make_objective(kind, name)
    small = objective.generator.network
    encoder_inputs, small_states = [], []
    note_insertion_point(objective.encoder).register_forward_pre_hook(lambda norm, args: encoder_inputs.append(args[0]))
    small.register_forward_hook(lambda network, args, output: small_states.append(output[0]))
    batch = make_sampled_batch(kind)
    output = objective(**batch)
    objective(**{key: value for key, value in batch.items() if key != "note_spans"})
    mixed, plain = encoder_inputs
    columns = {tuple(cell) for cell in (mixed != plain).any(-1).nonzero().tolist()}
    assert columns == {(SPANS[i][0], column) for i in INTACT for column in range(SPANS[i][1], SPANS[i][2])}
    assert torch.equal(*small_states)
    ((keys, _),) = notes.pending.waiting
    assert keys.tolist() == [SPANS[i][3] for i in INTACT]
    assert output.note_hits.item() == pytest.approx(len(INTACT) / 3)
    output.loss.backward()


@pytest.mark.parametrize("padding", [None, -7], ids=["an-id-at-padding", "no-id-at-padding"])
@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_an_encoder_that_is_a_masked_lm_first_has_its_rules_then(kind, padding):
    """A word with a target in it reads no note, though its token is kept; one is taken from it all the same."""
    batch = make_sampled_batch(kind)
    batch["input_ids"] = ORIGINAL.clone()  # every target is kept: the text that the encoder sees is intact
    if padding is not None:
        assert (batch["attention_mask"] == 0).any()
        batch["input_ids"][batch["attention_mask"] == 0] = padding
    objective, notes = make_objective(kind, stage_one="masked_lm", discriminator_start_step=3)
    free = [i for i, (row, start, end, _) in enumerate(SPANS) if (batch["labels"][row, start:end] == -100).all()]
    assert 0 < len(free) < len(SPANS)
    assert objective(**batch).note_hits.item() == pytest.approx(len(free) / 3)
    ((keys, _),) = notes.pending.waiting
    assert keys.tolist() == [key for *_, key in SPANS]
    objective.enable_discriminator()
    assert objective(**batch).note_hits.item() == pytest.approx(len(INTACT) / 3)


def test_rules_about_masked_words_are_refused_where_none_are_seen():
    for settings in ({"read_masked": True}, {"update_masked": False}):
        notes = NoteDictionary(KEYS, 16, NoteSettings(**settings))
        with pytest.raises(ValueError, match="reads none: leave them"):
            attach(make_discriminator("replaced_token"), notes)
        attach(make_discriminator("replaced_token", stage_one="masked_lm", discriminator_start_step=3), notes)


def test_replicas_of_data_parallel_are_refused():
    objective, _ = make_objective("replaced_token")
    objective._is_replica = True  # as torch.nn.DataParallel marks them
    with pytest.raises(RuntimeError, match="start a process for each GPU"):
        objective(**make_sampled_batch("replaced_token"))


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_stage_one_takes_no_notes(kind):
    objective, notes = make_objective(kind, discriminator_start_step=3)
    output = objective(**make_sampled_batch(kind))
    assert output.note_hits.isnan()
    assert not notes.pending.waiting


@pytest.mark.parametrize("kind", DISCRIMINATORS)
@pytest.mark.parametrize("name", ["bert", "modernbert", "tupe"])
def test_recomputed_layers_update_notes_once(kind, name):
    """Whole layers are run again in the backward pass, by which nothing changes."""
    batch, found = make_sampled_batch(kind), []
    for checkpointed in (False, True):
        objective, notes = make_objective(kind, name)
        layer = next(part for part in objective.encoder.modules() if isinstance(part, GradientCheckpointingLayer))
        linear = next(part for part in layer.modules() if isinstance(part, torch.nn.Linear))
        if checkpointed:
            objective.gradient_checkpointing_enable({"use_reentrant": False})
        calls = []
        linear.register_forward_pre_hook(lambda part, args, calls=calls: calls.append(part))
        loss = objective(**batch).loss
        loss.backward()
        assert len(calls) == 1 + checkpointed
        assert len(notes.pending.waiting) == 1
        notes.apply_updates()
        found.append({"loss": loss, "notes": notes.values.clone(), "gradients": named_gradients(objective)})
    plain, recomputed = found
    assert_close("recomputed", recomputed, plain)
