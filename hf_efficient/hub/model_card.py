"""The model card of an exported model: metadata with a `model-index`, loading instructions, and measurements."""

import json
import statistics
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase


PIPELINE_TAGS = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}

CARD = """---
{metadata}
---

# {name}

`{architecture}` with {parameters:,} parameters.

## Use

```python
from transformers import {imported}

{load_tokenizer}model = {auto_class}.from_pretrained("{name}", trust_remote_code=True)
```

`trust_remote_code=True` runs the Python files of this repository ({files}): read them first, and pin the `revision`
that you read. Where the package `hf_efficient` is installed, `import hf_efficient` before loading and leave the
argument away; the package's own classes are used then.

## Results

{results}
"""


def model_card(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    auto_class: str,
    name: str,
    code_files: list[str],
    results: str | Path | dict | list | None = None,
    license: str | None = None,
    language: str | None = None,
) -> str:
    """
    Write the text of a model's README.md.

    Args:
        model (`PreTrainedModel`): the model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the tokenizer that lies beside it.
        auto_class (`str`): name of the Auto class that loads it.
        name (`str`): the argument of `from_pretrained` in the card's example.
        code_files (`list[str]`): the Python files that `trust_remote_code=True` runs.
        results (`str`, `Path`, `dict` or `list`, *optional*): as for [`read_results`].
        license, language (`str`, *optional*): as the Hub spells them.

    Raises:
        ValueError: if the results are not of the form that [`read_results`] knows.
    """
    pipeline_tag = PIPELINE_TAGS.get(auto_class)
    evaluations = read_results(results, pipeline_tag) if results is not None else []
    metadata = ModelCardData(
        model_name=name,
        eval_results=evaluations or None,
        pipeline_tag=pipeline_tag,
        library_name="transformers",
        tags=["hf_efficient", model.config.model_type],
        license=license,
        language=language,
    )
    return CARD.format(
        metadata=metadata.to_yaml(),
        name=name,
        architecture=type(model).__name__,
        parameters=model.num_parameters(),
        auto_class=auto_class,
        imported=auto_class if tokenizer is None else f"{auto_class}, AutoTokenizer",
        load_tokenizer="" if tokenizer is None else f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n',
        files=", ".join(f"`{file}`" for file in code_files),
        results=_results_table(evaluations),
    )


def read_results(results: str | Path | dict | list, task_type: str | None = None) -> list[EvalResult]:
    """
    Convert measured results to the form of a card's `model-index`.

    Args:
        results (`str`, `Path`, `dict` or `list`): a JSON file, or its content: one entry or several (a list, or a
            dict with the list under `"results"`) of `{"task": "sst2", "metrics": {"accuracy": 0.91}}`; further keys
            do no harm. A metric is a number, or a list with a number for each seed, of which the median is reported
            with its range, or `None` where it is undefined, and is left out then. `"dataset"` may name the data in
            the Hub's terms: `{"type": "nyu-mll/glue", "name": "GLUE SST-2", "config": "sst2", "split": "validation"}`.
        task_type (`str`, *optional*): the model's pipeline tag.

    Raises:
        ValueError: if an entry lacks its task or metrics, or a metric is not numeric.
    """
    content = json.loads(Path(results).read_text(encoding="utf-8")) if isinstance(results, (str, Path)) else results
    entries = content.get("results", [content]) if isinstance(content, dict) else content
    evaluations = []
    for entry in entries:
        if not (isinstance(entry, dict) and entry.get("task") and isinstance(entry.get("metrics"), dict)):
            raise ValueError(f'A result has the form {{"task": ..., "metrics": {{...}}}}; this one has not: {entry!r}')
        dataset = {"type": entry["task"], "name": entry["task"], "split": "validation", **entry.get("dataset", {})}
        for metric, value in entry["metrics"].items():
            if value is None:
                continue
            number, note = _median(value, f"{entry['task']}, {metric}")
            evaluations.append(
                EvalResult(
                    task_type=task_type or "other",
                    dataset_type=dataset["type"],
                    dataset_name=dataset["name"],
                    dataset_config=dataset.get("config"),
                    dataset_split=dataset["split"],
                    metric_type=metric,
                    metric_value=number,
                    metric_name=metric + note,
                )
            )
    return evaluations


def _median(value: Any, where: str) -> tuple[float, str]:
    """The value of a metric, and a note on how many seeds it comes from."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        raise ValueError(f"The result {where} is {value!r}, neither a number nor a list of numbers.")
    if len(values) == 1:
        return values[0], ""
    note = f", median of {len(values)} seeds ({min(values):.4g} to {max(values):.4g})"
    return statistics.median(values), note


def _results_table(evaluations: list[EvalResult]) -> str:
    if not evaluations:
        return "None were given when this folder was written."
    rows = [f"| {e.dataset_name} | {e.dataset_split} | {e.metric_name} | {e.metric_value:.4g} |" for e in evaluations]
    return "\n".join(["| data | split | metric | value |", "| --- | --- | --- | ---: |", *rows])
