"""Twenty steps of training of each family and objective give the losses that were recorded, on every processor."""

import json

import pytest

from tests.helpers.loss_curves import CASES, FOLDER, TOLERANCES, largest_difference, loss_curve


@pytest.mark.parametrize("name", CASES)
def test_losses_in_float64(name):
    expected = json.loads((FOLDER / f"{name}.json").read_text())["float64"]
    assert expected[-1] < expected[0]  # it learns, so that gradients are compared too
    # The adaptive softmax takes logarithms in float32, whatever the model.
    tolerance = 1e-6 if name == "srupp_causal_lm_adaptive" else TOLERANCES["float64"]
    assert largest_difference(loss_curve(name, "float64"), expected) < tolerance


def test_every_recorded_curve_has_a_case():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(CASES)
