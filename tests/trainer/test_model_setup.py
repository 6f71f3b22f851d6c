"""Tokenizer, config and longest row of a new model, before a training script starts."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoModelForMaskedLM

from hf_efficient.data.tokenizers import train_tokenizer
from hf_efficient.trainer.arguments import PretrainingArguments
from hf_efficient.trainer.model_setup import build_config, check_block_size, load_or_build_tokenizer


SIZES = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 7}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the old dog sees a red bird near the river"], vocab_size=43)


def test_config_has_the_ids_and_the_size_of_the_tokenizer(tokenizer):
    config = build_config(tokenizer, "bert", overrides=SIZES)
    assert (config.model_type, config.vocab_size, config.hidden_size) == ("bert", len(tokenizer), 12)
    assert config.pad_token_id == tokenizer.pad_token_id == 0
    roberta = build_config(tokenizer, "roberta", overrides="num_hidden_layers=1,vocab_size=99,pad_token_id=1")
    assert (roberta.vocab_size, roberta.pad_token_id) == (99, 1)
    # Ids of another vocabulary are replaced by those that stand at the ends of a row.
    assert (roberta.bos_token_id, roberta.eos_token_id) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


def test_a_config_file_comes_before_the_kind_of_model(tokenizer, tmp_path):
    build_config(tokenizer, "tupe", overrides={**SIZES, "max_position_embeddings": 31}).save_pretrained(tmp_path)
    config = build_config(tokenizer, "bert", str(tmp_path), "hidden_size=24")
    found = (config.model_type, config.max_position_embeddings, config.hidden_size, config.intermediate_size)
    assert found == ("tupe", 31, 24, 7)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 12}))
    with pytest.raises(ValueError, match="does not say its `model_type`"):
        build_config(tokenizer, "bert", str(tmp_path))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [("hiden_size=3", "A bert config has no hiden_size"), ("vocab_size=7", "vocab_size=7 .* has no room")],
    ids=["unknown-field", "small-vocabulary"],
)
def test_overrides_that_do_not_fit_are_refused(tokenizer, overrides, message):
    with pytest.raises(ValueError, match=message):
        build_config(tokenizer, "bert", overrides=overrides)


def test_a_row_that_is_too_long_is_refused_by_the_name_of_its_option(tokenizer):
    config = build_config(tokenizer, "bert", overrides={**SIZES, "max_position_embeddings": 31})
    model = AutoModelForMaskedLM.from_config(config)
    check_block_size(model, config, 31)
    with pytest.raises(ValueError, match=r"rows of 32 tokens .its max_position_embeddings is 31.. Lower --unroll_size"):
        check_block_size(model, config, 32, "--unroll_size")


def test_a_tokenizer_is_built_once_for_a_run(tokenizer, tmp_path):
    args = PretrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to=[])
    built = []

    def build():
        built.append(tokenizer)
        return tokenizer

    first = load_or_build_tokenizer(None, build, args, resumed=False)
    again = load_or_build_tokenizer(None, build, args, resumed=True)
    named = load_or_build_tokenizer(str(tmp_path / "run" / "tokenizer"), build, args, resumed=False)
    assert first.get_vocab() == again.get_vocab() == named.get_vocab() == tokenizer.get_vocab()
    assert len(built) == 1
    load_or_build_tokenizer(None, build, args, resumed=False)
    assert len(built) == 2, "a run that starts anew takes nothing up"


def test_a_preset_gives_the_published_sizes_with_the_vocabulary_of_the_tokenizer(tokenizer):
    config = build_config(tokenizer, "tupe", preset="large", overrides="num_hidden_layers=2")
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (1024, 2, len(tokenizer))
    assert build_config(tokenizer, "srupp", preset="enwik8-base").vocab_size == len(tokenizer)
    # A vocabulary that is cut into clusters stays.
    assert build_config(tokenizer, "srupp", preset="wikitext103-base").vocab_size == 267_735


def test_a_vocabulary_is_rounded_up_to_what_the_modules_of_an_output_layer_share(tokenizer, caplog):
    """But not one that was asked for, which is refused where it does not divide."""
    assert len(tokenizer) == 43
    with caplog.at_level("INFO", "hf_efficient"):
        config = build_config(tokenizer, "scaling_transformer", preset="24x1024-all", overrides="loss_sparsity=5")
    assert (config.vocab_size, config.loss_sparsity) == (45, 5)
    assert "rounded up from 43 to 45 ids" in caplog.text
    caplog.clear()
    assert build_config(tokenizer, "scaling_transformer", preset="24x1024-dense").vocab_size == 43
    assert not caplog.text
    with pytest.raises(
        StrictDataclassClassValidationError,
        match=r"vocab_size .46. must be a multiple of loss_sparsity .4.: make it 48",
    ):
        build_config(tokenizer, "scaling_transformer", preset="24x1024-all", overrides="vocab_size=46")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_type": "bert", "preset": "base"}, "bert models have no presets"),
        ({"model_type": "tupe", "preset": "huge"}, "TupeConfig has no preset 'huge'. Its presets are: base, large"),
        ({"model_type": "tupe", "preset": "base", "config": "a-folder"}, "give no --config beside it"),
    ],
    ids=["no-presets", "unknown-preset", "config-and-preset"],
)
def test_presets_that_do_not_exist_are_refused(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_config(tokenizer, **arguments)
