"""transformers' own common tests, on every Scaling Transformer class. Run by `run.py`, which fetches them."""

import unittest
from unittest.mock import patch

import torch
from parameterized import parameterized
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import (
    TEST_EAGER_MATCHES_SDPA_INFERENCE_PARAMETERIZATION,
    ModelTesterMixin,
    _test_eager_matches_sdpa_inference,
    ids_tensor,
    random_attention_mask,
)
from transformers_tests.test_training_mixin import TrainingTesterMixin

from hf_efficient import (
    ScalingTransformerConfig,
    ScalingTransformerForCausalLM,
    ScalingTransformerForSequenceClassification,
    ScalingTransformerModel,
)
from hf_efficient.modules.sparse_layers import SparseFeedForward


class ScalingTransformerModelTester:
    """Small configs and random inputs."""

    is_training = True
    causal_lm_class = ScalingTransformerForCausalLM  # the class that the training test overfits

    def __init__(self, parent: unittest.TestCase, **variant):
        self.parent = parent
        self.variant = variant
        self.batch_size = 5
        self.seq_length = 7
        self.vocab_size = 100
        self.hidden_size = 32
        self.intermediate_size = 48
        self.num_hidden_layers = 2
        self.num_attention_heads = 4

    def get_config(self) -> ScalingTransformerConfig:
        sizes = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        return ScalingTransformerConfig(**{**sizes, **self.variant})

    def prepare_config_and_inputs_for_common(self) -> tuple[ScalingTransformerConfig, dict[str, torch.Tensor]]:
        shape = [self.batch_size, self.seq_length]
        inputs = {"input_ids": ids_tensor(shape, self.vocab_size), "attention_mask": random_attention_mask(shape)}
        return self.get_config(), inputs


class ScalingTransformerTests(ModelTesterMixin, TrainingTesterMixin):
    """What all variants share."""

    all_model_classes = (
        ScalingTransformerModel,
        ScalingTransformerForCausalLM,
        ScalingTransformerForSequenceClassification,
    )
    test_can_init_all_missing_weights_before_2023 = True  # the year is read from a header that our files lack
    training_overfit_steps = 500
    variant: dict = {}

    def setUp(self):
        self.model_tester = ScalingTransformerModelTester(self, **self.variant)
        self.config_tester = ConfigTester(
            self, config_class=ScalingTransformerConfig, hidden_size=32, num_attention_heads=4
        )

    def test_config(self):
        self.config_tester.run_common_tests()


class ScalingTransformerDenseModelTest(ScalingTransformerTests, GenerationTesterMixin, unittest.TestCase):
    """Every layer dense, the default."""

    variant = {"tie_word_embeddings": True}


class ScalingTransformerSparseModelTest(ScalingTransformerTests, GenerationTesterMixin, unittest.TestCase):
    """Sparse feed-forward and attention with all that they can have, recurrences, and positions from digits."""

    variant = {
        "ff_sparsity": 4,
        "ff_rank": 5,
        "ff_inner_bias": True,
        "ff_sru_layers": 1,
        "ff_sru_units": 6,
        "attention_type": "multiplicative_conv",
        "attention_sparsity": 8,
        "attention_value_input": "by_module",
        "attention_output": "multiplicative_conv",
        "position_embedding_type": "fixed_base",
    }

    @parameterized.expand(TEST_EAGER_MATCHES_SDPA_INFERENCE_PARAMETERIZATION)
    def test_eager_matches_sdpa_inference(self, name, *options):
        """Override: the original compares outputs of 16 bits, in which the two attentions round otherwise and a
        controller then chooses other units. Here its bias decides, by far."""
        initialise = SparseFeedForward.init_own_weights

        def decide(layer):
            initialise(layer)
            layer.controller_bias[:, 1] += 100.0

        with patch.object(SparseFeedForward, "init_own_weights", decide):
            _test_eager_matches_sdpa_inference(self, name, *options)
