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


def write(folder: Path) -> None:
    from hf_efficient import (
        ScalingTransformerConfig,
        ScalingTransformerForCausalLM,
        SruppConfig,
        SruppForCausalLM,
        hub,
    )

    torch.manual_seed(0)
    config = SruppConfig(vocab_size=37, hidden_size=24, projection_size=8, num_hidden_layers=3, pad_token_id=0)
    model = SruppForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.projection.attention.alpha.fill_(1.0)
        model.lm_head.weight.mul_(3.0)
    sizes = {"vocab_size": 37, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    sparse = {"ff_sparsity": 5, "ff_rank": 8, "attention_type": "multiplicative_conv", "attention_sparsity": 6}
    scaling_config = ScalingTransformerConfig(**sizes, **sparse, num_attention_heads=4, ff_sru_layers=1, pad_token_id=0)
    scaling_transformer = ScalingTransformerForCausalLM(scaling_config).eval()
    for name, exported in (("srupp", model), ("scaling_transformer", scaling_transformer)):
        hub.export(exported, None, folder / name)
        (folder / name / "expected.json").write_text(json.dumps(generated(exported)))


def read(folder: Path) -> None:
    sys.meta_path.insert(0, NoPackage())
    for family in sorted(path for path in folder.iterdir() if path.is_dir()):
        compare(family)


def compare(folder: Path) -> None:
    """
    Raises:
        SystemExit: if the model in a folder generates other text than was written, or something warns.
    """
    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    transformers.utils.logging.get_logger("transformers").addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        found = generated(model.eval())
    warned += [str(warning.message) for warning in caught]
    expected = json.loads((folder / "expected.json").read_text())
    differing = [kind for kind, tokens in expected.items() if found[kind] != tokens]
    if differing or warned:
        where = f"transformers {transformers.__version__}, {folder.name}"
        raise SystemExit(f"{where}: differs in {differing}, warned {warned}")
    ways = f"generates the same in {len(expected)} ways, without a warning"
    print(f"{folder.name} under transformers {transformers.__version__} {ways}.")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
