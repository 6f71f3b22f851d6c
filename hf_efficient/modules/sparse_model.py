"""Initial values, vocabulary and output layer of models with sparse layers, alike in all of their families."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .input_checks import check_count
from .lm_heads import LowRankHead
from .sparse_layers import ModuleConv, MultiplicativeDense, SparseFeedForward
from .token_positions import FixedBasePositions, LearnedPositions


_INITIALISE_THEMSELVES = (SparseFeedForward, MultiplicativeDense, ModuleConv, LearnedPositions, FixedBasePositions)


def _init_uniformly(weight: torch.Tensor) -> None:
    """Draw embeddings of variance 1 / width, `(ids, width)`."""
    bound = (3.0 / weight.shape[1]) ** 0.5
    init.uniform_(weight, -bound, bound)


class SparseModelMixin:
    """
    Methods of the models whose config is a [`~hf_efficient.modules.sparse_config.SparseLayersConfig`].

    Stands before `PreTrainedModel` among the bases of a model. A language model keeps its output layer as `lm_head` and
    calls [`settle_vocabulary`] before `post_init`.
    """

    config: Any
    lm_head: Any
    has_fixed_vocabulary = False  # True where the ids are shared out by a multiplicative output layer

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as the original does: Glorot for matrices, biases of deviation 1e-6, uniform embeddings of
        variance 1 / d. Sparse layers and positions know their own."""
        if isinstance(module, _INITIALISE_THEMSELVES):
            module.init_own_weights()
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            if module.bias is not None:  # first: its draw must not depend on whether the weight is one that is loaded
                init.normal_(module.bias, std=1e-6)
            if self.config.tie_word_embeddings and module is getattr(self, "lm_head", None):
                _init_uniformly(module.weight)  # the embeddings themselves
            else:
                init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Embedding):
            _init_uniformly(module.weight)

    def settle_vocabulary(self) -> None:
        """Let a language model, and each model under it, know whether its output layer can be resized."""
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, SparseModelMixin):
                module.has_fixed_vocabulary = self.config.lm_head_type == "multiplicative"

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the linear map to the vocabulary; `None` for a multiplicative output layer, which has none."""
        head = getattr(self, "lm_head", None)
        if head is None or self.config.lm_head_type == "multiplicative":
            return None
        return head.get_submodule("out_proj") if self.config.lm_head_type == "low_rank" else head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if isinstance(self.lm_head, LowRankHead):
            self.lm_head.out_proj = new_embeddings  # type: ignore[assignment]
        else:
            self.lm_head = new_embeddings

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, *args, **kwargs):
        """
        See [`~transformers.PreTrainedModel.resize_token_embeddings`].

        Raises:
            ValueError: for a size that the config does not allow; and if a multiplicative output layer, or the model
                under it, is asked for another size than it has: its modules share the vocabulary evenly, so that every
                id would move. Nothing has changed then.
        """
        resize: Any = super().resize_token_embeddings  # type: ignore[misc]
        embeddings: Any = self.get_input_embeddings()  # type: ignore[attr-defined]
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embeddings
        if isinstance(pad_to_multiple_of, float):  # which transformers refuses in words of its own
            return resize(new_num_tokens, pad_to_multiple_of, *args, **kwargs)
        for name, value in (("new_num_tokens", new_num_tokens), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None:
                check_count(name, value, least=1)
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        size += -size % (pad_to_multiple_of or 1)
        if self.has_fixed_vocabulary:
            if size != self.config.vocab_size:
                raise ValueError(
                    f"A multiplicative output layer of {self.config.vocab_size} ids cannot be resized to {size}: its "
                    "modules share the vocabulary evenly, and every id would move; so the model under it cannot be "
                    "either. Leave ids to spare when the model is made, or take lm_head_type='dense'."
                )
            return embeddings
        self._check_vocab_size(size)
        return resize(new_num_tokens, pad_to_multiple_of, *args, **kwargs)

    def _check_vocab_size(self, size: int) -> None:
        """Raise a `ValueError` if the config of a vocabulary of `size` ids could not be saved or loaded."""
        changed = copy.deepcopy(self.config)
        changed.__dict__["vocab_size"] = size
        try:
            changed.validate_architecture()
        except ValueError as error:
            advice = ""
            if self.config.loss_sparsity is not None and size % self.config.loss_sparsity:
                advice = f" Give pad_to_multiple_of={self.config.loss_sparsity} (loss_sparsity)."
            raise ValueError(
                f"The vocabulary of {self.config.vocab_size} ids cannot be resized to {size}: {error}{advice}"
            ) from error
