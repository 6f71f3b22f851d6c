"""When the position bias is kept between calls, and each of the events after which it must not be."""

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


@pytest.fixture
def warm(make_model):
    """A model in eval mode, and the bias that it has just cached."""
    model = make_model(TupeForMaskedLM)
    return model, bias_of(model)


def bias_of(model, length=LENGTH):
    with torch.no_grad():
        return position_bias_of(model)(length)


def position_bias_of(model):
    return next(module for name, module in model.named_modules() if name.endswith("position_bias"))


def fresh_bias_of(model, length=LENGTH):
    """Computed by a copy, which starts with an empty cache."""
    return bias_of(copy.deepcopy(model), length)


def test_hit_gives_the_same_object(warm):
    model, bias = warm
    assert bias_of(model) is bias
    with torch.inference_mode():
        assert model.model.position_bias(LENGTH) is bias


def test_the_model_itself_hits(make_model, make_inputs, monkeypatch):
    model = make_model()
    calls = []
    compute = model.position_bias._compute
    monkeypatch.setattr(
        model.position_bias, "_compute", lambda length, *rest: calls.append(length) or compute(length, *rest)
    )
    with torch.no_grad():
        for lengths in ((7, 5), (7, 7), (5,), (5,), (7,)):
            model(**make_inputs(*lengths))
    assert calls == [7, 5, 7]


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.model.position_bias(LENGTH).sin().sum().backward()
    optimizer.step()


def load_other_weights(model, assign=False):
    other = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    model.load_state_dict(other, assign=assign)


def replace_data(model):
    weight = model.model.position_bias.query.weight
    weight.data = weight.data * 2


def prune_twice(model):
    for amount in (0.3, 0.6):
        prune.l1_unstructured(model.model.position_bias.query, "weight", amount)
        bias_of(model)


def add_hook(model):
    model.model.position_bias.query.register_forward_hook(lambda module, args, output: output * 2)


def merge_adapter(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query", "key"], init_lora_weights=False)
    merged = peft.get_peft_model(model, config).merge_and_unload()
    assert type(merged.model.position_bias.query) is nn.Linear


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(step, id="optimizer-step-in-eval-mode"),
        pytest.param(load_other_weights, id="load_state_dict"),
        pytest.param(lambda model: load_other_weights(model, assign=True), id="load_state_dict-assign"),
        pytest.param(lambda model: model.bfloat16(), id="to-bf16"),
        pytest.param(lambda model: model.bfloat16().float(), id="to-bf16-and-back"),
        pytest.param(lambda model: model.resize_position_embeddings(80), id="resize_position_embeddings"),
        pytest.param(lambda model: model.train().eval(), id="train"),
        pytest.param(replace_data, id="data-replaced"),
        pytest.param(prune_twice, id="pruned-twice"),
        pytest.param(add_hook, id="hook"),
        pytest.param(merge_adapter, id="lora-merged"),
    ],
)
def test_dropped_when_something_changes(warm, change):
    model, old = warm
    change(model)
    new = bias_of(model)
    assert new is not old
    assert new.dtype == next(model.parameters()).dtype
    assert torch.equal(new, fresh_bias_of(model))


def test_dropped_when_the_length_changes(warm):
    model, bias = warm
    assert bias_of(model, 6).shape == (3, 6, 6)
    again = bias_of(model)
    assert again is not bias
    assert torch.equal(again, bias)


def test_weights_swapped_by_functional_call_never_hit(make_model):
    module = make_model().position_bias
    base = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def scaled(factor):
        return torch.func.functional_call(module, {name: w * factor for name, w in base.items()}, (LENGTH,))

    with torch.no_grad():
        biases = [scaled(factor) for factor in (1.0, 2.0, 3.0, 4.0, 5.0)]
        for factor, bias in zip((1.0, 2.0, 3.0, 4.0, 5.0), biases, strict=True):
            module.eval()
            assert torch.equal(bias, scaled(factor)), factor
        stacked = {name: torch.stack([w, 2 * w]) for name, w in base.items()}
        batched = torch.func.vmap(lambda weights: torch.func.functional_call(module, weights, (LENGTH,)))(stacked)
    assert torch.allclose(batched, torch.stack(biases[:2]), atol=1e-5)


def test_not_kept_with_grad(warm):
    model, bias = warm
    module = model.model.position_bias
    with_grad = module(LENGTH)
    assert with_grad is not bias
    assert with_grad.requires_grad
    assert module(LENGTH) is not with_grad
    assert bias_of(model) is bias  # and what was kept is still right


