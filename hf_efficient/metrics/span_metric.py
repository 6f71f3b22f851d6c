"""
F1 of the spans that tags mark, such as the names of persons in a text, as an `evaluate.Metric` that needs no download.

A span is right if its beginning, its end and its type are. The rules are those of the CoNLL-2000 script, as in
seqeval's default mode. Use it by `load_span_metric()`, or from this file alone by
`evaluate.load("path/to/span_metric.py")`. `evaluate` reads this file's imports line by line: keep one import to a line
at the top, and none from this package.
"""

import datasets
import evaluate


INPUTS = """
Args:
    predictions: for each example a list of tags such as B-PER, I-PER and O, one for every token.
    references: the same of the truth.
    metrics: names of the scores to compute, by default precision, recall, f1 and accuracy.
Returns, all floats:
    precision, recall, f1: of all spans together
    macro_f1: mean of the F1 of every type
    accuracy: share of the tokens whose tag is right
    token_macro_f1: mean over tags of the F1 of the tokens that have them, for tags that mark no spans
"""
METRIC_NAMES = ("precision", "recall", "f1", "accuracy", "macro_f1", "token_macro_f1")
NUM_DEFAULTS = 4
# Tags with which a span begins in any case, and those after which it is at its end, by their first letter; of B-, I-
# and O alone, and of the schemes with marks for ends (E, L) and for spans of one token (S, U).
_BEGINS, _ENDS = frozenset("BSU"), frozenset("ELSU")
_MARKS = frozenset("BIELSU")


def is_span_tag(tag: str) -> bool:
    """Tell whether a tag is `O` or a mark with a type, such as `B-PER`."""
    return tag == "O" or (tag[:1] in _MARKS and tag[1:2] == "-" and len(tag) > 2)


def find_spans(tags: "list[str]") -> "set[tuple[str, int, int]]":
    """
    Find the spans that tags mark.

    An `I-` after another type, or after `O`, begins a span too, as in the script of CoNLL.

    Args:
        tags (`list[str]`): the tags of one example.

    Returns:
        `set[tuple[str, int, int]]`: type, first token, and the token behind the last one.
    """
    spans = set()
    kind, start = None, 0
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        inside = tag != "O" and is_span_tag(tag)
        if kind is not None and (not inside or name != kind or mark in _BEGINS):
            spans.add((kind, start, place))
            kind = None
        if inside and kind is None:
            kind, start = name, place
        if inside and mark in _ENDS:
            spans.add((name, start, place + 1))
            kind = None
    return spans


def _scores(right, found, true):
    precision = right / found if found else 0.0
    recall = right / true if true else 0.0
    return precision, recall, 2 * right / (found + true) if found + true else 0.0


class SpanMetric(evaluate.Metric):
    """
    Precision, recall and F1 of spans, and accuracy of tags.

    Args:
        kwargs:
            See `evaluate.EvaluationModule`.
    """

    def _info(self):
        tags = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description="F1 of spans marked by tags.",
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(predictions=tags, references=tags),
        )

    def _compute(self, predictions, references, metrics=None):
        chosen = metrics or METRIC_NAMES[:NUM_DEFAULTS]
        unknown = [name for name in chosen if name not in METRIC_NAMES]
        if unknown:
            raise ValueError(f"No score {unknown[0]!r} of token_classification; there are {', '.join(METRIC_NAMES)}.")
        counts: dict[str, list[int]] = {}
        for row, (found_tags, true_tags) in enumerate(zip(predictions, references, strict=True)):
            if len(found_tags) != len(true_tags):
                raise ValueError(f"Row {row} has {len(found_tags)} predicted tags and {len(true_tags)} true ones.")
            found, true = find_spans(found_tags), find_spans(true_tags)
            for place, spans in enumerate((found & true, found, true)):
                for kind, _, _ in spans:
                    counts.setdefault(kind, [0, 0, 0])[place] += 1
        total = [sum(column) for column in zip(*counts.values(), strict=True)] or [0, 0, 0]
        scores = dict(zip(METRIC_NAMES, _scores(*total), strict=False))
        of_types = [_scores(*count)[2] for count in counts.values()]
        scores["macro_f1"] = sum(of_types) / len(of_types) if of_types else 0.0
        return {
            name: float(scores[name] if name in scores else _token_score(name, predictions, references))
            for name in chosen
        }


def _token_score(name, predictions, references):
    from sklearn import metrics

    found = [tag for tags in predictions for tag in tags]
    true = [tag for tags in references for tag in tags]
    if name == "accuracy":
        return metrics.accuracy_score(true, found)
    return metrics.f1_score(true, found, average="macro", zero_division=0)


def load_span_metric(**kwargs) -> SpanMetric:
    """
    Load the metric of tagged spans, without a network.

    Args:
        kwargs:
            Passed to the metric, such as `cache_dir` or `experiment_id`.
    """
    return SpanMetric(**kwargs)
