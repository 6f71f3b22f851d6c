"""Checkpoints of the original MC-BERT code in and out, files that must not be trusted, and the command line."""

import argparse
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

from hf_efficient.objectives import convert_mcbert
from hf_efficient.objectives.convert_mcbert import build_model, convert_state_dict, infer_config, restore_state_dict
from hf_efficient.objectives.meta_controller import MetaControllerObjective
from hf_efficient.objectives.replaced_token import ReplacedTokenObjective
from tests.helpers.comparison import assert_equal
from tests.helpers.processes import run_program
from tests.helpers.rare_word_corpus import make_tokenizer


KINDS = ["meta_controller", "replaced_token", "classifier"]
ARGUMENTS = argparse.Namespace(
    arch="mcbert_base",
    encoder_attention_heads=3,
    activation_fn="gelu",
    dropout=0.2,
    attention_dropout=0.3,
    pooler_dropout=0.4,
    activation_dropout=0.0,
    encoder_normalize_before=False,
    pooler_activation_fn="tanh",
    class_num=7,
    loss_lamda=12.5,
    lr=[0.1],
)
ENCODER = "decoder.sentence_encoder."


def make_config(**fields) -> RobertaConfig:
    sizes = {"vocab_size": 41, "hidden_size": 18, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 27, "max_position_embeddings": 19, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    return RobertaConfig(**{**sizes, **no_dropout, **fields})


@pytest.fixture
def make_original():
    """`make_original(kind)`: a model, all of whose weights are large, and its weights by the original's names."""

    def make(kind: str, **fields):
        torch.manual_seed(0)
        encoder = RobertaModel(make_config(**fields), add_pooling_layer=False)
        if kind == "meta_controller":
            model = MetaControllerObjective(encoder=encoder, num_candidates=7, loss_weight=12.5, nota_token_id=40)
        elif kind == "replaced_token":
            model = ReplacedTokenObjective(
                encoder=encoder, discriminator_weight=12.5, label_original=1, discriminator_hidden_layer=False
            )
        else:
            model = RobertaForSequenceClassification(make_config(num_labels=4, **fields))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "orm.weight" in name else 0.0, 0.3)
                if "token_type" in name:
                    parameter.zero_()
        return model.eval(), restore_state_dict(model.state_dict(), model.config)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_both_directions_are_exact(make_original, kind):
    model, original = make_original(kind)
    parameters = dict(model.named_parameters())
    assert_equal("tensor", convert_state_dict(original, model.config), parameters)
    with_all_names = restore_state_dict(model.state_dict(), model.config, aliases=True)
    expected = {"meta_controller": 6, "replaced_token": 4 + 2 + 4 + 2 * 12, "classifier": 0}
    assert len(with_all_names) - len(original) == expected[kind]
    assert_equal("tensor", convert_state_dict(with_all_names, model.config), parameters)
    packed = original[f"{ENCODER}layers.1.self_attn.in_proj_weight"]
    encoder = model.roberta if kind == "classifier" else model.encoder
    attention = encoder.encoder.layer[1].attention.self
    assert torch.equal(packed, torch.cat([attention.query.weight, attention.key.weight, attention.value.weight]))


def test_the_names_and_shapes_are_those_of_the_original(make_original):
    _, original = make_original("meta_controller")
    shapes = {name: list(tensor.shape) for name, tensor in original.items()}
    expected = {
        "decoder.sentence_encoder.embed_tokens.weight": [41, 18],
        "decoder.sentence_encoder.embed_positions.weight": [19, 18],
        "decoder.sentence_encoder.layers.0.self_attn.in_proj_bias": [54],
        "decoder.lm_head.dense.weight": [18, 18],
        "decoder.lm_head.bias.weight": [41, 1],
        "mc.sentence_encoder.embed_linear.weight": [6, 18],
        "mc.sentence_encoder.embed_positions.weight": [19, 6],
        "mc.sentence_encoder.layers.1.fc1.weight": [9, 6],
        "mc.lm_head.layer_norm.bias": [6],
    }
    assert expected.items() <= shapes.items()
    _, original = make_original("replaced_token")
    assert original["decoder.lm_head.dense.weight"].shape == (1, 18)
    assert original["generator.lm_head.bias"].shape == (41,)


@pytest.mark.parametrize(("kind", "count"), [("meta_controller", 121_113_856), ("replaced_token", 120_522_497)])
def test_the_published_size_has_the_originals_parameters(kind, count):
    config = RobertaConfig(vocab_size=32768, type_vocab_size=1, max_position_embeddings=514)
    with torch.device("meta"):
        encoder = RobertaModel(config, add_pooling_layer=False)
        if kind == "meta_controller":
            model = MetaControllerObjective(encoder=encoder, nota_token_id=32767)
        else:
            model = ReplacedTokenObjective(encoder=encoder, discriminator_hidden_layer=False)
    ours = {name: tensor.numel() for name, tensor in model.named_parameters() if "token_type" not in name}
    assert sum(ours.values()) == count


