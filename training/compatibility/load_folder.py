"""A user who loads folders: a process of its own, which imports nothing of this repository by itself.

    python load_folder.py JOBS.json            # with hf_efficient imported first, as a user who installed it
    python -I load_folder.py JOBS.json remote  # where hf_efficient cannot be imported, by the code in the folder

The jobs are a list of `{"auto_class": ..., "folder": ...}`; beside each model lie `inputs.safetensors`, and its outputs
are written there as `outputs.safetensors`.
"""

import json
import sys
from pathlib import Path


if sys.argv[2:] == ["remote"]:
    sys.modules["hf_efficient"] = None  # type: ignore[assignment]  # an import of it fails, wherever it lies
    remote = {"trust_remote_code": True}
else:
    import hf_efficient  # noqa: F401  (registers the models)

    remote = {}

import torch
import transformers
from safetensors.torch import load_file, save_file


for job in json.loads(Path(sys.argv[1]).read_text()):
    folder = Path(job["folder"])
    auto_class = getattr(transformers, job["auto_class"])
    model, info = auto_class.from_pretrained(folder, output_loading_info=True, **remote)
    assert not info["missing_keys"], info  # a weight that the file lacks would be random
    with torch.no_grad():
        outputs = model.eval()(**load_file(folder / "inputs.safetensors"))
    tensors = {name: value.contiguous() for name, value in outputs.items() if torch.is_tensor(value)}
    save_file(tensors, folder / "outputs.safetensors")
