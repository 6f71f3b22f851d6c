"""
Run the benchmarks, each of which writes a JSON into training/results.

    python -m training.benchmarks --list
    python -m training.benchmarks run encoder_speed --sizes 4x256
    python -m training.benchmarks run encoder_speed --help
"""

import argparse
from importlib import import_module
from typing import NamedTuple

from hf_efficient.utils.process import errors_in_one_line


class Benchmark(NamedTuple):
    """One module of this package, whose `main` takes a command line."""

    description: str
    duration: str  # with the defaults, on one core unless it says otherwise


BENCHMARKS = {
    "encoder_speed": Benchmark("train step, inference and memory of TUPE-R against BERT", "65 minutes"),
    "objective_speed": Benchmark("train step and memory of the objectives against masked LM", "10 minutes"),
    "lm_speed": Benchmark("SRU++ against the original and GPT-2: recurrence, training, decoding", "10 minutes"),
    "pretraining_comparison": Benchmark("pretraining methods at equal time, on the same text", "140 minutes a seed"),
    "lm_comparison": Benchmark("SRU++ against GPT-2 at equal time, 2.6 M parameters", "15 minutes, and 18 a seed"),
    "lm_ablation": Benchmark("attention in SRU++ at equal time, 42 M parameters", "25 minutes on a GPU"),
    "sparse_quality": Benchmark("dense and sparse Scaling Transformers on the same tokens", "550 minutes a seed"),
    "quantized_quality": Benchmark("quality of those models in 8 and 4 bits", "6 minutes a seed"),
    "equal_winners": Benchmark("units chosen alike in 16 bits and in decoding", "5 minutes"),
    "sparsify_quality": Benchmark("a trained GPT-2 made sparse, quality against speed", "75 minutes"),
    "sparsify_cost": Benchmark("time and memory of making a layer sparse", "10 minutes, 3 GB"),
    "sparse_growth": Benchmark("time of a token over the width, sparse and dense blocks", "10 minutes, 5 GB"),
    "decode_speed": Benchmark("decoding at batch 1, sparse and dense, 32 to 4 bits, llama.cpp", "40 minutes, 12 GB"),
    "seq2seq_decode": Benchmark("decoding of encoder-decoders, sparse and dense", "3 minutes, 8 GB"),
    "seq2seq_limits": Benchmark(
        "decoding of very wide encoder-decoders, and behind a very long source", "5 minutes, 12 GB"
    ),
    "lsh_quality": Benchmark("attention by hashing against attention to all keys", "60 minutes"),
    "summarization_race": Benchmark("summaries of a small Terraformer and its dense twin", "130 minutes"),
    "long_summary": Benchmark("memory of training on whole meetings, and what it teaches", "15 minutes, 4 GB"),
    "long_input": Benchmark("memory and time of Terraformer on long input", "40 minutes, 16 GB"),
    "sru_recurrence_cpu": Benchmark("compiled recurrence against copy bandwidth and the original", "20 minutes"),
    "sparse_ff_cpu": Benchmark("compiled sparse feed-forward against the dense one", "6 minutes"),
    "decode_layer_cpu": Benchmark("compiled layers of decoding, by format, against torch", "10 minutes, 6 GB"),
    "streaming": Benchmark("training on a stream: memory, resuming, cost of the reading", "10 minutes, 1 GB of disk"),
    "gpu_agenda": Benchmark("all that waits for a GPU, in parts with time limits of their own", "9 minutes on a GPU"),
    "demo": Benchmark("scores and time of `make demo`", "4 minutes on two cores"),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="name the benchmarks, and the time that each takes")
    commands = parser.add_subparsers(dest="command")
    runs = commands.add_parser("run", help="run one benchmark", add_help=False)
    runs.add_argument("name", choices=BENCHMARKS)
    args, options = parser.parse_known_args(argv)
    if args.command == "run":
        import_module(f".{args.name}", __package__).main(options)
    elif options:
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    elif args.list:
        width = max(map(len, BENCHMARKS))
        for name, benchmark in BENCHMARKS.items():
            print(f"{name:{width}}  {benchmark.description} ({benchmark.duration})")
    else:
        parser.print_help()


if __name__ == "__main__":
    with errors_in_one_line():
        main()
