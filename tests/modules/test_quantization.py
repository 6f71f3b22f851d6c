"""Models in 8 and 4 bits by transformers' own ways: on the fly, saved and loaded, generating, and what is refused."""

import copy
import inspect
import json
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_efficient import (
    ScalingTransformerConfig,
    ScalingTransformerForCausalLM,
    ScalingTransformerForSequenceClassification,
    SparseQuantizationConfig,
    SruppConfig,
    SruppForCausalLM,
    TupeConfig,
    TupeForMaskedLM,
)
from hf_efficient.modules.quantization import QUANT_METHOD, SparseQuantizer, quantized_layers
from hf_efficient.modules.quantized_layers import QuantizedLayer, QuantizedLinear
from hf_efficient.modules.unit_usage import observed_units
from tests.helpers.comparison import assert_close, assert_equal, relative_error
from tests.helpers.processes import ROOT


SIZES = {
    "vocab_size": 60,
    "hidden_size": 33,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 70,
}
SPARSE = {"ff_sparsity": 5, "ff_rank": 4}
CONV = {"attention_type": "multiplicative_conv", "attention_sparsity": 3}
LOSS = {"lm_head_type": "multiplicative", "loss_sparsity": 4}
KINDS = {
    "dense": {},
    "all": {**SPARSE, **CONV, **LOSS},
    "options": {**SPARSE, "ff_inner_bias": True, "ff_multiply_by_controller": True, "hidden_act": "gelu"},
    "tied": {"tie_word_embeddings": True},
    "low-rank": {"lm_head_type": "low_rank", "lm_head_rank": 7},
    "mixed": {**LOSS, "lm_head_sparse_probability": 0.5},
    "multiplicative": {"attention_type": "multiplicative", "attention_sparsity": 3, "lm_head_bias": False},
    "modular-sru": {"attention_type": "multiplicative_modular", "attention_sparsity": 3, "ff_sru_layers": 1},
    "by-module": {**CONV, "attention_value_input": "by_module", "attention_output": "multiplicative_conv"},
    "concatenated": {**CONV, "attention_value_input": "concatenated", "attention_share_qk": True},
}
CASES = [pytest.param(kind, weights, id=f"{kind}-{weights}") for kind in KINDS for weights in ("int8", "int4")]


def make_float(folder, kind="all", seed=0):
    torch.manual_seed(seed)
    model = ScalingTransformerForCausalLM(ScalingTransformerConfig(**SIZES, **KINDS[kind])).eval()
    model.save_pretrained(folder / "float", max_shard_size="20KB")
    return model


def make(folder, kind="all", weights="int8", **options):
    """A float model, and the quantised one that is made of it."""
    model = make_float(folder, kind)
    config = SparseQuantizationConfig(weights)
    return model, type(model).from_pretrained(folder / "float", quantization_config=config, **options)


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(60, (2, 63))


@pytest.mark.parametrize(("kind", "weights"), CASES)
def test_saved_integers_come_back(kind, weights, tmp_path, ids):
    model, quantized = make(tmp_path, kind, weights)
    quantized.save_pretrained(tmp_path / "quantized")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    state = quantized.state_dict()
    assert_equal("weights", dict(loaded.state_dict()), dict(state))
    with torch.no_grad():
        logits = quantized(ids).logits
        assert_equal("logits", loaded(ids).logits, logits)
        if "ff_sparsity" not in KINDS[kind]:  # where winners change, logits of random weights do as well
            assert relative_error(logits, model(ids).logits) < (0.05 if weights == "int8" else 0.5)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert all(buffer.data_ptr() % 64 == 0 for layer in quantized_layers(loaded) for buffer in layer.buffers())
    assert loaded.num_parameters() == model.num_parameters()
    assert loaded.weights_read_per_token() == model.weights_read_per_token()
    # Nothing that is multiplied stays a float, but embeddings and a head that is tied to them.
    floats = {name for name, module in loaded.named_modules() if type(module) is torch.nn.Linear}
    assert floats == ({"lm_head"} if kind == "tied" else set())
    found = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    assert found["source"] == "float"
    assert found["weights"] == weights
    assert found["quant_method"] == QUANT_METHOD


