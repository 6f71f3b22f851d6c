"""What controllers choose, in Trainer's log, beside checkpoints, and as a warning."""

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_efficient import ScalingTransformerConfig, ScalingTransformerForCausalLM, SruppConfig, SruppForCausalLM
from hf_efficient.modules.sparse_layers import SparseFeedForward, UnitDraws
from hf_efficient.modules.unit_usage import UnitUsage, UnitUsageCallback, observed_units
from hf_efficient.trainer import EfficientTrainer
from hf_efficient.utils.cache_naming import cache_kwarg


MEANS = {"dead_units", "unit_entropy", "top_unit_share", "killed_winners", "lowest_unit_entropy"}
NAMES = [f"model.layers.{index}.feed_forward.sparse" for index in range(2)]


def make_model(seed=0, **fields):
    torch.manual_seed(seed)
    config = ScalingTransformerConfig(
        vocab_size=11,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=16,
        **{"ff_sparsity": 4, "ff_rank": 3, **fields},
    )
    return ScalingTransformerForCausalLM(config)


ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.randint(11, (40, 7), generator=torch.Generator())]


def make_trainer(folder, model, callbacks, trainer_class=EfficientTrainer, **changes):
    settings = {
        "max_steps": 6,
        "logging_steps": 2,
        "save_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        **changes,
    }
    args = TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, report_to="none", **settings)
    return trainer_class(model, args, train_dataset=ROWS, callbacks=callbacks)


def logs_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_figures_by_hand():
    """Two blocks of four units, three tokens: units chosen 2, 1, 0, 0 and 3, 0, 0, 0 times; one winner is killed."""
    usage = UnitUsage(2, 4)
    usage(torch.tensor([[0, 0], [1, 0]]), torch.tensor([[True, True], [False, True]]))
    usage(torch.tensor([[0, 0]]), torch.tensor([[True, True]]))
    assert usage.counts.tolist() == [2, 1, 0, 0, 3, 0, 0, 0]
    assert usage.tokens == 3
    first = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(4)
    assert usage.figures() == pytest.approx(
        {"dead_units": 5 / 8, "entropy": first / 2, "top_share": (2 / 3 + 1) / 2, "killed_winners": 1 / 6}
    )


@pytest.mark.parametrize("select", [0.0, 0.9], ids=["hard", "soft"])
def test_what_is_counted_is_what_the_layer_chose(select):
    """In soft calls, which draw nothing, what the controller ranks first; a second run of a call counts nothing."""
    torch.manual_seed(0)
    layer = SparseFeedForward(5, 12, 4, 2, temperature=2.0)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight)
    x, draws = torch.randn(2, 9, 5), UnitDraws(select=torch.tensor(select))
    with observed_units(layer) as usage:
        layer.train()(x, draws)
        layer(x, draws)
        (counted,) = (one.numbers for one in usage.values())
    flat = x.flatten(0, 1)
    logits = (flat @ layer.controller_down.T) @ layer.controller_up.flatten(0, 1).T + layer.controller_bias.flatten()
    winners = draws.winners if select == 0.0 else logits.view(18, 3, 4).argmax(-1)
    assert winners is not None
    expected = torch.nn.functional.one_hot(winners, 4).sum(0).flatten()
    values = (flat @ layer.up.flatten(0, 1).T).view(18, 3, 4).gather(-1, winners.unsqueeze(-1))
    assert counted.tolist() == [*expected.tolist(), int((values <= 0).sum())]


def test_an_inner_bias_decides_in_evaluation_too_what_relu_kills():
    layer = SparseFeedForward(5, 12, 4, 2, inner_bias=True)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight)
    assert layer.inner_bias is not None
    torch.nn.init.constant_(layer.inner_bias, -1e4)
    with observed_units(layer) as usage:
        layer.eval()(torch.randn(5))
    assert usage[""].killed == 3


