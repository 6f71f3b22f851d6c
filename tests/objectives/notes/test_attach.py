"""Notes on any objective: where they are mixed in, which words read and give them, and what stays as it is."""

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, ElectraConfig, GPT2Config

import hf_efficient
from hf_efficient.objectives.mlm import MaskedLMObjectiveOutput
from hf_efficient.objectives.notes import NoteDictionary, NoteSettings, attach, note_insertion_point
from tests.helpers.comparison import assert_close, assert_gradients_close, named_gradients
from tests.objectives.notes.note_models import (
    CONFIGS,
    KEYS,
    MASK,
    ORIGINAL,
    PAD,
    SPANS,
    TARGETS,
    Discriminator,
    make_batch,
    make_mlm,
)


def make_notes(hidden=16, **settings):
    notes = NoteDictionary(KEYS, hidden, NoteSettings(**settings), seed=7)
    notes.values.add_(torch.randn(notes.values.shape, generator=torch.Generator().manual_seed(1)))
    return notes


def with_notes(objective, **settings):
    notes = make_notes(**settings)
    attach(objective, notes)
    return objective, notes


class Probe:
    """Records the input of the embedding norm and the final states in each forward pass of an encoder."""

    def __init__(self, encoder):
        self.inputs, self.states = [], []
        note_insertion_point(encoder).register_forward_pre_hook(lambda norm, args: self.inputs.append(args[0].detach()))
        encoder.register_forward_hook(lambda module, args, output: self.states.append(output[0].detach()), prepend=True)


def mixed_columns(objective, batch):
    """The (row, column) whose input differs from what it is without notes."""
    probe = Probe(objective.encoder)
    objective(**batch)
    objective(**{name: value for name, value in batch.items() if name != "note_spans"})
    mixed, plain = probe.inputs
    return {tuple(cell) for cell in (mixed != plain).any(-1).nonzero().tolist()}


def columns_of(*numbers):
    return {(row, column) for row, start, end, _ in (SPANS[i] for i in numbers) for column in range(start, end)}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_encoder_mixes_before_its_embedding_norm(name):
    objective, notes = with_notes(make_mlm(name), half_window=2)
    probe = Probe(objective.encoder)
    batch = make_batch(TARGETS)
    before = notes.values.clone()
    objective.train()
    output = objective(**batch)
    plain = objective(**{key: value for key, value in batch.items() if key != "note_spans"})
    assert isinstance(output, MaskedLMObjectiveOutput)
    assert type(plain) is MaskedLMObjectiveOutput
    expected = probe.inputs[1].clone()
    for i in (1, 4, 5):  # those without a target
        row, start, end, key = SPANS[i]
        expected[row, start:end] = 0.5 * (expected[row, start:end] + notes.values[key])
    torch.testing.assert_close(probe.inputs[0], expected, rtol=0, atol=1e-6)
    assert output.note_hits.item() == 1.0  # three in three rows
    assert output.loss.item() != plain.loss.item()

    notes.apply_updates()
    sums = {key: [] for key in range(len(KEYS))}
    for row, start, end, key in SPANS:
        columns = [c for c in range(max(start - 2, 0), min(end + 2, 13)) if ORIGINAL[row, c] != PAD]
        sums[key].append(probe.states[0][row, columns].mean(0))
    for key, taken in sums.items():
        expected = 0.9 * before[key] + 0.1 * torch.stack(taken).mean(0) if taken else before[key]
        torch.testing.assert_close(notes.values[key], expected, rtol=0, atol=1e-6)


def test_masked_words_read_no_note_whatever_is_seen_of_them():
    """A mask, a random id and the word itself alike."""
    objective, _ = with_notes(make_mlm("bert"))
    assert mixed_columns(objective, make_batch(TARGETS)) == columns_of(1, 4, 5)
    assert mixed_columns(objective, make_batch([(1, 6, 13)])) == columns_of(0, 1, 2, 3, 4, 5)
    assert mixed_columns(objective, make_batch()) == columns_of(*range(7))