def test_trained_token_types_go_into_the_positions(make_original):
    model, _ = make_original("classifier")
    torch.nn.init.normal_(model.roberta.embeddings.token_type_embeddings.weight)
    restored = build_model(restore_state_dict(model.state_dict(), model.config), model.config)
    assert not restored.roberta.embeddings.token_type_embeddings.weight.any()
    ids = torch.tensor([[0, 7, 9, 30, 2], [0, 8, 2, 1, 1]])
    with torch.no_grad():
        ours, theirs = (m(ids, attention_mask=(ids != 1).long()).logits for m in (model, restored))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_tells_its_config_and_the_model(make_original, kind):
    model, original = make_original(kind)
    arguments = {**vars(ARGUMENTS), "dropout": 0.0, "attention_dropout": 0.0, "pooler_dropout": 0.0}
    config = infer_config(original, arguments=arguments)
    said, told = model.config.to_dict(), config.to_dict()
    encoders = [fields.get("encoder_config", fields) for fields in (said, told)]
    for name in make_config().to_dict().keys() - {"architectures", "dtype", "transformers_version", "_name_or_path"}:
        assert encoders[0].get(name) == encoders[1].get(name), name
    for name in (
        "num_candidates",
        "loss_weight",
        "nota_token_id",
        "discriminator_weight",
        "label_original",
        "id2label",
    ):
        assert said.get(name) == told.get(name), name
    rebuilt = build_model(original, config, whole=True)
    assert type(rebuilt) is type(model)
    assert not rebuilt.training
    assert_equal("tensor", dict(rebuilt.named_parameters()), dict(model.named_parameters()))
    if kind != "classifier":
        encoder = build_model(original, config)
        assert_equal("tensor", dict(encoder.named_parameters()), dict(model.encoder.named_parameters()))


def test_the_head_of_pretraining_stays_beside_a_classifier(make_original):
    """As the original saves it; it is kept on the way there and back, and no part of the model."""
    model, original = make_original("classifier")
    _, pretrained = make_original("meta_controller")
    original |= {name: tensor for name, tensor in pretrained.items() if name.startswith("decoder.lm_head.")}
    converted = convert_state_dict(original, model.config)
    assert {"dense.weight", "norm.bias", "bias"} <= converted.keys()
    assert_equal("tensor", restore_state_dict(converted, model.config), original)
    assert_equal("tensor", dict(build_model(original, model.config).named_parameters()), dict(model.named_parameters()))
    named = restore_state_dict(converted, model.config, head_name="mnli")
    assert "classification_heads.mnli.out_proj.weight" in named
    assert_equal("tensor", convert_state_dict(named, model.config), converted)
    with pytest.raises(ValueError, match=r"several classifiers \(mnli, sentence_classification_head\)"):
        convert_state_dict({**original, **named}, model.config)


def test_a_missing_number_of_heads_is_asked_for(make_original):
    _, original = make_original("meta_controller")
    with pytest.raises(ValueError, match="give --set num_attention_heads=N"):
        infer_config(original)
    assert infer_config(original, 6).encoder_config["num_attention_heads"] == 6
    config = infer_config(original, arguments=vars(ARGUMENTS))
    assert (config.num_candidates, config.loss_weight) == (7, 12.5)
    assert config.encoder_config["hidden_dropout_prob"] == 0.2
    assert config.encoder_config["attention_probs_dropout_prob"] == 0.3


def test_networks_that_transformers_lacks_are_refused(make_original):
    _, original = make_original("meta_controller")
    for name, value in (("encoder_normalize_before", True), ("pooler_activation_fn", "relu")):
        with pytest.raises(ValueError, match=f"{name} is .*RobertaModel has no such network"):
            infer_config(original, arguments={**vars(ARGUMENTS), name: value})
    without = {name: tensor for name, tensor in original.items() if "emb_layer_norm" not in name}
    with pytest.raises(ValueError, match="no norm of its embeddings"):
        infer_config(without, 3)


def test_heads_of_the_controller_are_the_originals(make_original):
    """The original divides the number of heads as well, where a new objective keeps their size."""
    model, original = make_original("meta_controller", num_attention_heads=6)
    assert model.controller.network.config.num_attention_heads == 3
    whole = build_model(original, infer_config(original, 6), whole=True)
    assert whole.controller.network.config.num_attention_heads == 2
    assert_equal("tensor", dict(whole.named_parameters()), dict(model.named_parameters()))


