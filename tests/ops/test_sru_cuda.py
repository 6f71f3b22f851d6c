"""The built recurrence on a GPU against the torch form: every kernel that a call can reach, odd and large shapes."""

import pytest
import torch

from hf_efficient.ops.backend import use_backend
from hf_efficient.ops.sru import sru_recurrence
from training.benchmarks.gpu import sru_recurrence_parity as parity


pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
KERNELS = [(types, units) for types in parity.TYPES for units in parity.WIDTHS if units <= parity.widest(types)]


def assert_parity(cases):
    found = parity.check_parity(cases, CUDA)
    assert found["compared"] > 0
    assert not found["failures"], "\n".join(found["failures"][:10])


def test_without_flags_in_every_width_of_access():
    """As models train; short, so that it says first whether all is well."""
    assert_parity(parity.smoke_cases(CUDA))


@pytest.mark.parametrize("flags", parity.FLAGS)
@pytest.mark.parametrize(("types", "units"), KERNELS, ids=[f"{types}-V{units}" for types, units in KERNELS])
def test_every_kernel(types, units, flags):
    """In both directions, with each form of highway, with and without a peephole, and with the last state alone."""
    shape = parity.shape_for(units, CUDA)
    wanted = (types, shape, flags)
    assert_parity(case for case in parity.kernel_cases(CUDA) if (case.types, case.shape, case.flags) == wanted)


@pytest.mark.parametrize(
    "shape",
    [*parity.ODD_SHAPES, (8, 65, 512), (64, 40, 3072), (16, 33, 1100)],
    ids=lambda shape: "B{}-T{}-D{}".format(*shape),
)
def test_odd_and_large_shapes(shape):
    assert_parity(parity.shape_cases([shape]))


def test_gradients_are_the_same_each_time():
    inputs = parity.random_inputs(parity.Case("float32", (64, 40, 512)), CUDA)
    leaves = [values for values in inputs.values() if values.requires_grad]
    with use_backend("cuda"):
        runs = [torch.autograd.grad(sru_recurrence(**inputs)[0].sum(), leaves) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], again, strict=True))
