"""transformers' own common tests, on every Terraformer class that generates, and the model under them. Run by `run.py`,
which fetches them."""

import unittest

import torch
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from transformers_tests.test_training_mixin import TrainingTesterMixin

from hf_efficient import (
    TerraformerConfig,
    TerraformerForCausalLM,
    TerraformerForConditionalGeneration,
    TerraformerModel,
)


class TerraformerModelTester:
    """Small configs and random inputs."""

    is_training = True
    causal_lm_class = TerraformerForCausalLM  # the class that the training test overfits

    def __init__(self, parent: unittest.TestCase, **variant):
        self.parent = parent
        self.variant = variant
        self.batch_size = 5
        self.seq_length = self.encoder_seq_length = self.decoder_seq_length = 7
        self.vocab_size = 100
        self.hidden_size = 32
        self.num_attention_heads = 4
        self.num_layers = 2

    @property
    def num_hidden_states_types(self) -> int:
        return 2 if self.get_config().is_encoder_decoder else 1

    @property
    def num_hidden_layers(self) -> int:
        return self.get_config().num_hidden_layers

    def get_config(self) -> TerraformerConfig:
        sizes = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": 48,
            "num_encoder_layers": self.num_layers,
            "num_decoder_layers": self.num_layers,
            "attentions_per_layer": 1,
            "num_attention_heads": self.num_attention_heads,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        return TerraformerConfig(**{**sizes, **self.variant})

    def prepare_config_and_inputs_for_common(self) -> tuple[TerraformerConfig, dict[str, torch.Tensor]]:
        shape = [self.batch_size, self.seq_length]
        # Ids from 3: no row ends by chance, and a source has no padding inside.
        inputs = {"input_ids": ids_tensor(shape, self.vocab_size - 3) + 3}
        config = self.get_config()
        if config.is_encoder_decoder:
            inputs["attention_mask"] = torch.ones(shape, dtype=torch.long)
            inputs["attention_mask"][1, 5:] = 0
            inputs["decoder_input_ids"] = ids_tensor(shape, self.vocab_size - 3) + 3
            inputs["decoder_attention_mask"] = torch.ones(shape, dtype=torch.long)
        else:
            inputs["attention_mask"] = random_attention_mask(shape)
        return config, inputs


class TerraformerTests(ModelTesterMixin):
    """What all variants share."""

    all_model_classes = (TerraformerModel, TerraformerForConditionalGeneration)
    test_can_init_all_missing_weights_before_2023 = True  # the year is read from a header that our files lack
    variant: dict = {}

    def setUp(self):
        self.model_tester = TerraformerModelTester(self, **self.variant)
        self.config_tester = ConfigTester(
            self,
            config_class=TerraformerConfig,
            common_properties=["hidden_size", "num_attention_heads"],
            hidden_size=32,
            num_attention_heads=4,
        )

    def test_config(self):
        self.config_tester.run_common_tests()


class JoinedTests(TerraformerTests):
    """What variants share whose decoder reads source and target in one stack."""

    def test_retain_grad_hidden_states_attentions(self):
        """Override: the original asks for weights of cross attention as well, of which there are none."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config._attn_implementation = "eager"
        model = TerraformerModel(config)
        output = model(**inputs, output_attentions=True, output_hidden_states=True)
        names = ("encoder_hidden_states", "decoder_hidden_states", "encoder_attentions", "decoder_attentions")
        kept = [output[name][0] for name in names]
        for tensor in kept:
            tensor.retain_grad()
        output.last_hidden_state.flatten()[0].backward(retain_graph=True)
        for tensor in kept:
            assert tensor.grad is not None


class TerraformerModelTest(JoinedTests, GenerationTesterMixin, unittest.TestCase):
    """Both streams, the source in front of the target."""


class TerraformerSparseModelTest(JoinedTests, GenerationTesterMixin, unittest.TestCase):
    """Sparse attention, recurrences, streams that are averaged, one swap."""

    variant = {
        "attention_type": "multiplicative_conv",
        "attention_sparsity": 8,
        "ff_sru_layers": 1,
        "ff_sru_units": 6,
        "encoder_keeps_streams": False,
        "encoder_swaps": 1,
    }


class TerraformerCrossAttentionModelTest(TerraformerTests, GenerationTesterMixin, unittest.TestCase):
    """The ordinary encoder-decoder."""

    variant = {"decoder_type": "cross_attention", "tie_word_embeddings": True}


class TerraformerCausalModelTest(TerraformerTests, TrainingTesterMixin, GenerationTesterMixin, unittest.TestCase):
    """The decoder alone, which the test of training overfits; that writes on, as no encoder-decoder does."""

    training_overfit_steps = 500
    all_model_classes = (TerraformerForCausalLM,)
    variant = {"is_encoder_decoder": False, "num_encoder_layers": 0, "forget_every": 1}
