"""Initial values, vocabulary and output layer of models with sparse layers, alike in all of their families."""

import copy
from typing import Any, cast

import torch
from torch import nn
from transformers import initialization as init

from .input_checks import check_count
from .lm_heads import LowRankHead, MixedHead
from .quantized_layers import QuantizedLayer, QuantizedSparseFeedForward
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


class WeightsReadMixin:
    """Count of what decoding reads, for language models with sparse layers; stands before `PreTrainedModel`."""

    config: Any
    _read_once: tuple[str, ...] = ()  # parts of the names of modules that the first token of a text alone needs

    def weights_read_per_token(self) -> int:
        """Count the weights that decoding a token reads: of embedding and table of positions one row each, of a sparse
        feed-forward layer its controller and one unit in each block, of two output layers the sparse one, of all else
        everything. An encoder, and maps of its output to keys and values, are no part of it: they run once a text."""
        skipped = self._read_once
        total = 0
        for name, module in self.named_modules():  # type: ignore[attr-defined]
            if isinstance(module, MixedHead):
                skipped += (f"{name}.dense",)
            if not any(part in name for part in skipped):
                total += self._own_weights_read(module)
        return total

    def _own_weights_read(self, module: nn.Module) -> int:
        """Count what a token reads of a module, without its children."""
        if isinstance(module, nn.Embedding):  # if tied, its weights are those of the output layer, and counted there
            return 0 if self.config.tie_word_embeddings else module.embedding_dim
        if isinstance(module, QuantizedLayer):
            own = module.num_weights()
        else:
            own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if isinstance(module, LearnedPositions):
            own -= module.table.numel() - module.table.shape[1]
        elif isinstance(module, (SparseFeedForward, QuantizedSparseFeedForward)):
            width = cast(torch.Tensor, module.bias).numel()
            units = 2 * module.controller_bias.numel() * width
            own -= units - units // module.block_size
        return own