@pytest.mark.parametrize("trainer_class", [Trainer, EfficientTrainer])
def test_figures_stand_in_the_log_and_beside_checkpoints(tmp_path, trainer_class):
    """Counted are steps 3 and 6, step 4, which ends in a checkpoint, and the last one."""
    model = make_model()
    seen = []

    class Reader(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(set(logs))

    callback = UnitUsageCallback(model, every=3)
    callbacks = [Reader(), callback] if trainer_class is EfficientTrainer else [callback, Reader()]
    trainer = make_trainer(tmp_path, model, callbacks, trainer_class, max_steps=7)
    trainer.train()
    logs = logs_of(trainer)
    steps = [2, 4, 6, *([7] if trainer_class is EfficientTrainer else [])]  # a window ends where a checkpoint is saved
    assert [entry["step"] for entry in logs] == steps
    assert [set(entry) >= {*MEANS, "unit_usage"} for entry in logs] == [False, True, True, True][: len(steps)]
    assert [names >= MEANS for names in seen[:3]] == [False, True, True]
    for entry in logs[1:]:
        assert list(entry["unit_usage"]) == NAMES
        layers = entry["unit_usage"].values()
        assert entry["unit_entropy"] == pytest.approx(sum(layer["entropy"] for layer in layers) / 2, abs=1e-4)
        assert entry["lowest_unit_entropy"] == pytest.approx(min(layer["entropy"] for layer in layers), abs=1e-4)
    found = {step: json.loads((tmp_path / f"checkpoint-{step}/unit_usage.json").read_text()) for step in (4, 7)}
    assert {step: content["tokens"] for step, content in found.items()} == {4: 2 * 4 * 7, 7: 2 * 4 * 7}
    assert found[4]["layers"] == logs[1]["unit_usage"]
    assert set(found[4]["mean"]) == MEANS
    assert not list(tmp_path.glob("**/_incomplete*"))
    assert not any(layer.observer for layer in callback.layers.values())


def test_counting_changes_nothing(tmp_path):
    model = make_model(dropout=0.1)
    make_trainer(tmp_path, model, [UnitUsageCallback(model, every=2)]).train()
    twin = make_model(dropout=0.1)
    make_trainer(tmp_path / "twin", twin, []).train()
    for (name, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("chunk", [0, 5], ids=["layers", "pieces"])
def test_recomputation_counts_once(tmp_path, chunk):
    """Of 7 tokens in each of 4 rows, with layers, and pieces of layers, that run again in the backward pass."""
    counts = []
    for checkpointed in (False, True):
        model = make_model(ff_chunk_size=chunk, dropout=0.0)
        callback = UnitUsageCallback(model, every=1)
        folder = tmp_path / str(checkpointed)
        make_trainer(folder, model, [callback], max_steps=2, gradient_checkpointing=checkpointed).train()
        counts.append([usage.numbers.tolist() for usage in callback.usage.values()])
        assert [usage.tokens for usage in callback.usage.values()] == [2 * 4 * 7] * 2
    assert counts[0] == counts[1]


PADDED = {
    "right": [[1, 1, 1, 0, 0, 0, 0], [1] * 7, [1, 0, 0, 0, 0, 0, 0]],
    "left": [[0, 0, 0, 0, 1, 1, 1], [1] * 7, [0, 0, 0, 0, 0, 0, 1]],
    "inside": [[1, 0, 1, 0, 0, 1, 0], [1] * 7, [0, 0, 0, 1, 0, 0, 0]],
    "whole row": [[1, 1, 1, 0, 0, 0, 0], [0] * 7, [0, 1, 0, 0, 0, 0, 0]],
}


def counts_of(model, **inputs):
    """What each layer chose in one call, as the numbers of [`UnitUsage`]."""
    with observed_units(model) as usage:
        model(**inputs, use_cache=False)
    return [one.numbers.tolist() for one in usage.values()]


@pytest.mark.parametrize("chunk", [0, 4], ids=["whole", "pieces"])
@pytest.mark.parametrize("hard", [0.0, 1.0, None], ids=["soft", "hard", "evaluation"])
@pytest.mark.parametrize("mask", PADDED.values(), ids=PADDED)
def test_padding_is_not_counted(mask, hard, chunk):
    """A padded batch gives the figures of its rows alone. Noise is too small to decide, so that draws are no matter."""
    hard_probability, temperature = (0.3, 0.1) if hard is None else (hard, 1e-6)
    model = make_model(
        dropout=0.0, ff_chunk_size=chunk, ff_hard_probability=hard_probability, ff_temperature=temperature
    ).train(hard is not None)
    mask = torch.tensor(mask)
    ids = torch.randint(11, mask.shape, generator=torch.Generator().manual_seed(1))
    rows = [row[kept.bool()] for row, kept in zip(ids, mask, strict=True) if kept.any()]
    alone = [counts_of(model, input_ids=row[None]) for row in rows]
    expected = [[sum(numbers) for numbers in zip(*layers, strict=True)] for layers in zip(*alone, strict=True)]
    assert sum(expected[0][:4]) == mask.sum()  # the units of a block, one of which each token takes
    assert counts_of(model, input_ids=ids, attention_mask=mask) == expected
    assert counts_of(model, inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask.bool()) == expected


def test_padding_of_a_chunked_prefill_is_not_counted():
    """The mask covers the cache too; that of the new tokens counts."""
    model, ids = make_model().eval(), torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1]])
    with observed_units(model) as usage:
        cache = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True).cache
        model(ids[:, 4:], attention_mask=mask, **cache_kwarg(cache))
    assert [one.numbers.tolist() for one in usage.values()] == counts_of(model, input_ids=ids, attention_mask=mask)
    assert {one.tokens for one in usage.values()} == {9}