def test_what_masked_words_read_and_give_can_be_switched():
    objective, notes = with_notes(make_mlm("tupe"), read_masked=True, update_masked=False)
    objective.train()
    assert mixed_columns(objective, make_batch(TARGETS)) == columns_of(*range(7))
    ((keys, _),) = notes.pending.waiting
    assert keys.tolist() == [1, 2, 2]


SAMPLED = [
    (0, 2, 11),  # selected, but drawn back to the original
    (0, 4, 33),  # replaced inside a word
    (0, 7, 16),  # half of a word drawn back, half replaced
    (0, 8, 30),
    (0, 6, 35),  # replaced beside words
    (1, 2, 16),  # a word of one token
    (2, 5, 15),  # a key newly spelled
]


def discriminator_batch(sampled=SAMPLED):
    batch = make_batch([(row, column, MASK) for row, column, _ in sampled])
    sampled_ids = ORIGINAL.clone()
    for row, column, seen in sampled:
        sampled_ids[row, column] = seen
    return {**batch, "sampled_ids": sampled_ids}


@pytest.mark.parametrize("name", ["bert", "tupe"])
def test_corrupted_words_read_and_give_notes_exactly_when_intact(name):
    discriminator, notes = with_notes(Discriminator(name))
    discriminator.train()
    assert mixed_columns(discriminator, discriminator_batch()) == columns_of(0, 3, 5, 6)
    ((keys, _),) = notes.pending.waiting
    assert keys.tolist() == [0, 0, 2, 1]


def test_presence_of_notes_follows_from_the_seen_text_alone():
    """Other selections that lead to the same corrupted text mix the same notes in."""
    more = [*SAMPLED, (0, 1, 10), (0, 10, 11), (1, 5, 12), (2, 7, int(ORIGINAL[2, 7]))]
    seen = []
    for sampled in (SAMPLED, more):
        discriminator, _ = with_notes(Discriminator("roberta"))
        probe = Probe(discriminator.encoder)
        discriminator(**discriminator_batch(sampled))
        seen.append(probe.inputs[0])
    assert torch.equal(*seen)


def test_steps_read_the_notes_as_they_were_before():
    objective, notes = with_notes(make_mlm("bert"))
    objective.train()
    probe = Probe(objective.encoder)
    for _ in range(2):
        objective(**make_batch(TARGETS))
    notes.apply_updates()
    objective(**make_batch(TARGETS))
    assert torch.equal(probe.inputs[0], probe.inputs[1])
    assert not torch.equal(probe.inputs[0], probe.inputs[2])
    assert not any("notes" in name for name, _ in objective.named_parameters())
    with pytest.raises(ValueError, match="has notes already"):
        attach(objective, make_notes())


def test_evaluation_reads_and_never_writes():
    objective, notes = with_notes(make_mlm("tupe"))
    objective.eval()
    before = notes.values.clone()
    output = objective(**make_batch(TARGETS))
    assert type(output) is MaskedLMObjectiveOutput
    assert mixed_columns(objective, make_batch(TARGETS)) == columns_of(1, 4, 5)
    objective.train()
    with torch.no_grad():
        objective(**make_batch(TARGETS))
    assert not notes.pending.waiting
    notes.apply_updates()
    assert torch.equal(notes.values, before)


def test_a_call_of_the_encoder_alone_has_no_notes():
    """Neither after a forward pass of the objective, nor after one that failed."""
    objective, notes = with_notes(make_mlm("bert"))
    objective.train()
    objective(**make_batch(TARGETS))
    with pytest.raises(ValueError, match="labels"):
        objective(**{**make_batch(TARGETS), "labels": None})
    ids = make_batch(TARGETS)["input_ids"]
    assert torch.equal(objective.encoder(ids)[0], make_mlm("bert").train().encoder(ids)[0])
    assert len(notes.pending.waiting) == 1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "tupe"])
def test_checkpointed_layers_update_notes_once(name, reentrant):
    gradients, values = [], []
    for checkpointed in (False, True):
        objective, notes = with_notes(make_mlm(name))
        objective.train()
        if checkpointed:
            objective.gradient_checkpointing_enable({"use_reentrant": reentrant})
        objective(**make_batch(TARGETS)).loss.backward()
        assert len(notes.pending.waiting) == 1
        notes.apply_updates()
        values.append(notes.values)
        gradients.append(named_gradients(objective))
    assert_close("values", *values)
    assert_gradients_close(*gradients)


