"""The objectives under the transforms of `torch.func`, in forward mode, and differentiated twice."""

import pytest
import torch
from torch.func import functional_call

from hf_efficient.models.srupp.modeling_srupp import SruppForMaskedLM
from hf_efficient.models.tupe.modeling_tupe import TupeForMaskedLM
from hf_efficient.objectives.mlm import MaskedLMObjective
from tests.helpers.derivatives import check_first_derivatives, check_second_derivatives, check_vmap
from tests.objectives.discriminator_models import make_draws, make_objective
from tests.objectives.encoders import CONFIGS, make_batch, perturb


HEADS = {"tupe": TupeForMaskedLM, "srupp": SruppForMaskedLM}
ATTENTION = {"tupe": "tupe_auto", "srupp": "eager"}


def make(kind, name, **options):
    if kind != "mlm":
        objective = make_objective(kind, name, **options)
    else:
        torch.manual_seed(0)
        objective = perturb(MaskedLMObjective(model=HEADS[name](CONFIGS[name]()))).double().eval()
    for module in objective.modules():
        if hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation(ATTENTION[name])
    return objective


def batch_of(kind, samples):
    batch = make_batch()
    del batch["sample_seeds"]
    if kind != "mlm" and samples == "given":
        draws = make_draws(batch)
        batch["sampled_ids"] = draws[..., 0] if kind == "replaced_token" else draws
    elif kind != "mlm":
        batch["sample_seeds"] = torch.tensor([3, 4, 5])
    return batch


@pytest.fixture(params=["mlm", "replaced_token", "meta_controller"])
def kind(request):
    return request.param


@pytest.fixture(params=["tupe", "srupp"])
def name(request):
    return request.param


def loss_of(kind, name):
    objective, batch = make(kind, name), batch_of(kind, "given")
    # What the config stops has no gradient, and row `padding_idx` of the table none from candidates.
    frozen = objective.get_input_embeddings().weight if kind == "meta_controller" else None
    point = {name: p.detach() for name, p in objective.named_parameters() if p is not frozen and p.numel() < 400}
    return lambda point: functional_call(objective, point, kwargs=batch).loss, point


def test_first_derivatives(kind, name):
    check_first_derivatives(*loss_of(kind, name), tolerance=1e-6)


def test_second_derivatives(kind, name):
    loss, point = loss_of(kind, name)
    check_second_derivatives(loss, point, 1e-4)


@pytest.mark.parametrize("own_batch", [False, True], ids=["one-batch", "own-batches"])
@pytest.mark.parametrize(
    ("kind", "samples"),
    [("mlm", "none"), *((kind, how) for kind in ("replaced_token", "meta_controller") for how in ("given", "drawn"))],
)
def test_vmap_over_objectives_equals_a_loop(kind, name, samples, own_batch):
    objectives = [make(kind, name) for _ in range(2)]
    for parameter in objectives[1].parameters():
        parameter.data.mul_(1.1)
    check_vmap(objectives, batch_of(kind, samples), lambda output: output.loss, own_batch, 1e-6)


def test_objectives_of_different_stages_are_refused():
    objectives = [make("replaced_token", "tupe") for _ in range(2)]
    objectives[1].enable_discriminator(False)
    with pytest.raises(ValueError, match="same stage"):
        check_vmap(objectives, batch_of("replaced_token", "given"), lambda output: output.loss, False, 1e-6)
