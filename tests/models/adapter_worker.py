"""One step of models with LoRA. Run as a script, it is one process of several that share the rows by
DistributedDataParallel."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from hf_efficient.utils.process import settle_process_group
from tests.helpers.comparison import named_gradients
from tests.models.test_every_head import ADAPTIVE, IGNORED, adapt, make_inputs, make_labels, make_model


CASES = ("SruppForCausalLM-adaptive", "SruppForCausalLM-adaptive-tied", "TupeForMaskedLM")


def step(case, rank=0, processes=1):
    """Gradients of the loss over all targets, of which each process sees those of its rows. The second of two has none
    in the rarest cluster of an adaptive softmax, whose adapters must take part all the same."""
    inputs = make_inputs(case)
    inputs |= make_labels(case, inputs)
    labels = inputs["labels"]
    labels[4:] = labels[4:].masked_fill(labels[4:] >= ADAPTIVE["adaptive_cutoffs"][-1], IGNORED)  # no rare word
    targets = labels[:, 1:] if "CausalLM" in case else labels
    count = targets.ne(IGNORED).sum()
    own = {name: tensor.chunk(processes)[rank] for name, tensor in inputs.items()}
    model = adapt(make_model(case), target_modules="all-linear", init_lora_weights=False).train()
    wrapped = nn.parallel.DistributedDataParallel(model) if processes > 1 else model
    # Gradients are averaged over processes, so that each weighs its share so many times.
    (processes * wrapped(**own, num_items_in_batch=count).loss).backward()
    return named_gradients(model)


def main():
    torch.distributed.init_process_group("gloo")
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for case in CASES:
        gradients = step(case, rank, processes)
        if rank == 0:
            save_file(gradients, Path(sys.argv[1], f"{case}.safetensors"))
    settle_process_group()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
