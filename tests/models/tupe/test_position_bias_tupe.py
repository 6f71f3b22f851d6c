"""The position bias follows the weights at every call: nothing of an earlier one is left, whatever changed since."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from hf_efficient.models.tupe.modeling_tupe import TupeForMaskedLM


LENGTH = 7


def bias_of(model, length=LENGTH):
    with torch.no_grad():
        return model.model.position_bias(length)


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.model.position_bias(LENGTH).sin().sum().backward()
    optimizer.step()


def load_other_weights(model, assign=False):
    other = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    model.load_state_dict(other, assign=assign)


def swap_in_averages(model):
    """What exponential moving averages do around an evaluation."""
    weights = [parameter.data for parameter in model.parameters()]
    torch._foreach_copy_(weights, [weight * 2 for weight in weights])


def fill_from_numpy(model):
    """Through memory that torch does not watch."""
    model.model.position_bias.query.weight.detach().numpy()[:] *= 2


def replace_data(model):
    weight = model.model.position_bias.query.weight
    weight.data = weight.data * 2


def set_storage(model):
    weight = model.model.position_bias.query.weight
    with torch.no_grad():
        weight.set_(weight.detach() * 2)


def prune_twice(model):
    for amount in (0.3, 0.6):
        prune.l1_unstructured(model.model.position_bias.query, "weight", amount)
        bias_of(model)


def fail_half_way(model):
    """A call with an input on another device, which ends in an error after the bias is computed."""
    with pytest.raises(Exception, match="meta"):
        model(inputs_embeds=torch.zeros(1, LENGTH, model.config.hidden_size, device="meta"))
    model.model.position_bias.query.weight.data.mul_(2)


def parametrise(model):
    class Double(nn.Module):
        def forward(self, weight):
            return weight * 2

    nn.utils.parametrize.register_parametrization(model.model.position_bias.query, "weight", Double())


def merge_adapter(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query", "key"], init_lora_weights=False)
    peft.get_peft_model(model, config).merge_and_unload()


SAME = "same"  # changes after which the model computes what it did before


@pytest.mark.parametrize(
    ("change", "effect"),
    [
        pytest.param(step, "other", id="optimizer-step-in-eval-mode"),
        pytest.param(load_other_weights, "other", id="load_state_dict"),
        pytest.param(lambda model: load_other_weights(model, assign=True), "other", id="load_state_dict-assign"),
        pytest.param(lambda model: model.model.position_bias.query.weight.data.mul_(2), "other", id="data-mul"),
        pytest.param(lambda model: model.model.position_bias.norm.bias.data.copy_(torch.ones(15)), "other", id="copy"),
        pytest.param(swap_in_averages, "other", id="foreach-copy"),
        pytest.param(fill_from_numpy, "other", id="numpy"),
        pytest.param(replace_data, "other", id="data-replaced"),
        pytest.param(set_storage, "other", id="set"),
        pytest.param(lambda model: model.bfloat16(), "other", id="to-bf16"),
        pytest.param(lambda model: model.bfloat16().float(), "other", id="to-bf16-and-back"),
        pytest.param(lambda model: model.resize_position_embeddings(80), SAME, id="resize_position_embeddings"),
        pytest.param(prune_twice, "other", id="pruned-twice"),
        pytest.param(parametrise, "other", id="parametrised"),
        pytest.param(merge_adapter, "other", id="lora-merged"),
        pytest.param(fail_half_way, "other", id="failed-call"),
    ],
)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_a_change_of_weights_is_seen_at_once(make_model, make_inputs, change, effect, context):
    """Compared with a copy, which has made no call before. Most changes are of the weights of the bias alone."""
    model = make_model(TupeForMaskedLM, embedding_norm=False)
    inputs = make_inputs(LENGTH, 5)
    with context():
        before = model(**inputs).logits
    change(model)
    with context():
        after, expected = model(**inputs).logits, copy.deepcopy(model)(**inputs).logits
    torch.testing.assert_close(after, expected)
    assert torch.allclose(after.to(before.dtype), before, atol=1e-5) == (effect == SAME)


def test_weights_swapped_by_functional_call(make_model):
    module = make_model().position_bias
    base = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def scaled(factor):
        return torch.func.functional_call(module, {name: w * factor for name, w in base.items()}, (LENGTH,))

    with torch.no_grad():
        biases = [scaled(factor) for factor in (1.0, 2.0)]
        assert not torch.allclose(*biases)
        stacked = {name: torch.stack([w, 2 * w]) for name, w in base.items()}
        batched = torch.func.vmap(lambda weights: torch.func.functional_call(module, weights, (LENGTH,)))(stacked)
    torch.testing.assert_close(batched, torch.stack(biases))


def test_compiled_code_follows_the_weights(make_model):
    torch._dynamo.reset()
    module = make_model().position_bias
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch.no_grad():
        first = compiled(LENGTH)
        module.query.weight.data.mul_(2)
        second = compiled(LENGTH)
        assert not torch.allclose(first, second)
        torch.testing.assert_close(second, module(LENGTH))


def test_an_adapter_is_switched_off_and_on(make_model):
    peft = pytest.importorskip("peft")
    model = make_model(TupeForMaskedLM)
    without = bias_of(model)
    config = peft.LoraConfig(target_modules=["query", "key"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    with_adapter = bias_of(model)
    assert not torch.allclose(with_adapter, without)
    with adapted.disable_adapter():
        torch.testing.assert_close(bias_of(model), without)
    torch.testing.assert_close(bias_of(model), with_adapter)


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), lambda model: save_and_load(model)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_go_their_own_way(make_model, clone):
    model = make_model(TupeForMaskedLM)
    bias = bias_of(model)
    other = clone(model)
    torch.testing.assert_close(bias_of(other), bias)
    other.model.position_bias.query.weight.data.mul_(2)
    assert not torch.allclose(bias_of(other), bias)
    torch.testing.assert_close(bias_of(model), bias)


def save_and_load(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_threads_of_different_lengths_get_their_own(make_model):
    model = make_model(TupeForMaskedLM)
    wrong = []

    def serve(length):
        for _ in range(50):
            if bias_of(model, length).shape[-1] != length:
                wrong.append(length)

    threads = [threading.Thread(target=serve, args=(length,)) for length in (2, 3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_bias_from_inference_mode_is_not_kept_for_training(make_model, make_inputs):
    model = make_model()
    inputs = make_inputs(7, 5)
    with torch.inference_mode():
        model(**inputs)
    model(**inputs).last_hidden_state.sum().backward()
    assert model.position_bias.query.weight.grad is not None
