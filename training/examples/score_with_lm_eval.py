"""
Score a language model by EleutherAI's evaluation harness, on a task of your own that lies in files: no download.

    pip install lm-eval
    python -m training.examples.score_with_lm_eval --output /tmp/scored
    python -m training.examples.score_with_lm_eval --output /tmp/scored --model my-lm-exported

The folder is an exported one (`hf-efficient export`), whose code the harness loads by `trust_remote_code`, so that its
command line works as well, where hf_efficient need not be installed:

    lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True --tasks which_word --include_path TASKS

SRU++ and Scaling Transformer are scored as causal models, Terraformer as an encoder-decoder. An encoder is neither.
"""

from hf_efficient.utils import openmp  # noqa: F401  # isort: skip  (before torch, which reads it when it is loaded)

import json
from pathlib import Path
from typing import Any

from hf_efficient.hub import export
from hf_efficient.utils.process import errors_in_one_line

from .small_models import TEXTS, example_parser, load_or_make


# A question, the choices, and which of them is right; the model's is the one that it finds most likely.
TASK = """task: which_word
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{beginning}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


def write_task(folder: Path) -> Path:
    """Write the task and its rows: the beginning of a text, its last word and that of the text before."""
    folder.mkdir(parents=True, exist_ok=True)
    beginnings, words = zip(*(text.rsplit(" ", 1) for text in TEXTS), strict=True)
    rows = [
        {"beginning": beginning, "choices": [words[index], words[index - 1]], "answer": 0}
        for index, beginning in enumerate(beginnings)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "which_word.yaml").write_text(TASK.format(rows=(folder / "rows.jsonl").absolute()))
    return folder


def score(folder: Path, tasks: Path) -> float:
    """Return the accuracy of the model in an exported folder."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(folder), trust_remote_code=True, device="cpu", batch_size=4)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found: Any = simple_evaluate(model, tasks=["which_word"], task_manager=manager, bootstrap_iters=0)
    return found["results"]["which_word"]["acc,none"]


def main(argv: list[str] | None = None) -> float:
    """Score a model on the task, and return its accuracy."""
    parser = example_parser("score_with_lm_eval", __doc__)
    parser.add_argument("--family", default="srupp", help="of the model that is made where no folder is given")
    args = parser.parse_args(argv)
    folder = args.model
    if folder is None:
        auto_class = "AutoModelForSeq2SeqLM" if args.family == "terraformer" else "AutoModelForCausalLM"
        folder = export(*load_or_make(None, args.family, auto_class), args.output / "model")
    accuracy = score(folder, write_task(args.output / "tasks"))
    print(f"accuracy: {accuracy:.3f} of {len(TEXTS)} questions")
    return accuracy


if __name__ == "__main__":
    with errors_in_one_line():
        main()
