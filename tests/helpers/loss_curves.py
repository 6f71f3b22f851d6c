"""Loss curves of every model family and objective: the guard that a change of structure changes no numbers.

    python -m tests.helpers.loss_curves record   # writes tests/golden/losses/*.json
    python -m tests.helpers.loss_curves check    # compares both precisions with what was recorded on this machine

Each case trains a tiny model for 20 steps on one thread. The curve in float64 does not depend on the processor, and
`tests/golden/test_loss_curves.py` compares it to 1e-8 everywhere. The curve in float32, with dropout and with the
compiled kernel where one is built, is only comparable on the machine that recorded it, to 1e-5.
"""

import json
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast

import hf_efficient
from hf_efficient.objectives.masking import MaskingCollator
from hf_efficient.objectives.meta_controller import MetaControllerObjective
from hf_efficient.objectives.mlm import MaskedLMObjective
from hf_efficient.objectives.notes import NoteDictionary, RareWordCollator, attach
from hf_efficient.objectives.replaced_token import ReplacedTokenObjective
from hf_efficient.ops.backend import use_backend


FOLDER = Path(__file__).resolve().parents[1] / "golden" / "losses"
STEPS = 20
TOLERANCES = {"float64": 1e-8, "float32": 1e-5}
WORDS, NOTA, KEYS = 60, 5, [(10, 11), (12, 13, 14), (20, 21), (30, 31)]


class Run(NamedTuple):
    """What a case trains: a model, a batch for each step, and what is called after each step."""

    model: nn.Module
    batch: Callable[[int], dict[str, Any]]
    after_step: Callable[[], None] = lambda: None


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    names = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", "[NOTA]", *(f"w{i}" for i in range(6, WORDS))]
    vocabulary = {name: index for index, name in enumerate(names)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="[UNK]")),
        **{f"{name}_token": f"[{name.upper()}]" for name in ("cls", "pad", "sep", "unk", "mask")},
    )


def rows(step: int, batch: int = 5, length: int = 19) -> list[dict[str, list[int]]]:
    """Rows of unequal length, in which rare words stand, with the number of the word of each token."""
    generator = torch.Generator().manual_seed(100 + step)
    features = []
    for row in range(batch):
        ids, words = [0], [-1]
        while len(ids) < length - 2 * row - 4:
            draw = int(torch.randint(0, 10, (), generator=generator))
            word = KEYS[draw] if draw < len(KEYS) else (int(torch.randint(40, WORDS, (), generator=generator)),)
            ids += word
            words += [max(words) + 1] * len(word)
        features.append({"input_ids": [*ids, 2], "word_ids": [*words, -1]})
    return features


def tupe_config(dropout: float, **fields: Any) -> Any:
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    return hf_efficient.TupeConfig(vocab_size=WORDS, max_position_embeddings=32, **sizes, **rates, **fields)


def bert_config(dropout: float) -> Any:
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    return transformers.BertConfig(vocab_size=WORDS, max_position_embeddings=32, pad_token_id=1, **sizes, **rates)


def srupp_config(dropout: float, **fields: Any) -> Any:
    sizes = {"hidden_size": 24, "projection_size": 8, "num_hidden_layers": 3}
    return hf_efficient.SruppConfig(vocab_size=WORDS, dropout=dropout, attention_dropout=dropout, **sizes, **fields)


def causal_language_model(dropout: float, **fields: Any) -> Run:
    """Training by segments: three columns of text, with memory from each step to the next."""
    model = hf_efficient.SruppForCausalLM(srupp_config(dropout, **fields))
    for layer in model.model.layers:
        if layer.projection.attention is not None:
            nn.init.constant_(layer.projection.attention.alpha, 0.5)
    text = (torch.arange(STEPS * 13 + 1) * 7 + torch.arange(3)[:, None]) % WORDS
    carried: dict[str, Any] = {"memory": None}
    model.register_forward_hook(lambda module, args, output: carried.update(memory=output.memory.detach()))

    def batch(step: int) -> dict[str, Any]:
        part = text[:, 13 * step : 13 * step + 14]
        targets = part[:, 1:].contiguous()
        inputs = {"input_ids": part[:, :-1], "labels": targets, "shift_labels": targets}
        return {**inputs, "memory": carried["memory"], "return_memory": True}

    return Run(model, batch)


