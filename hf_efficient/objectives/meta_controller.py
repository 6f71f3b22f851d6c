"""The meta-controller's objective (MC-BERT): which of a few candidates, or none of them, belongs at a position?"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .candidates import build_candidates, candidate_scores
from .categorical import sample_categorical
from .collapse import token_variance_share
from .detector import DetectorObjective, DetectorObjectiveConfig, check_labels, in_float32, original_ids
from .draws import row_uniforms
from .generator import token_table
from .masking import IGNORE_INDEX
from .phases import add_idle


_CANDIDATES = 1  # the stream of random numbers


@strict
class MetaControllerObjectiveConfig(DetectorObjectiveConfig):
    """
    Configuration of a [`MetaControllerObjective`]. The defaults are those of the released code; `preset("paper")` gives
    what the paper describes.

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
    keys_to_ignore_at_inference = [
        *("generator_loss", "detector_loss", "share_replaced", "recall_replaced", "accuracy_replaced"),
        *("accuracy_original", "token_variance_share", "generator_accuracy"),
    ]
    # Xu et al. 2020, section 4.1 and table 5. It masks as BERT does, 80/10/10, which is the collator's part.
    presets: ClassVar[dict[str, dict]] = {
        "paper": {"num_candidates": 10, "loss_weight": 20.0, "candidate_replacement": False, "head": "dot"}
    }

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

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "MetaControllerObjectiveConfig":
        """A named setting, `"paper"`; `overrides` replace fields. Raises a ValueError for another name."""
        if name not in cls.presets:
            raise ValueError(f"There is no preset {name!r}; there is {', '.join(cls.presets)}.")
        return cls(**{**cls.presets[name], **overrides})


@dataclass
class MetaControllerObjectiveOutput(ModelOutput):
    """
    In a first phase only `loss` and the generator's parts are there. Shares of what does not occur are not a number.

    Args:
        loss (`torch.FloatTensor` of shape `()`):
            The controller's loss plus the encoder's weighted one, in nats; see [`DetectorObjective.total_loss`].
        generator_loss, detector_loss (`torch.FloatTensor` of shape `()`):
            This batch's means: of the controller over targets, and of the encoder, over candidates, over tokens.
        share_replaced (`torch.FloatTensor` of shape `()`):
            Share of tokens that differ from the original: s of `H(s) + s ln(K - 1)`, which a blind encoder reaches.
        recall_replaced, accuracy_replaced (`torch.FloatTensor` of shape `()`):
            Share of replaced tokens where the encoder prefers some token to the reject option; and the right one.
        accuracy_original (`torch.FloatTensor` of shape `()`):
            Share of original tokens where it chooses column 0, the reject option.
        token_variance_share (`torch.FloatTensor` of shape `()`):
            See [`~hf_efficient.objectives.collapse.token_variance_share`].
        generator_accuracy (`torch.FloatTensor` of shape `()`):
            Share of targets that the controller ranks first.
    """

    loss: Tensor | None = None
    generator_loss: Tensor | None = None
    detector_loss: Tensor | None = None
    share_replaced: Tensor | None = None
    recall_replaced: Tensor | None = None
    accuracy_replaced: Tensor | None = None
    accuracy_original: Tensor | None = None
    token_variance_share: Tensor | None = None
    generator_accuracy: Tensor | None = None