@pytest.mark.parametrize(("kind", "weights"), CASES)
def test_decoding_with_a_cache_is_the_whole_text(kind, weights, tmp_path, ids):
    _, quantized = make(tmp_path, kind, weights)
    generated = quantized.generate(ids[:, :7], max_new_tokens=5, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        for place in range(7, 12):
            logits = quantized(generated[:, :place]).logits[:, -1]
            # A last bit that differs may round an input to another code.
            assert_close("chosen", logits.gather(1, generated[:, place : place + 1])[:, 0], logits.amax(-1), 0.03)


def test_formats_of_int4_by_module(tmp_path):
    _, quantized = make(tmp_path, "low-rank", "int4")
    formats = {name: module.kind for name, module in quantized.named_modules() if isinstance(module, QuantizedLinear)}
    assert {name for name, kind in formats.items() if kind == "int8"} == {"lm_head.in_proj", "lm_head.out_proj"}


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_dtypes(dtype, weights, tmp_path, ids):
    _, quantized = make(tmp_path, "all", weights)
    quantized.save_pretrained(tmp_path / "quantized")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype=dtype)
    assert loaded.dtype == (torch.float32 if dtype == "auto" else dtype)
    assert loaded(ids).logits.dtype == loaded.dtype
    assert_equal("integers", dict(loaded.named_buffers()), dict(quantized.named_buffers()))
    moved = quantized.to(torch.bfloat16)
    assert moved.dtype == torch.bfloat16
    assert_equal("integers", dict(moved.named_buffers()), dict(loaded.named_buffers()))
    for cast in (loaded.half, loaded.float):
        with pytest.raises(ValueError, match="not supported for quantized model"):
            cast()


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps(device_map, tmp_path, ids):
    _, quantized = make(tmp_path, device_map=device_map)
    quantized.save_pretrained(tmp_path / "quantized", max_shard_size="20KB")
    assert len(list((tmp_path / "quantized").glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", device_map=device_map)
    assert_equal("logits", loaded(ids).logits, quantized(ids).logits)


def test_quantising_from_a_disk_is_refused(tmp_path):
    make_float(tmp_path)
    device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="cannot be quantised while parts of it stay on a disk"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "float",
            quantization_config=SparseQuantizationConfig(),
            device_map=device_map,
            offload_folder=tmp_path / "offload",
        )


def test_other_heads_of_the_same_folder(tmp_path, ids):
    _, quantized = make(tmp_path, "dense")
    quantized.save_pretrained(tmp_path / "quantized")
    trunk = AutoModel.from_pretrained(tmp_path / "quantized")
    assert_equal("trunk", trunk(ids).last_hidden_state, quantized.model(ids).last_hidden_state)
    classifier = ScalingTransformerForSequenceClassification.from_pretrained(tmp_path / "quantized")
    assert type(classifier.score) is torch.nn.Linear
    assert_equal("trunk", classifier.model(ids).last_hidden_state, quantized.model(ids).last_hidden_state)
    trunk.save_pretrained(tmp_path / "trunk")
    with pytest.raises(ValueError, match=r"trunk/model.safetensors has no tensor 'lm_head.weight'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "trunk")


def test_modules_that_are_not_converted(tmp_path):
    make_float(tmp_path)
    config = SparseQuantizationConfig(modules_to_not_convert=["lm_head", "model.layers.0", "query_conv"])
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    quantized.save_pretrained(tmp_path / "quantized")
    for model in (quantized, AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")):
        names = {name for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
        attention = "model.layers.1.attention.projections."
        places = ("shared", "key_conv", "value_conv")
        assert names == {"model.layers.1.feed_forward.sparse", *(attention + place for place in places)}
    trunk = AutoModel.from_pretrained(tmp_path / "quantized")
    assert {name for name, m in trunk.named_modules() if isinstance(m, QuantizedLayer)} == {n[6:] for n in names}


@pytest.mark.parametrize("adaptive", [None, [20, 40]], ids=["dense-head", "adaptive"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_linear_layers_of_srupp(adaptive, weights, tmp_path, ids):
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 33, "num_hidden_layers": 2, "projection_size": 11}
    model = SruppForCausalLM(SruppConfig(**sizes, adaptive_cutoffs=adaptive)).eval()
    model.save_pretrained(tmp_path / "float")
    config = SparseQuantizationConfig(weights)
    quantized = SruppForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    quantized.save_pretrained(tmp_path / "quantized")
    loaded = SruppForCausalLM.from_pretrained(tmp_path / "quantized")
    assert len(list(quantized_layers(loaded))) >= 4
    assert_equal("logits", loaded(ids).logits, quantized(ids).logits)
    with torch.no_grad():
        assert relative_error(loaded(ids).logits, model(ids).logits) < (0.05 if weights == "int8" else 0.4)


def test_another_family_is_refused(tmp_path):
    TupeForMaskedLM(
        TupeConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="TupeForMaskedLM cannot be quantised"):
        TupeForMaskedLM.from_pretrained(tmp_path, quantization_config=SparseQuantizationConfig())


def test_a_quantised_model_comes_back_as_floats(tmp_path, ids):
    model, quantized = make(tmp_path)
    restored = quantized.dequantize()
    assert str(restored) == str(model)
    assert not hasattr(restored.config, "quantization_config")
    assert all(parameter.requires_grad for parameter in restored.parameters())
    restored.train()(ids, labels=ids).loss.backward()
    restored.save_pretrained(tmp_path / "restored")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "restored")
    assert_equal("logits", again(ids).logits, restored.eval()(ids).logits)


def test_training_is_refused_with_the_folder_of_the_float_model(tmp_path, ids):
    _, quantized = make(tmp_path)
    quantized.save_pretrained(tmp_path / "quantized")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    message = rf"cannot be trained.*{tmp_path}/float.*quantise what comes out"
    for model in (quantized, loaded):
        with pytest.raises(ValueError, match=message):
            model.train()(ids, labels=ids)
        model.eval()
        with pytest.raises(ValueError, match=message):
            model(inputs_embeds=torch.zeros(1, 3, 33, requires_grad=True))
        with pytest.raises(ValueError, match=message):
            Trainer(model, TrainingArguments(tmp_path / "runs", report_to="none"))


def test_who_looks_at_all_attributes_is_not_refused(tmp_path):
    _, quantized = make(tmp_path)
    quantizer = quantized.hf_quantizer
    config = quantizer.quantization_config
    for looked_at in (config, quantizer):
        assert dict(inspect.getmembers(looked_at))
    assert getattr(quantizer, "is_trainable", None) is None
    assert not hasattr(config, "no_such_setting")
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again.__dict__ == config.__dict__
    with pytest.raises(ValueError, match=rf"cannot be trained.*{tmp_path}/float"):
        quantizer.is_trainable  # noqa: B018
    with pytest.raises(ValueError, match=rf"no adapter.*{tmp_path}/float"):
        config.get_apply_tensor_subclass  # noqa: B018


@pytest.mark.parametrize("targets", [["q_proj"], ["lm_head"], ["embed_tokens"], "all-linear"], ids=str)
def test_adapters_are_refused(targets, tmp_path, ids):
    peft = pytest.importorskip("peft")
    _, quantized = make(tmp_path, "dense")
    lora = peft.LoraConfig(target_modules=targets)
    message = rf"cannot be trained, and no adapter.*{tmp_path}/float"
    with pytest.raises(ValueError, match=message):
        quantized.add_adapter(lora)
    if targets == "all-linear":  # PEFT finds none
        with pytest.raises(ValueError, match="target_modules"):
            peft.get_peft_model(quantized, lora)
        return
    with pytest.raises(ValueError, match=message):  # of embeddings, which stay floats, when it is trained
        peft.get_peft_model(quantized, lora).train()(input_ids=ids, labels=ids)


def test_a_config_serves_several_folders_and_none_is_published(tmp_path):
    config = SparseQuantizationConfig("int8")
    for name in ("first", "second"):
        make_float(tmp_path / name)
        quantized = AutoModelForCausalLM.from_pretrained(tmp_path / name / "float", quantization_config=config)
        assert config.source is None
        with pytest.raises(ValueError, match=rf"{tmp_path}/{name}/float"):
            quantized.add_adapter(None)
        quantized.save_pretrained(tmp_path / name / "quantized")
        for file in (tmp_path / name / "quantized").glob("*.json"):
            assert str(tmp_path) not in file.read_text()


@pytest.mark.parametrize(
    ("source", "saved"),
    [("org/name", "org/name"), ("/home/someone/models/mine", "mine"), (None, None)],
    ids=["hub", "folder", "none"],
)
def test_of_a_source_no_place_is_saved(source, saved):
    config = SparseQuantizationConfig(source=source)
    assert config.to_dict()["source"] == saved
    assert json.loads(config.to_json_string())["source"] == saved
    assert config.source == source


def test_a_float_folder_that_is_elsewhere_is_named_by_its_name(tmp_path, ids):
    _, quantized = make(tmp_path)
    quantized.save_pretrained(tmp_path / "elsewhere" / "quantized")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere" / "quantized")
    with pytest.raises(ValueError, match="Train the float model, 'float', without quantization_config"):
        loaded.train()(ids, labels=ids)


RESIZED = {
    "larger": (64,),
    "smaller": (59,),
    "padded": (None, 64),
    "size-and-padding": (60, 64),
}


@pytest.mark.parametrize("arguments", RESIZED.values(), ids=RESIZED)
def test_resizing_is_refused_where_the_output_layer_would_change(arguments, tmp_path):
    _, quantized = make(tmp_path, "dense")
    with pytest.raises(ValueError, match=rf"output layer cannot be resized.*{tmp_path}/float.*modules_to_not_convert"):
        quantized.resize_token_embeddings(*arguments)
    assert quantized.config.vocab_size == quantized.get_input_embeddings().num_embeddings == 60


@pytest.mark.parametrize("arguments", [(), (60,), (None, 30), (59, 10)], ids=str)
def test_resizing_to_the_same_size_changes_nothing(arguments, tmp_path, ids):
    _, quantized = make(tmp_path, "dense")
    before, embeddings = quantized(ids).logits, quantized.get_input_embeddings()
    assert quantized.resize_token_embeddings(*arguments) is embeddings
    assert_equal("logits", quantized(ids).logits, before)


def test_output_layers_in_floats_are_resized(tmp_path, ids):
    make_float(tmp_path / "untied", "dense")
    config = SparseQuantizationConfig(modules_to_not_convert=["lm_head"])
    for model in (
        make(tmp_path / "tied", "tied")[1],
        AutoModelForCausalLM.from_pretrained(tmp_path / "untied" / "float", quantization_config=config),
    ):
        model.resize_token_embeddings(64, mean_resizing=False)
        assert model(ids).logits.shape[-1] == 64


def test_an_int8_folder_keeps_its_format(tmp_path):
    _, quantized = make(tmp_path)
    quantized.save_pretrained(tmp_path / "quantized")
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "quantized", quantization_config=SparseQuantizationConfig("int4")
        )
    assert_equal("weights", dict(loaded.state_dict()), dict(quantized.state_dict()))
    with pytest.raises(ValueError, match="quantized with SparseQuantizationConfig but you are passing"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "quantized", quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )


def test_damaged_and_mismatched_files_are_named(tmp_path):
    _, quantized = make(tmp_path)
    folder = tmp_path / "quantized"
    quantized.save_pretrained(folder)
    file, config = folder / "model.safetensors", folder / "config.json"
    whole, settings = file.read_bytes(), json.loads(config.read_text())
    for content in (whole[: len(whole) // 2], whole[:5], b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{file} is damaged or cut off .*download it anew"):
            AutoModelForCausalLM.from_pretrained(folder)
    file.write_bytes(whole)
    for changed in ({"hidden_size": 36}, {"intermediate_size": 25}, {"quantization_config": {"weights": "int4"}}):
        changed = {**settings, **changed}
        changed["quantization_config"] = {**settings["quantization_config"], **changed["quantization_config"]}
        config.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=rf"{file} holds 'model.layers.0.*promises.*another model's"):
            AutoModelForCausalLM.from_pretrained(folder)
    # Floats where the config promises integers would be cast to them without a word.
    floats = json.loads((tmp_path / "float" / "config.json").read_text())
    floats["quantization_config"] = settings["quantization_config"]
    (tmp_path / "float" / "config.json").write_text(json.dumps(floats))
    with pytest.raises(ValueError, match=r"float/model-00001-of-.*shared.gating' as F32"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "float")


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = make_float(tmp_path)
    model.model.layers[1].feed_forward.sparse.up.data[0, 0, 0] = float("inf")
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match=r"model.layers.1.feed_forward.sparse cannot be quantised.*inf or NaN"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=SparseQuantizationConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int3"}, "one of 'int8', 'int4', not 'int3'"),
        ({"bits": 8}, "takes weights, modules_to_not_convert and source.*got other values for bits"),
        ({"quant_method": "gptq"}, "got other values for quant_method"),
        ({"modules_to_not_convert": "lm_head"}, r"give \['lm_head'\]"),
    ],
    ids=["format", "unknown", "method", "string"],
)
def test_configs_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        SparseQuantizationConfig(**options)


def test_a_config_may_be_a_dict(tmp_path):
    make_float(tmp_path)
    config = {"quant_method": QUANT_METHOD, "weights": "int4"}
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert quantized.config.quantization_config.weights == "int4"
    assert SparseQuantizationConfig.from_dict(config).to_dict() == quantized.config.quantization_config.to_dict() | {
        "source": None
    }


def test_observers_count_quantised_layers(tmp_path, ids):
    model, quantized = make(tmp_path)
    found = []
    for each in (model, quantized):
        with observed_units(each) as usage, torch.no_grad():
            each(ids)
        assert [layer.tokens for layer in usage.values()] == [ids.numel()] * 2
        found.append(next(iter(usage.values())).counts)
    assert (found[0] - found[1]).abs().sum() < 0.1 * found[0].sum()  # of the first layer, whose input is alike


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_quantised_model_compiles_as_one_graph(weights, tmp_path, ids):
    _, quantized = make(tmp_path, weights=weights)
    compiled = torch.compile(quantized, fullgraph=True, backend="eager")
    for length in (63, 1):
        given = {"input_ids": ids[:, :length], "use_cache": False}
        assert_close("logits", compiled(**given).logits, quantized(**given).logits, 1e-5)


def test_registration_stands_once():
    assert AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] is SparseQuantizationConfig
    assert AUTO_QUANTIZER_MAPPING[QUANT_METHOD] is SparseQuantizer


LARGE = {
    "vocab_size": 60,
    "hidden_size": 512,
    "intermediate_size": 8192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 70,
}
FRESH_PROCESS = """
import json, resource, sys, warnings
import torch, transformers
import hf_efficient

warnings.simplefilter("error")
torch.set_num_threads(1)
small, large, *on_the_fly = sys.argv[1:]
options = {"quantization_config": hf_efficient.SparseQuantizationConfig("int8")} if on_the_fly else {}
ids = torch.arange(9)[None]
load = transformers.AutoModelForCausalLM.from_pretrained
load(small)(ids)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load(large, **options)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([after - before, model(ids).logits.double().sum().item()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_a_fresh_process_never_holds_the_floats(tmp_path):
    _, small = make(tmp_path, "dense")
    small.save_pretrained(tmp_path / "small")
    torch.manual_seed(0)
    model = ScalingTransformerForCausalLM(ScalingTransformerConfig(**LARGE)).eval()
    floats = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path / "large-float")
    config = SparseQuantizationConfig("int8")
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "large-float", quantization_config=config)
    quantized.save_pretrained(tmp_path / "large")
    found = []
    for arguments in (["large"], ["large-float", "on the fly"]):
        folders = [str(tmp_path / "small"), str(tmp_path / arguments[0]), *arguments[1:]]
        done = subprocess.run([sys.executable, "-c", FRESH_PROCESS, *folders], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    (grown, total), (grown_on_the_fly, _) = found
    # On the fly the float model, and beside it what is quantised, and one layer that is.
    assert grown_on_the_fly * 1024 < 2 * floats
    # In 8 bits a quarter of the floats; where the file's pages still count beside the aligned copies, a half.
    assert grown * 1024 < 0.6 * floats
    with torch.no_grad():
        assert total == pytest.approx(quantized(torch.arange(9)[None]).logits.double().sum().item(), rel=1e-4)


def test_loading_warns_of_nothing(tmp_path):
    _, quantized = make(tmp_path)
    quantized.save_pretrained(tmp_path / "quantized")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
