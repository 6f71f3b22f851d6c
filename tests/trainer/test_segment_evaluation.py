"""Texts of any length predicted with memory from segment to segment, during training and by itself."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_efficient import SruppConfig, SruppForCausalLM
from hf_efficient.data.segments import ColumnSegments
from hf_efficient.models.srupp.convert_srupp import convert_state_dict
from hf_efficient.trainer.segment_trainer import evaluate_segments, token_losses
from tests.trainer.segment_runs import gpt2, make_trainer, same, srupp, text, weights


def test_evaluation_has_a_memory_of_its_own(tmp_path):
    evaluated = ColumnSegments(text(80, seed=2), 13, columns=2, drop_tail=False)
    quiet = make_trainer(tmp_path, save_strategy="no")
    trainer = make_trainer(tmp_path, evaluated=evaluated, eval_strategy="steps", eval_steps=1, save_strategy="no")
    for each in (quiet, trainer):
        each.train()
    same(weights(quiet), weights(trainer), atol=0, rtol=0)
    values = [trainer.evaluate()["eval_loss"] for _ in range(2)]
    assert values[0] == values[1] == trainer.state.log_history[-2]["eval_loss"]
    score = evaluate_segments(trainer.model, evaluated, progress=False)
    assert score.tokens == 79
    assert values[0] == pytest.approx(score.loss, abs=1e-6)


@pytest.mark.parametrize("unroll", [5, 13, 40])
def test_long_unroll_equals_one_forward_with_a_window(unroll):
    """State without limit, and each position attends to itself and `unroll` before it, wherever segments are cut."""
    model, tokens = srupp().eval(), text(67)
    score = evaluate_segments(model, ColumnSegments(tokens, unroll, drop_tail=False), progress=False)
    with torch.no_grad():
        whole = model(tokens[None, :-1], attention_window=unroll).logits
    expected = token_losses(whole, tokens[None, 1:]).sum().item()
    assert score.tokens == 66
    assert score.nats == pytest.approx(expected, abs=1e-4)


@pytest.mark.golden
def test_evaluation_recorded_from_the_original():
    """The case lm_char_eval_samelength: segments of 8, 8 and 5, each position seeing 8 before it."""
    folder = Path(os.environ.get("HF_EFFICIENT_GOLDEN", Path(__file__).parents[1] / "golden"))
    case = folder / "srupp" / "cases" / "lm_char_eval_samelength"
    recorded, tensors = json.loads(case.with_suffix(".json").read_text()), load_file(case.with_suffix(".safetensors"))
    sizes = recorded["args"]
    config = SruppConfig(
        vocab_size=recorded["vocab"],
        hidden_size=sizes["n_d"],
        projection_size=sizes["n_proj"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["attn_heads"],
    )
    model = SruppForCausalLM(config)
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    model.load_state_dict(convert_state_dict(weights, config))
    inputs, targets, expected = (tensors[name].T for name in ("input.x", "input.y", "output.nll"))
    for column in range(2):
        assert torch.equal(inputs[column, 1:], targets[column, :-1])
        tokens = torch.cat([inputs[column], targets[column, -1:]])
        score = evaluate_segments(model, ColumnSegments(tokens, 8, drop_tail=False), progress=False)
        assert score.tokens == sum(recorded["segments"]) == 21
        assert score.nats == pytest.approx(expected[column].sum().item(), abs=2e-5)


def test_columns_are_evaluated_like_texts_of_their_own():
    model, tokens = srupp().eval(), text(67)
    score = evaluate_segments(model, ColumnSegments(tokens, 8, columns=3, drop_tail=False), progress=False)
    pieces = [tokens[start : start + 23] for start in (0, 22, 44)]
    single = [evaluate_segments(model, ColumnSegments(piece, 8, drop_tail=False), progress=False) for piece in pieces]
    assert score.tokens == sum(part.tokens for part in single) == 66
    assert score.nats == pytest.approx(sum(part.nats for part in single), abs=1e-4)


@pytest.mark.parametrize("model", ["plain", "adaptive", "gpt2"])
def test_metrics_get_token_losses(tmp_path, model):
    adaptive = {"adaptive_cutoffs": [7, 15], "tie_word_embeddings": True}
    model = {"plain": srupp, "adaptive": lambda: srupp(**adaptive), "gpt2": gpt2}[model]()
    found = {}

    def metrics(prediction):
        found.update(losses=prediction.predictions, labels=prediction.label_ids)
        return {"mean": prediction.predictions[prediction.label_ids != -100].mean()}

    evaluated = ColumnSegments(text(80, seed=2), 13, columns=2, drop_tail=False)
    values = make_trainer(tmp_path, model, evaluated=evaluated, metrics=metrics).evaluate()
    assert found["losses"].shape == found["labels"].shape == (8, 13)
    assert sorted(found["labels"][found["labels"] != -100]) == sorted(text(80, seed=2)[1:].tolist())
    assert values["eval_mean"] == pytest.approx(values["eval_loss"], abs=1e-6)
