"""The objectives with a generator on tiny encoders, samples for them, and their gradients."""

import torch

from hf_efficient.objectives.meta_controller import MetaControllerObjective
from hf_efficient.objectives.replaced_token import ReplacedTokenObjective
from tests.objectives.encoders import VOCAB, make_encoder, perturb


NOTA = VOCAB - 1
# Each objective, and options that it can't do without or that make it smaller.
KINDS = {
    "replaced_token": (ReplacedTokenObjective, {}),
    "meta_controller": (MetaControllerObjective, {"nota_token_id": NOTA, "num_candidates": 5}),
}
# Options that a saved objective must know again.
SAVED = {
    "replaced_token": {"generator_divider": 2, "discriminator_start_step": 3, "label_original": 1},
    "meta_controller": {"generator_divider": 2, "discriminator_start_step": 3, "temperature": 0.5},
}


def make_objective(kind, name="tupe", **options):
    encoder = make_encoder(name)
    torch.manual_seed(2)
    objective, needed = KINDS[kind]
    return perturb(objective(encoder=encoder, **{**needed, **options})).double().eval()


def make_draws(batch, count=5):
    """Draws of which some happen to be right, repeat the original elsewhere, or are special tokens."""
    labels, ids = batch["labels"], batch["input_ids"]
    original = torch.where(labels == -100, ids, labels)
    draws = torch.randint(0, VOCAB, (*labels.shape, count))
    draws[..., 0] = torch.where(torch.rand(labels.shape) < 0.3, original, draws[..., 0])
    draws[..., 2] = torch.where(torch.rand(labels.shape) < 0.3, original, draws[..., 2])
    return draws


def gradients(objective, *batches, **options):
    """The sum of the losses of batches, and its gradients by name."""
    objective.zero_grad()
    losses = [objective(**batch, **options).loss for batch in batches]
    sum(losses).backward()
    found = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    return sum(losses).item(), found
