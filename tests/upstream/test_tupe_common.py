"""transformers' own common tests, on every TUPE class. Run by `run.py`, which fetches them."""

import tempfile
import unittest

import torch
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from transformers_tests.test_training_mixin import TrainingTesterMixin

from hf_efficient import (
    TupeConfig,
    TupeForMaskedLM,
    TupeForMultipleChoice,
    TupeForPreTraining,
    TupeForQuestionAnswering,
    TupeForSequenceClassification,
    TupeForTokenClassification,
    TupeModel,
)
from hf_efficient.models.tupe.modeling_tupe import AUTO_ATTENTION


class TupeModelTester:
    """Small configs and random inputs. The ids are random, so the check for [CLS] in front is off."""

    is_training = True
    causal_lm_class = TupeForMaskedLM  # the class that the training test overfits
    num_choices = 4

    def __init__(self, parent: unittest.TestCase, **variant):
        self.parent = parent
        self.variant = variant
        self.batch_size = 5
        self.seq_length = 7
        self.vocab_size = 99
        self.hidden_size = 32
        self.num_hidden_layers = 2
        self.num_attention_heads = 4

    def get_config(self) -> TupeConfig:
        sizes = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": 37,
            "max_position_embeddings": 64,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 16,
            "cls_token_id": None,
        }
        return TupeConfig(**sizes, **self.variant)

    def prepare_config_and_inputs_for_common(self) -> tuple[TupeConfig, dict[str, torch.Tensor]]:
        shape = [self.batch_size, self.seq_length]
        inputs = {
            "input_ids": ids_tensor(shape, self.vocab_size),
            "attention_mask": random_attention_mask(shape),
            "token_type_ids": ids_tensor(shape, 2),
        }
        return self.get_config(), inputs


class TupeModelTest(ModelTesterMixin, TrainingTesterMixin, unittest.TestCase):
    """TUPE-R, the default."""

    all_model_classes = (
        TupeModel,
        TupeForMaskedLM,
        TupeForPreTraining,
        TupeForSequenceClassification,
        TupeForTokenClassification,
        TupeForQuestionAnswering,
        TupeForMultipleChoice,
    )
    test_resize_position_embeddings = True
    test_can_init_all_missing_weights_before_2023 = True  # the year is read from a header that our files lack
    variant: dict = {}

    def setUp(self):
        self.model_tester = TupeModelTester(self, **self.variant)
        self.config_tester = ConfigTester(self, config_class=TupeConfig, hidden_size=32, num_attention_heads=4)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """Labels for the pretraining class as well, whose form the common tests cannot know."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is TupeForPreTraining:
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_sdpa_can_dispatch_non_composite_models(self):
        """Override: the original asserts that "sdpa" is chosen when nothing is asked for. TUPE then chooses per device
        and mode what is fastest, because torch's fused kernel on a CPU takes no bias that is being trained. That the
        form which was asked for is the one that runs is tested as in the original."""
        for model_class in self.all_model_classes:
            with tempfile.TemporaryDirectory() as folder:
                model_class(self.model_tester.get_config()).save_pretrained(folder)
                for requested in (None, "sdpa", "eager"):
                    model = model_class.from_pretrained(folder, attn_implementation=requested)
                    configs = [part.config for part in model.modules() if hasattr(part, "config")]
                    assert {config._attn_implementation for config in configs} == {requested or AUTO_ATTENTION}


class TupeTiedPreNormModelTest(TupeModelTest):
    """The other side of every switch: absolute positions, tied [CLS], pre-norm, no embedding norm."""

    variant = {
        "relative_attention": False,
        "untie_cls": False,
        "normalize_before": True,
        "embedding_norm": False,
        "tie_word_embeddings": False,
    }
