"""
Take a model elsewhere: to ONNX Runtime, and to 8 bits by torchao.

    pip install onnx onnxscript onnxruntime torchao
    python -m training.examples.deploy --output /tmp/deployed
    python -m training.examples.deploy --output /tmp/deployed --model my-topics/seed-42/model --ways onnx

**ONNX.** The program takes any number of texts of any length. The recurrence of SRU++ becomes a `Scan`, which ONNX
Runtime steps through token by token; encoders such as TUPE have none. Generation with a cache stays in torch.

**torchao.** Int8 weights of the linear layers, float activations: a model of a fourth of the bytes that loads by
`from_pretrained` as before. Sparse layers stay in float32; for those there is `SparseQuantizationConfig` (see
docs/quantization.md), which has kernels of its own.
"""

from hf_efficient.utils import openmp  # noqa: F401  # isort: skip  (before torch, which reads it when it is loaded)

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_efficient.utils.process import errors_in_one_line, names_among

from .small_models import TEXTS, example_parser, load_or_make


class Classifier(nn.Module):
    """From ids and a mask to logits: what is exported takes and gives tensors alone."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask=attention_mask).logits


def to_onnx(folder: Path, source: Path | None) -> float:
    """Export a classifier, and return how far ONNX Runtime's logits are from torch's, for batches of other sizes."""
    import onnxruntime

    model, tokenizer = load_or_make(source, "tupe", "AutoModelForSequenceClassification")
    classifier = Classifier(model).eval()
    inputs = dict(tokenizer(list(TEXTS[:3]), padding=True, return_tensors="pt"))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=tokenizer.model_max_length)
    program: Any = torch.onnx.export(
        classifier,
        kwargs=inputs,
        dynamic_shapes={name: {0: batch, 1: length} for name in inputs},
        dynamo=True,
        verbose=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    program.save(folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    worst = 0.0
    for texts in (TEXTS[:3], TEXTS, ("Rain.",)):
        inputs = dict(tokenizer(list(texts), padding=True, return_tensors="pt"))
        (logits,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        with torch.no_grad():
            worst = max(worst, (torch.from_numpy(logits) - classifier(**inputs)).abs().max().item())
    print(f"onnx: {(folder / 'model.onnx').stat().st_size / 1e6:.2f} MB, logits differ by at most {worst:.1g}")
    return worst


def to_int8(folder: Path, source: Path | None) -> float:
    """Quantise a language model as it is loaded, save it, load it, and return its distance from the float model's."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model, tokenizer = load_or_make(source, "srupp", "AutoModelForCausalLM")
    if source is None:
        source = folder / "float"
        model.save_pretrained(source)
    config: Any = TorchAoConfig(Int8WeightOnlyConfig())
    quantised = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    quantised.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        before, after = (one.eval()(**inputs).logits for one in (model, again))
    change = ((after - before).norm() / before.norm()).item()
    print(f"torchao: int8, logits change by {change:.1%}")
    return change


WAYS = {"onnx": to_onnx, "torchao": to_int8}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Deploy a model in each way, and return how far its outputs are from those in torch."""
    parser = example_parser("deploy", __doc__)
    parser.add_argument("--ways", type=names_among(WAYS), default=",".join(WAYS), help=f"some of {', '.join(WAYS)}")
    args = parser.parse_args(argv)
    return {way: WAYS[way](args.output / way, args.model) for way in args.ways}


if __name__ == "__main__":
    with errors_in_one_line():
        main()
