"""LSH attention as loops over rounds, tokens and keys, written to be read.

`ops/lsh_attention.py` has the formulas. These loops state them one query at a time and leave the gradients to autograd;
they are slow, and the tests hold every other implementation against them.
"""

import math

import torch
from torch import Tensor


def hash_buckets_naive(vectors: Tensor, rotations: Tensor, factors: list[int]) -> Tensor:
    """
    Hash one vector after the other.

    Arguments and results are those of [`~hf_efficient.ops.lsh_hashing.hash_buckets`], except that none is checked.
    """
    batch, heads, length, size = vectors.shape
    rounds = rotations.shape[-2]
    rotations = rotations.to(vectors.dtype).expand(batch, heads, size, rounds, -1)
    buckets = torch.zeros(batch, heads, rounds, length, dtype=torch.int32)
    for row, head, this_round, step in torch.cartesian_prod(*map(torch.arange, buckets.shape)).tolist():
        rotated = vectors[row, head, step] @ rotations[row, head, :, this_round]
        bucket, stride, start = 0, 1, 0
        for factor in factors:
            part = rotated[start : start + factor // 2]
            bucket += stride * int(torch.cat([part, -part]).argmax())
            stride, start = stride * factor, start + factor // 2
        buckets[row, head, this_round, step] = bucket
    return buckets


def _key(vector: Tensor) -> Tensor:
    return vector / (vector.square().mean() + 1e-6).sqrt() / math.sqrt(len(vector))


def _cut(order: list, chunk_length: int) -> list[list]:
    return [order[start : start + chunk_length] for start in range(0, len(order), chunk_length)]


def lsh_attention_naive(
    query_key: Tensor, value: Tensor, buckets: Tensor, *, chunk_length: int, chunks_before: int = 1,
    chunks_after: int = 0, causal: bool, mask: Tensor | None = None, dropout_mask: Tensor | None = None,
    layout: str = "packed",
) -> Tensor:  # fmt: skip
    """
    Attend one query after the other.

    Arguments and results are those of [`~hf_efficient.ops.lsh_attention.lsh_attention`], except that none is checked.
    """
    batch, heads, length, _ = query_key.shape
    rounds = buckets.shape[2]
    outputs = torch.zeros_like(value)
    for row, head in torch.cartesian_prod(torch.arange(batch), torch.arange(heads)).tolist():
        real = [True] * length if mask is None else mask[row].tolist()
        sorted_rounds = []
        for this_round in range(rounds):
            bucket = buckets[row, head, this_round].tolist()
            tokens = [step for step in range(length) if real[step] or layout == "original"]
            # Padding lies in one bucket of its own, the last.
            order = sorted(tokens, key=lambda step: (bucket[step] if real[step] else math.inf, step))
            sorted_rounds.append([(this_round, step) for step in order])
        if layout == "packed":
            cut = [_cut(order, chunk_length) for order in sorted_rounds]
        else:
            cut = [_cut([place for order in sorted_rounds for place in order], chunk_length)]

        logits: dict[int, list[tuple[Tensor, Tensor]]] = {step: [] for step in range(length)}
        for chunks in cut:
            for index, chunk in enumerate(chunks):
                looks = range(-chunks_before, chunks_after + 1)
                # Rows of fewer chunks see each of them once in the packed layout.
                looks = looks[: len(chunks)] if layout == "packed" else looks
                keys = [
                    (other, window * chunk_length + place)
                    for window, look in enumerate(looks)
                    for place, (_, other) in enumerate(chunks[(index + look) % len(chunks)])
                ]
                for place, (_, step) in enumerate(chunk):
                    for other, column in keys:
                        logit = query_key[row, head, step] @ _key(query_key[row, head, other])
                        if causal and other > step:
                            logit = logit - 1e9
                        if not real[other]:
                            logit = logit - 1e9
                        elif other == step:
                            logit = logit - 1e5
                        kept = 1.0 if dropout_mask is None else dropout_mask[place, column]
                        logits[step].append((logit, kept * value[row, head, other]))
        for step, pairs in logits.items():
            if pairs:  # over the keys of all rounds, which weighs rounds by their sums of exponentials
                probabilities = torch.stack([logit for logit, _ in pairs]).softmax(0)
                outputs[row, head, step] = probabilities @ torch.stack([term for _, term in pairs])
    return outputs


def lsh_decode_naive(
    query_key: Tensor, keys: Tensor, values: Tensor, buckets: Tensor, *, chunk_length: int, chunks_before: int = 1,
    mask: Tensor | None = None, position: int | None = None, layout: str = "packed", memory_length: int | None = None,
) -> Tensor:  # fmt: skip
    """
    Attend from one new token after the other.

    Arguments and results are those of [`~hf_efficient.ops.lsh_attention.lsh_decode`], except that none is checked.
    """
    batch, heads, new, _ = query_key.shape
    rounds, slots = buckets.shape[2:]
    count = rounds * chunk_length * (1 + chunks_before)
    first = slots - new if position is None else position
    outputs = torch.zeros_like(values[:, :, :new])
    for row, head, step in torch.cartesian_prod(*map(torch.arange, (batch, heads, new))).tolist():
        own = first + step
        if mask is not None and not mask[row, own]:
            continue
        hashes = buckets[row, head]
        ranked = []
        for slot in range(own):
            if mask is None or mask[row, slot]:
                ranked.append((any(hashes[r, slot] == hashes[r, own] for r in range(rounds)), slot))
        if layout == "original":  # the query takes a place, and so does the empty slot behind it, which holds zeros
            ranked.append((True, own))
            if memory_length is None or own + 1 < memory_length:
                ranked.append((bool(hashes[0, own] == 0), own + 1))
        candidates = [slot for _, slot in sorted(ranked, reverse=True)[:count] if slot < own]
        logits = [query_key[row, head, step] @ _key(keys[row, head, slot]) for slot in candidates]
        logits.append(query_key[row, head, step] @ _key(keys[row, head, own]) - 1e5)
        probabilities = torch.stack(logits).softmax(0)
        outputs[row, head, step] = probabilities @ values[row, head, [*candidates, own]]
    return outputs
