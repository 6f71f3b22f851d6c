"""A folder exported under one release of transformers generates the same under another, without a warning.

    PYTHON_A -m tests.hub.cross_release write FOLDER
    PYTHON_B -m tests.hub.cross_release read FOLDER     # exits with 1 if what it generates differs

`read` cannot import `hf_efficient`: it runs the code that lies in the folder.
"""

import json
import logging
import sys
import warnings
from pathlib import Path

import torch
import transformers

from tests.hub.remote_client import NoPackage


MODELS = {
    "srupp": "AutoModelForCausalLM",
    "scaling_transformer": "AutoModelForCausalLM",
    "terraformer": "AutoModelForSeq2SeqLM",
    "terraformer_cross": "AutoModelForSeq2SeqLM",
}
PROMPT = [[5, 9, 11, 3, 7], [8, 2, 6, 6, 1]]
OPTIONS = {"max_new_tokens": 12, "do_sample": False}


def generated(model) -> dict:
    """The text that each kind of cache gives."""
    ids = torch.tensor(PROMPT)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    static = {"cache_implementation": "static", "disable_compile": True}
    return {
        "dynamic": model.generate(**inputs, **OPTIONS).tolist(),
        "static": model.generate(**inputs, **OPTIONS, **static).tolist(),
        "beams": model.generate(**inputs, **OPTIONS, num_beams=3).tolist(),
        "without": model.generate(**inputs, **OPTIONS, use_cache=False).tolist(),
    }


def srupp():
    from hf_efficient import SruppConfig, SruppForCausalLM

    config = SruppConfig(vocab_size=37, hidden_size=24, projection_size=8, num_hidden_layers=3, pad_token_id=0)
    model = SruppForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.projection.attention.alpha.fill_(1.0)
        model.lm_head.weight.mul_(3.0)
    return model


def scaling_transformer():
    from hf_efficient import ScalingTransformerConfig, ScalingTransformerForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    sparse = {"ff_sparsity": 4, "ff_rank": 5, "attention_type": "multiplicative_conv", "attention_sparsity": 3}
    config = ScalingTransformerConfig.preset(
        "24x1024-all", **sizes, **sparse, num_attention_heads=4, max_position_embeddings=32, ff_sru_layers=1
    )
    return ScalingTransformerForCausalLM(config)


def terraformer(**fields):
    from hf_efficient import TerraformerConfig, TerraformerForConditionalGeneration

    sizes = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 32, "num_encoder_layers": 1}
    sparse = {"ff_sparsity": 4, "ff_rank": 5, "attention_type": "multiplicative_conv", "attention_sparsity": 3}
    config = TerraformerConfig(
        **sizes, **sparse, **fields, num_decoder_layers=2, num_attention_heads=4, max_position_embeddings=32
    )
    return TerraformerForConditionalGeneration(config)


def terraformer_cross():
    return terraformer(decoder_type="cross_attention", attentions_per_layer=1, ff_sru_layers=1)


def write(folder: Path) -> None:
    from hf_efficient import hub

    for name in MODELS:
        torch.manual_seed(0)
        model = globals()[name]().eval()
        hub.export(model, None, folder / name)
        (folder / name / "expected.json").write_text(json.dumps(generated(model)))


def read(folder: Path) -> None:
    sys.meta_path.insert(0, NoPackage())
    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    transformers.utils.logging.get_logger("transformers").addHandler(handler)
    for name, auto_class in MODELS.items():
        model_folder = folder / name
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = getattr(transformers, auto_class).from_pretrained(model_folder, trust_remote_code=True)
            found = generated(model.eval())
        warned += [str(warning.message) for warning in caught]
        expected = json.loads((model_folder / "expected.json").read_text())
        differing = [kind for kind, tokens in expected.items() if found[kind] != tokens]
        if differing or warned:
            raise SystemExit(f"{name}, {transformers.__version__}: differs in {differing}, warned {warned}")
        print(f"{name}: transformers {transformers.__version__} generates the same in {len(expected)} ways.")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
