"""The meta-controller's objective (MC-BERT): which of a few candidates, or none of them, belongs at a position?"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .candidates import build_candidates, candidate_scores
from .categorical import sample_categorical
from .collapse import token_variance_share
from .configuration_detector import MetaControllerObjectiveConfig
from .detector import DetectorObjective, DetectorObjectiveOutput
from .draws import SampleSource, row_uniforms
from .generator import Guesses, SharedTableGenerator, token_table
from .labels import IGNORE_INDEX
from .precision import in_float32


_CANDIDATES = 1  # the stream of random numbers


@dataclass
class MetaControllerObjectiveOutput(DetectorObjectiveOutput):
    """
    Args:
        recall_replaced, accuracy_replaced (`torch.FloatTensor` of shape `()`):
            Share of replaced tokens where the encoder prefers some token to the reject option; and the right one.
        accuracy_original (`torch.FloatTensor` of shape `()`):
            Share of original tokens where it prefers the reject option.

    With s, `share_replaced`, an encoder that is blind reaches a `detector_loss` of `H(s) + s ln(K - 1)`. The other
    fields are those of [`DetectorObjectiveOutput`].
    """

    accuracy_replaced: Tensor | None = None


class MetaControllerObjective(DetectorObjective):
    """
    Pretrains an encoder by MC-BERT's multi-choice task (Xu et al. 2020, arXiv 2006.05744).

    A small masked language model, the controller, is trained beside the encoder and shares its token table. What it
    draws replaces the targets; the encoder then chooses at every token among candidates that the controller drew: "none
    of the above" where the token is the text's own, else the text's token. No gradient passes through the draws.

    `objective.encoder` is what pretraining is for: its `save_pretrained` gives what `AutoModel` and fine-tuning load.
    The objective itself is saved in checkpoints for resuming.

    Deviations: see [`~hf_efficient.objectives.detector_loss.combine_losses`] for accumulated batches under plain
    Trainer. A padding token that is drawn is a token like others, where the released code takes its position for
    padding. Which tokens are targets and how they are hidden is the collator's choice; the released code masks all of
    them.

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
    output_class = MetaControllerObjectiveOutput
    _first_phase = ("controller", "bias")
    _masked_lm_phase = ("encoder", "dense", "norm")

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

    @property
    def small_network(self) -> SharedTableGenerator:
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
        if module is self:  # the released code has it in an embedding, and so not 0 at the start
            init.normal_(self.bias, mean=0.0, std=self.config.initializer_range)

    def vocabulary_states(self, states: Tensor) -> Tensor:
        if self.config.head == "transform":
            return self.norm(nn.functional.gelu(self.dense(states)))
        return states

    def score(self, states: Tensor, candidates: Tensor) -> Tensor:
        """Scores `(tokens, candidates)` of candidate ids, by the encoder's final states `(tokens, hidden_size)`."""
        table = token_table(self.encoder)
        if self.config.embedding_sharing == "stop_detector_gradient":
            table = table.detach()
        bias = self.bias if self.config.head == "transform" else None
        padding_idx = getattr(self.get_input_embeddings(), "padding_idx", None)  # no look-up trains this row
        return candidate_scores(self.vocabulary_states(states), table, bias, candidates, padding_idx)

    @torch.no_grad()
    def _draw(self, guesses: Guesses, source: SampleSource) -> Tensor:
        """Ids `(batch, length, num_candidates)`: injected, or drawn from the controller; see `forward`."""
        sampled_ids, draw_seeds, generator = source
        states = guesses.states
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
            guesses.projected,
            self.bias,
            uniforms.flatten(0, 1),
            temperature=self.config.temperature,
            replacement=self.config.candidate_replacement,
        ).view(shape)

    def detect(self, guesses: Guesses, source: SampleSource) -> tuple[Tensor, dict[str, Tensor]]:
        original, attention_mask = guesses.original_ids, guesses.attention_mask
        drawn = self._draw(guesses, source)
        replaced_ids = torch.where(guesses.labels == IGNORE_INDEX, original, drawn[..., 0])
        candidates, right = build_candidates(original, replaced_ids, drawn, self.config.nota_token_id)
        candidates, right = candidates.flatten(0, 1), right.flatten()
        states = self.encode(replaced_ids, guesses)
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
                "accuracy_original": (rejected & ~is_replaced).sum() / (len(right) - replaced),
                "token_variance_share": token_variance_share(states, attention_mask),
            }
        return detector_sum, parts
