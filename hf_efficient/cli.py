"""
The console command `hf-efficient`: scripts, converters, export and kernels under one name.

A command imports what it runs, and nothing else is imported: `hf-efficient --help` answers at once.
"""

import difflib
import filecmp
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from .utils.version import __version__


PROGRAM = "hf-efficient"
# What a command does, and the module whose `main` takes its arguments.
COMMANDS = {
    "pretrain": ("pretrain an encoder on text", "training.pretrain"),
    "train-lm": ("train a causal language model", "training.train_lm"),
    "train-seq2seq": ("train an encoder-decoder to summarise, or on plain text", "training.train_seq2seq"),
    "finetune": ("fine-tune on a task of your own, and score it", "training.finetune"),
    "finetune-glue": ("fine-tune on GLUE tasks over several seeds", "training.finetune_glue"),
    "train-tokenizer": ("train a tokenizer", "training.train_tokenizer"),
    "count-rare-words": ("count words, and choose those that get notes", "training.count_rare_words"),
    "sparsify": ("make the feed-forward layers of a trained GPT-2 sparse", "training.sparsify"),
    "export": ("write a model with its code into a folder for the Hub", "hub.__main__"),
    "push": ("write such a folder and upload it", "hub.__main__"),
    "convert": ("convert a checkpoint that the original authors released", ""),
    "kernels": ("build or check the compiled kernels", ""),
}
CONVERTERS = {
    "mcbert": ("MC-BERT, and its baselines", "objectives.convert_mcbert"),
    "scaling-transformer": ("Scaling Transformers of trax", "models.scaling_transformer.convert_scaling_transformer"),
    "srupp": ("SRU and SRU++", "models.srupp.convert_srupp"),
    "terraformer": ("Terraformer, encoder-decoders and Reformer of trax", "models.terraformer.convert_terraformer"),
    "tupe": ("TUPE", "models.tupe.convert_tupe"),
}
KERNEL_COMMANDS = {
    "build": ("build what is missing or changed, of all kernels or those that are named; --help tells more", ""),
    "check": ("say what is built and current, and what this machine lacks", ""),
}
HERE = Path(__file__).resolve().parent


def _list(title: str, program: str, commands: dict[str, tuple[str, str]], more: str = "") -> str:
    rows = [f"  {name:<{max(map(len, commands))}}  {text}" for name, (text, _) in commands.items()]
    return "\n".join([f"usage: {program} COMMAND [options]", "", title, "", *rows, "", more.strip()]).strip()


def _choose(argv: Sequence[str], program: str, commands: dict[str, tuple[str, str]], help_text: str) -> str:
    """
    Return the command that the arguments start with.

    Raises:
        SystemExit: with what there is, where help is asked for or no such command is named.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text)
        sys.exit(0 if argv else 2)
    if argv[0] not in commands:
        near = difflib.get_close_matches(argv[0].replace("_", "-"), commands, 1)
        meant = f", but {near[0]}" if near else ""
        print(f"Error: there is no command {argv[0]}{meant}. {program} --help lists them.", file=sys.stderr)
        sys.exit(2)
    return argv[0]


def _find_scripts() -> None:
    """In a clone the scripts lie beside the package, where they belong to it too."""
    if not (HERE / "training").is_dir() and (HERE.parent / "training" / "pretrain.py").is_file():
        sys.modules[__package__].__path__.append(str(HERE.parent))


def _converter(argv: Sequence[str]) -> Callable[[], object]:
    program = f"{PROGRAM} convert"
    text = _list(
        "Convert a checkpoint that the original authors released into a folder for from_pretrained.",
        program,
        CONVERTERS,
        f"`{program} COMMAND --help` shows the options of one.",
    )
    name = _choose(argv, program, CONVERTERS, text)
    sys.argv[0] = f"{program} {name}"
    return lambda: import_module(f".{CONVERTERS[name][1]}", __package__).CONVERTER.run(list(argv[1:]))


def _renew(source: Path, target: Path) -> None:
    """Make a copy of the kernels' sources be like them; what was built stays."""
    files = {
        path.relative_to(source) for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    for path in list(target.rglob("*")):
        inner = path.relative_to(target)
        if path.is_file() and inner not in files and not {"build", "__pycache__"} & set(inner.parts):
            path.unlink()
    for name in sorted(files):
        copy = target / name
        if not copy.is_file() or not filecmp.cmp(source / name, copy, shallow=False):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, copy)


def _build_kernels(options: Sequence[str]) -> None:
    """Run `kernels/build.py`: of a clone in its place, of an installed package in a copy in the user's cache, where the
    package looks for what was built."""
    folder, carried = HERE.parent / "kernels", HERE / "kernels"
    if carried.is_dir():
        cache = import_module(".ops.kernel_loader", __package__).cache_folder()
        if cache is None:
            raise FileNotFoundError("There is no place to build in: set XDG_CACHE_HOME to a folder of yours.")
        folder = cache
        _renew(carried, folder)
    environment = {**os.environ, "HF_EFFICIENT_BUILD_COMMAND": f"{PROGRAM} kernels build"}
    sys.exit(subprocess.call([sys.executable, str(folder / "build.py"), *options], env=environment))


def _kernels(argv: Sequence[str]) -> Callable[[], object]:
    text = _list(
        "Build or check the compiled kernels; without them everything runs in plain torch.",
        f"{PROGRAM} kernels",
        KERNEL_COMMANDS,
    )
    name = _choose(argv, f"{PROGRAM} kernels", KERNEL_COMMANDS, text)
    return lambda: _build_kernels([*(["--check"] if name == "check" else []), *argv[1:]])


def _command(argv: Sequence[str]) -> Callable[[], object]:
    """Find what a command line runs; torch is not imported before that is called."""
    if argv[:1] == ["--version"]:
        return lambda: print(f"{PROGRAM} {__version__}")
    text = _list(
        "Efficient language models for the Hugging Face ecosystem.",
        PROGRAM,
        COMMANDS,
        f"`{PROGRAM} COMMAND --help` shows the options of a command. On several processes run\n"
        "`torchrun --nproc_per_node N -m hf_efficient.cli COMMAND ...`.",
    )
    name = _choose(argv, PROGRAM, COMMANDS, text)
    if name in ("convert", "kernels"):
        return (_converter if name == "convert" else _kernels)(argv[1:])
    module = COMMANDS[name][1]
    sys.argv[0] = f"{PROGRAM} {name}"
    _find_scripts()
    # The hub's command line has its commands itself.
    arguments = list(argv if module == "hub.__main__" else argv[1:])
    return lambda: import_module(f".{module}", __package__).main(arguments)


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run a command line.

    Raises:
        SystemExit: with code 2 and one line on stderr for a fault in what was given.
    """
    run = _command(list(sys.argv[1:] if argv is None else argv))
    from .utils import openmp  # noqa: F401  # isort: skip  (before torch, which reads it when it is loaded)
    from .utils.process import errors_in_one_line

    with errors_in_one_line():
        run()


if __name__ == "__main__":
    main()
