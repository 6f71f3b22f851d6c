"""A probe with little noise of an encoder's knowledge of word order: were two neighbouring words exchanged?

Windows of words from validation documents, half of them with one pair of neighbours exchanged; the encoder stays
frozen, its final states are pooled (mean and maximum over tokens), and a logistic regression decides.
"""

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def windows(documents: Dataset, text_column: str, count: int, length: int = 16, seed: int = 0):
    """
    Cut documents into windows of words, and exchange two neighbours in half of them.

    Args:
        documents (`Dataset`): validation documents.
        count (`int`): number of windows wanted.
        length (`int`, defaults to 16): words in a window.

    Returns:
        `tuple[list[str], np.ndarray]`: windows of text, and 1 where two neighbouring words were exchanged.

    Raises:
        ValueError: if the documents are too short for `count` windows.
    """
    draws = np.random.default_rng(seed)
    whole = []
    for text in documents[text_column]:
        words = text.split()
        whole += [words[start : start + length] for start in range(0, len(words) - length + 1, length)]
    if len(whole) < count:
        raise ValueError(f"The validation text gives {len(whole)} windows of {length} words; {count} are wanted.")
    chosen = [list(whole[place]) for place in draws.permutation(len(whole))[:count]]
    labels = draws.integers(0, 2, count)
    for window, exchanged in zip(chosen, labels, strict=True):
        # Equal neighbours would make an exchange that nobody can see.
        places = [place for place in range(length - 1) if window[place] != window[place + 1]]
        if exchanged and places:
            place = int(draws.choice(places))
            window[place], window[place + 1] = window[place + 1], window[place]
    return [" ".join(window) for window in chosen], labels


@torch.no_grad()
def pooled_states(
    encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], batch_size: int = 64
) -> np.ndarray:
    """Pool the mean and the maximum of the final states over the real tokens: `(len(texts), 2 * hidden_size)`."""
    encoder.eval()
    device = next(encoder.parameters()).device
    limit = encoder.config.max_position_embeddings
    rows = []
    for start in tqdm(range(0, len(texts), batch_size), desc="probe", leave=False):
        batch = tokenizer(
            texts[start : start + batch_size], padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(device)
        states = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        real = batch["attention_mask"].unsqueeze(-1).bool()
        mean = states.masked_fill(~real, 0).sum(1) / real.sum(1)
        maximum = states.masked_fill(~real, -torch.inf).max(1).values
        rows.append(torch.cat([mean, maximum], dim=1).float().cpu().numpy())
    return np.concatenate(rows)


def word_order_probe(
    encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Dataset,
    text_column: str,
    train: int = 10_000,
    test: int = 4_000,
    seed: int = 0,
) -> dict[str, float]:
    """
    Train a logistic regression on pooled states of a frozen encoder to see exchanged neighbours.

    Returns:
        `dict[str, float]`: `accuracy` in percent on `test` windows, its binomial standard error, and the share of the
        larger class, all in percent.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    texts, labels = windows(documents, text_column, train + test, seed=seed)
    features = pooled_states(encoder, tokenizer, texts)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    classifier.fit(features[:train], labels[:train])
    accuracy = float(classifier.score(features[train:], labels[train:]))
    share = float(labels[train:].mean())
    return {
        "accuracy": 100 * accuracy,
        "standard_error": 100 * (accuracy * (1 - accuracy) / test) ** 0.5,
        "larger_class": 100 * max(share, 1 - share),
    }