def test_not_kept_in_training(make_model):
    model = make_model().train()
    assert bias_of(model) is not bias_of(model)


def test_not_kept_for_weights_made_in_inference_mode(make_model):
    with torch.inference_mode():
        model = make_model()
        assert model.position_bias(LENGTH) is not model.position_bias(LENGTH)
        model.position_bias.query.weight.mul_(2)
        assert torch.equal(model.position_bias(LENGTH), fresh_bias_of(model))


def test_a_bias_from_inference_mode_serves_no_grad(make_model, make_inputs):
    model = make_model()
    inputs = make_inputs(7, 5)
    with torch.inference_mode():
        expected = model(**inputs).last_hidden_state.clone()
    with torch.no_grad():
        assert torch.equal(model(**inputs).last_hidden_state, expected)
    model(**inputs).last_hidden_state.sum().backward()
    assert model.position_bias.query.weight.grad is not None


def test_not_kept_under_compile(make_model):
    torch._dynamo.reset()
    model = make_model()
    compiled = torch.compile(model.position_bias, fullgraph=True, backend="eager")
    with torch.no_grad():
        first = compiled(LENGTH)
        model.position_bias.query.weight.mul_(2)
        second = compiled(LENGTH)
    assert model.position_bias._cache.entry is None
    assert not torch.equal(first, second)
    assert torch.allclose(second, fresh_bias_of(model))


def test_not_kept_with_lora_on_the_position_projections(warm):
    peft = pytest.importorskip("peft")
    model, _ = warm
    expected_without = bias_of(model).clone()
    config = peft.LoraConfig(target_modules=["query", "key"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    with_adapter = bias_of(adapted)
    assert not torch.allclose(with_adapter, expected_without)
    with adapted.disable_adapter():
        assert torch.allclose(bias_of(adapted), expected_without, atol=1e-6)
    assert torch.equal(bias_of(adapted), with_adapter)


def test_not_kept_with_a_parametrised_weight(warm):
    model, bias = warm

    class Scale(nn.Module):
        factor = 2.0

        def forward(self, weight):
            return weight * self.factor

    scale = Scale()
    nn.utils.parametrize.register_parametrization(model.model.position_bias.query, "weight", scale)
    doubled = bias_of(model)
    scale.factor = 1.0
    assert not torch.equal(doubled, bias)
    assert torch.equal(bias_of(model), bias)


def test_not_kept_in_a_replica_without_parameters(make_model):
    """nn.DataParallel makes replicas whose weights are plain attributes, and which share all other attributes."""
    module = make_model().position_bias

    def replicate(original):
        replica = original._replicate_for_data_parallel()
        for name, child in original._modules.items():
            replica._modules[name] = replicate(child) if child is not None else None
        for name, parameter in original._parameters.items():
            object.__setattr__(replica, name, parameter * 2)
        return replica

    with torch.no_grad():
        bias = module(LENGTH)
        replica = replicate(module)
        assert not list(replica.parameters())
        assert replica(LENGTH) is not replica(LENGTH)
        assert not torch.equal(replica(LENGTH), bias)
        assert module(LENGTH) is bias


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), lambda model: save_and_load(model)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_start_empty_and_go_their_own_way(warm, clone):
    model, bias = warm
    other = clone(model)
    assert position_bias_of(other)._cache.entry is None
    assert torch.equal(bias_of(other), bias)
    with torch.no_grad():
        position_bias_of(other).query.weight.mul_(2)
    assert not torch.equal(bias_of(other), bias)
    assert bias_of(model) is bias


def save_and_load(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_saving_does_not_see_it(make_model, tmp_path):
    model = make_model(TupeForMaskedLM)
    model.save_pretrained(tmp_path / "cold")
    keys = set(model.state_dict())
    bias_of(model)
    model.save_pretrained(tmp_path / "warm")
    assert set(model.state_dict()) == keys
    names = ("model.safetensors", "config.json")
    assert all((tmp_path / "cold" / n).read_bytes() == (tmp_path / "warm" / n).read_bytes() for n in names)


def test_threads_of_different_lengths_get_their_own(make_model):
    model = make_model()
    wrong = []

    def serve(length):
        for _ in range(200):
            if bias_of(model, length).shape[-1] != length:
                wrong.append(length)

    threads = [threading.Thread(target=serve, args=(length,)) for length in (2, 3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
