"""transformers' own common tests, on every SRU++ class. Run by `run.py`, which fetches them."""

import unittest

import torch
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from transformers_tests.test_training_mixin import TrainingTesterMixin

from hf_efficient import (
    SruppConfig,
    SruppForCausalLM,
    SruppForMaskedLM,
    SruppForQuestionAnswering,
    SruppForSequenceClassification,
    SruppForTokenClassification,
    SruppModel,
)


class SruppModelTester:
    """Small configs and random inputs."""

    is_training = True
    causal_lm_class = SruppForCausalLM  # the class that the training test overfits

    def __init__(self, parent: unittest.TestCase, **variant):
        self.parent = parent
        self.variant = variant
        self.batch_size = 5
        self.seq_length = 7
        self.vocab_size = 99
        self.hidden_size = 32
        self.num_hidden_layers = 2
        self.num_attention_heads = 4

    def get_config(self) -> SruppConfig:
        sizes = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "projection_size": 24,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        return SruppConfig(**{**sizes, **self.variant})

    def prepare_config_and_inputs_for_common(self) -> tuple[SruppConfig, dict[str, torch.Tensor]]:
        shape = [self.batch_size, self.seq_length]
        inputs = {"input_ids": ids_tensor(shape, self.vocab_size), "attention_mask": random_attention_mask(shape)}
        return self.get_config(), inputs


class SruppTests(ModelTesterMixin, TrainingTesterMixin):
    """What all variants share."""

    all_model_classes = (
        SruppModel,
        SruppForCausalLM,
        SruppForSequenceClassification,
        SruppForTokenClassification,
        SruppForQuestionAnswering,
    )
    test_can_init_all_missing_weights_before_2023 = True  # the year is read from a header that our files lack
    training_overfit_steps = 500
    variant: dict = {}

    def setUp(self):
        self.model_tester = SruppModelTester(self, **self.variant)
        self.config_tester = ConfigTester(self, config_class=SruppConfig, hidden_size=32, num_attention_heads=4)

    def test_config(self):
        self.config_tester.run_common_tests()


class SruppModelTest(SruppTests, GenerationTesterMixin, unittest.TestCase):
    """Every layer attends, the default."""


class SruppSparseModelTest(SruppTests, GenerationTesterMixin, unittest.TestCase):
    """The other side of every switch: the last layer alone attends, an input that is projected, norms around layers, a
    scaled highway, tanh."""

    variant = {
        "attention_layers": [1],
        "embedding_size": 20,
        "project_input": True,
        "layer_norm": True,
        "attention_layer_norm": False,
        "rescale": True,
        "recurrence_activation": "tanh",
    }

    def test_attention_outputs(self):
        """Override: the original expects as many attentions as layers, here as many as layers that attend."""
        config = self.model_tester.get_config()
        self.model_tester.get_config = lambda: config
        self.model_tester.num_hidden_layers = len(config.attention_layer_indices)
        super().test_attention_outputs()

    def test_tied_weights_keys(self):
        """Override: the original ties any config, and embeddings narrower than the layers cannot be tied."""
        self.model_tester.variant = {**self.variant, "embedding_size": self.model_tester.hidden_size}
        super().test_tied_weights_keys()


class SruModelTest(SruppTests, GenerationTesterMixin, unittest.TestCase):
    """SRU without attention."""

    has_attentions = False
    variant = {"attention_layers": [], "projection_size": 0, "tie_word_embeddings": True}


class SruppBidirectionalModelTest(SruppTests, unittest.TestCase):
    """The encoder."""

    all_model_classes = (
        SruppModel,
        SruppForMaskedLM,
        SruppForSequenceClassification,
        SruppForTokenClassification,
        SruppForQuestionAnswering,
    )
    variant = {"bidirectional": True}

    def setUp(self):
        super().setUp()
        self.model_tester.causal_lm_class = SruppForMaskedLM