def scaling_config(dropout: float, **fields: Any) -> Any:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    rates = {"dropout": dropout, "activation_dropout": dropout}
    return hf_efficient.ScalingTransformerConfig(
        vocab_size=WORDS, max_position_embeddings=32, **sizes, **rates, **fields
    )


def plain_language_model(model: nn.Module) -> Run:
    """Training on rows of a text that does not go on from step to step; hard and soft masks are drawn among them."""
    text = (torch.arange(STEPS * 13 + 1) * 7 + torch.arange(3)[:, None]) % WORDS

    def batch(step: int) -> dict[str, Any]:
        part = text[:, 13 * step : 13 * step + 13]
        return {"input_ids": part, "labels": part}

    return Run(model, batch)


def classification(model: nn.Module, kind: str = "classes") -> Run:
    """Fine-tuning on rows with padding: for `classes`, a `number`, or several `labels` at once."""
    collate = MaskingCollator(tokenizer())

    def batch(step: int) -> dict[str, Any]:
        inputs = {name: value for name, value in collate(rows(step % 4)).items() if name != "labels"}
        classes = torch.arange(len(inputs["input_ids"])) % 3
        dtype = next(model.parameters()).dtype
        labels = {
            "classes": classes,
            "number": classes.to(dtype) / 3,
            "labels": nn.functional.one_hot(classes, 3).to(dtype),
        }
        return {**inputs, "labels": labels[kind]}

    return Run(model, batch)


def pretraining(objective: Any, notes: bool = False) -> Run:
    """An objective on masked rows, with or without notes on rare words."""
    collate: Any = MaskingCollator(tokenizer(), sample_seeds=not isinstance(objective, MaskedLMObjective), seed=3)
    if not notes:
        return Run(objective, lambda step: collate(rows(step % 4)))
    torch.manual_seed(5)
    dictionary = NoteDictionary(KEYS, objective.encoder.config.hidden_size)
    attach(objective, dictionary)
    with_notes = RareWordCollator(collate, KEYS)
    return Run(
        objective, lambda step: with_notes(rows(step % 4)), lambda: dictionary.apply_updates(torch.device("cpu"))
    )


def discriminator(kind: type, encoder_config: Any, notes: bool = False, **options: Any) -> Run:
    encoder = transformers.AutoModel.from_config(encoder_config)
    needed = {"nota_token_id": NOTA, "num_candidates": 4} if kind is MetaControllerObjective else {}
    return pretraining(kind(encoder=encoder, generator_divider=2, **needed, **options), notes)


def masked_lm(config: Any, notes: bool = False) -> Run:
    return pretraining(MaskedLMObjective(model=AutoModelForMaskedLM.from_config(config)), notes)


