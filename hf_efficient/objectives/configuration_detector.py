"""The configurations of objectives that train an encoder to find what a generator put in."""

from typing import Any, ClassVar, Literal, Self

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


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
        generator_num_attention_heads (`int`, *optional*):
            Its number of heads. By default they keep the encoder's head size as well as the width allows.
        temperature (`float`, *optional*, defaults to 1.0):
            Of the softmax that the generator's samples are drawn from.
        embedding_sharing (`str`, *optional*, defaults to `"tied"`):
            `"tied"`: both losses train the token table; `"stop_detector_gradient"`: the generator's alone.
        target_share (`float`, *optional*, defaults to 0.15):
            Expected targets per token, which balances the losses where only the number of targets is known.
        detector_start_loss (`float`, *optional*):
            Begin with a first phase without detector, until the logged loss of the generator (of the encoder, if that
            learns too) is below this. By default there is no such phase.
        detector_start_step (`int`, *optional*):
            The first phase takes at most so many steps.
        first_phase (`str`, *optional*, defaults to `"generator"`):
            What learns in it besides the token table: `"generator"`, the generator alone, or `"masked_lm"`, the encoder
            too, as a masked language model. That is in no paper; it is a start from which a detector learns at once,
            where one of random weights may stay blind for very long.
        detector_warmup_steps (`int`, *optional*, defaults to 0):
            Steps after that phase over which the encoder's updates grow from 0 to their full size; see
            [`~hf_efficient.objectives.phases.DetectorWarmup`].
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial weights of heads and of the projection.
    """

    keys_to_ignore_at_inference = [
        *("generator_loss", "generator_accuracy", "detector_loss", "share_replaced", "recall_replaced"),
        *("accuracy_original", "token_variance_share", "masked_lm_loss"),
    ]

    # Named settings: fields by their names.
    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    encoder_config: dict | None = None
    generator_divider: int = 3
    generator_hidden_size: int | None = None
    generator_num_hidden_layers: int | None = None
    generator_num_attention_heads: int | None = None
    temperature: float | int = 1.0
    embedding_sharing: Literal["tied", "stop_detector_gradient"] = "tied"
    target_share: float | int = 0.15
    detector_start_loss: float | int | None = None
    detector_start_step: int | None = None
    first_phase: Literal["generator", "masked_lm"] = "generator"
    detector_warmup_steps: int = 0
    initializer_range: float | int = 0.02

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """
        A named setting of `presets`; `overrides` replace fields.

        Raises:
            ValueError: for another name.
        """
        if name not in cls.presets:
            raise ValueError(
                f"{cls.__name__} has no preset {name!r}; there is {', '.join(map(repr, cls.presets)) or 'none'}."
            )
        return cls(**{**cls.presets[name], **overrides})

    def validate_architecture(self):
        """Checks of single fields; runs at construction and before saving."""
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}.")
        if not 0 < self.target_share <= 1:
            raise ValueError(f"target_share must lie above 0 and at most at 1, not {self.target_share}.")
        for name in ("detector_start_step", "detector_warmup_steps"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}.")
        if self.first_phase == "masked_lm" and self.detector_start_step is None and self.detector_start_loss is None:
            raise ValueError(
                "first_phase='masked_lm' has no end: give detector_start_step, detector_start_loss, or both."
            )


@strict
class ReplacedTokenObjectiveConfig(DetectorObjectiveConfig):
    """
    Configuration of a [`~hf_efficient.objectives.replaced_token.ReplacedTokenObjective`]. The defaults are ELECTRA's;
    `preset("electra")` gives them by name, and `preset("mcbert_baseline")` the baseline of the MC-BERT repository.

    Args:
        detector_weight (`float`, *optional*, defaults to 50.0):
            Weight of the detector's loss, the paper's lambda.
        label_original (`int`, *optional*, defaults to 0):
            The detector's label of an original token: 0, as transformers' `ElectraForPreTraining` and the paper's
            code have it, or 1, as in the MC-BERT repository. A replaced token has the other one.
        discriminator_hidden_layer (`bool`, *optional*, defaults to `True`):
            Dense layer and GELU before the detector's output, as in transformers; else the output layer alone.
        initial_share_replaced (`float`, *optional*):
            Share of replaced tokens that the detector's bias says at the start, 0.14 for instance: the encoder need not
            learn it first by moving all its states to one side. By default the bias is 0, as released.

    The other fields are those of [`DetectorObjectiveConfig`].
    """

    model_type = "replaced_token_objective"
    presets = {
        "electra": {},
        # The repository of Xu et al. 2020: the other labels, and no hidden layer.
        "mcbert_baseline": {"label_original": 1, "discriminator_hidden_layer": False},
    }

    detector_weight: float | int = 50.0
    label_original: int = 0
    discriminator_hidden_layer: bool = True
    initial_share_replaced: float | None = None

    def validate_labels(self):
        """Checks the labels; runs at construction and before saving."""
        if self.label_original not in (0, 1):
            raise ValueError(f"label_original is 0 or 1, not {self.label_original}.")
        if self.initial_share_replaced is not None and not 0 < self.initial_share_replaced < 1:
            raise ValueError(f"initial_share_replaced must lie between 0 and 1, not {self.initial_share_replaced}.")


@strict
class MetaControllerObjectiveConfig(DetectorObjectiveConfig):
    """
    Configuration of a [`~hf_efficient.objectives.meta_controller.MetaControllerObjective`]. The defaults are those of
    the released code; `preset("paper")` gives what the paper describes.

    Args:
        nota_token_id (`int`, *optional*):
            Id of the reject option, "none of the above": a special token that never occurs in text. Needed.
        num_candidates (`int`, *optional*, defaults to 10):
            Candidates at each position, the reject option among them.
        loss_weight (`float`, *optional*, defaults to 50.0):
            Weight of the encoder's loss, the paper's lambda.
        candidate_replacement (`bool`, *optional*, defaults to `True`):
            Draw the candidates of a position with replacement.
        head (`str`, *optional*, defaults to `"transform"`):
            `"transform"` scores by `norm(gelu(dense(state))) @ table[id] + bias[id]`, `"dot"` by `state @ table[id]`.

    The other fields are those of [`DetectorObjectiveConfig`]; the controller is the generator that they speak of.
    """

    model_type = "meta_controller_objective"
    keys_to_ignore_at_inference = [*DetectorObjectiveConfig.keys_to_ignore_at_inference, "accuracy_replaced"]
    attribute_map = {"detector_weight": "loss_weight"}
    # Xu et al. 2020, section 4.1 and table 5. It masks as BERT does, 80/10/10 and each token by itself, which is the
    # collator's part.
    presets = {"paper": {"num_candidates": 10, "loss_weight": 20.0, "candidate_replacement": False, "head": "dot"}}

    nota_token_id: int | None = None
    num_candidates: int = 10
    loss_weight: float | int = 50.0
    candidate_replacement: bool = True
    head: Literal["transform", "dot"] = "transform"

    def validate_candidates(self):
        """Checks the candidates; runs at construction and before saving."""
        if self.num_candidates < 2:
            raise ValueError(
                f"num_candidates must be at least 2, the reject option and a token: {self.num_candidates}."
            )
