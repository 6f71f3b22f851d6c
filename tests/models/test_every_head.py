"""What must hold for every head of every family: losses, adapters, quantisation, resizing, saving and loading."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

import hf_efficient
from hf_efficient import auto
from hf_efficient.trainer import EfficientTrainer
from tests.helpers.comparison import assert_close, assert_equal, assert_gradients_close, named_gradients


IGNORED = -100
OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")
TRANSFORMER = {
    "vocab_size": 37,
    "hidden_size": 15,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 21,
    "max_position_embeddings": 12,
}
SIZES = {
    "srupp": {"vocab_size": 37, "hidden_size": 14, "projection_size": 6, "num_hidden_layers": 2, "dropout": 0.0},
    "tupe": {
        **TRANSFORMER,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout": 0.0,
    },
    "scaling_transformer": {
        **TRANSFORMER,
        "dropout": 0.0,
        "activation_dropout": 0.0,
    },
}
SIZES["terraformer"] = {name: x for name, x in SIZES["scaling_transformer"].items() if name != "num_hidden_layers"}
SIZES["terraformer"] |= {"num_encoder_layers": 2, "num_decoder_layers": 2}
ADAPTIVE = {"adaptive_cutoffs": [9, 23], "adaptive_embedding_size": 8, "adaptive_divisor": 2}
# Soft masks in training, of which no draw decides anything.
SPARSE = {"ff_sparsity": 3, "ff_rank": 4, "ff_hard_probability": 0.0, "ff_sru_layers": 1, "ff_sru_units": 5}
SPARSE |= {"attention_type": "multiplicative_conv", "attention_sparsity": 5}
MULTIPLICATIVE = {**SPARSE, "lm_head_type": "multiplicative", "loss_sparsity": 37}
LOW_RANK = {"lm_head_type": "low_rank", "lm_head_rank": 6, "position_embedding_type": "none"}
ALONE = {"is_encoder_decoder": False, "num_encoder_layers": 0}
CROSS = {"decoder_type": "cross_attention", "attentions_per_layer": 1}
SPARSE_CROSS = {**CROSS, **MULTIPLICATIVE, "cross_query_type": "multiplicative_conv", "cross_query_sparsity": 5}
# Fields of the config for each kind of head, and by what name the kind goes in test ids; others take none.
KINDS = {
    "SruppForCausalLM": {"": {}, "adaptive": ADAPTIVE, "adaptive-tied": {**ADAPTIVE, "tie_adaptive_projections": True}},
    "SruppForMaskedLM": {"": {"bidirectional": True}},
    "ScalingTransformerModel": {"": {}, "sparse": SPARSE},
    "ScalingTransformerForCausalLM": {"": {}, "sparse": MULTIPLICATIVE, "low-rank": LOW_RANK},
    "TerraformerModel": {"": {}, "cross": CROSS},
    "TerraformerForConditionalGeneration": {
        "": {},
        "sparse": MULTIPLICATIVE,
        "cross-tied": {**CROSS, "tie_word_embeddings": True},
        "cross-sparse": SPARSE_CROSS,
    },
    "TerraformerForCausalLM": {
        "reformer": {**ALONE, "attentions_per_layer": 1, "stream_output": "concatenate"},
        "sparse": {**ALONE, **MULTIPLICATIVE},
    },
    "SequenceClassification": {
        "": {"num_labels": 3},
        "regression": {"num_labels": 1},
        "regression-3": {"num_labels": 3, "problem_type": "regression"},
        "multi-label": {"num_labels": 3, "problem_type": "multi_label_classification"},
    },
    "TokenClassification": {"": {"num_labels": 3}},
}
CASES = {
    "-".join(filter(None, (name, kind))): (name, fields)
    for family in auto.FAMILIES.values()
    for name in dict.fromkeys(family.classes.values())
    for kind, fields in KINDS.get(name, KINDS.get(name.partition("For")[2], {"": {}})).items()
}
HEADS = {case: row for case, row in CASES.items() if "For" in row[0]}
every_head = pytest.mark.parametrize("case", HEADS)
every_model = pytest.mark.parametrize("case", CASES)


def make_model(case, dtype=torch.float64):
    """A tiny model whose weights are large enough that each shows in the output."""
    name, fields = CASES[case]
    model_class = getattr(hf_efficient, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**SIZES[model_class.config_class.model_type] | fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in name or "alpha" in name else 0.0, 0.3)
    return model.to(dtype)


def make_inputs(case):
    """Eight rows, or pairs of rows for a multiple choice, of which some are padded."""
    generator = torch.Generator().manual_seed(1)
    shape = (8, 2, 7) if "MultipleChoice" in case else (8, 7)
    ids = torch.randint(3, 37, shape, generator=generator)
    ids[..., 0] = 0  # [CLS]
    mask = torch.ones_like(ids)
    mask[1, ..., 5:] = 0
    mask[2, ..., 2:] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}
    if CASES[case][0] in ("TerraformerModel", "TerraformerForConditionalGeneration"):
        inputs["decoder_input_ids"] = ids.flip(1)
    return inputs


def make_labels(case, inputs):
    """Labels of the kind that the head takes, of which the micro-batches hold different numbers."""
    name, fields = CASES[case]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if "QuestionAnswering" in name:
        return {"start_positions": ids[:, 1] % 7, "end_positions": ids[:, 2] % 7}
    if "MultipleChoice" in name:
        return {"labels": ids[:, 0, 1] % 2}
    if "SequenceClassification" in name:
        if "regression" in case:
            numbers = ids[:, 1 : 1 + fields["num_labels"]].float() / 7
            return {"labels": numbers.squeeze(-1)}
        return {"labels": (ids[:, 1:4] % 2).float() if "multi-label" in case else ids[:, 1] % 3}
    labels = ids % 3 if "TokenClassification" in name else ids
    labels = labels.masked_fill((mask == 0) | (ids % 4 == 1), IGNORED)
    labels[3, 2:] = IGNORED
    return {"labels": labels}


def count_targets(case, labels):
    """The number that Trainer passes as `num_items_in_batch`; it knows none for question answering."""
    if "labels" not in labels:
        return torch.tensor(len(labels["start_positions"]))
    return (labels["labels"][:, 1:] if "CausalLM" in case else labels["labels"]).ne(IGNORED).sum()


def outputs_of(model, inputs):
    """The floating-point outputs at real tokens, or of rows, in evaluation."""
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    mask = inputs["attention_mask"].bool()
    tensors = {name: outputs[name] for name in OUTPUTS if name in outputs}
    return {name: x[mask] if x.shape[: mask.dim()] == mask.shape else x for name, x in tensors.items()}


@every_head
def test_four_accumulated_batches_are_one(case):
    model, accumulated, inputs = make_model(case), make_model(case), make_inputs(case)
    labels = make_labels(case, inputs)
    count = count_targets(case, labels)
    loss = model(**inputs, **labels).loss
    loss.backward()
    losses = []
    for step in range(4):
        rows = slice(2 * step, 2 * step + 2)
        part = {name: tensor[rows] for name, tensor in {**inputs, **labels}.items()}
        losses.append(accumulated(**part, num_items_in_batch=count).loss)
        losses[-1].backward()
    assert_close("loss", sum(losses).detach(), loss.detach(), 1e-6)
    assert_gradients_close(accumulated, model, 1e-5)


@every_head
def test_trainer_accumulates_four_batches_as_one(case, tmp_path):
    """One step of plain Trainer, and its evaluation: weights and losses do not depend on how the batch is cut."""
    inputs = make_inputs(case)
    batch = {**inputs, **make_labels(case, inputs)}
    rows = [{name: tensor[i] for name, tensor in batch.items()} for i in range(8)]
    results = []
    for steps in (1, 4):
        model = make_model(case, torch.float32)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8 // steps,
            gradient_accumulation_steps=steps,
            max_steps=1,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        results.append((trainer.state.log_history[0]["loss"], dict(model.named_parameters())))
    (loss, weights), (accumulated_loss, accumulated) = results
    assert accumulated_loss == pytest.approx(loss, rel=1e-4)
    for name, weight in weights.items():
        assert_close(name, accumulated[name].detach(), weight.detach(), 1e-5)


@every_head
def test_int32_labels(case):
    model, inputs = make_model(case), make_inputs(case)
    labels = make_labels(case, inputs)
    small = {name: x if x.is_floating_point() else x.int() for name, x in labels.items()}
    assert_equal("loss", model(**inputs, **small).loss.detach(), model(**inputs, **labels).loss.detach())


@every_head
@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)], ids=["own-count", "count-0", "count-tensor-0"])
def test_a_batch_without_targets_has_a_loss_of_zero_and_gradients_of_zero(case, count):
    model, inputs = make_model(case), make_inputs(case)
    nothing = {name: torch.full_like(x, IGNORED) for name, x in make_labels(case, inputs).items()}
    loss = model(**inputs, **nothing, num_items_in_batch=count).loss
    loss.backward()
    assert loss.item() == 0.0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient, for which distributed training would wait"
            assert not parameter.grad.any(), name


@every_head
def test_evaluation_weighs_batches_by_their_targets(case, tmp_path):
    """Batches of two rows, one of which has no target: the loss of all rows at once."""
    model, inputs = make_model(case, torch.float32).eval(), make_inputs(case)
    labels = make_labels(case, inputs)
    for tensor in labels.values():
        tensor[2:4] = IGNORED
    with torch.no_grad():
        expected = model(**inputs, **labels).loss.item()
    rows = [{name: tensor[i] for name, tensor in {**inputs, **labels}.items()} for i in range(8)]
    settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "per_device_eval_batch_size": 2}
    arguments = TrainingArguments(output_dir=str(tmp_path), **settings)
    assert EfficientTrainer(model, arguments).evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert Trainer(model, arguments).evaluate(rows)["eval_loss"] > 0  # a mean over batches, none of which is NaN


@every_head
@pytest.mark.parametrize(("attention", "value"), [("eager", float("nan")), ("sdpa", float("inf"))])
def test_what_stands_at_padding_reaches_nothing(case, attention, value):
    if "MultipleChoice" in case:
        pytest.skip("its inputs_embeds have a dimension more; the encoder is that of the other heads")
    model, inputs = make_model(case), make_inputs(case)
    model.set_attn_implementation(attention)
    mask, labels = inputs["attention_mask"], make_labels(case, inputs)
    width = model.get_input_embeddings().embedding_dim
    embeds = torch.randn(8, 7, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    results = []
    for filling in (0.0, value):
        filled = embeds.masked_fill(mask.unsqueeze(-1) == 0, filling).requires_grad_()
        model.zero_grad()
        outputs = model(inputs_embeds=filled, attention_mask=mask, **labels)
        outputs.loss.backward()
        states = [] if outputs.get("logits") is None else [outputs.logits]
        assert all(x.isfinite().all() for x in states)
        results.append([outputs.loss.detach(), *(x.detach() for x in states), filled.grad, named_gradients(model)])
    assert_close("outputs and gradients", results[1], results[0], 1e-12)


def adapt(model, **options):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied weights, and how Conv1D stores its weight
        return peft.get_peft_model(model, peft.LoraConfig(r=3, **options))


@every_model
def test_lora_on_all_linear_layers_trains_all_and_merges(case):
    inputs = make_inputs(case)
    model = adapt(make_model(case), target_modules="all-linear", init_lora_weights=False)
    before = outputs_of(model, inputs)
    outputs = model.train()(**inputs, **(make_labels(case, inputs) if case in HEADS else {}))
    (outputs.loss if case in HEADS else outputs.last_hidden_state.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, f"{name} gets no gradient"
    assert_close("output", outputs_of(model.merge_and_unload(), inputs), before, 1e-6)


HEAD_MODULES = ("lm_head", "score", "classifier", "qa_outputs")


@every_head
def test_modules_to_save(case):
    inputs = make_inputs(case)
    plain = make_model(case)
    head = next(name for name in HEAD_MODULES if hasattr(plain, name))
    before = outputs_of(plain, inputs)
    target = r".*(down_proj|(?<!cross_attention\.)q_proj|sru\.in_proj)"
    model = adapt(make_model(case), target_modules=target, modules_to_save=[head])
    assert_close("output", outputs_of(model, inputs), before, 1e-12)
    model.train()(**inputs, **make_labels(case, inputs)).loss.backward()
    saved = {name: x for name, x in model.named_parameters() if f"{head}.modules_to_save" in name}
    assert saved
    assert all(x.grad is not None for x in saved.values())
    with torch.no_grad():
        for parameter in saved.values():
            parameter.mul_(0.5)
    changed = outputs_of(model, inputs)
    assert_close("output", outputs_of(model.merge_and_unload(), inputs), changed, 1e-12)


class InDouble(nn.Module):
    """A wrapper such as those that cast the output of a head."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs).double()