class MetaControllerObjective(DetectorObjective):
    """
    Pretrains an encoder by MC-BERT's multi-choice task (Xu et al. 2020, arXiv 2006.05744).

    A small masked language model, the controller, is trained beside the encoder and shares its token table. What it
    draws replaces the targets; the encoder then chooses at every token among candidates that the controller drew: "none
    of the above" where the token is the text's own, else the text's token. No gradient passes through the draws.

    `objective.encoder` is what pretraining is for: its `save_pretrained` gives what `AutoModel` and fine-tuning load.
    The objective itself is saved in checkpoints for resuming.

    Deviations: see [`DetectorObjective.total_loss`] for the weights of accumulated batches. A padding token that is
    drawn is a token like others, where the released code takes its position for padding. Which tokens are targets and
    how they are hidden is the collator's choice; the released code masks all of them.

    Args:
        config ([`MetaControllerObjectiveConfig`], *optional*), encoder (`PreTrainedModel`, *optional*), options:
            See [`DetectorObjective`].

    Raises:
        ValueError: besides, if the reject option is no id of the vocabulary, or `head="dot"` can't be.

    Example:

    ```python
    >>> from transformers import AutoModel, BertConfig
    >>> objective = MetaControllerObjective(encoder=AutoModel.from_config(BertConfig()), nota_token_id=1)
    ```
    """

    config_class = MetaControllerObjectiveConfig
    _first_phase = ("controller", "bias")

    def __init__(
        self,
        config: MetaControllerObjectiveConfig | None = None,
        encoder: PreTrainedModel | None = None,
        **options: Any,
    ):
        super().__init__(config, encoder, **options)
        vocab_size, width = token_table(self.encoder).shape
        self._check_fit(vocab_size, width)
        self.controller = self._make_generator(vocabulary_bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        if self.config.head == "transform":
            self.dense = nn.Linear(self.encoder.config.hidden_size, width)
            self.norm = nn.LayerNorm(width, eps=self.controller.norm.eps)
        self.post_init()

    def _check_fit(self, vocab_size: int, width: int) -> None:
        token_id, hidden_size = self.config.nota_token_id, self.encoder.config.hidden_size
        if token_id is None or not 0 <= token_id < vocab_size:
            raise ValueError(
                f"nota_token_id must be an id of the encoder's vocabulary of {vocab_size}, not {token_id}: add the "
                "reject option to the tokenizer as a special token, say '[NOTA]', and resize the encoder's embeddings."
            )
        if self.config.head == "dot" and width != hidden_size:
            raise ValueError(
                f"head='dot' compares the states of {type(self.encoder).__name__}, {hidden_size} wide, with its "
                f"embeddings, {width} wide: take head='transform', or make both widths the same."
            )

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:  # the released code has it in an embedding, and so not 0 at the start
            init.normal_(self.bias, mean=0.0, std=self.config.initializer_range)

    def score(self, states: Tensor, candidates: Tensor) -> Tensor:
        """Scores `(tokens, candidates)` of candidate ids, by the encoder's final states `(tokens, hidden_size)`."""
        table = token_table(self.encoder)
        bias = None
        if self.config.embedding_sharing == "stop_detector_gradient":
            table = table.detach()
        if self.config.head == "transform":
            states, bias = self.norm(nn.functional.gelu(self.dense(states))), self.bias
        padding_idx = getattr(self.get_input_embeddings(), "padding_idx", None)  # no look-up trains this row
        return candidate_scores(states, table, bias, candidates, padding_idx)

    @torch.no_grad()
    def _draw(self, states: Tensor, projected: Tensor, sources: dict) -> Tensor:
        """Ids `(batch, length, num_candidates)`: injected, or drawn from the controller; see `forward`."""
        sampled_ids, draw_seeds, generator = (sources[name] for name in ("sampled_ids", "draw_seeds", "generator"))
        shape = (*states.shape[:2], self.config.num_candidates)
        if sampled_ids is not None:
            if sampled_ids.shape != shape:
                raise ValueError(f"`sampled_ids` must have the shape {shape}, not {tuple(sampled_ids.shape)}.")
            return sampled_ids
        if draw_seeds is not None:
            uniforms = row_uniforms(draw_seeds, shape[1], shape[2], _CANDIDATES)
        else:
            uniforms = torch.rand(shape, generator=generator, device=states.device, dtype=torch.float64)
        return sample_categorical(
            self.controller.transform(states).flatten(0, 1),
            projected,
            self.bias,
            uniforms.flatten(0, 1),
            temperature=self.config.temperature,
            replacement=self.config.candidate_replacement,
        ).view(shape)

    def _choose(
        self, replaced_ids: Tensor, original: Tensor, drawn: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, dict]:
        """The encoder's loss, summed over tokens, and what is logged of it."""
        candidates, right = build_candidates(original, replaced_ids, drawn, self.config.nota_token_id)
        candidates, right = candidates.flatten(0, 1), right.flatten()
        states = self.encode(replaced_ids, attention_mask)
        flat = states.flatten(0, 1)
        if attention_mask is not None:
            tokens = attention_mask.flatten().nonzero().squeeze(-1)
            if len(tokens) < len(right):
                flat, candidates, right = (rows.index_select(0, tokens) for rows in (flat, candidates, right))
        scores = in_float32(self.score(flat, candidates))
        detector_sum = nn.functional.cross_entropy(scores, right, reduction="sum")
        with torch.no_grad():
            choice = scores.argmax(-1)
            rejected = candidates.gather(1, choice.unsqueeze(1)).squeeze(1) == self.config.nota_token_id
            is_replaced, is_right = right.bool(), choice == right
            replaced = is_replaced.sum()
            parts = {
                "detector_loss": detector_sum / len(right),
                "share_replaced": replaced / len(right),
                "recall_replaced": (~rejected & is_replaced).sum() / replaced,
                "accuracy_replaced": (is_right & is_replaced).sum() / replaced,
                "accuracy_original": (is_right & ~is_replaced).sum() / (len(right) - replaced),
                "token_variance_share": token_variance_share(states, attention_mask),
            }
        return detector_sum, parts

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        draw_seeds: Tensor | None = None,
        sampled_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> MetaControllerObjectiveOutput:
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
            draw_seeds (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Numbers of the rows that decide all draws, from `MaskingCollator(..., draw_seeds=True)`.
            sampled_ids (`torch.LongTensor` of shape `(batch, length, num_candidates)`, *optional*):
                The draws themselves, column 0 for the targets' places. They come before `draw_seeds`.
            generator (`torch.Generator`, *optional*):
                Source of draws if neither is given, in place of torch's global one.

        Raises:
            ValueError: if there are no labels, or shapes do not agree.
        """
        labels = check_labels(input_ids, labels)
        flat = labels.flatten()
        positions = (flat != IGNORE_INDEX).nonzero().squeeze(-1)
        targets = flat.index_select(0, positions)
        table = token_table(self.encoder)
        projected = self.controller.project(table)
        # Looked up in the table's own dtype: the gradient of a row is a sum over many tokens.
        states = self.controller.states(input_ids, attention_mask, projected=projected.to(table.dtype))
        hidden = self.controller.transform(states.flatten(0, 1).index_select(0, positions))
        logits = in_float32(nn.functional.linear(hidden, projected, self.bias))
        generator_sum = nn.functional.cross_entropy(logits, targets, reduction="sum")
        with torch.no_grad():
            generator_loss = generator_sum / targets.numel()
            generator_accuracy = (logits.argmax(-1) == targets).float().mean()

        detector_sum, parts = None, dict[str, Tensor]()
        if self.detector_on:
            sources = {"sampled_ids": sampled_ids, "draw_seeds": draw_seeds, "generator": generator}
            drawn = self._draw(states, projected, sources)
            original = original_ids(input_ids, labels)
            replaced_ids = torch.where(labels == IGNORE_INDEX, original, drawn[..., 0])
            detector_sum, parts = self._choose(replaced_ids, original, drawn, attention_mask)
        tokens = input_ids.new_tensor(input_ids.numel()) if attention_mask is None else attention_mask.sum()
        loss = self.total_loss(
            generator_sum, targets.numel(), detector_sum, tokens, self.config.loss_weight, num_items_in_batch
        )
        if detector_sum is None:
            loss = add_idle(loss, self, self.idle_parameters())
        return MetaControllerObjectiveOutput(
            loss=loss, generator_loss=generator_loss, generator_accuracy=generator_accuracy, **parts
        )
