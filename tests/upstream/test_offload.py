"""Weights offloaded to disk change nothing: the common tests check this on an accelerator only."""

import pytest
import torch

from hf_efficient import TupeConfig, TupeForMaskedLM, TupeForSequenceClassification, TupeModel


@pytest.mark.parametrize("model_class", [TupeForMaskedLM, TupeForSequenceClassification])
@pytest.mark.parametrize("variant", [{}, {"relative_attention": False, "untie_cls": False}])
def test_weights_on_disk_give_the_same_outputs(model_class, variant, tmp_path):
    pytest.importorskip("accelerate")
    sizes = {"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = TupeConfig(**sizes, intermediate_size=20, max_position_embeddings=11, **variant)
    model = model_class(config).eval()
    model.save_pretrained(tmp_path / "model")
    on_disk = ("model.position_bias", "model.layers.1")
    places = {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
    places |= {name: "cpu" for name, _ in model.named_children() if name != "model"}
    places |= {"model.layers.0": "cpu"} | dict.fromkeys(on_disk, "disk")
    offloaded = model_class.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    ).eval()
    for name in on_disk:
        assert {weight.device.type for weight in offloaded.get_submodule(name).parameters()} == {"meta"}
    input_ids = torch.randint(4, 37, (3, 7))
    input_ids[:, 0] = config.cls_token_id
    with torch.no_grad():
        expected = model(input_ids).logits
        for _ in range(2):  # the second time is where a cache of the position bias would answer
            torch.testing.assert_close(offloaded(input_ids).logits, expected, atol=1e-6, rtol=0)


def test_a_split_over_devices_keeps_the_position_bias_whole():
    """Its parts meet in one operation, so they must be on one device."""
    accelerate = pytest.importorskip("accelerate")
    sizes = {"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    model = TupeModel(TupeConfig(**sizes, intermediate_size=20, max_position_embeddings=11))
    first_devices = set()
    for memory in range(20_000, 32_000, 500):
        places = accelerate.infer_auto_device_map(
            model, max_memory={0: memory, 1: 10**9}, no_split_module_classes=model._no_split_modules
        )
        devices = {device for name, device in places.items() if name.startswith("position_bias")}
        assert len(devices) == 1, f"at {memory} bytes: {places}"
        first_devices |= devices
    assert first_devices == {0, 1}, "the sizes tried must reach from too small to large enough"
