"""Adaptive embedding and softmax over a large vocabulary: rare words get shorter vectors.

Sources: Grave et al. 2017 (arXiv 1609.04309), Baevski and Auli 2019 (arXiv 1809.10853), in the form of Transformer-XL's
code that SRU++'s experiments use: a projection even for the first cluster, cluster logits beside the words of the first
cluster, in reverse order (cluster i stands at column -i). Tables are shared by embedding and softmax.

What is shared is one module, not one weight of two modules. So an adapter that is put on it acts on both sides, and may
be merged into the weight without a change of either. Where the softmax has got a weight of its own after all, as in a
folder that was saved with two that differ, it computes with that.
"""

import math
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..utils.labels import IGNORE_INDEX
from .input_checks import check_class_ids, check_count, check_labels, stands_for_many
from .losses import in_float32


def cluster_sizes(config: Any) -> list[tuple[int, int]]:
    """Number of ids and width of the vectors of each cluster, from `vocab_size` and the adaptive fields of a config."""
    edges = [0, *config.adaptive_cutoffs, config.vocab_size]
    return [
        (stop - start, config.adaptive_embedding_size // config.adaptive_divisor**cluster)
        for cluster, (start, stop) in enumerate(pairwise(edges))
    ]


def tied_names(config: Any, softmax: str, embedding: str) -> dict[str, str]:
    """Names of the softmax's weights that are tied, to those of the embedding, for `_tied_weights_keys`."""
    tied = ("tables", "projections") if config.tie_adaptive_projections else ("tables",)
    names = [f"{part}.{cluster}.weight" for part in tied for cluster in range(len(config.adaptive_cutoffs) + 1)]
    return {f"{softmax}.{name}": f"{embedding}.{name}" for name in names}


class TransposedLinear(Conv1D):
    """
    Linear map without bias whose weight is stored as `(inputs, outputs)`: transformers' `Conv1D`, by which adapters and
    quantisers know this layout.

    Args:
        inputs (`int`): width of the input.
        outputs (`int`): width of the output.
    """

    def __init__(self, inputs: int, outputs: int):
        nn.Module.__init__(self)  # `Conv1D` itself always has a bias
        self.nx, self.nf = inputs, outputs
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.register_parameter("bias", None)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def _has_plain_weight(module: nn.Module, device: torch.device) -> bool:
    """Return whether a module's weight says all that it does, and can be read here and now: nothing else stands in its
    place (an adapter, a quantised layer), and the weight is not offloaded until the module is called."""
    return type(module) in (nn.Linear, nn.Embedding) and module.weight.device == device


class TiedWeight(nn.Module):
    """
    A weight under a second name, for saving and loading. Another module computes with it as long as it has that weight:
    a module of two names would keep what `torch.func.functional_call` put into it, and an adapter in this place would
    never be called.

    Args:
        weight (`nn.Parameter`): the other module's.
    """

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight
        self.was_tied = True

    def is_part_of(self, module: nn.Module) -> bool:
        """Return whether the weight is that of `module`, of what it wraps, or of what was made of it by quantisation.
        A weight that is offloaded has no identity of its own; then the answer is that of the last `note_tie`."""
        if self.weight.is_meta:
            return self.was_tied
        alike = [
            parameter
            for parameter in module.parameters()
            if parameter.shape == self.weight.shape and type(parameter) is type(self.weight)
        ]
        return not alike or any(parameter is self.weight for parameter in alike)

    def note_tie(self, module: nn.Module) -> None:
        """Note for `is_part_of` whether `module` has the weight, as long as that can be seen."""
        self.was_tied = any(parameter is self.weight for parameter in module.parameters())

    def forward(self) -> torch.Tensor:
        return self.weight  # a call, so that an offloaded weight is loaded


class AdaptiveEmbedding(nn.Module):
    """
    Embedding of ids `(batch, length)` as `(batch, length, embedding_size)`, with narrower vectors for rarer ids.

    Args:
        config (`PreTrainedConfig`): gives `vocab_size`, `embedding_size`, `embedding_dropout` and the adaptive fields.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.cutoffs = [0, *(config.adaptive_cutoffs or []), config.vocab_size]
        sizes = cluster_sizes(config)
        self.num_embeddings, self.embedding_dim = config.vocab_size, config.embedding_size
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for rows, width in sizes)
        self.projections = nn.ModuleList(nn.Linear(width, config.embedding_size, bias=False) for _, width in sizes)
        self.dropout = nn.Dropout(config.embedding_dropout)

    @property
    def weight(self) -> torch.Tensor:
        """The vectors of all ids, `(vocab_size, embedding_size)`, as a plain embedding stores them. They are computed
        anew each time: a change in place is lost, and `num_embeddings` and `embedding_dim` give the size for nothing.
        """
        ids = torch.arange(self.num_embeddings, device=next(self.tables.parameters()).device)
        clusters = zip(self.tables, self.projections, pairwise(self.cutoffs), strict=True)
        return torch.cat([projection(table(ids[: stop - start])) for table, projection, (start, stop) in clusters])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        # Every cluster for every id: the rarer ones are narrow, so it costs little and does not depend on values.
        clusters = []
        for cluster, (table, projection) in enumerate(zip(self.tables, self.projections, strict=True)):
            start, stop = self.cutoffs[cluster : cluster + 2]
            vectors = projection(self.dropout(table(input_ids.clamp(start, stop - 1) - start)))
            inside = (input_ids >= start) & (input_ids < stop)
            clusters.append(vectors.masked_fill(~inside.unsqueeze(-1), 0.0))
        return torch.stack(clusters).sum(0)


class AdaptiveSoftmax(nn.Module):
    """
    Log-probabilities of words, computed through the probabilities of their clusters.

    Args:
        config (`PreTrainedConfig`): gives `vocab_size`, `hidden_size`, `embedding_dropout` and the adaptive fields.
    """

    def __init__(self, config: Any):
        super().__init__()
        sizes = cluster_sizes(config)
        self.cutoffs = [0, *(config.adaptive_cutoffs or []), config.vocab_size]
        self.widths = [width for _, width in sizes]
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for rows, width in sizes)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(rows)) for rows, _ in sizes)
        self.projections = nn.ModuleList(TransposedLinear(config.hidden_size, width) for _, width in sizes)
        self.embedding: AdaptiveEmbedding | None = None
        clusters, width = len(sizes) - 1, sizes[0][1]
        self.cluster_weight = nn.Parameter(torch.zeros(clusters, width))
        self.cluster_bias = nn.Parameter(torch.zeros(clusters))
        self.dropout = nn.Dropout(config.embedding_dropout)

    def share(self, embedding: AdaptiveEmbedding, projections: bool) -> None:
        """Compute with the tables of an embedding, to which one's own are tied, and if `projections` with its
        projections: whatever stands in their place, such as an adapter, then acts on both sides. To be called again
        when weights have been tied anew; one that is not tied is one's own."""
        object.__setattr__(self, "embedding", embedding)  # its parameters keep their names
        self.tables = self._tied(self.tables, embedding.tables)
        if projections:
            self.projections = self._tied(self.projections, embedding.projections)

    @staticmethod
    def _tied(own: nn.ModuleList, others: nn.ModuleList) -> nn.ModuleList:
        """One's own modules as tied weights, which know whether the others have them."""
        tied = nn.ModuleList()
        for module, other in zip(own, others, strict=True):
            if not isinstance(module, TiedWeight):
                module = TiedWeight(cast(nn.Parameter, module.weight))
            module.note_tie(other)
            tied.append(module)
        return tied

    @torch.no_grad()
    def resize(self, size: int, mean_resizing: bool) -> None:
        """Give the last cluster as many biases as a vocabulary of `size` ids wants: new ones are the mean of the
        others, or zero. The tables are the embedding's, see [`resize_adaptive`]."""
        bias = self.biases[-1]
        resized = bias.new_full((size - self.cutoffs[-2],), bias.mean().item() if mean_resizing else 0.0)
        kept = min(len(bias), len(resized))
        resized[:kept] = bias[:kept]
        bias.grad, bias.data = None, resized
        self.cutoffs[-1] = size

    def _project(self, hidden: torch.Tensor, cluster: int) -> torch.Tensor:
        """(N, hidden_size) -> (N, width of the cluster)."""
        own = self.projections[cluster]
        if self.embedding is None or not isinstance(own, TiedWeight):
            return own(hidden)
        # The embedding's projection the other way round, by the weight W of y = W x.
        projection = self.embedding.projections[cluster]
        if not own.is_part_of(projection):
            return hidden @ own().to(hidden.device)
        if _has_plain_weight(projection, hidden.device):
            return hidden @ cast(nn.Linear, projection).weight
        unit_vectors = torch.eye(self.widths[cluster], dtype=hidden.dtype, device=hidden.device)
        return nn.functional.linear(hidden, projection(unit_vectors).to(hidden))

    def _vectors(self, like: torch.Tensor, cluster: int) -> torch.Tensor:
        """The table of a cluster, (ids, width)."""
        own = self.tables[cluster]
        if self.embedding is None or not isinstance(own, TiedWeight):
            table = own
        else:
            table = self.embedding.tables[cluster]
            if not own.is_part_of(table):
                return own().to(like.device)
        if _has_plain_weight(table, like.device):
            return cast(nn.Embedding, table).weight
        start, stop = self.cutoffs[cluster : cluster + 2]
        return table(torch.arange(stop - start, device=like.device)).to(like.device)

    def _logits(self, hidden: torch.Tensor, cluster: int) -> torch.Tensor:
        """(N, d) -> (N, ids of the cluster); for cluster 0 followed by the clusters' own logits."""
        inner = self.dropout(self._project(hidden, cluster))
        weight, bias = self._vectors(inner, cluster), self.biases[cluster]
        if cluster == 0:
            weight, bias = torch.cat([weight, self.cluster_weight]), torch.cat([bias, self.cluster_bias])
        return nn.functional.linear(inner, weight, bias)

    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., hidden_size)` -> `(..., vocab_size)`, float32 or better."""
        flat = hidden.flatten(0, -2)
        head = in_float32(self._logits(flat, 0)).log_softmax(-1)
        parts = [head[:, : self.cutoffs[1]]]
        for cluster in range(1, len(self.tables)):
            parts.append(head[:, -cluster, None] + in_float32(self._logits(flat, cluster)).log_softmax(-1))
        return torch.cat(parts, -1).view(*hidden.shape[:-1], -1)

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor | None = None, ignore_index: int = IGNORE_INDEX
    ) -> torch.Tensor:
        """
        Compute the log-probabilities of all words or, much cheaper, of `targets` alone.

        Args:
            hidden (`Tensor` of shape `(..., hidden_size)`): top states.
            targets (`Tensor` of shape `(...)`, *optional*): ids, of any integer dtype, or `ignore_index`.
            ignore_index (`int`, defaults to -100): what stands where there is no target.

        Returns:
            `Tensor`: float32 or better. Without targets of shape `(..., vocab_size)`; with targets of their shape, in
            the order of positions (the original returns them grouped by cluster), 0 where the target is ignored.

        Raises:
            ValueError: if the targets are no ids of the vocabulary, or not one for each position.
        """
        if self.embedding is not None and self.embedding.num_embeddings != self.cutoffs[-1]:
            raise ValueError(
                f"The embedding has {self.embedding.num_embeddings} ids, but its softmax {self.cutoffs[-1]}: call "
                "resize_token_embeddings of the whole model, not of the encoder inside it."
            )
        if targets is None:
            return self.log_probs(hidden)
        check_labels(targets, tuple(hidden.shape[:-1]), "of the positions")
        check_class_ids(targets, self.cutoffs[-1], hidden.device, kind="vocabulary")
        if stands_for_many(targets):  # the words of all clusters, since which are wanted cannot be asked
            kept = targets != ignore_index
            wanted = torch.where(kept, targets, 0).long()
            found = self.log_probs(hidden).gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
            return found.masked_fill(~kept, 0.0)
        flat, wanted = hidden.flatten(0, -2), targets.flatten().long()
        kept = (wanted != ignore_index).nonzero().squeeze(-1)
        flat, wanted = flat[kept], wanted[kept]
        head = in_float32(self._logits(flat, 0)).log_softmax(-1)
        found = head.new_zeros(wanted.shape)
        for cluster in range(len(self.tables)):
            start, stop = self.cutoffs[cluster : cluster + 2]
            places = ((wanted >= start) & (wanted < stop)).nonzero().squeeze(-1)
            within = (wanted[places] - start)[:, None]
            if cluster == 0:
                values = head[places].gather(1, within).squeeze(1)
            else:
                tail = in_float32(self._logits(flat[places], cluster)).log_softmax(-1)
                values = head[places, -cluster] + tail.gather(1, within).squeeze(1)
            found = found.index_copy(0, places, values)
        return head.new_zeros(targets.numel()).index_copy(0, kept, found).view(targets.shape)


def resize_adaptive(
    model: Any,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> nn.Module:
    """
    Change the number of ids of an adaptive embedding, and of the adaptive softmax that shares its tables. Ids are
    sorted by frequency, so it is the last cluster, of the rarest words, that gets new ones at its end or loses them.

    Args:
        model (`PreTrainedModel`): its input embeddings, `lm_head` (if there is one) and `config.vocab_size` change.
        new_num_tokens (`int`, *optional*): number of ids; without it as many as there are, for `pad_to_multiple_of`.
        pad_to_multiple_of (`int`, *optional*): round the number up to a multiple.
        mean_resizing (`bool`, defaults to `True`): draw new rows around the mean of the cluster's, as
            [`~transformers.PreTrainedModel.resize_token_embeddings`] does; else initialise them as in a new model.

    Returns:
        `nn.Module`: the embedding.

    Raises:
        ValueError: for a number that leaves nothing of the last cluster, and where an adapter or anything else stands
            in the place of what would change.
    """
    config = model.config
    if new_num_tokens is not None:
        check_count("new_num_tokens", new_num_tokens)
    multiple = pad_to_multiple_of or 1
    size = math.ceil((config.vocab_size if new_num_tokens is None else new_num_tokens) / multiple) * multiple
    embedding, softmax = model.get_input_embeddings(), getattr(model, "lm_head", None)
    is_stale = isinstance(softmax, AdaptiveSoftmax) and softmax.cutoffs[-1] != size
    if size == config.vocab_size and not is_stale:
        return embedding
    first = config.adaptive_cutoffs[-1]
    if size <= first:
        raise ValueError(
            f"An adaptive embedding of {config.vocab_size} ids cannot be resized to {size}: it loses ids of its last "
            f"cluster alone, which begins at id {first}. Keep at least {first + 1}."
        )
    # A head that was copied and trained by itself computes with a copy of the embedding.
    embeddings = list(dict.fromkeys((embedding, getattr(softmax, "embedding", None) or embedding)))
    are_plain = all(isinstance(one, AdaptiveEmbedding) and type(one.tables[-1]) is nn.Embedding for one in embeddings)
    if not are_plain or not isinstance(softmax, (AdaptiveSoftmax, type(None))):
        raise ValueError(
            "The vocabulary cannot be resized while something else, such as an adapter, stands in the place of the "
            "embedding, its last table or lm_head: resize before it is put on, or after merge_and_unload()."
        )
    tables = [one.tables[-1] for one in embeddings]
    if softmax is not None:
        own = cast(nn.Parameter, softmax.tables[-1].weight)
        if all(own is not table.weight for table in tables):
            tables.append(nn.Embedding(len(own), softmax.widths[-1], device="meta"))
            tables[-1].weight = own
        softmax.resize(size, mean_resizing)
    for table in tables:
        # In place: a weight that is tied stays so.
        model._get_resized_embeddings(table, size - first, None, mean_resizing)
        table.weight.grad = None
    for one in embeddings:
        one.cutoffs[-1] = one.num_embeddings = size
    config.vocab_size = size
    return embedding


__all__ = ["AdaptiveEmbedding", "AdaptiveSoftmax", "TransposedLinear", "cluster_sizes", "resize_adaptive"]