def test_accumulated_batches_are_one_batch():
    whole, expected = with_notes(make_mlm("tupe"))
    parts, found = with_notes(make_mlm("tupe"))
    targets = len(TARGETS)
    for objective, splits in ((whole, [range(3)]), (parts, [[0], [1], [2]])):
        objective.train()
        for rows in splits:
            objective(**make_batch(TARGETS, rows), num_items_in_batch=targets).loss.backward()
        objective.notes.apply_updates()
    torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-6)
    assert found.updates.tolist() == expected.updates.tolist() == [1, 1, 1, 1]
    assert_gradients_close(parts, whole)


def test_a_batch_equals_its_rows_one_by_one():
    objective, _ = with_notes(make_mlm("tupe"))
    objective.eval()
    probe = Probe(objective.encoder)
    objective(**make_batch(TARGETS))
    for row in range(3):
        objective(**make_batch(TARGETS, [row]))
        torch.testing.assert_close(probe.inputs[-1][0], probe.inputs[0][row])


def test_start_step_waits_with_reading():
    objective, notes = with_notes(make_mlm("bert"), start_step=2)
    objective.train()
    assert not mixed_columns(objective, make_batch())
    assert len(notes.pending.waiting) == 1
    notes.apply_updates()
    assert not mixed_columns(objective, make_batch())
    notes.apply_updates()  # two steps are done, by whatever loop
    assert mixed_columns(objective, make_batch())
    again = make_notes(start_step=2)
    assert not again.reading
    again.load_state_dict(notes.state_dict())
    assert again.reading


def test_encoder_is_saved_without_notes(tmp_path):
    objective, notes = with_notes(make_mlm("bert"))
    objective.train()
    objective(**make_batch(TARGETS))
    notes.apply_updates()
    objective.encoder.save_pretrained(tmp_path / "encoder")
    objective.model.save_pretrained(tmp_path / "model")
    for folder, kind in (("encoder", AutoModel), ("model", AutoModelForMaskedLM)):
        _, info = kind.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["unexpected_keys"]
        assert not [key for key in info["missing_keys"] if "pooler" not in key]
    kept = {name for name in objective.state_dict() if name.startswith("notes.")}
    assert kept == {"notes.bits", "notes.updates", "notes.steps", "notes.key_ids", "notes.key_lengths"}


def test_encoders_that_cannot_have_notes_say_why():
    electra = AutoModel.from_config(ElectraConfig(**{**CONFIGS["electra"]().to_dict(), "embedding_size": 8}))
    with pytest.raises(ValueError, match=r"ElectraModel.*16 wide.*8 wide"):
        note_insertion_point(electra)
    adaptive = hf_efficient.SruppConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_size=8,
        bidirectional=True,
        adaptive_cutoffs=[10, 20],
    )
    with pytest.raises(ValueError, match=r"SruppModel.*several widths"):
        note_insertion_point(AutoModel.from_config(adaptive))
    gpt2 = AutoModel.from_config(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"GPT2Model.*embedding norm"):
        note_insertion_point(gpt2)
    with pytest.raises(ValueError, match="hidden_size of 16"):
        attach(make_mlm("bert"), NoteDictionary(KEYS, 12))
    with pytest.raises(ValueError, match="masked, replaced"):
        attach(make_mlm("bert"), make_notes(), encoder_reads="hidden")


def test_a_step_that_was_interrupted_moves_no_note():
    """What waits when training is broken off belongs to no step of the training that begins next."""
    notes = make_notes()
    callback = attach(make_mlm("bert"), notes)
    before = notes.values.clone()
    notes.enqueue(torch.tensor([0, 1]), torch.ones(2, 16))
    callback.on_train_begin(None, None, None)
    notes.apply_updates()
    assert torch.equal(notes.values, before)
    assert notes.updates.sum() == 0
