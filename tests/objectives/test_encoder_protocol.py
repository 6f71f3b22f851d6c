"""Objectives and notes on encoders that neither the package nor transformers knows, with the optional methods of the
protocol and without them."""

import copy

import pytest
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from hf_efficient.objectives.meta_controller import MetaControllerObjective
from hf_efficient.objectives.mlm import MaskedLMObjective
from hf_efficient.objectives.notes import NoteDictionary, attach
from hf_efficient.objectives.replaced_token import ReplacedTokenObjective
from tests.helpers.comparison import assert_close
from tests.objectives.notes.note_models import KEYS, ORIGINAL, SPANS, TARGETS, VOCAB, make_batch


WIDTH = 21


@strict
class ConvolutionConfig(PreTrainedConfig):
    """Config of an encoder without heads and without a feed-forward part."""

    model_type = "test_convolution"
    vocab_size: int = VOCAB
    hidden_size: int = WIDTH
    num_hidden_layers: int = 2


class ConvolutionModel(PreTrainedModel):
    """Convolutions over embeddings, with their norm under a usual name."""

    config_class = ConvolutionConfig
    base_model_prefix = "convolutions"
    norm_name = "embed_norm"

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)
        self.add_module(self.norm_name, nn.LayerNorm(config.hidden_size))
        width = self.inner_width(config)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv1d(config.hidden_size, width, 3, padding=1), nn.Tanh(), nn.Conv1d(width, width, 1))
            for _ in range(config.num_hidden_layers)
        )
        self.post_init()

    def inner_width(self, config):
        return config.hidden_size

    def get_input_embeddings(self):
        return self.table

    def set_input_embeddings(self, value):
        self.table = value

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, return_dict=None):
        embeds = self.table(input_ids) if inputs_embeds is None else inputs_embeds
        states = getattr(self, self.norm_name)(embeds)
        for layer in self.layers:
            if attention_mask is not None:
                states = states * attention_mask.unsqueeze(-1)
            states = states + layer(states.mT).mT
        return BaseModelOutput(last_hidden_state=states)


@strict
class GroupedConfig(ConvolutionConfig):
    """Config whose fields the default cannot scale: the inner width belongs to the width."""

    model_type = "test_grouped_convolution"
    inner_size: int = WIDTH

    def scale_down(self, divider=3, hidden_size=None, num_hidden_layers=None, num_attention_heads=None):
        small = copy.deepcopy(self)
        small.hidden_size = small.inner_size = hidden_size or self.hidden_size // divider + 1
        small.num_hidden_layers = num_hidden_layers or self.num_hidden_layers
        return small


class GroupedModel(ConvolutionModel):
    """The same under other names, with both optional methods of the protocol."""

    config_class = GroupedConfig
    norm_name = "stem"

    def inner_width(self, config):
        if config.inner_size != config.hidden_size:
            raise ValueError("inner_size must be hidden_size")
        return config.inner_size

    def get_post_embedding_module(self):
        return self.stem


class ForMaskedLM(PreTrainedModel):
    """A masked-LM head on one of these encoders."""

    config_class = ConvolutionConfig
    base_model_prefix = "convolutions"

    def __init__(self, encoder):
        super().__init__(encoder.config)
        self.convolutions = encoder
        self.head = nn.Linear(encoder.config.hidden_size, encoder.config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.convolutions.get_input_embeddings()

    def forward(self, input_ids, attention_mask=None, return_dict=None):
        states = self.convolutions(input_ids, attention_mask=attention_mask).last_hidden_state
        return MaskedLMOutput(logits=self.head(states))


ENCODERS = {"defaults": (ConvolutionConfig, ConvolutionModel), "protocol": (GroupedConfig, GroupedModel)}
OBJECTIVES = {
    "masked_lm": lambda encoder: MaskedLMObjective(model=ForMaskedLM(encoder)),
    "replaced_token": lambda encoder: ReplacedTokenObjective(encoder=encoder),
    "meta_controller": lambda encoder: MetaControllerObjective(encoder=encoder, nota_token_id=3, num_candidates=4),
}


def make_encoder(kind):
    torch.manual_seed(0)
    config, model = ENCODERS[kind]
    return model(config())


def inputs(objective, with_notes=False):
    batch = make_batch(TARGETS)
    if objective != "masked_lm":
        batch["sample_seeds"] = torch.arange(len(ORIGINAL))
    return batch if with_notes else {name: value for name, value in batch.items() if name != "note_spans"}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", ENCODERS)
def test_every_weight_is_trained_and_the_loss_falls(kind, objective):
    model = OBJECTIVES[objective](make_encoder(kind)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(**inputs(objective)).loss
        loss.backward()
        without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not without
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("objective", ["replaced_token", "meta_controller"])
@pytest.mark.parametrize(("kind", "width"), [("defaults", 7), ("protocol", 8)])
def test_the_generator_is_scaled_down_by_the_config_or_by_default(kind, width, objective):
    network = OBJECTIVES[objective](make_encoder(kind)).generator.network
    assert type(network) is ENCODERS[kind][1]
    assert network.config.hidden_size == network.layers[0][2].weight.shape[0] == width


def test_without_scale_down_a_config_that_the_default_cannot_scale_is_refused(monkeypatch):
    monkeypatch.delattr(GroupedConfig, "scale_down")
    with pytest.raises(ValueError, match=r"No generator can be made .* GroupedModel .*must be hidden_size"):
        ReplacedTokenObjective(encoder=make_encoder("protocol"))
    same = ReplacedTokenObjective(encoder=make_encoder("protocol"), generator_divider=1)
    assert same.generator.network.config.hidden_size == WIDTH


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", ENCODERS)
def test_notes_are_mixed_into_the_embeddings_and_updated(kind, objective):
    model = OBJECTIVES[objective](make_encoder(kind)).train()
    notes = NoteDictionary(KEYS, WIDTH)
    before = notes.values.clone()
    attach(model, notes)
    mixed = []
    norm = getattr(model.encoder, model.encoder.norm_name)
    norm.register_forward_pre_hook(lambda module, args: mixed.append(args[0].detach()))
    output = model(**inputs(objective, with_notes=True))
    model.encoder(ORIGINAL)
    row, start, end, key = SPANS[4]  # without a target
    assert output.note_hits > 0
    assert_close("mixed", mixed[0][row, start:end], 0.5 * (mixed[1][row, start:end] + before[key]))
    notes.apply_updates()
    assert not torch.equal(notes.values[key], before[key])


def test_without_a_known_norm_notes_ask_for_the_method_of_the_protocol(monkeypatch):
    monkeypatch.delattr(GroupedModel, "get_post_embedding_module")
    model = OBJECTIVES["masked_lm"](make_encoder("protocol"))
    with pytest.raises(ValueError, match=r"GroupedModel: it has no embedding norm .*get_post_embedding_module"):
        attach(model, NoteDictionary(KEYS, WIDTH))


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_registered_encoder_is_found_by_the_checkpoints_of_an_objective(kind, tmp_path, monkeypatch):
    config, encoder = ENCODERS[kind]
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, config.model_type, config)
    monkeypatch.setitem(MODEL_MAPPING._extra_content, config, encoder)
    objective = OBJECTIVES["replaced_token"](make_encoder(kind)).eval()
    objective.save_pretrained(tmp_path)
    again = ReplacedTokenObjective.from_pretrained(tmp_path).eval()
    assert type(again.encoder) is encoder
    assert torch.equal(again(**inputs("replaced_token")).loss, objective(**inputs("replaced_token")).loss)
