"""Two processes that share the rows of an evaluation count each of them once, however the last batch is filled up."""

import json

import pytest
import torch

from tests.helpers.processes import run_distributed
from tests.trainer import evaluation_worker
from tests.trainer.evaluation_worker import BATCH_SIZES, MODELS, evaluate
from tests.trainer.toy_trainer import Rows


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    run_distributed(evaluation_worker, folder)
    return json.loads((folder / "found.json").read_text())


def expected(model):
    """The means over all rows at once."""
    rows = [Rows()[i] for i in range(len(Rows()))]
    x, labels = torch.stack([row["x"] for row in rows]), torch.tensor([row["labels"] for row in rows])
    with torch.no_grad():
        output = MODELS[model]().eval()(x, labels)
    means = {"eval_loss": output.loss.item(), "eval_first_id": output.first_id.item()}
    return {**means, "eval_first_column": x[:, 0].mean().item()} if model == "targets-and-rows" else means


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("model", MODELS)
def test_each_row_counts_once(found, tmp_path, model, batch_size):
    wanted = expected(model)
    assert evaluate(tmp_path, model, batch_size) == pytest.approx(wanted, rel=1e-5)
    assert found[f"{model} {batch_size}"] == pytest.approx(wanted, rel=1e-5)
