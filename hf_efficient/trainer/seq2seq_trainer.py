"""`Seq2SeqTrainer` of transformers with the checkpoints of `EfficientTrainer`, and with the original's Adafactor."""

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from .adafactor import Recipe, TraxAdafactor
from .length_grouping import LengthGroupingTrainer


class EfficientSeq2SeqTrainer(LengthGroupingTrainer, Seq2SeqTrainer):
    """
    [`EfficientTrainer`] for encoder-decoders, with [`~transformers.Seq2SeqTrainingArguments`].

    With `predict_with_generate` the loss of an evaluation is the mean over all targets too, and each row of the data
    gives one row of predictions, in the order of the data, in any number of processes and however training is sampled.

    Args:
        recipe ([`Recipe`], *optional*): train by [`TraxAdafactor`], at the rates and with the weight decay of a recipe;
            `args.max_grad_norm` should be 0 then.
        recipe_warmup (`int`, *optional*): updates before the rate falls, by default those of the recipe.
        factored_axes (`Mapping[str, tuple[int, int]]`, *optional*): of parameters, by name, whose averages do not go
            along their last two axes.
        lengths (`list[int]`, *optional*): length of each training example, for batches of similar length
            (`args.train_sampling_strategy="group_by_length"`).
        kwargs:
            See [`EfficientTrainer`].
    """

    def __init__(
        self,
        *,
        recipe: Recipe | None = None,
        recipe_warmup: int | None = None,
        factored_axes: Mapping[str, tuple[int, int]] | None = None,
        lengths: list[int] | None = None,
        **kwargs: Any,
    ):
        super().__init__(lengths=lengths or [], **kwargs)
        self.recipe, self.recipe_warmup = recipe, recipe_warmup
        self.factored_axes = dict(factored_axes or {})

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.recipe is None:
            return super().create_optimizer(*args, **kwargs)
        if self.optimizer is None:
            groups: dict[tuple[int, int], list[Any]] = {}
            for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters():
                if parameter.requires_grad:
                    groups.setdefault(self.factored_axes.get(name, (-2, -1)), []).append(parameter)
            self.optimizer = TraxAdafactor(
                [{"params": parameters, "factored_axes": axes} for axes, parameters in groups.items()],
                decay_exponent=self.recipe.decay_exponent,
                weight_decay=self.recipe.weight_decay,
                weight_decay_steps=self.recipe.weight_decay_steps,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.recipe is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        rate, warmup = self.recipe.rate, self.recipe_warmup or self.recipe.warmup
        optimized: Any = optimizer or self.optimizer
        self.lr_scheduler = LambdaLR(optimized, lambda updates: rate(updates + 1, warmup))
        return self.lr_scheduler

    # Private, but Trainer's one place to choose the sampler, and the same from transformers 5.17 to 5.24.
    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler | None:
        strategy = self.args.train_sampling_strategy  # which Trainer applies to evaluation too
        self.args.train_sampling_strategy = "random"
        try:
            return super()._get_eval_sampler(eval_dataset)
        finally:
            self.args.train_sampling_strategy = strategy

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Seq2SeqTrainer keeps the rows that fill up the last batch of several processes.
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        args, network = cast(Seq2SeqTrainingArguments, self.args), cast(Any, self.model)
        if not args.predict_with_generate or prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        loss, labels = None, inputs.get("labels")
        if labels is not None:
            loss, _, _ = super().prediction_step(model, dict(inputs), True, ignore_keys)
        source = {name: value for name, value in inputs.items() if name not in ("labels", "decoder_input_ids")}
        generation_config = network.generation_config
        network.generation_config = copy.deepcopy(generation_config)  # into which Seq2SeqTrainer writes defaults
        try:
            _, tokens, _ = super().prediction_step(model, source, False, ignore_keys, **gen_kwargs)
        finally:
            network.generation_config = generation_config
        return loss, tokens, labels
