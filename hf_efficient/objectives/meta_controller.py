"""The meta-controller (MC-BERT): the encoder chooses among a few candidates, or none of them, at every position."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from ..modules.input_checks import stands_for_many
from ..modules.losses import in_float32
from ..ops.candidate_scores import candidate_scores
from ..ops.categorical import sample_categorical
from ..ops.counter_rng import counter_based_uniforms
from ..utils.config_checks import check_range
from ..utils.labels import IGNORE_INDEX
from .base import embedding_weight
from .diagnostics import token_variance_fraction
from .discriminator import DiscriminatorObjective, DiscriminatorObjectiveConfig, DiscriminatorObjectiveOutput
from .generator import GeneratorOutput, SampleSource, TiedEmbeddingGenerator


_CANDIDATE_STREAM = 1  # of the counter-based random numbers


@strict
class MetaControllerObjectiveConfig(DiscriminatorObjectiveConfig):
    """
    Configuration of a [`MetaControllerObjective`]. The defaults are those of the released code; `preset("paper")` gives
    the settings that the paper describes.

    Args:
        nota_token_id (`int`, *optional*):
            Id of the reject option, "none of the above": a special token that never occurs in text. Required.
        num_candidates (`int`, *optional*, defaults to 10):
            Number of candidates at each position, the reject option among them.
        loss_weight (`float`, *optional*, defaults to 50.0):
            Weight of the encoder's loss, the paper's lambda.
        candidate_replacement (`bool`, *optional*, defaults to `True`):
            Whether the candidates of a position are drawn with replacement.
        head (`str`, *optional*, defaults to `"transform"`):
            `"transform"` scores by `norm(gelu(dense(state))) @ table[id] + bias[id]`, `"dot"` by `state @ table[id]`.

    The other fields are those of [`~hf_efficient.objectives.discriminator.DiscriminatorObjectiveConfig`], whose
    generator is the controller here.
    """

    model_type = "meta_controller_objective"
    keys_to_ignore_at_inference = [*DiscriminatorObjectiveConfig.keys_to_ignore_at_inference, "accuracy_replaced"]
    attribute_map = {"discriminator_weight": "loss_weight"}
    # Xu et al. 2020, section 4.1 and table 5. The paper masks as BERT does, 80/10/10 and each token by itself, which is
    # up to the collator.
    published_settings = {
        "paper": {"num_candidates": 10, "loss_weight": 20.0, "candidate_replacement": False, "head": "dot"}
    }

    nota_token_id: int | None = None
    num_candidates: int = 10
    loss_weight: float | int = 50.0
    candidate_replacement: bool = True
    head: Literal["transform", "dot"] = "transform"

    def validate_candidates(self):
        """Checks of single fields; runs at construction and before saving."""
        check_range(self, "num_candidates", least=2)  # the reject option and a token
        check_range(self, "loss_weight", least=0)


@dataclass
class MetaControllerObjectiveOutput(DiscriminatorObjectiveOutput):
    """
    With s the `replaced_fraction`, an encoder that has learned nothing has a `discriminator_loss` of
    `H(s) + s ln(K - 1)`. Fields that are not named here are those of
    [`~hf_efficient.objectives.discriminator.DiscriminatorObjectiveOutput`].

    Args:
        recall_replaced, accuracy_replaced (`torch.FloatTensor` of shape `()`):
            Fractions of replaced tokens where the encoder prefers some token, and the right one, to the reject option.
        accuracy_original (`torch.FloatTensor` of shape `()`):
            Fraction of original tokens where it prefers the reject option.
    """

    accuracy_replaced: Tensor | None = None


def build_candidates(original: Tensor, replaced: Tensor, sampled: Tensor, nota_token_id: int) -> tuple[Tensor, Tensor]:
    """
    Build the candidates of each position, and the label of the right one (Xu et al. 2020, section 3, as released).

    Column 0 is the reject option, "none of the above", right wherever the token was not replaced. Where it was, column
    1 holds the original token, and is right. All other columns are the draws as they are: the original token, the
    reject option or special tokens may be among them, and an id may come twice.

    Args:
        original (`torch.LongTensor` of shape `(...)`):
            Tokens of the text.
        replaced (`torch.LongTensor` of shape `(...)`):
            Tokens that the encoder reads.
        sampled (`torch.LongTensor` of shape `(..., candidates)`):
            Draws of every position; columns 0 and, where replaced, 1 are not used.
        nota_token_id (`int`):
            Id of the reject option.

    Returns:
        `tuple`: candidates `(..., candidates)` and labels `(...)`, 0 or 1.

    Raises:
        ValueError: if there are fewer than 2 candidates, or the shapes do not agree.
    """
    if sampled.shape[:-1] != original.shape or replaced.shape != original.shape:
        shapes = f"{tuple(original.shape)}, {tuple(replaced.shape)} and {tuple(sampled.shape)}"
        raise ValueError(f"`original`, `replaced` and `sampled` must have shapes (...), (...), (..., K), not {shapes}.")
    if sampled.shape[-1] < 2:
        raise ValueError(f"At least 2 candidates are needed, the reject option and a token, not {sampled.shape[-1]}.")
    wrong = replaced != original
    candidates = sampled.clone()
    candidates[..., 0] = nota_token_id
    candidates[..., 1] = torch.where(wrong, original, sampled[..., 1])
    return candidates, wrong.long()


class MetaControllerObjective(DiscriminatorObjective):
    """
    Pretrains an encoder by MC-BERT's multi-choice task (Xu et al. 2020, arXiv 2006.05744).

    A small masked language model, the controller, is trained beside the encoder and shares its token embeddings. Its
    samples replace the targets; the encoder then chooses at every token among candidates that the controller drew:
    "none of the above" where the token is the original one, else the original token. No gradient passes through the
    samples.

    `objective.encoder.save_pretrained(folder)` gives what `AutoModel` and fine-tuning load. The objective itself is
    saved in checkpoints for resuming.

    Deviations: under plain Trainer, accumulated batches balance the two losses by `config.target_fraction`. A padding
    token that is drawn counts as any other token, where the released code takes its position for padding. The choice
    of targets is the collator's; the released code masks all of them.

    Args:
        config ([`MetaControllerObjectiveConfig`], *optional*), encoder (`PreTrainedModel`, *optional*), options:
            See [`~hf_efficient.objectives.discriminator.DiscriminatorObjective`].

    Raises:
        ValueError: also if the reject option is no id of the vocabulary, or the encoder does not fit `head="dot"`.

    Example:

    ```python
    >>> from transformers import AutoModel, BertConfig
    >>> objective = MetaControllerObjective(encoder=AutoModel.from_config(BertConfig()), nota_token_id=1)
    ```
    """

    config_class = MetaControllerObjectiveConfig
    output_class = MetaControllerObjectiveOutput
    _stage_one = ("controller", "bias")
    _stage_one_masked_lm = ("encoder", "dense", "norm")

    def __init__(
        self,
        config: MetaControllerObjectiveConfig | None = None,
        encoder: PreTrainedModel | None = None,
        **options: Any,
    ):
        super().__init__(config, encoder, **options)
        vocab_size, width = embedding_weight(self.encoder).shape
        self._check_fit(vocab_size, width)
        self.controller = self._make_generator(vocabulary_bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        if self.config.head == "transform":
            self.dense = nn.Linear(self.encoder.config.hidden_size, width)
            self.norm = nn.LayerNorm(width, eps=self.controller.norm.eps)
        self.post_init()

    @property
    def generator(self) -> TiedEmbeddingGenerator:  # type: ignore[override]
        return self.controller

    @property
    def vocabulary_bias(self) -> Tensor:
        return self.bias

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
        if module is self:  # an embedding in the released code, and so not 0 at the start
            init.normal_(self.bias, mean=0.0, std=self.config.initializer_range)

    def vocabulary_states(self, states: Tensor) -> Tensor:
        if self.config.head == "transform":
            return self.norm(nn.functional.gelu(self.dense(states)))
        return states

    def score(self, states: Tensor, candidates: Tensor) -> Tensor:
        """Score candidate ids `(tokens, candidates)` by the encoder's final states `(tokens, hidden_size)`."""
        table = embedding_weight(self.encoder)
        if self.config.embedding_sharing == "stop_discriminator_gradient":
            table = table.detach()
        bias = self.bias if self.config.head == "transform" else None
        padding_idx = getattr(self.get_input_embeddings(), "padding_idx", None)  # no look-up trains this row
        return candidate_scores(self.vocabulary_states(states), table, bias, candidates, padding_idx)

    @torch.no_grad()
    def _draw(self, generated: GeneratorOutput, source: SampleSource) -> Tensor:
        """Take ids `(batch, length, num_candidates)` from `source`, or draw them from the controller."""
        sampled_ids, sample_seeds, generator = source
        states = generated.states
        shape = (*states.shape[:2], self.config.num_candidates)
        if sampled_ids is not None:
            if sampled_ids.shape != shape:
                raise ValueError(f"`sampled_ids` must have the shape {shape}, not {tuple(sampled_ids.shape)}.")
            return sampled_ids
        if sample_seeds is not None:
            uniforms = counter_based_uniforms(sample_seeds, shape[1], shape[2], _CANDIDATE_STREAM)
        else:
            uniforms = torch.rand(shape, generator=generator, device=states.device, dtype=torch.float64)
        return sample_categorical(
            self.controller.transform(states).flatten(0, 1),
            generated.projected,
            self.bias,
            uniforms.flatten(0, 1),
            temperature=self.config.temperature,
            replacement=self.config.candidate_replacement,
        ).view(shape)

    def discriminator_loss(self, generated: GeneratorOutput, source: SampleSource) -> tuple[Tensor, dict[str, Tensor]]:
        original, attention_mask = generated.original_ids, generated.attention_mask
        drawn = self._draw(generated, source)
        replaced_ids = torch.where(generated.labels == IGNORE_INDEX, original, drawn[..., 0])
        candidates, right = build_candidates(original, replaced_ids, drawn, self.config.nota_token_id)
        candidates, right = candidates.flatten(0, 1), right.flatten()
        states = self.encode(replaced_ids, generated)
        flat = states.flatten(0, 1)
        if attention_mask is not None and stands_for_many(attention_mask):
            right = torch.where(attention_mask.flatten().bool(), right, IGNORE_INDEX)
        elif attention_mask is not None:
            tokens = attention_mask.flatten().nonzero().squeeze(-1)
            if len(tokens) < len(right):
                flat, candidates, right = (rows.index_select(0, tokens) for rows in (flat, candidates, right))
        scores = in_float32(self.score(flat, candidates))
        discriminator_sum = nn.functional.cross_entropy(scores, right, reduction="sum")
        with torch.no_grad():
            choice = scores.argmax(-1)
            rejected = candidates.gather(1, choice.unsqueeze(1)).squeeze(1) == self.config.nota_token_id
            is_replaced, is_original, is_right = right > 0, right == 0, choice == right
            replaced, original_count = is_replaced.sum(), is_original.sum()
            tokens_count = replaced + original_count
            parts = {
                "discriminator_loss": discriminator_sum / tokens_count,
                "replaced_fraction": replaced / tokens_count,
                "recall_replaced": (~rejected & is_replaced).sum() / replaced,
                "accuracy_replaced": (is_right & is_replaced).sum() / replaced,
                "accuracy_original": (rejected & is_original).sum() / original_count,
                "token_variance_fraction": token_variance_fraction(states, attention_mask),
            }
        return discriminator_sum, parts
