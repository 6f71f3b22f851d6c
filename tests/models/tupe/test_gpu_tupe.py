"""TUPE on a CUDA device: its forms of attention against each other, bf16 with compile, and the assertions."""

import subprocess
import sys
import textwrap

import pytest
import torch

from hf_efficient.models.tupe.modeling_tupe import TupeForMaskedLM
from tests.helpers.comparison import assert_close, assert_gradients_close


pytestmark = pytest.mark.gpu
SIZES = {"hidden_size": 64, "num_attention_heads": 2}  # flex_attention wants heads of 16 or more on a GPU


def losses_and_gradients(model, inputs):
    """Loss of a fixed cotangent over the real tokens; gradients stay on the parameters."""
    inputs = {name: tensor.cuda() for name, tensor in inputs.items()}
    logits = model(**inputs).logits[inputs["attention_mask"].bool()]
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).cuda()
    loss = (logits.float() * cotangent).sum()
    loss.backward()
    return logits


@pytest.mark.parametrize("attention", [None, "sdpa", "flex_attention"])
@pytest.mark.parametrize("lengths", [(63, 5), (1,)], ids=["padded", "T1"])
def test_attentions_agree_with_the_definition(make_model, make_inputs, attention, lengths):
    inputs = make_inputs(*lengths)
    expected = make_model(TupeForMaskedLM, "eager", **SIZES).cuda()
    ours = make_model(TupeForMaskedLM, attention, **SIZES).cuda()
    assert_close("logits", losses_and_gradients(ours, inputs), losses_and_gradients(expected, inputs), 1e-4)
    assert_gradients_close(ours, expected, 1e-3)


@pytest.mark.parametrize("attention", [None, "flex_attention"])
def test_bf16_autocast_compiled_as_one_graph(make_model, make_inputs, attention):
    inputs = make_inputs(63, 63)
    expected = make_model(TupeForMaskedLM, "eager", **SIZES).cuda()
    ours = make_model(TupeForMaskedLM, attention, **SIZES).cuda()
    compiled = torch.compile(ours, fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16):
        logits = losses_and_gradients(compiled, inputs)
    assert_close("logits", logits, losses_and_gradients(expected, inputs), 3e-2)
    assert_gradients_close(ours, expected, 6e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("ids[0, 3] = 99", "holds an id outside the vocabulary of 50"),
        ("ids[1, 0] = 7", "does not start with"),
        ("mask[0, 0] = 0", "right padding only"),
    ],
)
def test_bad_values_end_in_an_assertion_that_names_them(change, message):
    """In a process of its own: a failed device assertion takes the CUDA context with it."""
    program = f"""
        import torch
        from hf_efficient import TupeConfig, TupeModel
        sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
        model = TupeModel(TupeConfig(**sizes)).cuda().eval()
        ids = torch.full((2, 5), 7, device="cuda")
        ids[:, 0] = model.config.cls_token_id
        mask = torch.ones_like(ids)
        {change}
        model(input_ids=ids, attention_mask=mask)
        torch.cuda.synchronize()
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert message in run.stderr + run.stdout
