"""Exported folders in 8 and 4 bits: in a process without the package, and beside it."""

from hf_efficient import ScalingTransformerForCausalLM, SparseQuantizationConfig
from hf_efficient.hub import export
from tests.helpers.comparison import assert_close
from tests.hub.remote_client import GREEDY, TEXT, outputs_of


def test_a_quantised_folder_loads_without_the_package(stranger, make_model, tokenizer, tmp_path):
    make_model("AutoModelForCausalLM", 0, "scaling_transformer").save_pretrained(tmp_path / "float")
    config = SparseQuantizationConfig("int8")
    model = ScalingTransformerForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    folder = export(model, tokenizer, tmp_path / "exported")
    answer = stranger("quantized", folder=str(folder), again=str(tmp_path / "again"))

    assert not answer["package_seen"]
    for which in ("loaded", "again"):  # saved once more, by the code that the folder carries
        assert answer[which]["module"].startswith("transformers_modules.")
        assert_close(which, answer[which]["outputs"], outputs_of(model), 1e-5)
    assert answer["quantizer"].startswith("transformers_modules.")
    ids = model.generate(**tokenizer(TEXT, return_tensors="pt"), **GREEDY)
    assert answer["generated"] == ids[0].tolist()
    assert "cannot be trained" in answer["refused"]
    assert f"'{tmp_path / 'float'}'" in answer["refused"]


def test_a_quantised_folder_loads_beside_the_package(stranger, make_model, tmp_path):
    """The package's quantiser may have registered before that of the folder's code, or after it."""
    make_model("AutoModelForCausalLM", 0, "scaling_transformer").save_pretrained(tmp_path / "float")
    config = SparseQuantizationConfig("int4")
    model = ScalingTransformerForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    folder = export(model, None, tmp_path / "exported")
    for first in ("package", "folder"):
        beside = stranger("quantized_beside", installed=True, folder=str(folder), first=first)
        assert_close(first, beside["loaded"]["outputs"], outputs_of(model), 1e-5)
        assert_close(first, beside["remote"]["outputs"], outputs_of(model), 1e-5)
        assert beside["remote"]["module"].startswith("transformers_modules.")
