"""Base of the objectives that train an encoder to recognise the tokens that a generator has put in."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, TrainerCallback
from transformers import initialization as init
from transformers.utils import ModelOutput

from ..modules.input_checks import check_class_ids, read_shared_flag, stands_for_many
from ..modules.losses import divide_by_targets, in_float32
from ..utils.config_checks import LabelChecksMixin, check_range
from ..utils.presets import PresetMixin
from .base import (
    PretrainingObjective,
    add_frozen_parameters,
    config_from_dict,
    drop_pooler,
    embedding_weight,
    position_inputs,
)
from .callbacks import discriminator_callbacks
from .diagnostics import token_variance_fraction
from .generator import GeneratorOutput, SampleSource, TiedEmbeddingGenerator


@strict
class DiscriminatorObjectiveConfig(PresetMixin, LabelChecksMixin, PreTrainedConfig):
    """
    Args:
        encoder_config (`dict`, *optional*):
            Config of the encoder, with its `model_type`.
        generator_divider (`int`, *optional*, defaults to 3):
            How many times narrower than the encoder the generator is.
        generator_hidden_size, generator_num_hidden_layers, generator_num_attention_heads (`int`, *optional*):
            Width of the generator, in place of the divider; its depth, the encoder's by default; its heads, which by
            default keep the encoder's head size as well as the width allows.
        temperature (`float`, *optional*, defaults to 1.0):
            Temperature of the softmax that the generator's samples are drawn from.
        embedding_sharing (`str`, *optional*, defaults to `"tied"`):
            `"tied"`: both losses train the token embeddings; `"stop_discriminator_gradient"`: the generator's alone.
        target_fraction (`float`, *optional*, defaults to 0.15):
            Expected targets per token, which balances the losses where only the number of targets is known.
        discriminator_start_loss (`float`, *optional*), discriminator_start_step (`int`, *optional*):
            Begin with a stage one without discriminator, until the logged loss of the generator (of the encoder, if
            that learns too) is below this, or so many steps are done. By default there is no such stage.
        stage_one (`str`, *optional*, defaults to `"generator"`):
            Models that stage one trains: `"generator"`, the generator alone, or `"masked_lm"`, the encoder too, as a
            masked language model. The latter is in no paper; a discriminator that starts from it learns at once, where
            one of random weights may stay at chance level for very long.
        discriminator_warmup_steps (`int`, *optional*, defaults to 0):
            Steps after stage one over which the encoder's updates grow from 0 to their full size.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial weights of heads and of the projection.
    """

    keys_to_ignore_at_inference = [
        *("generator_loss", "generator_accuracy", "discriminator_loss", "replaced_fraction", "recall_replaced"),
        *("accuracy_original", "token_variance_fraction", "masked_lm_loss"),
    ]

    encoder_config: dict | None = None
    generator_divider: int = 3
    generator_hidden_size: int | None = None
    generator_num_hidden_layers: int | None = None
    generator_num_attention_heads: int | None = None
    temperature: float | int = 1.0
    embedding_sharing: Literal["tied", "stop_discriminator_gradient"] = "tied"
    target_fraction: float | int = 0.15
    discriminator_start_loss: float | int | None = None
    discriminator_start_step: int | None = None
    stage_one: Literal["generator", "masked_lm"] = "generator"
    discriminator_warmup_steps: int = 0
    initializer_range: float | int = 0.02

    @property
    def has_stage_one(self) -> bool:
        """Return whether the discriminator starts later: a loss or a step is given at which it does."""
        return self.discriminator_start_loss is not None or self.discriminator_start_step is not None

    def validate_architecture(self):
        """Checks of single fields; runs at construction and before saving."""
        sizes = ("generator_divider", "generator_hidden_size", "generator_num_hidden_layers")
        check_range(self, *sizes, "generator_num_attention_heads", least=1)
        check_range(self, "temperature", above=0)
        check_range(self, "target_fraction", above=0, most=1)
        check_range(self, "discriminator_start_loss", "discriminator_start_step", least=0)
        check_range(self, "discriminator_warmup_steps", "initializer_range", least=0)
        if self.stage_one == "masked_lm" and not self.has_stage_one:
            raise ValueError(
                "stage_one='masked_lm' has no end: give discriminator_start_step, discriminator_start_loss, or both."
            )


@dataclasses.dataclass
class DiscriminatorObjectiveOutput(ModelOutput):
    """
    Fractions of what does not occur in a batch are NaN. In stage one only the masked language models' fields are there.

    Args:
        loss (`torch.FloatTensor` of shape `()`):
            Generator loss plus weighted discriminator loss, in nats.
        generator_loss, discriminator_loss (`torch.FloatTensor` of shape `()`):
            This batch's means over its targets, and over its tokens.
        generator_accuracy (`torch.FloatTensor` of shape `()`):
            Fraction of targets that the generator ranks first.
        replaced_fraction (`torch.FloatTensor` of shape `()`):
            Fraction s of tokens that differ from the original.
        recall_replaced, accuracy_original (`torch.FloatTensor` of shape `()`):
            Fractions of replaced and of original tokens that the encoder recognises as such.
        token_variance_fraction (`torch.FloatTensor` of shape `()`):
            See [`~hf_efficient.objectives.diagnostics.token_variance_fraction`].
        masked_lm_loss (`torch.FloatTensor` of shape `()`):
            This batch's mean over its targets of the encoder as a masked LM, in a stage one of that kind only.
    """

    loss: Tensor | None = None
    generator_loss: Tensor | None = None
    generator_accuracy: Tensor | None = None
    discriminator_loss: Tensor | None = None
    replaced_fraction: Tensor | None = None
    recall_replaced: Tensor | None = None
    accuracy_original: Tensor | None = None
    token_variance_fraction: Tensor | None = None
    masked_lm_loss: Tensor | None = None


class DiscriminatorObjective(PretrainingObjective):
    """
    Base class: an encoder, a generator that shares its token embeddings, and what both need in training.

    `objective.encoder.save_pretrained(folder)` gives what `AutoModel` and `AutoModelForSequenceClassification` load.

    Args:
        config ([`DiscriminatorObjectiveConfig`], *optional*):
            Used by `from_pretrained`; a new encoder is built from `config.encoder_config`.
        encoder (`PreTrainedModel`, *optional*):
            The encoder to pretrain. A pooler is removed from it.
        options:
            Fields of the config, where only an encoder is given.

    Raises:
        ValueError: if neither is given, an option is unknown, or the encoder can't have a generator of its kind.
    """

    discriminator_on: Tensor
    discriminator_steps: Tensor
    generator: TiedEmbeddingGenerator
    output_class: type[DiscriminatorObjectiveOutput] = DiscriminatorObjectiveOutput
    # Modules that stage one trains besides the token embeddings, and further ones if the encoder learns as a masked LM.
    _stage_one: tuple[str, ...] = ("generator",)
    _stage_one_masked_lm: tuple[str, ...] = ("encoder", "dense")

    def __init__(
        self,
        config: DiscriminatorObjectiveConfig | None = None,
        encoder: PreTrainedModel | None = None,
        **options: Any,
    ):
        name = type(self).__name__
        config_class: Any = type(self).config_class
        if encoder is None:
            if config is None or not config.encoder_config:
                raise ValueError(f"Give {name} an `encoder`, or a config with `encoder_config`.")
            # A config may name the dtype in which its weights were saved; training uses the default one.
            fields, dtype = config.encoder_config, torch.get_default_dtype()
            attention = config._attn_implementation
            encoder = AutoModel.from_config(config_from_dict(fields), dtype=dtype, attn_implementation=attention)
        unknown = sorted(set(options) - {field.name for field in dataclasses.fields(config_class)})
        if unknown or (config is not None and options):
            given = f"has no option {', '.join(unknown)}" if unknown else "takes a config or options, not both"
            raise ValueError(f"{name} {given}; the fields of {config_class.__name__} are its options.")
        super().__init__(config or config_class(encoder_config=encoder.config.to_dict(), **options))
        self.encoder = drop_pooler(encoder)
        self.supports_gradient_checkpointing = encoder.supports_gradient_checkpointing
        self.register_buffer("discriminator_on", torch.tensor(not self.config.has_stage_one))
        self._discriminator_active: bool | None = None
        if self.config.discriminator_warmup_steps:
            self.register_buffer("discriminator_steps", torch.tensor(0))

    @property
    def discriminator_active(self) -> bool:
        """Return whether the discriminator is trained already: `discriminator_on`, read from its device once."""
        if stands_for_many(self.discriminator_on):
            return read_shared_flag(self.discriminator_on)
        if self._discriminator_active is None:
            self._discriminator_active = bool(self.discriminator_on)
        return self._discriminator_active

    def enable_discriminator(self, enabled: bool = True) -> None:
        """Begin to train the discriminator, or leave it out again."""
        self.discriminator_on.fill_(enabled)
        self._discriminator_active = enabled

    def _load_from_state_dict(self, *args: Any) -> None:
        self._discriminator_active = None
        nn.Module._load_from_state_dict(self, *args)

    @property
    def vocabulary_bias(self) -> Tensor | None:
        """Bias of the generator's logits, of shape `(vocab_size,)`."""
        return self.generator.bias

    def _make_generator(self, vocabulary_bias: bool) -> TiedEmbeddingGenerator:
        names = ("divider", "hidden_size", "num_hidden_layers", "num_attention_heads")
        sizes = {name: getattr(self.config, f"generator_{name}") for name in names}
        return TiedEmbeddingGenerator(self.encoder, **sizes, vocabulary_bias=vocabulary_bias)

    def post_init(self) -> None:
        table = embedding_weight(self.encoder)
        nn.Module.to(self, device=table.device, dtype=table.dtype)
        super().post_init()
        self._exclude_from_sharding([table])

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TiedEmbeddingGenerator) and module.bias is not None:
            init.zeros_(module.bias)

    def resize_token_embeddings(self, *args, **kwargs):
        raise ValueError(
            "The vocabulary of an objective is fixed, since its generator has a bias for each id: resize the encoder's "
            "(`encoder.resize_token_embeddings`) before the objective is made."
        )

    def frozen_parameters(self) -> list[nn.Parameter]:
        """Parameters that stage one does not train, but for those that FSDP flattens together with others."""
        masked_lm = self.config.stage_one == "masked_lm"
        return self._parameters_without(self._stage_one_masked_lm if masked_lm else ())

    def discriminator_parameters(self) -> list[nn.Parameter]:
        """The encoder's parameters without its token embeddings, and those of its heads; for FSDP as above."""
        return self._parameters_without(())

    def _parameters_without(self, names: tuple[str, ...]) -> list[nn.Parameter]:
        """Parameters other than the token embeddings, the generator's, and those of the modules of these `names`."""
        table, others = self.get_input_embeddings().weight, ("_flat_param", *self._stage_one, *names)
        return [
            parameter
            for name, parameter in self.named_parameters()
            if parameter is not table and name.split(".")[0] not in others
        ]

    def callbacks(self) -> list[TrainerCallback]:
        """The callbacks that Trainer needs for this objective: logging, warnings, and the end of stage one."""
        return discriminator_callbacks(self)

    @contextlib.contextmanager
    def _embedding_gradient_as_configured(self) -> Iterator[None]:
        """Context in which the encoder's look-ups pass no gradient to the token embeddings, if the config says so."""
        if self.config.embedding_sharing == "tied":
            yield
            return
        embeddings = self.get_input_embeddings()
        handle = embeddings.register_forward_hook(lambda module, args, output: output.detach())
        try:
            yield
        finally:
            handle.remove()

    def encode(self, input_ids: Tensor, generated: GeneratorOutput) -> Tensor:
        """Compute the encoder's final states `(batch, length, hidden)` for these ids and the batch's other inputs."""
        mask = generated.attention_mask
        inputs = {**position_inputs(self.encoder, input_ids, mask), **generated.inputs}
        with self._embedding_gradient_as_configured():
            output = self.encoder(input_ids=input_ids, attention_mask=mask, return_dict=True, **inputs)
        return output.last_hidden_state

    def vocabulary_states(self, states: Tensor) -> Tensor:
        """Map the encoder's final states `(tokens, hidden)` to the width of the token embeddings, `(tokens, width)`."""
        raise NotImplementedError

    def mlm_loss(self, generated: GeneratorOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the encoder's loss as a masked LM, summed over targets, with logits by the token embeddings."""
        table = embedding_weight(self.encoder)
        if self.config.embedding_sharing == "stop_discriminator_gradient":
            table = table.detach()
        states = self.encode(generated.input_ids, generated)
        hidden = self.vocabulary_states(states.flatten(0, 1).index_select(0, generated.positions))
        logits = in_float32(nn.functional.linear(hidden, table, self.vocabulary_bias))
        loss_sum = nn.functional.cross_entropy(logits, generated.targets, reduction="sum")
        return loss_sum, {
            "masked_lm_loss": loss_sum.detach() / generated.num_targets,
            "token_variance_fraction": token_variance_fraction(states, generated.attention_mask),
        }

    def discriminator_loss(self, generated: GeneratorOutput, source: SampleSource) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the encoder's loss on the generator's samples, summed over tokens, and what is logged."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_tokens_in_batch: Tensor | int | None = None,
        sample_seeds: Tensor | None = None,
        sampled_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
        **inputs: Any,
    ) -> DiscriminatorObjectiveOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                Masked tokens.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
                1 for tokens, 0 for padding.
            labels (`torch.LongTensor` of shape `(batch, length)`):
                The true id at targets, -100 elsewhere.
            num_items_in_batch, num_tokens_in_batch (`torch.Tensor` or `int`, *optional*):
                Numbers of targets and of tokens without padding over all accumulated batches and processes. Trainer
                counts the former, `EfficientTrainer` both.
            sample_seeds (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Seeds of the rows that decide all samples, from `MaskingCollator(..., sample_seeds=True)`.
            sampled_ids (`torch.LongTensor`, *optional*):
                The samples themselves, in place of `sample_seeds`: `(batch, length)`, read at targets only, for
                replaced tokens; `(batch, length, num_candidates)`, column 0 for the targets' places, for the
                meta-controller.
            generator (`torch.Generator`, *optional*):
                Source of samples if neither is given, in place of torch's global one.
            inputs:
                Further inputs of the encoder, such as `token_type_ids`; the generator gets them too.

        Raises:
            TypeError: for a keyword that the encoder does not know.
            ValueError: if there are no labels, shapes do not agree, or ids or labels lie outside the vocabulary.
        """
        self._check_keywords(inputs)
        table = embedding_weight(self.encoder)
        input_ids, labels = self._check_rows(input_ids, attention_mask, labels, table.shape[0])
        check_class_ids(labels, table.shape[0], input_ids.device, kind="vocabulary")
        generated = self.generator(input_ids, attention_mask, labels, table, self.vocabulary_bias, **inputs)
        mlm_sum = generated.loss_sum
        discriminator_sum, components = None, dict[str, Tensor]()
        if self.discriminator_active:
            source = SampleSource(sampled_ids, sample_seeds, generator)
            discriminator_sum, components = self.discriminator_loss(generated, source)
        elif self.config.stage_one == "masked_lm":
            encoder_sum, components = self.mlm_loss(generated)
            mlm_sum = mlm_sum + encoder_sum
        loss = self._combine(mlm_sum, discriminator_sum, generated, num_items_in_batch, num_tokens_in_batch)
        if discriminator_sum is None:
            loss = add_frozen_parameters(loss, self, self.frozen_parameters())
        with torch.no_grad():
            components["generator_loss"] = generated.loss_sum / generated.num_targets
        return self.output_class(loss=loss, generator_accuracy=generated.accuracy, **components)

    def _combine(
        self,
        mlm_sum: Tensor,
        discriminator_sum: Tensor | None,
        generated: GeneratorOutput,
        num_items: Any,
        num_tokens: Any,
    ) -> Tensor:
        """
        Add the mean over targets and `config.discriminator_weight` times the mean over tokens, as the papers have it.

        Accumulated batches and processes divide by the numbers of all of them, so that their losses add up to that of
        one large batch. Trainer itself counts targets only; where tokens are not counted, their number is taken to be
        `num_items / config.target_fraction`, a deviation that vanishes where the fraction of targets is
        exactly that. A batch without targets has the discriminator's loss alone.
        """
        items = generated.num_targets if num_items is None else num_items
        loss = divide_by_targets(mlm_sum, items)
        if discriminator_sum is None:
            return loss
        mean = divide_by_targets(discriminator_sum, generated.num_tokens if num_tokens is None else num_tokens)
        if num_items is not None and num_tokens is None:
            by_targets = divide_by_targets(self.config.target_fraction * discriminator_sum, items)
            mean = torch.where(torch.as_tensor(items, device=mean.device) > 0, by_targets, mean)
        return loss + self.config.discriminator_weight * mean

    def part_counts(self, outputs: DiscriminatorObjectiveOutput, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Count the tokens that components of the output are means over, where these are not the batch's targets."""
        fraction = outputs.replaced_fraction
        if fraction is None:
            return {}
        mask = batch.get("attention_mask")
        tokens = torch.as_tensor(batch["input_ids"].numel() if mask is None else mask.sum(), device=fraction.device)
        replaced = fraction * tokens
        counts = dict.fromkeys(("discriminator_loss", "replaced_fraction", "token_variance_fraction"), tokens)
        counts |= dict.fromkeys(("recall_replaced", "accuracy_replaced"), replaced)
        return {**counts, "accuracy_original": tokens - replaced}

    def loss_of_parts(self, parts: dict[str, float]) -> float:
        """Combine means of components over many batches to their loss; without targets there is no generator's."""
        loss = parts.get("generator_loss", 0.0) + parts.get("masked_lm_loss", 0.0)
        return loss + self.config.discriminator_weight * parts.get("discriminator_loss", 0.0)
