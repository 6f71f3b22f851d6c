"""The trainer of language models: the SRU++ paper's recipe, the strength of attention in the log, samples of text."""

import logging
import math
import re
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from hf_efficient.trainer import SegmentTrainer


logger = logging.getLogger(__name__)


def paper_rate(step: int, warmup: int, total: int) -> float:
    """
    Factor of the learning rate at an update, from 0: linear up to 1, then a cosine to 0 that runs since the start.

    Source: the training code of arXiv 2102.12459, which steps a cosine from the first update on and overwrites its rate
    during the warm-up; torch's cosine multiplies, so it goes on from where the warm-up ends.
    """
    if step < warmup:
        return (step + 1) / warmup
    end = max(warmup - 1, 0)
    return (1 + math.cos(math.pi * min(step, total) / total)) / (1 + math.cos(math.pi * end / total))


def attention_strengths(model: torch.nn.Module) -> dict[int, float]:
    """alpha of each layer of an SRU++ that attends, which starts at 0; none of other models."""
    named = ((re.search(r"\.(\d+)\..*\.alpha$", name), value) for name, value in model.named_parameters())
    return {int(match[1]): value.item() for match, value in named if match and value.numel() == 1}


class LanguageModelTrainer(SegmentTrainer):
    """[`SegmentTrainer`] that can follow the paper's recipe, and logs how strong attention is."""

    def __init__(self, *args: Any, paper_recipe: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.paper_recipe = paper_recipe
        if paper_recipe:
            # The paper's package decays as AdamW does; torch's RAdam does so on demand.
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            options = {"lr": self.args.learning_rate, "betas": betas, "eps": self.args.adam_epsilon}
            self.optimizer_cls_and_kwargs = (torch.optim.RAdam, {**options, "decoupled_weight_decay": True})

    def get_decay_parameter_names(self, model) -> list[str]:
        if self.paper_recipe:
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.paper_recipe and self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            optimized: Any = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(optimized, lambda step: paper_rate(step, warmup, num_training_steps))
        return super().create_scheduler(num_training_steps, optimizer)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        strengths = attention_strengths(self.accelerator.unwrap_model(self.model))
        if strengths and "loss" in logs:
            logs = {**logs, "alpha": max(strengths.values(), key=abs)}
        elif strengths and "eval_loss" in logs:
            logs = {**logs, **{f"eval_alpha_{layer}": alpha for layer, alpha in strengths.items()}}
        super().log(logs, start_time)


class SampleText(TrainerCallback):
    """At each evaluation the model goes on with a prompt. The text is kept in the history, beside the measurement."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: torch.Tensor, tokens: int):
        self.tokenizer, self.prompt, self.tokens = tokenizer, prompt, tokens

    def on_evaluate(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        text = sample(kwargs["model"], self.tokenizer, self.prompt, self.tokens)
        logger.info("Step %d, a sample:\n%s", state.global_step, text)
        state.log_history[-1]["sample"] = text


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: torch.Tensor, tokens: int) -> str:
    """The prompt and what the model says next, drawn from its whole distribution. Training draws as if it had not
    been."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None:
        prompt = prompt[: max(1, limit // 2)]
        tokens = min(tokens, limit - len(prompt))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = model.eval().generate(
            prompt[None].to(model.device),
            attention_mask=torch.ones_like(prompt)[None].to(model.device),
            max_new_tokens=tokens,
            do_sample=True,
            top_k=0,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        )
    return str(tokenizer.decode(ids[0]))
