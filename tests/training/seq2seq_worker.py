"""Training of an encoder-decoder by one process of several, as given on the command line."""

import sys

import torch.distributed as dist

from hf_efficient.utils.process import settle_process_group
from training import train_seq2seq


def main():
    _, *argv = sys.argv[1:]
    train_seq2seq.train_seq2seq(*train_seq2seq.parse_arguments(argv))
    settle_process_group()
    dist.destroy_process_group()