@pytest.mark.parametrize("kind", ["labels", "documents", "four dimensions"])
def test_tokens_that_are_not_learned_or_belong_to_several_documents_are_counted(kind):
    model, ids = make_model().eval(), torch.randint(11, (2, 6))
    inputs = {
        "labels": {"labels": torch.full((2, 6), -100), "attention_mask": torch.ones(2, 6)},
        "documents": {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]] * 2)},
        "four dimensions": {"attention_mask": torch.ones(6, 6).tril()[None, None].bool()},
    }[kind]
    assert [sum(numbers[:4]) for numbers in counts_of(model, input_ids=ids, **inputs)] == [12, 12]


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_padding_is_left_out_of_a_run(tmp_path, checkpointed):
    """Rows of 7 tokens, of which the mask keeps 5, alternate with whole ones."""
    model = make_model(ff_chunk_size=4)
    callback = UnitUsageCallback(model, every=1)
    trainer = make_trainer(tmp_path, model, [callback], max_steps=2, gradient_checkpointing=checkpointed)
    trainer.train_dataset = [
        {**row, "attention_mask": torch.ones(7).index_fill_(0, torch.tensor([0, 3]), float(index % 2))}
        for index, row in enumerate(ROWS)
    ]
    trainer.args.train_sampling_strategy = "sequential"
    trainer.train()
    assert {usage.tokens for usage in callback.usage.values()} == {2 * (2 * 5 + 2 * 7)}


