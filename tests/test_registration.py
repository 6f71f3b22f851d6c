"""What `import hf_efficient` makes known to transformers: Auto classes, name tables, pipelines, Trainer."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto

import hf_efficient
from hf_efficient import auto


TINY = {
    "vocab_size": 30,
    "hidden_size": 15,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 21,
    "max_position_embeddings": 40,
    "mask_token_id": 4,
}
SRUPP = {"vocab_size": 30, "hidden_size": 14, "projection_size": 6, "num_hidden_layers": 2, "mask_token_id": 4}
SCALING = {name: value for name, value in TINY.items() if name != "mask_token_id"}
SCALING |= {"ff_sparsity": 3, "ff_rank": 4, "attention_type": "multiplicative_conv", "attention_sparsity": 5}
TERRAFORMER = {name: value for name, value in SCALING.items() if name != "num_hidden_layers"}
TERRAFORMER |= {"num_encoder_layers": 1, "num_decoder_layers": 1}
# What builds each family small; for a head that takes no default of its family, what it takes.
SIZES = {"tupe": TINY, "srupp": SRUPP, "scaling_transformer": SCALING, "terraformer": TERRAFORMER}
HEAD_FIELDS = {
    "SruppForMaskedLM": {"bidirectional": True},
    "TerraformerForCausalLM": {"is_encoder_decoder": False, "num_encoder_layers": 0},
}
HEADS = [
    pytest.param(model_type, auto_class, name, id=f"{model_type}-{auto_class}")
    for model_type, family in auto.FAMILIES.items()
    for auto_class, name in family.classes.items()
]


@pytest.fixture
def tokenizer():
    specials = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
    words = ["a", "b", "c", "the", "cat", "sat", "on", "mat", "dog", "ran", "good", "bad", "sport", "news", "is", "."]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(specials + words)}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    names = {f"{word[1:-1].lower()}_token": word for word in specials}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=40, **names)


def tiny_model(name, **fields):
    model_class = getattr(hf_efficient, name)
    sizes = SIZES[model_class.config_class.model_type] | HEAD_FIELDS.get(name, {}) | fields
    return model_class(model_class.config_class(**sizes))


@pytest.mark.parametrize(("model_type", "auto_class", "name"), HEADS)
def test_auto_classes_build_our_classes(model_type, auto_class, name):
    config = AutoConfig.for_model(model_type, **SIZES[model_type] | HEAD_FIELDS.get(name, {}))
    model = getattr(transformers, auto_class).from_config(config)
    assert type(model) is getattr(hf_efficient, name)
    assert type(model).__name__ == name
    assert getattr(modeling_auto, auto._NAME_TABLES[auto_class])[model_type] == name


def test_public_names():
    assert {"DistillationTrainer", "SparseQuantizationConfig", "from_gpt2", "sparsify"} <= set(hf_efficient.__all__)
    for name in hf_efficient.__all__:
        assert getattr(hf_efficient, name).__name__ == name
        assert name in dir(hf_efficient)
    with pytest.raises(AttributeError, match="has no attribute 'TupeForPoetry'"):
        hf_efficient.TupeForPoetry  # noqa: B018


def test_tokenizer_of_a_folder_is_found(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    hf_efficient.TupeConfig(**TINY).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for named in (True, False):
        if not named:
            del settings["tokenizer_class"]
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        again = AutoTokenizer.from_pretrained(tmp_path)
        assert again("the cat sat")["input_ids"] == tokenizer("the cat sat")["input_ids"] == [0, 8, 9, 10, 2]
        assert again.padding_side == "right"


def test_registering_twice_is_harmless():
    tables = {name: dict(getattr(modeling_auto, name)) for name in auto._NAME_TABLES.values()}
    before = AutoModel._model_mapping[hf_efficient.TupeConfig]
    count = len(AutoModel._model_mapping)
    auto.register()
    auto.register()
    assert AutoModel._model_mapping[hf_efficient.TupeConfig] is before
    assert len(AutoModel._model_mapping) == count
    assert {name: dict(getattr(modeling_auto, name)) for name in tables} == tables


def test_other_packages_can_still_register():
    class OtherConfig(transformers.PreTrainedConfig):
        model_type = "registered_by_a_test"

    class OtherModel(transformers.PreTrainedModel):
        config: OtherConfig

    mapping = AutoModel._model_mapping
    AutoModel.register(OtherConfig, OtherModel)
    try:
        assert mapping[OtherConfig] is OtherModel
        auto.register()
        assert mapping[OtherConfig] is OtherModel
        assert OtherModel in mapping._extra_content.values()
    finally:
        del mapping._extra_content[OtherConfig]


class FakeFamily:
    loaded: list[str] = []

    def load(self, name):
        self.loaded.append(name)
        return dict


WAYS_TO_READ = {
    "item": lambda table: table["config"],
    "get": lambda table: table.get("config"),
    "get-with-default": lambda table: table.get("config", "default"),
    "values": lambda table: next(iter(table.values())),
    "items": lambda table: dict(table.items())["config"],
    "pop": lambda table: table.pop("config"),
    "setdefault": lambda table: table.setdefault("config", "default"),
    "dict": lambda table: dict(table)["config"],
    "unpacked": lambda table: {**table}["config"],
    "merged": lambda table: (table | {})["config"],
    ".copy": lambda table: table.copy()["config"],
    "copy.copy": lambda table: copy.copy(table)["config"],
}


@pytest.mark.parametrize("way", WAYS_TO_READ)
def test_lazy_table_holds_classes_however_it_is_read(way):
    table = auto._LazyClasses({"config": (FakeFamily(), "Name")})
    FakeFamily.loaded.clear()
    assert "config" in table
    assert list(table) == list(table.keys()) == ["config"]
    assert len(table) == 1
    assert table.get("other", "default") == "default"
    assert not FakeFamily.loaded  # asking what is there loads nothing
    assert WAYS_TO_READ[way](table) is dict
    assert set(FakeFamily.loaded) == {"Name"}


def test_lazy_table_loads_each_class_once():
    table = auto._LazyClasses({"config": (FakeFamily(), "Name")})
    FakeFamily.loaded.clear()
    assert [table["config"], *table.values()] == [dict, dict]
    assert FakeFamily.loaded == ["Name"]


def test_lazy_table_survives_pickling():
    table = AutoModel._model_mapping._extra_content
    again = pickle.loads(pickle.dumps(table))
    assert again[hf_efficient.TupeConfig] is hf_efficient.TupeModel
    assert pickle.loads(pickle.dumps(dict(table)))[hf_efficient.TupeConfig] is hf_efficient.TupeModel


FRESH_PROCESS = """
import json, logging, sys, warnings

