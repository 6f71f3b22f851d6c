"""
ROUGE of summaries, by Google's `rouge-score`, as an `evaluate.Metric` that needs no download.

Inputs and result keys are those of the Hub's `rouge`, and so are the numbers, but for one point: the Hub's result is
the median of a thousand means over rows that are drawn at random, and this one is the mean over all rows. Use it by
`load_rouge_metric()`, or from this file alone by `evaluate.load("path/to/rouge_metric.py")`. `evaluate` reads this
file's imports line by line: keep one import to a line at the top, and none from this package.
"""

import datasets
import evaluate


CITATION = """\
@inproceedings{lin2004rouge,
  title={{ROUGE}: A Package for Automatic Evaluation of Summaries},
  author={Lin, Chin-Yew},
  booktitle={Text Summarization Branches Out},
  year={2004}
}
"""
DESCRIPTION = """\
Overlap of a summary with one that a person wrote, as F1: of words (rouge1), of pairs of words (rouge2), of the longest
common subsequence (rougeL), and of the union of those of the sentences (rougeLsum).
"""
INPUTS = """
Args:
    predictions: a summary for each row. For rougeLsum its sentences are divided by line breaks.
    references: for each row a text, or a list of several, of which the one that scores highest counts.
    rouge_types: all four by default; rouge3 to rouge9 exist as well.
    use_aggregator: True for means over rows, False for the score of each row, in a list.
    use_stemmer: whether words that differ in their endings only are equal.
    tokenizer: a function from a text to its words. Without it these are runs of the letters a to z and digits, of the
        text in lower case, so that a text in another script has none, and scores 0.
Returns:
    a number from 0 to 1, or a list of them, for each of rouge_types
"""
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class _FunctionTokenizer:
    def __init__(self, function):
        self.tokenize = function


class RougeMetric(evaluate.Metric):
    """
    ROUGE-1, -2, -L and -Lsum.

    Args:
        kwargs:
            See `evaluate.EvaluationModule`.
    """

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            homepage="https://github.com/google-research/google-research/tree/master/rouge",
            inputs_description=INPUTS,
            features=[
                datasets.Features(predictions=text, references=datasets.List(text)),
                datasets.Features(predictions=text, references=text),
            ],
        )

    def _compute(
        self,
        predictions,
        references,
        rouge_types=ROUGE_TYPES,
        use_aggregator=True,
        use_stemmer=False,
        tokenizer=None,
    ):
        from rouge_score.rouge_scorer import RougeScorer

        own = None if tokenizer is None else _FunctionTokenizer(tokenizer)
        scorer = RougeScorer(list(rouge_types), use_stemmer=use_stemmer, tokenizer=own)
        scores: dict[str, list[float]] = {name: [] for name in rouge_types}
        for row, (prediction, given) in enumerate(zip(predictions, references, strict=True)):
            targets = [given] if isinstance(given, str) else list(given)
            if not targets:
                raise ValueError(f"Row {row} has no reference: leave it out, or give it one.")
            for name, score in scorer.score_multi(targets, prediction).items():
                scores[name].append(float(score.fmeasure))
        if not use_aggregator:
            return scores
        return {name: sum(values) / len(values) for name, values in scores.items()}


def load_rouge_metric(**kwargs) -> RougeMetric:
    """
    Load the metric of summaries, without a network.

    Args:
        kwargs:
            Passed to the metric, such as `cache_dir` or `experiment_id`.
    """
    return RougeMetric(**kwargs)
