"""What objectives share that train an encoder to find the tokens that a generator put in."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, TrainerCallback
from transformers import initialization as init

from .generator import SharedTableGenerator, drop_pooler, token_table
from .masking import IGNORE_INDEX
from .phases import detector_callbacks, starts_with_detector, units_without


@strict
class DetectorObjectiveConfig(PreTrainedConfig):
    """
    Args:
        encoder_config (`dict`, *optional*):
            The config of the encoder, with its `model_type`.
        generator_divider (`int`, *optional*, defaults to 3):
            The generator is as many times narrower than the encoder.
        generator_hidden_size (`int`, *optional*):
            Its width, in place of the divider.
        generator_num_hidden_layers (`int`, *optional*):
            Its depth, the encoder's by default.
        temperature (`float`, *optional*, defaults to 1.0):
            Of the softmax that the generator's samples are drawn from.
        embedding_sharing (`str`, *optional*, defaults to `"tied"`):
            `"tied"`: both losses train the token table; `"stop_detector_gradient"`: the generator's alone.
        target_share (`float`, *optional*, defaults to 0.15):
            Expected targets per token, which balances the losses where only the number of targets is known.
        detector_start_loss (`float`, *optional*):
            Train the generator alone until its logged loss is below this. By default there is no such phase.
        detector_start_step (`int`, *optional*):
            Train the generator alone for at most so many steps.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial weights of heads and of the projection.
    """

    encoder_config: dict | None = None
    generator_divider: int = 3
    generator_hidden_size: int | None = None
    generator_num_hidden_layers: int | None = None
    temperature: float | int = 1.0
    embedding_sharing: str = "tied"
    target_share: float | int = 0.15
    detector_start_loss: float | int | None = None
    detector_start_step: int | None = None
    initializer_range: float | int = 0.02

    def validate_architecture(self):
        """Checks of single fields; runs at construction and before saving."""
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}.")
        if not 0 < self.target_share <= 1:
            raise ValueError(f"target_share must lie above 0 and at most at 1, not {self.target_share}.")
        if self.embedding_sharing not in ("tied", "stop_detector_gradient"):
            raise ValueError(
                f"embedding_sharing is {self.embedding_sharing!r}; it is 'tied' or 'stop_detector_gradient'."
            )


class DetectorObjective(PreTrainedModel):
    """
    An encoder, a generator beside it that shares its token table, and what both need in training.

    `encoder` is what pretraining is for: `objective.encoder.save_pretrained(folder)` gives what `AutoModel` and
    `AutoModelForSequenceClassification` load. From a checkpoint of a run it is had by
    `type(objective).from_pretrained(checkpoint).encoder`.

    Args:
        config ([`DetectorObjectiveConfig`], *optional*):
            Used by `from_pretrained`; a new encoder is built from `config.encoder_config`.
        encoder (`PreTrainedModel`, *optional*):
            What is trained and kept. A pooler is taken away from it.
        options:
            Fields of the config, where only an encoder is given.

    Raises:
        ValueError: if neither is given, an option is unknown, or the encoder can't have a generator of its kind.
    """

    base_model_prefix = ""
    # Notes that were attached to the objective stand in its checkpoints; they are attached anew, or left.
    _keys_to_ignore_on_load_unexpected = [r"^notes\."]
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    # What the first phase trains besides the token table: names of modules and parameters.
    _first_phase: tuple[str, ...] = ("generator",)

    def __init__(
        self,
        config: DetectorObjectiveConfig | None = None,
        encoder: PreTrainedModel | None = None,
        **options: Any,
    ):
        name = type(self).__name__
        config_class: Any = type(self).config_class
        if encoder is None:
            if config is None or not config.encoder_config:
                raise ValueError(f"Give {name} an `encoder`, or a config with `encoder_config`.")
            settings = dict(config.encoder_config)
            encoder_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
            # A config may name the dtype in which its weights were saved; what is trained is in that of everything.
            encoder = AutoModel.from_config(encoder_config, dtype=torch.get_default_dtype())
        unknown = sorted(set(options) - {field.name for field in dataclasses.fields(config_class)})
        if unknown or (config is not None and options):
            given = f"has no option {', '.join(unknown)}" if unknown else "takes a config or options, not both"
            raise ValueError(f"{name} {given}; the fields of {config_class.__name__} are its options.")
        super().__init__(config or config_class(encoder_config=encoder.config.to_dict(), **options))
        self.encoder = drop_pooler(encoder)
        self.supports_gradient_checkpointing = encoder.supports_gradient_checkpointing
        self.register_buffer("detector_on", torch.tensor(starts_with_detector(self.config)))

    def _make_generator(self, vocabulary_bias: bool) -> SharedTableGenerator:
        config = self.config
        return SharedTableGenerator(
            self.encoder,
            config.generator_divider,
            config.generator_hidden_size,
            config.generator_num_hidden_layers,
            vocabulary_bias=vocabulary_bias,
        )

    def post_init(self) -> None:
        table = token_table(self.encoder)
        nn.Module.to(self, device=table.device, dtype=table.dtype)
        super().post_init()
        self._no_split_modules = units_without(self, table)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SharedTableGenerator) and module.bias is not None:
            init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs):
        raise ValueError(
            "The vocabulary of an objective is fixed, since its generator has a bias for each id: resize the encoder's "
            "(`encoder.resize_token_embeddings`) before the objective is made."
        )

    def idle_parameters(self) -> list[nn.Parameter]:
        """What the first phase does not train. A parameter in which FSDP mixes this with other things is not of it."""
        table = self.get_input_embeddings().weight
        return [
            parameter
            for name, parameter in self.named_parameters()
            if parameter is not table and name.split(".")[0] not in (*self._first_phase, "_flat_param")
        ]

    def callbacks(self) -> list[TrainerCallback]:
        """What Trainer needs to be given for this objective; see [`~hf_efficient.objectives.phases.PlateauWatch`]."""
        return detector_callbacks(self)

    @contextlib.contextmanager
    def _table_as_configured(self) -> Iterator[None]:
        """Within, the encoder's look-ups pass no gradient to the token table, if the config says so."""
        if self.config.embedding_sharing == "tied":
            yield
            return
        embeddings = self.get_input_embeddings()
        handle = embeddings.register_forward_hook(lambda module, args, output: output.detach())
        try:
            yield
        finally:
            handle.remove()

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Final states of the encoder, `(batch, length, hidden)`."""
        with self._table_as_configured():
            output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        return output.last_hidden_state

    def total_loss(
        self,
        generator_sum: Tensor,
        targets: int,
        detector_sum: Tensor | None,
        tokens: Tensor,
        weight: float,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """
        The two losses as one.

        Without `num_items_in_batch` it is that of the papers, the mean over targets plus `weight` times the mean over
        tokens. The number of tokens of all accumulated batches is not known to one of them, so with
        `num_items_in_batch` (which counts targets) it is `(generator_sum + weight * target_share * detector_sum) /
        num_items_in_batch`, a deviation: the same where the share of targets is exactly `target_share`, and it adds up
        over batches and processes.
        """
        if num_items_in_batch is None:
            loss = generator_sum / max(targets, 1)
            return loss if detector_sum is None else loss + weight * detector_sum / tokens.clamp(min=1)
        count = torch.as_tensor(num_items_in_batch, device=generator_sum.device).clamp(min=1)
        if detector_sum is None:
            return generator_sum / count
        return (generator_sum + weight * self.config.target_share * detector_sum) / count


def check_labels(input_ids: Tensor, labels: Tensor | None) -> Tensor:
    """
    Raises:
        ValueError: if there are no labels, or not one for each token.
    """
    if labels is None or labels.shape != input_ids.shape:
        raise ValueError(
            f"`labels` must have the shape of `input_ids`, {tuple(input_ids.shape)}, not "
            f"{None if labels is None else tuple(labels.shape)}: let MaskingCollator make the batches."
        )
    return labels


def original_ids(input_ids: Tensor, labels: Tensor) -> Tensor:
    """The rows before masking."""
    return torch.where(labels == IGNORE_INDEX, input_ids, labels)


def in_float32(values: Tensor) -> Tensor:
    """At least float32, for sums that lower precision would spoil."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
