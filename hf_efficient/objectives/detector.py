"""What objectives share that train an encoder to find the tokens that a generator put in."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, TrainerCallback
from transformers import initialization as init

from .collapse import token_variance_share
from .configuration_detector import DetectorObjectiveConfig
from .detector_loss import DetectorObjectiveOutput, combine_losses, combine_parts, count_parts
from .draws import SampleSource
from .generator import Guesses, SharedTableGenerator, drop_pooler, token_positions, token_table
from .labels import check_labels
from .phases import add_idle, detector_callbacks, starts_with_detector, units_without
from .precision import in_float32


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

    detector_on: Tensor
    detector_steps: Tensor
    base_model_prefix = ""
    # Notes that were attached to the objective stand in its checkpoints; they are attached anew, or left.
    _keys_to_ignore_on_load_unexpected = [r"^notes\."]
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    output_class: type[DetectorObjectiveOutput] = DetectorObjectiveOutput
    # What the first phase trains besides the token table, and what else if the encoder learns in it: names of modules
    # and parameters.
    _first_phase: tuple[str, ...] = ("generator",)
    _masked_lm_phase: tuple[str, ...] = ("encoder", "dense")

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
            encoder = AutoModel.from_config(
                encoder_config,
                dtype=torch.get_default_dtype(),
                attn_implementation=config._attn_implementation,  # as `from_pretrained` of the objective was asked
            )
        unknown = sorted(set(options) - {field.name for field in dataclasses.fields(config_class)})
        if unknown or (config is not None and options):
            given = f"has no option {', '.join(unknown)}" if unknown else "takes a config or options, not both"
            raise ValueError(f"{name} {given}; the fields of {config_class.__name__} are its options.")
        super().__init__(config or config_class(encoder_config=encoder.config.to_dict(), **options))
        self.encoder = drop_pooler(encoder)
        self.supports_gradient_checkpointing = encoder.supports_gradient_checkpointing
        self.register_buffer("detector_on", torch.tensor(starts_with_detector(self.config)))
        self._detects: bool | None = None
        if self.config.detector_warmup_steps:
            self.register_buffer("detector_steps", torch.tensor(0))

    @property
    def detects(self) -> bool:
        """Whether the detector is trained, or a first phase goes on; `detector_on`, but read from its device once."""
        if self._detects is None:
            self._detects = bool(self.detector_on)
        return self._detects

    def switch_detector(self, on: bool = True) -> None:
        """Begin with the detector (or leave it out again)."""
        self.detector_on.fill_(on)
        self._detects = on

    def _load_from_state_dict(self, *args: Any) -> None:
        self._detects = None
        nn.Module._load_from_state_dict(self, *args)

    @property
    def small_network(self) -> SharedTableGenerator:
        """The generator, under whichever name it is kept."""
        raise NotImplementedError

    @property
    def vocabulary_bias(self) -> Tensor | None:
        """The bias of its logits, `(vocab_size,)`."""
        return self.small_network.bias

    def _make_generator(self, vocabulary_bias: bool) -> SharedTableGenerator:
        config = self.config
        return SharedTableGenerator(
            self.encoder,
            config.generator_divider,
            config.generator_hidden_size,
            config.generator_num_hidden_layers,
            config.generator_num_attention_heads,
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
        return self._parameters_without(self._masked_lm_phase if self.config.first_phase == "masked_lm" else ())

    def detector_parameters(self) -> list[nn.Parameter]:
        """The encoder without its token table, and its heads; of FSDP's see above."""
        return self._parameters_without(())

    def _parameters_without(self, names: tuple[str, ...]) -> list[nn.Parameter]:
        """All but the table, the generator and the modules of these `names`."""
        table, others = self.get_input_embeddings().weight, ("_flat_param", *self._first_phase, *names)
        return [
            parameter
            for name, parameter in self.named_parameters()
            if parameter is not table and name.split(".")[0] not in others
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

    def encode(self, input_ids: Tensor, guesses: Guesses) -> Tensor:
        """Final states of the encoder, `(batch, length, hidden)`, for these ids and the other inputs of the batch."""
        mask = guesses.attention_mask
        inputs = {**token_positions(self.encoder, input_ids, mask), **guesses.inputs}
        with self._table_as_configured():
            output = self.encoder(input_ids=input_ids, attention_mask=mask, return_dict=True, **inputs)
        return output.last_hidden_state

    def vocabulary_states(self, states: Tensor) -> Tensor:
        """The encoder's final states `(tokens, hidden)` as the token table is compared with them, `(tokens, width)`."""
        raise NotImplementedError

    def fill_in(self, guesses: Guesses) -> tuple[Tensor, dict[str, Tensor]]:
        """The encoder's loss as a masked LM with logits by the token table, summed over targets, and what is logged."""
        table = token_table(self.encoder)
        if self.config.embedding_sharing == "stop_detector_gradient":
            table = table.detach()
        states = self.encode(guesses.input_ids, guesses)
        hidden = self.vocabulary_states(states.flatten(0, 1).index_select(0, guesses.positions))
        logits = in_float32(nn.functional.linear(hidden, table, self.vocabulary_bias))
        targets = guesses.labels.flatten().index_select(0, guesses.positions)
        loss_sum = nn.functional.cross_entropy(logits, targets, reduction="sum")
        return loss_sum, {
            "masked_lm_loss": loss_sum.detach() / targets.numel(),
            "token_variance_share": token_variance_share(states, guesses.attention_mask),
        }

    def detect(self, guesses: Guesses, source: SampleSource) -> tuple[Tensor, dict[str, Tensor]]:
        """The encoder's loss on the generator's samples, summed over tokens, and what is logged of it."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_tokens_in_batch: Tensor | int | None = None,
        draw_seeds: Tensor | None = None,
        sampled_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
        **inputs: Any,
    ) -> DetectorObjectiveOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                Masked tokens.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
                1 for tokens, 0 for padding.
            labels (`torch.LongTensor` of shape `(batch, length)`):
                The true id at targets, -100 elsewhere.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Number of targets over all accumulated batches and processes, as Trainer counts them.
            num_tokens_in_batch (`torch.Tensor` or `int`, *optional*):
                Number of tokens, padding not counted, over the same; see
                [`~hf_efficient.objectives.detector_loss.combine_losses`]. `EfficientTrainer` gives it.
            draw_seeds (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Numbers of the rows that decide all samples, from `MaskingCollator(..., draw_seeds=True)`.
            sampled_ids (`torch.LongTensor`, *optional*):
                The samples themselves, which come before `draw_seeds`: `(batch, length)`, read at targets only, for
                replaced tokens; `(batch, length, num_candidates)`, column 0 for the targets' places, for the
                meta-controller.
            generator (`torch.Generator`, *optional*):
                Source of samples if neither is given, in place of torch's global one.
            inputs:
                What else the encoder takes, such as `token_type_ids`; the generator gets it too.

        Raises:
            ValueError: if there are no labels, or shapes do not agree.
        """
        labels = check_labels(input_ids, labels)
        table = token_table(self.encoder)
        guesses = self.small_network.guess(input_ids, attention_mask, labels, table, self.vocabulary_bias, **inputs)
        generator_sum = guesses.loss_sum
        detector_sum, parts = None, dict[str, Tensor]()
        if self.detects:
            detector_sum, parts = self.detect(guesses, SampleSource(sampled_ids, draw_seeds, generator))
        elif self.config.first_phase == "masked_lm":
            filled_sum, parts = self.fill_in(guesses)
            generator_sum = generator_sum + filled_sum
        loss = combine_losses(
            self.config, generator_sum, detector_sum, guesses, num_items_in_batch, num_tokens_in_batch
        )
        if detector_sum is None:
            loss = add_idle(loss, self, self.idle_parameters())
        with torch.no_grad():
            parts["generator_loss"] = guesses.loss_sum / guesses.positions.numel()
        return self.output_class(loss=loss, generator_accuracy=guesses.accuracy, **parts)

    def part_counts(self, outputs: DetectorObjectiveOutput, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """How many tokens each part of the output is a mean over, where these are not the batch's targets."""
        return count_parts(outputs, batch)

    def loss_of_parts(self, parts: dict[str, float]) -> float:
        """The loss of means over many batches."""
        return combine_parts(self.config, parts)