class EvaluateCallback(TrainerCallback):
    """Evaluates when a step ends."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.evaluate(ROWS)


def test_accumulated_batches_are_one_step_and_evaluation_is_none(tmp_path):
    model = make_model()
    callback = UnitUsageCallback(model, every=2)
    changes = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "max_steps": 2}
    trainer = make_trainer(tmp_path, model, [callback], **changes)
    trainer.add_callback(EvaluateCallback(trainer))
    trainer.train()
    assert {usage.tokens for usage in callback.usage.values()} == {2 * 3 * 7}


def test_saved_and_resumed_gives_the_same_figures(tmp_path):
    constant = {"lr_scheduler_type": "constant"}
    whole = make_model()
    straight = make_trainer(tmp_path / "straight", whole, [UnitUsageCallback(whole, every=3)], max_steps=8, **constant)
    straight.train()
    for steps in (4, 8):
        model = make_model()
        callbacks = [UnitUsageCallback(model, every=3)]
        trainer = make_trainer(tmp_path / "resumed", model, callbacks, max_steps=8, **constant)
        trainer.args.max_steps = steps
        trainer.train(resume_from_checkpoint=steps == 8)
    kept = [
        [{name: value for name, value in entry.items() if name in {*MEANS, "unit_usage"}} for entry in logs_of(one)]
        for one in (straight, trainer)
    ]
    assert len(kept[0]) == 4
    files = [(tmp_path / name / "checkpoint-8/unit_usage.json").read_text() for name in ("straight", "resumed")]
    assert len(set(files)) == 1
    assert kept[0] == kept[1]


def collapse(model):
    """Let every controller choose the first unit of each block, whatever the token."""
    with torch.no_grad():
        for layer in UnitUsageCallback(model).layers.values():
            layer.controller_bias[:, 0] += 30.0


@pytest.mark.parametrize("collapsed", [False, True], ids=["healthy", "collapsed"])
def test_a_collapsed_controller_warns_once_with_advice(tmp_path, caplog, collapsed):
    model = make_model()
    if collapsed:
        collapse(model)
    callback = UnitUsageCallback(model, every=1, patience=2)
    trainer = make_trainer(tmp_path, model, [callback], max_steps=8)
    with caplog.at_level(logging.WARNING, "hf_efficient"):
        trainer.train()
    lowest = [entry["lowest_unit_entropy"] for entry in logs_of(trainer)]
    warnings = [record.getMessage() for record in caplog.records if "collapsed" in record.getMessage()]
    if not collapsed:
        assert min(lowest) > 0.3
        assert not warnings
        return
    assert max(lowest) < 0.01
    assert len(warnings) == 1
    for part in (
        "for 2 steps up to step 4",
        "2 of 2 layers",
        NAMES[0],
        "learning rate (now 0.01",
        "75 % of its units",
        "warm-up",
        "ff_temperature, now 0.1",
        "ff_hard_probability, now 0.3",
    ):
        assert part in warnings[0]


def test_the_time_of_a_collapse_counts_across_an_interruption(caplog):
    """A run that is resumed takes up the history: patience does not begin anew."""
    model = make_model()
    callback = UnitUsageCallback(model, patience=50)
    worst = {name: {"entropy": 0.03, "top_share": 0.9, "dead_units": 0.7, "killed_winners": 0.0} for name in NAMES}
    entry = {"loss": 1.0, "lowest_unit_entropy": 0.03, "unit_usage": worst}
    state = SimpleNamespace(
        log_history=[{**entry, "step": 10}], global_step=60, is_world_process_zero=True, save_steps=9, max_steps=99
    )
    args = SimpleNamespace(torch_compile=False, learning_rate=0.1, max_grad_norm=1.0)
    callback.on_train_begin(args, state, None)
    with caplog.at_level(logging.WARNING, "hf_efficient"):
        callback.on_log(args, state, None, logs=dict(entry))
    assert "for 50 steps up to step 60" in caplog.text


def test_a_compiled_model_and_one_without_sparse_layers_are_not_counted(tmp_path, caplog):
    model = make_model()
    callback = UnitUsageCallback(model)
    state = SimpleNamespace(log_history=[], global_step=9, is_world_process_zero=True, save_steps=9, max_steps=99)
    with caplog.at_level(logging.INFO, "hf_efficient"):
        callback.on_train_begin(SimpleNamespace(torch_compile=True), state, None)
    assert "the model is compiled" in caplog.text
    callback.on_step_begin(SimpleNamespace(save_strategy="no"), state, None)
    assert not any(layer.observer for layer in callback.layers.values())
    dense = SruppForCausalLM(SruppConfig(vocab_size=11, hidden_size=6, projection_size=3, num_hidden_layers=1))
    trainer = make_trainer(tmp_path, dense, [UnitUsageCallback(dense, every=1)], max_steps=4)
    trainer.train()
    assert not MEANS & set().union(*logs_of(trainer))
    assert not list(tmp_path.glob("**/unit_usage.json"))
