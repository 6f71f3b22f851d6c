"""
Perplexity, and bits per token, byte or character, of a language model, as an `evaluate.Metric` that needs no download.

It takes the loss of each token, so it works with any model and tokenizer. Use it by `load_language_model_metric`, or
from this file alone by `evaluate.load("path/to/language_model_metric.py", "byte")`. `evaluate` reads this file's
imports line by line: keep one import to a line at the top, and none from this package.
"""

import datasets
import evaluate


DESCRIPTION = """\
Perplexity is the exponential of the mean negative log-likelihood of a token. Bits per byte or character divide the
same total, in bits, by the length of the text, so that they compare models with different tokenizers.
"""
INPUTS = """
Args:
    predictions: for each token the negative log of the probability that the model gave it, in nats.
    references: the tokens; those of -100 are left out.
    units_per_token: mean number of bytes or characters (the config's unit) of a token, 1 by default.
Returns:
    perplexity: of the tokens
    bits_per_token, bits_per_byte or bits_per_character, as the config says
"""
UNITS = ("token", "byte", "character")


class LanguageModelMetric(evaluate.Metric):
    """
    Perplexity and bits per unit of text.

    Args:
        config_name (`str`):
            The unit of text; one of `UNITS`.
        kwargs:
            See `evaluate.EvaluationModule`.

    Raises:
        ValueError: if there is no such unit.
    """

    def _info(self):
        if self.config_name not in UNITS:
            raise ValueError(f"No unit {self.config_name!r}. The units are: {', '.join(UNITS)}.")
        features = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(features),
            format="numpy",
        )

    def _compute(self, predictions, references, units_per_token=1.0):
        import numpy as np

        losses = np.asarray(predictions)[np.asarray(references) != -100]
        if losses.size == 0:
            raise ValueError("There is no token to score: all references are -100, or there are none.")
        if not units_per_token > 0:
            raise ValueError(f"`units_per_token` must be above 0, not {units_per_token}.")
        mean = losses.mean()
        with np.errstate(over="ignore"):
            perplexity = np.exp(mean)
        return {
            "perplexity": float(perplexity),
            f"bits_per_{self.config_name}": float(mean / np.log(2) / units_per_token),
        }


def load_language_model_metric(unit: str = "token", **kwargs) -> LanguageModelMetric:
    """
    Load the metric of language models, without a network.

    Args:
        unit (`str`, *optional*, defaults to `"token"`):
            The unit that bits are counted per: `"token"`, `"byte"` or `"character"`.
        kwargs:
            Passed to the metric, such as `cache_dir` or `experiment_id`.

    Raises:
        ValueError: if there is no such unit.
    """
    return LanguageModelMetric(config_name=unit, **kwargs)
