"""
Serve a language model by transformers' own server, for any client of OpenAI's API, and for `transformers chat`.

    pip install "transformers[serving]"
    python -m training.examples.serve my-lm --port 8000
    curl http://localhost:8000/v1/completions -H "Content-Type: application/json" \\
        -d '{"model": "my-lm", "prompt": "The old dog", "max_tokens": 20}'
    transformers chat my-lm http://localhost:8000/v1

`transformers serve my-lm` alone cannot load such a model, with `--trust-remote-code` neither: it looks the class up
in the namespace of transformers (5.24), where those of other packages are not. This program puts them there, in its
own process, and hands everything else to `transformers serve`, whose options it takes. Chats need a tokenizer with a
chat template; a model that was trained on plain text has none, and goes on with a prompt by `/v1/completions`.
"""

from hf_efficient.utils import openmp  # noqa: F401  # isort: skip  (before torch, which reads it when it is loaded)

import sys

import hf_efficient
from hf_efficient.auto import FAMILIES
from hf_efficient.utils.process import errors_in_one_line


AUTO_CLASS = "AutoModelForCausalLM"


def name_classes() -> list[str]:
    """Let the server find the causal language models of the package by name, and return the names."""
    from transformers.cli.serving import model_manager

    names = [family.classes[AUTO_CLASS] for family in FAMILIES.values() if AUTO_CLASS in family.classes]
    for name in names:
        # Of the module that the server has: transformers puts another in its place while it is being imported.
        setattr(model_manager.transformers, name, getattr(hf_efficient, name))
    return names


def main(argv: list[str] | None = None) -> None:
    """Run `transformers serve` with these arguments."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    name_classes()
    from transformers.cli.transformers import app

    app(["serve", *argv], prog_name="transformers")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