class Collect(logging.Handler):
    def emit(self, record):
        said.append(f"{record.name}: {record.getMessage()}")

said = []
logging.captureWarnings(True)
warnings.simplefilter("default")
logging.getLogger().addHandler(Collect(level=logging.WARNING))

import torch
torch.set_num_threads(1)
import hf_efficient
import transformers
from transformers import GenerationConfig, pipeline

said.clear()  # what importing torch and transformers says is theirs
assert not [name for name in sys.modules if name.startswith("hf_efficient.models.") and ".modeling_" in name]
transformers.logging.enable_propagation()
folder, report = sys.argv[1:]

def run(task, *args, **kwargs):
    return pipeline(task, model=f"{folder}/{task}")(*args, **kwargs)

short = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=1)
answers = {
    "fill-mask": run("fill-mask", "the cat [MASK] on the mat", top_k=3),
    "text-classification": run("text-classification", ["good dog", "the bad cat sat on the mat"], batch_size=2),
    "token-classification": run("token-classification", "the cat sat"),
    "feature-extraction": run("feature-extraction", "the cat sat", return_tensors=True).shape,
    "zero-shot-classification": run("zero-shot-classification", "the cat ran", candidate_labels=["sport", "news"]),
    # A whole config: transformers 5.17 warns of its own pipeline when it is given single arguments.
    "text-generation": run("text-generation", ["the cat sat", "dog"], batch_size=2, generation_config=short),
}
json.dump({"answers": answers, "said": said}, open(report, "w"), default=float)
"""


def test_pipelines_run_without_a_warning(tokenizer, tmp_path):
    entailment = {"label2id": {"contradiction": 0, "entailment": 1}, "id2label": {0: "contradiction", 1: "entailment"}}
    for task, name, fields in (
        ("fill-mask", "TupeForMaskedLM", {}),
        ("text-classification", "TupeForSequenceClassification", {"num_labels": 3}),
        ("token-classification", "TupeForTokenClassification", {"num_labels": 4}),
        ("feature-extraction", "TupeModel", {}),
        ("zero-shot-classification", "TupeForSequenceClassification", entailment),
        ("text-generation", "SruppForCausalLM", {"pad_token_id": 1}),
    ):
        model = tiny_model(name, **fields)
        model.save_pretrained(tmp_path / task)
        tokenizer.padding_side = "left" if task == "text-generation" else "right"
        tokenizer.save_pretrained(tmp_path / task)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", FRESH_PROCESS, tmp_path, tmp_path / "report.json"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["said"] == []
    answers = report["answers"]
    assert len(answers["fill-mask"]) == 3
    assert {answer["label"] for answer in answers["text-classification"]} <= {"LABEL_0", "LABEL_1", "LABEL_2"}
    assert len(answers["text-classification"]) == 2
    assert [token["word"] for token in answers["token-classification"]] == ["the", "cat", "sat"]
    assert answers["feature-extraction"] == [1, 5, 15]
    assert sorted(answers["zero-shot-classification"]["labels"]) == ["news", "sport"]
    assert sum(answers["zero-shot-classification"]["scores"]) == pytest.approx(1.0, abs=1e-3)
    texts = [answer["generated_text"] for (answer,) in answers["text-generation"]]
    assert [text.startswith(prompt) for text, prompt in zip(texts, ("the cat sat", "dog"), strict=True)] == [True] * 2
    assert "arning" not in result.stderr


MASKED = torch.tensor([[-100, 7, -100, 9], [-100, -100, 6, -100]])
SHIFTED = torch.tensor([[7, -100, 9], [-100, 6, -100]])


@pytest.mark.parametrize(
    ("name", "labels", "targets"),
    [
        pytest.param("TupeForMaskedLM", MASKED, MASKED, id="masked-lm"),
        pytest.param("SruppForMaskedLM", MASKED, MASKED, id="masked-lm-srupp"),
        pytest.param("TupeForSequenceClassification", torch.tensor([1, 0]), torch.tensor([1, 0]), id="classification"),
        pytest.param("SruppForCausalLM", MASKED, SHIFTED, id="causal-lm"),
        pytest.param("ScalingTransformerForCausalLM", MASKED, SHIFTED, id="causal-lm-scaling-transformer"),
        pytest.param("TerraformerForCausalLM", MASKED, SHIFTED, id="causal-lm-terraformer"),
        pytest.param("TerraformerForConditionalGeneration", MASKED, MASKED, id="seq2seq-terraformer"),
    ],
)
def test_label_smoothing_shifts_the_labels_of_causal_models_alone(name, labels, targets, tmp_path):
    pytest.importorskip("accelerate")
    model = tiny_model(name).eval()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True
    )
    trainer = transformers.Trainer(model=model, args=arguments)
    inputs = {"input_ids": torch.tensor([[0, 7, 8, 9], [0, 5, 6, 2]])}
    if model.config.is_encoder_decoder:  # as the collator of transformers adds them
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    loss = trainer.compute_loss(model, {**inputs, "labels": labels})
    logits = model(**inputs).logits
    if targets.dim() == 2:
        logits = logits[:, : targets.shape[1]]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), label_smoothing=0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_package_gives_its_hub_module_as_an_attribute():
    assert hf_efficient.hub.export.__module__ == "hf_efficient.hub.exporting"
