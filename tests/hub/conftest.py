"""Fixtures of the Hub tests: a Hub on loopback, tiny models, and processes that use them as a stranger would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import hf_efficient
from hf_efficient.auto import FAMILIES
from tests.hub.loopback_hub import LoopbackHub


CLIENT = Path(__file__).with_name("remote_client.py")


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def stranger(tmp_path):
    """`stranger(scenario, hub=None, installed=False, **arguments)` runs a scenario of `remote_client.py`.

    The process has a cache of its own, kept for the test, and starts in an empty folder. It is offline unless it is
    given a hub.
    """
    empty = tmp_path / "empty"
    empty.mkdir()

    def run(scenario: str, hub: LoopbackHub | None = None, installed: bool = False, **arguments) -> dict:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        environment |= {"HF_HOME": str(tmp_path / "hf_home"), "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1,localhost"}
        environment |= {"HF_HUB_OFFLINE": "1"} if hub is None else {"HF_ENDPOINT": hub.endpoint}
        command = [sys.executable, "-I", str(CLIENT), scenario, json.dumps(arguments)]
        if installed:
            command += ["--installed", str(Path(hf_efficient.__file__).parents[1])]
        done = subprocess.run(
            command, env=environment, cwd=empty, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}

    return run


CONFIGS = {
    "tupe": {"num_attention_heads": 3, "intermediate_size": 40, "max_position_embeddings": 19},
    "srupp": {"projection_size": 6, "attention_layers": [1], "pad_token_id": 1},
    "scaling_transformer": {
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 19,
        "ff_sparsity": 5,
        "ff_rank": 4,
        "ff_sru_layers": 1,
        "attention_type": "multiplicative_conv",
        "attention_sparsity": 6,
        "lm_head_type": "low_rank",
        "lm_head_rank": 7,
        "pad_token_id": 1,
    },
}
CONFIGS["terraformer"] = {**CONFIGS["scaling_transformer"], "num_encoder_layers": 2, "num_decoder_layers": 1}
# For a head that takes no default of its family, what it takes.
HEAD_FIELDS = {
    "SruppForMaskedLM": {"bidirectional": True},
    "TerraformerForCausalLM": {"is_encoder_decoder": False, "num_encoder_layers": 0},
}


@pytest.fixture
def make_model():
    """`make_model(auto_class, seed=0, family="tupe")`: a tiny model of the class that an Auto class gives."""

    def make(auto_class: str, seed: int = 0, family: str = "tupe"):
        torch.manual_seed(seed)
        row = FAMILIES[family]
        fields = CONFIGS[family] | HEAD_FIELDS.get(row.classes[auto_class], {})
        config = row.load(row.config)(
            vocab_size=37,
            hidden_size=24,
            num_hidden_layers=2,
            num_labels=3,
            id2label={0: "no", 1: "perhaps", 2: "yes"},
            mask_token_id=4,
            **fields,
        )
        return row.load(row.classes[auto_class])(config).eval()

    return make


@pytest.fixture
def tokenizer():
    """A word-level tokenizer with the special tokens of `TupeConfig`."""
    words = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", "the", "a", "cat", "dog", "saw"]
    model = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    model.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 0), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        cls_token="[CLS]",
        pad_token="[PAD]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        model_max_length=19,
    )
