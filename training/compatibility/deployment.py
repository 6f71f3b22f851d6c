"""Cells of models at work elsewhere: compiled, exported, quantised, evaluated."""

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_efficient.hub import export

from ..examples.small_models import TEXTS
from .subjects import Refused, Subject, assert_close, outputs_of


class Logits(nn.Module):
    """A model from tensors to logits, as a program that is exported has it.

    Args:
        model (`PreTrainedModel`): the model.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor | None = None) -> Tensor:
        target = {} if decoder_input_ids is None else {"decoder_input_ids": decoder_input_ids}
        return self.model(input_ids, attention_mask=attention_mask, **target, **self.options).logits


def _program(subject: Subject) -> tuple[Logits, dict[str, Tensor], list[dict[str, Tensor]], dict[str, Any]]:
    """Make what is exported: a model, inputs to trace it with, further ones of other sizes, and the sizes that vary."""
    model = subject.model()
    inputs = subject.inputs(model)
    others = [{name: tensor[:rows, :length] for name, tensor in inputs.items()} for rows, length in ((2, 7), (1, 2))]
    for other in others:
        other["attention_mask"] = torch.ones_like(other["attention_mask"])
    batch, source, target = (torch.export.Dim(name, min=1, max=90) for name in ("batch", "source", "target"))
    sizes = {name: {0: batch, 1: target if name.startswith("decoder") else source} for name in inputs}
    return Logits(model).eval(), inputs, [inputs, *others], sizes


def torch_export(subject: Subject, folder: Path) -> str:
    """Export a model for any batch and length, save the program, load it, and run it."""
    model, inputs, cases, sizes = _program(subject)
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=sizes, strict=False)
        torch.export.save(program, folder / "model.pt2")
        loaded = torch.export.load(folder / "model.pt2").module()
        for case in cases:
            found, expected = {"logits": loaded(**case)}, {"logits": model(**case)}
            equal = assert_close(found, expected, 1e-4, case["attention_mask"])
    return f"{len(cases)} batches of other sizes: {equal}"


def onnx_runtime(subject: Subject, folder: Path) -> str:
    """Export a model to ONNX for any batch and length, and run it in ONNX Runtime."""
    import onnxruntime

    model, inputs, cases, sizes = _program(subject)
    with torch.no_grad():
        program: Any = torch.onnx.export(
            model, kwargs=inputs, dynamic_shapes=sizes, dynamo=True, verbose=False, optimize=True
        )
        program.save(folder / "model.onnx")
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        for case in cases:
            (found, *_) = session.run(None, {name: tensor.numpy() for name, tensor in case.items()})
            expected = {"logits": model(**case)}
            equal = assert_close({"logits": torch.from_numpy(found)}, expected, 1e-4, case["attention_mask"])
    operators = sorted({node.op_type for node in program.model.graph} & {"Scan", "Loop"})
    loops = f"; recurrences as {' and '.join(operators)}" if operators else ""
    return f"{len(cases)} batches of other sizes: {equal}{loops}"


def torchao(subject: Subject, folder: Path) -> str:
    """Quantise the linear layers of a saved model to 8 bits, save that and load it."""
    import transformers
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    twin = subject.save(folder / "float")
    inputs = subject.inputs(twin)
    auto_class: Any = getattr(transformers, subject.home)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    quantised = auto_class.from_pretrained(folder / "float", quantization_config=config, dtype=torch.float32)
    changed = 0
    for name, layer in quantised.named_modules():
        if isinstance(layer, nn.Linear) and type(layer.weight.data).__module__.startswith("torchao"):
            twin.get_submodule(name).weight.data = layer.weight.dequantize().float()
            changed += 1
    assert changed, "no layer was quantised"
    # Not with the model before it: a sparse layer may choose other units by weights that are rounded.
    found = outputs_of(quantised, inputs)
    equal = assert_close(found, outputs_of(twin, inputs), 0.02, inputs["attention_mask"])
    quantised.save_pretrained(folder / "int8")
    again = auto_class.from_pretrained(folder / "int8", dtype=torch.float32)
    assert_close(outputs_of(again, inputs), found, 1e-4, inputs["attention_mask"])
    return (
        f"int8 weights in {changed} linear layers: {equal}, with a model of the same rounded weights; saved and loaded"
    )


def torch_compile(subject: Subject, folder: Path) -> str:
    """Compile a model's evaluation whole, with the default backend, for batches of several sizes, and compare it with
    the model in float64: a small random model may round more than 1e-4 by itself."""
    torch._dynamo.reset()
    model, _, cases, _ = _program(subject)
    exact = copy.deepcopy(model).double()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for case in cases:
            expected = exact(**case)
            rounding = ((model(**case) - expected).abs().max() / expected.abs().max()).item()
            found = {"logits": compiled(**case)}
            assert_close(found, {"logits": expected}, max(1e-4, 3 * rounding), case["attention_mask"])
    return (
        f"fullgraph, inductor, {len(cases)} batches of other sizes: equal to 1e-4, or to three times the rounding of "
        "the model that is not compiled"
    )


TASK = """task: small_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


def lm_eval(subject: Subject, folder: Path) -> str:
    """Score an exported folder on a task that lies in files beside it, by log-likelihood and offline."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, place = subject.model(), folder / "exported"
    export(model, subject.tokenizer, place)
    try:
        scored = HFLM(pretrained=str(place), device="cpu", batch_size=2, trust_remote_code=True)
    except ValueError as error:
        if not subject.generates and "AutoModelForCausalLM" in str(error):
            raise Refused("it scores causal and encoder-decoder language models; a masked LM is neither.") from error
        raise
    rows = [{"question": text.split()[0], "choices": [text.split()[1], "zz"], "answer": 0} for text in TEXTS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "small_choice.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found: Any = simple_evaluate(scored, tasks=["small_choice"], task_manager=manager, bootstrap_iters=0)
    accuracy = found["results"]["small_choice"]["acc,none"]
    assert abs(accuracy - _accuracy(subject, model, rows)) < 1e-6
    return f"{len(rows)} questions of a local task, accuracy as by the model's own log-likelihoods"


@torch.no_grad()
def _accuracy(subject: Subject, model: Any, rows: list[dict[str, Any]]) -> float:
    """The share of rows of which the model itself finds the right word more likely than the wrong one."""
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            context, whole = (
                subject.tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in (row["question"], f"{row['question']} {choice}")
            )
            if model.config.is_encoder_decoder:
                source = subject.tokenizer(row["question"])["input_ids"]  # with the end of text
                continuation = subject.tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
                logits = model(torch.tensor([source]), labels=torch.tensor([continuation])).logits[0]
            else:
                continuation = whole[len(context) :]
                logits = model(torch.tensor([whole])).logits[0, len(context) - 1 : -1]
            chosen = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])
            scores.append(chosen.sum().item())
        right += scores[0] > scores[1]
    return right / len(rows)
