"""
The GLUE metric as an `evaluate.Metric` that needs no download.

Config names, input types and result keys are those of the Hub's `glue` metric, and the numbers come from the
same functions of scikit-learn and scipy. Use it by `load_glue_metric("mrpc")`, or from this file alone by
`evaluate.load("path/to/glue_metric.py", "mrpc")`. `evaluate` reads this file's imports line by line: keep one
import to a line at the top, and none from this package.
"""

import datasets
import evaluate


CITATION = """\
@inproceedings{wang2019glue,
  title={{GLUE}: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding},
  author={Wang, Alex and Singh, Amanpreet and Michael, Julian and Hill, Felix and Levy, Omer and
          Bowman, Samuel R.},
  booktitle={International Conference on Learning Representations},
  year={2019}
}
"""
INPUTS = """
Args:
    predictions: one prediction for each example, a class index or (stsb) a float.
    references: one label for each example, of the same type.
Returns, depending on the task, all floats:
    accuracy
    f1: F1 of class 1
    pearson, spearmanr: correlations, NaN if all predictions are equal or there is one alone
    matthews_correlation
"""

ACCURACY = ("accuracy",)
METRIC_KEYS = {
    "cola": ("matthews_correlation",),
    "sst2": ACCURACY,
    "mrpc": ("accuracy", "f1"),
    "stsb": ("pearson", "spearmanr"),
    "qqp": ("accuracy", "f1"),
    "mnli": ACCURACY,
    "mnli_matched": ACCURACY,
    "mnli_mismatched": ACCURACY,
    "qnli": ACCURACY,
    "rte": ACCURACY,
    "wnli": ACCURACY,
    "hans": ACCURACY,
    "topic_pairs": ACCURACY,
}


class GlueMetric(evaluate.Metric):
    """
    The metric of one GLUE task, or of the built-in task `topic_pairs`.

    Args:
        config_name (`str`):
            The task; one of the keys of `METRIC_KEYS`.
        kwargs:
            See `evaluate.EvaluationModule`.

    Raises:
        ValueError: if there is no task of that name.
    """

    def _info(self):
        if self.config_name not in METRIC_KEYS:
            raise ValueError(f"No GLUE task {self.config_name!r}. The tasks are: {', '.join(METRIC_KEYS)}.")
        value = datasets.Value("float32" if self.config_name == "stsb" else "int64")
        return evaluate.MetricInfo(
            description="The General Language Understanding Evaluation (GLUE) benchmark.",
            citation=CITATION,
            homepage="https://gluebenchmark.com",
            inputs_description=INPUTS,
            features=datasets.Features(predictions=value, references=value),
            format="numpy",
        )

    def _compute(self, predictions, references):
        from scipy.stats import pearsonr, spearmanr
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        functions = {
            "accuracy": accuracy_score,
            "f1": f1_score,
            "pearson": lambda references, predictions: pearsonr(references, predictions).statistic,
            "spearmanr": lambda references, predictions: spearmanr(references, predictions).statistic,
            "matthews_correlation": matthews_corrcoef,
        }
        keys = METRIC_KEYS[self.config_name]
        if "pearson" in keys and len(references) < 2:  # which scipy refuses
            return dict.fromkeys(keys, float("nan"))
        return {key: float(functions[key](references, predictions)) for key in keys}


def load_glue_metric(task: str, **kwargs) -> GlueMetric:
    """
    Load the metric of a GLUE task, without a network.

    Args:
        task (`str`):
            A GLUE task (`mnli_matched` and `mnli_mismatched` too), or `topic_pairs`.
        kwargs:
            Passed to the metric, such as `cache_dir` or `experiment_id`.

    Raises:
        ValueError: if there is no task of that name.
    """
    return GlueMetric(config_name=task, **kwargs)
