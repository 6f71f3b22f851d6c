"""Adaptive embedding and softmax over a large vocabulary: rare words get shorter vectors.

Sources: Grave et al. 2017 (arXiv 1609.04309), Baevski and Auli 2019 (arXiv 1809.10853), in the form of Transformer-XL's
code that SRU++'s experiments use: a projection even for the first cluster, cluster logits beside the words of the first
cluster, in reverse order (cluster i stands at column -i). Tables are shared by embedding and softmax.
"""

from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn

from ..utils.labels import IGNORE_INDEX
from .input_checks import stands_for_many, values_can_be_read


def cluster_sizes(config: Any) -> list[tuple[int, int]]:
    """Number of ids and width of the vectors of each cluster, from `vocab_size` and the adaptive fields of a config."""
    edges = [0, *config.adaptive_cutoffs, config.vocab_size]
    return [
        (stop - start, config.adaptive_embedding_size // config.adaptive_divisor**cluster)
        for cluster, (start, stop) in enumerate(pairwise(edges))
    ]


class AdaptiveEmbedding(nn.Module):
    """Embedding of ids `(batch, length)` as `(batch, length, embedding_size)`, with narrower vectors for rarer ids."""

    def __init__(self, config: Any):
        super().__init__()
        self.cutoffs = [0, *(config.adaptive_cutoffs or []), config.vocab_size]
        sizes = cluster_sizes(config)
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for rows, width in sizes)
        self.projections = nn.ModuleList(nn.Linear(width, config.embedding_size, bias=False) for _, width in sizes)
        self.dropout = nn.Dropout(config.embedding_dropout)

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
    """Log-probabilities of words, computed through the probabilities of their clusters."""

    def __init__(self, config: Any):
        super().__init__()
        sizes = cluster_sizes(config)
        self.cutoffs = [0, *(config.adaptive_cutoffs or []), config.vocab_size]
        # A module of tables, so that each can be tied to one of the embedding's.
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for rows, width in sizes)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(rows)) for rows, _ in sizes)
        self.projections = nn.ModuleList(nn.Linear(width, config.hidden_size, bias=False) for _, width in sizes)
        clusters, width = len(sizes) - 1, sizes[0][1]
        self.cluster_weight = nn.Parameter(torch.zeros(clusters, width))
        self.cluster_bias = nn.Parameter(torch.zeros(clusters))
        self.dropout = nn.Dropout(config.embedding_dropout)

    def _logits(self, hidden: torch.Tensor, cluster: int) -> torch.Tensor:
        """(N, d) -> (N, ids of the cluster); for cluster 0 followed by the clusters' own logits."""
        # Linear stores its weight the other way round: this is the map from embedding to hidden size, transposed.
        inner = self.dropout(hidden @ cast(nn.Linear, self.projections[cluster]).weight)
        weight, bias = cast(nn.Embedding, self.tables[cluster]).weight, self.biases[cluster]
        if cluster == 0:
            weight, bias = torch.cat([weight, self.cluster_weight]), torch.cat([bias, self.cluster_bias])
        return nn.functional.linear(inner, weight, bias)

    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., hidden_size)` -> `(..., vocab_size)`, float32."""
        flat = hidden.flatten(0, -2)
        head = self._logits(flat, 0).float().log_softmax(-1)
        parts = [head[:, : self.cutoffs[1]]]
        for cluster in range(1, len(self.tables)):
            parts.append(head[:, -cluster, None] + self._logits(flat, cluster).float().log_softmax(-1))
        return torch.cat(parts, -1).view(*hidden.shape[:-1], -1)

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor, ignore_index: int = IGNORE_INDEX) -> torch.Tensor:
        """
        Compute the log-probabilities of `targets` alone, not of all words.

        Args:
            hidden (`Tensor` of shape `(batch, length, hidden_size)`): top states.
            targets (`Tensor` of shape `(batch, length)`): ids, or `ignore_index`.

        Returns:
            `Tensor` of shape `(batch, length)`: float32, in the order of positions (the original returns them grouped
            by cluster); 0 where the target is ignored.
        """
        if stands_for_many(targets):  # the words of all clusters, since which are wanted cannot be asked
            kept = targets != ignore_index
            found = self.log_probs(hidden).gather(-1, torch.where(kept, targets, 0).unsqueeze(-1)).squeeze(-1)
            return found.masked_fill(~kept, 0.0)
        if targets.device.type == "cpu" and values_can_be_read(targets):
            outside = (targets != ignore_index) & ((targets < 0) | (targets >= self.cutoffs[-1]))
            if outside.any():
                raise ValueError(
                    f"labels hold {int(targets[outside][0])}, outside the vocabulary of {self.cutoffs[-1]} ids; "
                    f"what is not to be learned is {ignore_index}."
                )
        flat, wanted = hidden.flatten(0, -2), targets.flatten()
        result = flat.new_zeros(wanted.shape, dtype=torch.float32)
        kept = (wanted != ignore_index).nonzero().squeeze(-1)
        flat, wanted = flat[kept], wanted[kept]
        head = self._logits(flat, 0).float().log_softmax(-1)
        found = flat.new_zeros(wanted.shape, dtype=torch.float32)
        for cluster in range(len(self.tables)):
            start, stop = self.cutoffs[cluster : cluster + 2]
            places = ((wanted >= start) & (wanted < stop)).nonzero().squeeze(-1)
            within = (wanted[places] - start)[:, None]
            if cluster == 0:
                values = head[places].gather(1, within).squeeze(1)
            else:
                tail = self._logits(flat[places], cluster).float().log_softmax(-1)
                values = head[places, -cluster] + tail.gather(1, within).squeeze(1)
            found = found.index_copy(0, places, values)
        return result.index_copy(0, kept, found).view(targets.shape)


__all__ = ["AdaptiveEmbedding", "AdaptiveSoftmax", "cluster_sizes"]
