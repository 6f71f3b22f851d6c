"""
Scores of classes, of several labels at once, and of numbers, as an `evaluate.Metric` that needs no download.

The numbers come from scikit-learn and scipy. Use it by `load_classification_metric("classification")`, or from this
file alone by `evaluate.load("path/to/classification_metric.py", "multi_label")`. `evaluate` reads this file's imports
line by line: keep one import to a line at the top, and none from this package.
"""

import warnings

import datasets
import evaluate
import numpy as np


INPUTS = """
Args:
    predictions: for each example the number of its class; or (multi_label) a 0 or 1 for every label; or (regression) a
        number.
    references: the same of the truth.
    metrics: names of the scores to compute, by default those that METRIC_NAMES lists first for the kind of task.
Returns:
    a float for each of them. A correlation is NaN if all predictions are equal, or there are fewer than two.
"""
# For each kind of task its scores, and how many of them are the default.
METRIC_NAMES = {
    "classification": (
        "accuracy",
        "macro_f1",
        "micro_f1",
        "weighted_f1",
        "macro_precision",
        "macro_recall",
        "balanced_accuracy",
        "matthews_correlation",
        "f1",
    ),
    "multi_label": (
        "micro_f1",
        "macro_f1",
        "weighted_f1",
        "samples_f1",
        "micro_precision",
        "micro_recall",
        "macro_precision",
        "macro_recall",
        "accuracy",
    ),
    "regression": ("pearson", "spearmanr", "rmse", "mse", "mae", "r2"),
}
NUM_DEFAULTS = {"classification": 2, "multi_label": 2, "regression": 3}
LOWER_IS_BETTER = ("rmse", "mse", "mae")


class ClassificationMetric(evaluate.Metric):
    """
    Scores of one kind of task.

    Args:
        config_name (`str`):
            `"classification"` (one class of several), `"multi_label"` or `"regression"`. `f1` of the first is that of
            class 1, for two classes; `accuracy` of the second counts examples whose labels are all right.
        kwargs:
            See `evaluate.EvaluationModule`.

    Raises:
        ValueError: for another kind of task, or, when it computes, for a score that the kind does not have.
    """

    def _info(self):
        if self.config_name not in METRIC_NAMES:
            raise ValueError(f"No scores for {self.config_name!r}, only for {', '.join(METRIC_NAMES)}.")
        value = datasets.Value("float64" if self.config_name == "regression" else "int64")
        if self.config_name == "multi_label":
            value = datasets.List(value)
        return evaluate.MetricInfo(
            description="Scores of classification, of several labels at once, and of regression.",
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(predictions=value, references=value),
            format=None if self.config_name == "multi_label" else "numpy",  # which knows no lists
        )

    def _compute(self, predictions, references, metrics=None):
        names = METRIC_NAMES[self.config_name]
        chosen = metrics or names[: NUM_DEFAULTS[self.config_name]]
        unknown = [name for name in chosen if name not in names]
        if unknown:
            raise ValueError(f"No score {unknown[0]!r} of {self.config_name}; there are {', '.join(names)}.")
        if self.config_name == "regression":
            functions = _regression_functions()
        else:
            predictions, references = np.asarray(predictions), np.asarray(references)
            functions = _class_functions(chosen)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of scores that are not defined, and classes that do not occur
            return {name: float(functions[name](references, predictions)) for name in chosen}


def _regression_functions():
    from scipy.stats import pearsonr, spearmanr
    from sklearn import metrics

    return {
        "pearson": lambda truth, found: pearsonr(truth, found).statistic if len(truth) > 1 else np.nan,
        "spearmanr": lambda truth, found: spearmanr(truth, found).statistic if len(truth) > 1 else np.nan,
        "rmse": metrics.root_mean_squared_error,
        "mse": metrics.mean_squared_error,
        "mae": metrics.mean_absolute_error,
        "r2": metrics.r2_score,
    }


def _class_functions(names):
    """For each name its function of truth and predictions; of `macro_f1` and the like the first part says the mean."""
    from sklearn import metrics

    functions = {
        "accuracy": metrics.accuracy_score,
        "balanced_accuracy": metrics.balanced_accuracy_score,
        "matthews_correlation": metrics.matthews_corrcoef,
        "f1": lambda truth, found: metrics.f1_score(truth, found, zero_division=0),
    }
    scores = {"f1": metrics.f1_score, "precision": metrics.precision_score, "recall": metrics.recall_score}
    for name in names:
        average, _, score = name.partition("_")
        if name not in functions:
            function = scores[score]
            functions[name] = lambda truth, found, function=function, average=average: function(
                truth, found, average=average, zero_division=0
            )
    return functions


def load_classification_metric(task_type: str, **kwargs) -> ClassificationMetric:
    """
    Load the metric of a kind of task, without a network.

    Args:
        task_type (`str`):
            `"classification"`, `"multi_label"` or `"regression"`.
        kwargs:
            Passed to the metric, such as `cache_dir` or `experiment_id`.

    Raises:
        ValueError: for another kind of task.
    """
    return ClassificationMetric(config_name=task_type, **kwargs)
