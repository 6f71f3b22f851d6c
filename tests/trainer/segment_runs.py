"""Texts, models and trainers of the tests of segments. Run as a script, it is one process of several that train."""

import json
import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from hf_efficient import SruppConfig, SruppForCausalLM
from hf_efficient.data.segments import ColumnSegments
from hf_efficient.trainer import SegmentTrainer
from hf_efficient.utils.process import settle_process_group


VOCABULARY = 23
TIMES = ("runtime", "per_second")


def text(length=500, seed=1):
    """Noisy counting, which a model can learn something of."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 3, (length,), generator=generator)
    return steps.cumsum(0) % VOCABULARY


def srupp(dropout=0.0, alpha=0.7, **changes):
    """Attention counts from the start: alpha begins at 0 otherwise."""
    torch.manual_seed(5)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "projection_size": 6, "num_hidden_layers": 3}
    config = SruppConfig(**{**sizes, "attention_every_n_layers": 2, "dropout": dropout, **changes})
    model = SruppForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("alpha"):
            parameter.data.fill_(alpha)
    return model


def gpt2():
    torch.manual_seed(5)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    return GPT2LMHeadModel(config)


def make_trainer(
    folder, model=None, train=None, evaluated=None, callbacks=(), carry_state=True, metrics=None, **changes
):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 14,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return SegmentTrainer(
        model or srupp(),
        TrainingArguments(**{**settings, **changes}),
        train_dataset=train if train is not None else ColumnSegments(text(), 9, columns=4),
        eval_dataset=evaluated,
        callbacks=list(callbacks),
        carry_state=carry_state,
        compute_metrics=metrics,
    )


def history(trainer):
    kept = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    return [{key: value for key, value in entry.items() if not any(t in key for t in TIMES)} for entry in kept]


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(first, second, **tolerance):
    assert set(first) == set(second)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def main():
    """Train as one of two processes, on two of the four columns."""
    folder = Path(sys.argv[1])
    evaluated = ColumnSegments(text(80, seed=2), 13, columns=4, drop_tail=False)
    trainer = make_trainer(folder, evaluated=evaluated, per_device_train_batch_size=2, eval_strategy="epoch")
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(weights(trainer), folder / "weights.pt")
        (folder / "history.json").write_text(json.dumps(history(trainer)))
    settle_process_group()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