@every_head
@pytest.mark.parametrize("wrap", [InDouble, lambda m: torch.compile(m, backend="eager")], ids=["cast", "compile"])
def test_something_else_in_the_place_of_the_head(case, wrap):
    model, inputs = make_model(case), make_inputs(case)
    labels = make_labels(case, inputs)
    before, loss = outputs_of(model, inputs), model(**inputs, **labels).loss.detach()
    head = next(name for name in HEAD_MODULES if hasattr(model, name))
    setattr(model, head, wrap(getattr(model, head)))
    after = outputs_of(model, inputs)
    assert_close("output", {name: x.double() for name, x in after.items()}, {n: x.double() for n, x in before.items()})
    assert_close("loss", model(**inputs, **labels).loss.detach().double(), loss.double(), 1e-6)


@every_model
def test_dynamic_quantisation(case):
    model, inputs = make_model(case, torch.float32), make_inputs(case)
    before = outputs_of(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.ao makes way for torchao
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert any("quantized" in type(module).__module__ for module in quantised.modules())
    assert_close("output", outputs_of(quantised, inputs), before, 0.1)


@every_head
def test_precision_of_the_loss(case):
    """Float32 or better: a model of float64 has a loss that its finite differences agree with."""
    inputs = make_inputs(case)
    inputs.update(make_labels(case, inputs))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert make_model(case, dtype)(**inputs).loss.dtype == torch.promote_types(dtype, torch.float32)


@every_model
def test_resizing(case):
    model, inputs = make_model(case), make_inputs(case)
    before = outputs_of(model, inputs)
    assert model.resize_token_embeddings(37).num_embeddings == 37
    assert_equal("output", outputs_of(model, inputs), before)
    if hasattr(model, "lm_head") and case.endswith("-sparse"):
        with pytest.raises(ValueError, match=r"37 ids.* resized to 40"):
            model.resize_token_embeddings(38, pad_to_multiple_of=5)
        assert model.get_input_embeddings().weight.shape == (37, model.config.hidden_size)
        return
    assert model.resize_token_embeddings(38, pad_to_multiple_of=5).num_embeddings == 40
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 40
    inputs["input_ids"][0, ..., 1] = 39
    after = outputs_of(model, inputs)
    assert all(x.isfinite().all() for x in after.values())
    if hasattr(model, "lm_head"):
        assert after["logits"].shape[-1] == 40


LOADS = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
import hf_efficient
for case, name in json.load(open(sys.argv[1] + "/cases.json")).items():
    model = getattr(hf_efficient, name).from_pretrained(f"{sys.argv[1]}/{case}").eval()
    with torch.no_grad():
        outputs = model(**load_file(f"{sys.argv[1]}/{case}/inputs.safetensors"))
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    save_file({n: outputs[n].contiguous() for n in names if n in outputs}, f"{sys.argv[1]}/{case}/outputs.safetensors")
"""


def test_saved_models_give_the_same_in_a_fresh_process(tmp_path):
    from safetensors.torch import save_file

    expected = {}
    for case in CASES:
        model, inputs = make_model(case, torch.float32).eval(), make_inputs(case)
        model.save_pretrained(tmp_path / case)
        save_file(inputs, tmp_path / case / "inputs.safetensors")
        with torch.no_grad():
            expected[case] = model(**inputs)
    (tmp_path / "cases.json").write_text(json.dumps({case: name for case, (name, _) in CASES.items()}))
    command = [sys.executable, "-c", LOADS, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert result.returncode == 0, result.stderr
    for case, outputs in expected.items():
        for name, tensor in load_file(tmp_path / case / "outputs.safetensors").items():
            assert_close(f"{case}.{name}", tensor, outputs[name], 1e-6)
