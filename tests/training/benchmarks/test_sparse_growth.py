"""The benchmark of growth with the width: what it counts, what it fits, and a run at tiny widths."""

import json

import pytest
import torch

from training.benchmarks import sparse_growth as growth


def test_counted_weights_are_those_of_the_modules():
    """Of a sparse feed-forward layer the controller and one unit in each block; of all else everything but biases."""
    width, root, blocks = 64, 8, 32
    layer, counted = growth.Layer(width, torch.float32), growth.counts(width)
    shared = layer.projections.shared
    kernels = sum(weight.numel() for name, weight in layer.projections.named_parameters() if name.endswith("kernel"))
    assert layer.feed_forward.up.shape == (blocks, root, width)
    units = (layer.feed_forward.up.numel() + layer.feed_forward.down.numel()) // root
    controller = layer.feed_forward.controller_down.numel() + layer.feed_forward.controller_up.numel()
    gated = shared.gating.numel() + shared.projection.numel()
    weights = {part: numbers["weights"] for part, numbers in counted["sparse"].items()}
    assert weights == {
        "feed-forward": units + controller,
        "projections": gated + kernels,
        "multiplicative layer": gated,
        "block": units + controller + gated + kernels,
    }
    assert counted["dense"]["block"]["weights"] == 12 * width**2
    # Each of a convolution's weights is multiplied once for each module, each of the projection's too.
    assert counted["sparse"]["projections"]["products"] == root * (kernels + width * root + width)


def test_dense_and_sparse_layers_share_their_memory():
    layer = growth.Layer(16, torch.bfloat16)
    assert layer.dense_up.data_ptr() == layer.feed_forward.up.data_ptr()
    assert layer.dense_down.data_ptr() == layer.feed_forward.down.data_ptr()
    assert {weight.dtype for weight in layer.feed_forward.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("power", [1.5, 2.0])
def test_the_exponent_is_that_of_a_power_law(power):
    assert growth.exponent({width: 3e-6 * width**power for width in growth.WIDTHS}) == pytest.approx(power)


def test_layers_that_fit():
    sizes = [growth.fitting_layers(width, torch.float32, 5.0) for width in (64, *growth.WIDTHS)]
    assert sizes == [48, 48, 19, 6, 1]
    assert growth.fitting_layers(9216, torch.float32, 0.1) == 1


def test_tiny_widths_run_and_are_reported(tmp_path, capsys):
    folder = ["--output_dir", str(tmp_path / "runs")]
    with pytest.raises(SystemExit, match="fewer than two widths"):
        growth.main(["report", *folder])
    arguments = ["--backend", "reference", "--repeats", "2", "--gigabytes", "1e-4"]
    for width in ("16", "64"):
        growth.main(["run", "--widths", width, *arguments, *folder])
    growth.main(["report", *folder, "--result", str(tmp_path / "growth.json")])
    assert "grows with width^" in capsys.readouterr().out
    result = json.loads((tmp_path / "growth.json").read_text())
    assert (tmp_path / "growth.png").stat().st_size > 1000
    fitted = result["exponents"]["float32 reference"]
    assert fitted["dense block"]["weights"] == fitted["dense block"]["products"] == pytest.approx(2)
    assert fitted["sparse feed-forward"]["weights"] == pytest.approx(1.5, abs=0.01)
    assert {entry["goal"] for entry in result["summary"]} == {None, *growth.GOALS.values()}
    assert [one["layers"] for one in sorted(result["runs"], key=lambda one: one["width"])] == [8, 1]
    assert all(len(values) == 2 for one in result["runs"] for values in one["repetitions"].values())