def test_tensors_of_other_models_are_named(make_original):
    model, original = make_original("meta_controller")
    config = model.config
    wrong = f"{ENCODER}layers.0.attention.query.weight"
    with pytest.raises(ValueError, match=f"{wrong} is no tensor of an MC-BERT checkpoint"):
        convert_state_dict({**original, wrong: torch.zeros(2)}, config)
    with pytest.raises(ValueError, match=r"decoder.lm_head.other is no tensor"):
        convert_state_dict({**original, "decoder.lm_head.other": torch.zeros(2)}, config)
    with pytest.raises(ValueError, match="in_proj_weight has 44 rows"):
        convert_state_dict({f"{ENCODER}layers.0.self_attn.in_proj_weight": torch.zeros(44, 15)}, config)
    with pytest.raises(
        ValueError, match=r"mc.lm_head.weight differs from decoder.sentence_encoder.embed_tokens.weight"
    ):
        convert_state_dict({**original, "mc.lm_head.weight": torch.zeros(41, 18)}, config)
    with pytest.raises(ValueError, match="encoder is 18 wide; the config says 24"):
        convert_state_dict(original, make_config(hidden_size=24))
    with pytest.raises(ValueError, match=r"qa_outputs.weight has no place in an original"):
        restore_state_dict({"qa_outputs.weight": torch.zeros(2)}, config)
    with pytest.raises(ValueError, match=r"2 token types; the original knows none"):
        restore_state_dict({"encoder.embeddings.token_type_embeddings.weight": torch.ones(2, 18)}, config)
    with pytest.raises(ValueError, match=r"No MC-BERT checkpoint: its encoder lacks embed_tokens.*bert.weight"):
        infer_config({"bert.weight": torch.zeros(3, 3)})
    del original["mc.lm_head.dense.bias"]
    with pytest.raises(ValueError, match=r"does not fit MetaControllerObjective.*controller.dense.bias"):
        build_model(original, config, whole=True)


def test_a_discriminator_with_a_hidden_layer_has_no_place(make_original):
    model, _ = make_original("replaced_token")
    torch.manual_seed(0)
    deeper = ReplacedTokenObjective(encoder=model.encoder, discriminator_hidden_layer=True)
    with pytest.raises(ValueError, match=r"dense\.\w+ has no place"):
        restore_state_dict(deeper.state_dict(), deeper.config)


def test_command_line_writes_an_encoder_that_loads(make_original, tmp_path, capsys):
    model, _ = make_original("meta_controller")
    original = restore_state_dict(model.state_dict(), model.config, aliases=True)
    torch.save({"model": original, "args": ARGUMENTS}, tmp_path / "checkpoint_best.pt")
    places = ("--checkpoint", tmp_path / "checkpoint_best.pt", "--output_dir", tmp_path / "converted")
    run_program(convert_mcbert, *places)
    said = capsys.readouterr().out
    assert "Wrote RobertaModel" in said
    assert "No tokenizer was saved" in said
    ids = torch.tensor([[0, 7, 9, 30, 2]])
    converted = AutoModel.from_pretrained(tmp_path / "converted", add_pooling_layer=False).eval()
    with torch.no_grad():
        assert torch.equal(converted(ids).last_hidden_state, model.encoder(ids).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "converted", num_labels=3)
    assert torch.equal(
        classifier.roberta.encoder.layer[1].output.dense.weight, model.encoder.encoder.layer[1].output.dense.weight
    )
    assert "embeddings.word_embeddings.weight" in load_file(tmp_path / "converted" / "model.safetensors")


def test_command_line_for_a_classifier_and_for_whole_objectives(make_original, tmp_path, monkeypatch, capsys):
    def run(name, *options):
        command = ["convert_mcbert", "--checkpoint", str(tmp_path / f"{name}.safetensors")]
        monkeypatch.setattr(sys, "argv", [*command, "--output_dir", str(tmp_path / name), *options])
        convert_mcbert.CONVERTER.run()
        return capsys.readouterr().out

    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for kind in KINDS:
        model, original = make_original(kind)
        save_file(original, tmp_path / f"{kind}.safetensors")
        with pytest.raises(ValueError, match="--set num_attention_heads=N"):
            run(kind)
        assert not (tmp_path / kind).exists()
        said = run(kind, "--set", "num_attention_heads=3", "--whole", "--tokenizer", str(tmp_path / "tokenizer"))
        assert (tmp_path / kind / "tokenizer.json").exists()
        assert f"Wrote {type(model).__name__}" in said
        assert "hidden_dropout_prob 0.1" in said
        auto = AutoModelForSequenceClassification if kind == "classifier" else type(model)
        loaded = auto.from_pretrained(tmp_path / kind)
        assert_equal("tensor", dict(loaded.named_parameters()), dict(model.named_parameters()))
        with pytest.raises(ValueError, match="is not empty"):
            run(kind, "--set", "num_attention_heads=3")