ENCODER = {"bidirectional": True, "pad_token_id": 1, "attention_layers": [1]}
ADAPTIVE = {"adaptive_cutoffs": [20, 40], "adaptive_embedding_size": 24, "adaptive_divisor": 2}
SPARSE = {"ff_sparsity": 5, "ff_rank": 8, "ff_sru_layers": 1, "ff_sru_units": 6, "position_max_offset": 9}
SPARSE |= {"attention_type": "multiplicative_conv", "attention_sparsity": 6, "position_zero_probability": 0.5}
SPARSE |= {"lm_head_type": "multiplicative", "loss_sparsity": 4}
STAGE_ONE = {"stage_one": "masked_lm", "discriminator_start_step": 10**6}
CASES: dict[str, Callable[[float], Run]] = {
    "srupp_causal_lm": lambda p: causal_language_model(p),
    "srupp_causal_lm_adaptive": lambda p: causal_language_model(p, layer_norm=True, **ADAPTIVE),
    "srupp_classification": lambda p: classification(
        hf_efficient.SruppForSequenceClassification(srupp_config(p, num_labels=3, **ENCODER))
    ),
    "tupe_classification": lambda p: classification(
        hf_efficient.TupeForSequenceClassification(tupe_config(p, num_labels=3, classifier_dropout=p))
    ),
    "tupe_regression": lambda p: classification(
        hf_efficient.TupeForSequenceClassification(tupe_config(p, num_labels=1, classifier_dropout=p)), "number"
    ),
    "tupe_multi_label": lambda p: classification(
        hf_efficient.TupeForSequenceClassification(tupe_config(p, num_labels=3, classifier_dropout=p)), "labels"
    ),
    "scaling_transformer_dense": lambda p: plain_language_model(
        hf_efficient.ScalingTransformerForCausalLM(scaling_config(p))
    ),
    "scaling_transformer_sparse": lambda p: plain_language_model(
        # Hard masks in float32 alone: how torch draws their noise depends on the processor.
        hf_efficient.ScalingTransformerForCausalLM(scaling_config(p, ff_hard_probability=0.3 if p else 0.0, **SPARSE))
    ),
    "mlm_bert": lambda p: masked_lm(bert_config(p)),
    "mlm_tupe": lambda p: masked_lm(tupe_config(p)),
    "mlm_tupe_absolute": lambda p: masked_lm(tupe_config(p, relative_attention=False, normalize_before=True)),
    "mlm_srupp": lambda p: masked_lm(srupp_config(p, **ENCODER)),
    "mlm_tupe_notes": lambda p: masked_lm(tupe_config(p), notes=True),
    "replaced_token_tupe": lambda p: discriminator(ReplacedTokenObjective, tupe_config(p)),
    "replaced_token_srupp": lambda p: discriminator(ReplacedTokenObjective, srupp_config(p, **ENCODER)),
    "replaced_token_tupe_notes": lambda p: discriminator(ReplacedTokenObjective, tupe_config(p), notes=True),
    "replaced_token_tupe_stage_one": lambda p: discriminator(ReplacedTokenObjective, tupe_config(p), **STAGE_ONE),
    "meta_controller_tupe": lambda p: discriminator(MetaControllerObjective, tupe_config(p)),
    "meta_controller_tupe_notes": lambda p: discriminator(MetaControllerObjective, tupe_config(p), notes=True),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def loss_curve(name: str, precision: str) -> list[float]:
    """The losses of 20 steps of AdamW: `"float64"` in plain torch, or `"float32"` with dropout and compiled kernels."""
    dtype = getattr(torch, precision)
    with default_dtype(dtype), use_backend("reference" if precision == "float64" else "auto"):
        torch.manual_seed(11)
        run = CASES[name](0.0 if precision == "float64" else 0.1)
        model = run.model.to(dtype).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6, weight_decay=0.01)
        losses = []
        for step in range(STEPS):
            torch.manual_seed(1000 + step)
            batch = run.batch(step)
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.after_step()
            losses.append(loss.item())
    return losses


def largest_difference(found: list[float], expected: list[float]) -> float:
    """The largest relative difference of two curves of equal length."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def main(command: str) -> None:
    torch.set_num_threads(1)
    faults = []
    for name in CASES:
        path = FOLDER / f"{name}.json"
        curves = {precision: loss_curve(name, precision) for precision in TOLERANCES}
        if command == "record":
            machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
            FOLDER.mkdir(exist_ok=True)
            path.write_text(json.dumps({"recorded_on": machine, **curves}, indent=1) + "\n")
            continue
        expected = json.loads(path.read_text())
        differences = {kind: largest_difference(curve, expected[kind]) for kind, curve in curves.items()}
        print(f"{name:35}" + "".join(f"{kind} {value:8.1e}   " for kind, value in differences.items()))
        faults += [f"{name} in {kind}" for kind, value in differences.items() if value > TOLERANCES[kind]]
    if faults:
        raise SystemExit("Other losses than recorded: " + ", ".join(faults))


if __name__ == "__main__":
    if sys.argv[1:] not in (["record"], ["check"]):
        raise SystemExit(__doc__)
    main(sys.argv[1])
