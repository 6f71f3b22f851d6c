"""Replays the cases recorded from the original SRU and SRU++ code: outputs, states, and every gradient by name."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from hf_efficient.models.srupp.configuration_srupp import SruppConfig
from hf_efficient.models.srupp.convert_srupp import build_model, convert_state_dict, infer_config, restore_state_dict
from hf_efficient.models.srupp.masking_srupp import SegmentMemory
from hf_efficient.models.srupp.modeling_srupp import SruppForCausalLM, SruppModel, SruppProjection
from tests.golden.srupp_cases import (
    CASES,
    DEFAULTS,
    SRU_CASES,
    STACK_OPTIONS,
    Case,
    case_names,
    tied_names,
    translate,
)
from tests.helpers.comparison import assert_allclose


ATTENTION = ["eager", "sdpa"]

pytestmark = pytest.mark.golden


def compare_gradients(case: Case, model: torch.nn.Module, config: SruppConfig, leaves: dict, prefix: str = ""):
    """Of the loss of the probes: every parameter by its original name, and every input."""
    expected = {name.removeprefix("weights."): grad for name, grad in case.grads.items() if name.startswith("weights.")}
    atol = max([5e-5, *(1e-5 * grad.abs().max().item() for grad in case.grads.values())])
    ours = {
        name.removeprefix(prefix): torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not (isinstance(model, SruppModel) and name.startswith("embed_tokens."))
    }
    restored = {name: grad for name, grad in restore_state_dict(ours, config).items() if not name.endswith("scale_x")}
    # Of tied weights the recording has one gradient, under the first name.
    restored = {name: grad for name, grad in restored.items() if name not in tied_names(case)}
    assert set(restored) == set(expected), sorted(set(restored) ^ set(expected))
    for name, grad in expected.items():
        assert_allclose(f"gradient of {name}", restored[name], grad, atol)
    for name, grad in case.grads.items():
        if name.startswith("input."):
            leaf = leaves[name.removeprefix("input.")]
            assert_allclose(
                f"gradient of {name}", torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, grad, atol
            )


def batch_first(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.transpose(0, 1)


def stack_model(case: Case, config: SruppConfig) -> tuple[SruppModel, str]:
    """A model fed by embeddings, and what the names of its parameters have before those of the case's."""
    model, prefix = SruppModel(config).eval(), "layers.0." if case.is_cell else ""
    weights = {prefix + name: tensor for name, tensor in convert_state_dict(case.weights, config).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["embed_tokens.weight"], [])
    return model, prefix


def stack_inputs(case: Case, config: SruppConfig, leaves: dict) -> tuple[torch.Tensor, SegmentMemory | None]:
    """Embeddings and memory in our layout, of leaves in the case's."""
    x, c0 = leaves["x"], leaves["c0"]
    embeddings = batch_first(x if x.dim() == 3 else x[None])
    inputs = [batch_first(leaves[f"memory.{layer}"]) for layer in range(config.num_hidden_layers)]
    inputs = [tensor if layer in config.attention_layer_indices else None for layer, tensor in enumerate(inputs)]
    if c0 is None and all(tensor is None for tensor in inputs):
        return embeddings, None
    zeros = embeddings.new_zeros(config.num_hidden_layers, embeddings.shape[0], config.hidden_size)
    states = zeros if c0 is None else c0 if c0.dim() == 3 else c0[None]
    pads = batch_first(case.inputs.get("memory_mask_pad"))
    return embeddings, SegmentMemory(tuple(states), tuple(inputs), None if pads is None else ~pads.bool())


def ready_masks(case: Case, memory_length: int) -> dict[str, torch.Tensor | None] | None:
    """The case's masks as the model takes ready ones: scores (batch, 1, queries, keys) to add, and padding."""
    scores, pads = case.inputs.get("attn_mask"), case.inputs.get("mask_pad")
    before = case.inputs.get("memory_mask_pad")
    length, batch = case.inputs["x"].shape[:2]
    if scores is None and pads is None and before is None:
        return {"full_attention": None, "linear_attention": None}
    if scores is None:
        scores = torch.zeros(length, memory_length + length)
    scores = scores.expand(batch, 1, -1, -1)
    pads = torch.zeros(length, batch, dtype=torch.bool) if pads is None else pads.bool()
    if memory_length and before is None:
        before = torch.zeros(memory_length, batch, dtype=torch.bool)
    keys = pads.T if not memory_length else torch.cat([before.bool(), pads]).T
    scores = scores.masked_fill(keys[:, None, None], torch.finfo(scores.dtype).min)
    return {"full_attention": scores, "linear_attention": (~pads).T.long()}


def is_causal_mask(mask: torch.Tensor | None) -> bool:
    if mask is None:
        return False
    queries, keys = mask.shape
    seen = torch.arange(keys)[None, :] <= torch.arange(keys - queries, keys)[:, None]
    return torch.equal(mask == 0, seen) and bool((mask[~seen] <= -1e4).all())


def state_of(case: Case, memory: SegmentMemory, config: SruppConfig) -> torch.Tensor:
    states = torch.stack(memory.cell_states)
    if case.is_cell:
        return states[0]
    if case.flat_state:  # torch.nn.LSTM's layout: (layers x directions, batch, width of a direction)
        return states.unflatten(-1, (config.num_directions, -1)).transpose(1, 2).flatten(0, 1)
    return states


def backward(case: Case, outputs: dict[str, torch.Tensor]):
    assert set(outputs) == set(case.probes), sorted(set(outputs) ^ set(case.probes))
    loss = torch.stack([(outputs[name] * probe).sum() for name, probe in case.probes.items()]).sum()
    for name, tensor in outputs.items():
        assert_allclose(name, tensor, case.outputs[name], atol=5e-6)
    assert_allclose("loss", loss.reshape(1), case.outputs["loss"], atol=1e-4)
    loss.backward()


def check_stack(case: Case, attention: str):
    # By the masks of the case as they are and, where they are plainly causal or absent, by the model's own.
    mask = case.inputs.get("attn_mask")
    config = case.config(attention, is_causal=is_causal_mask(mask))
    ways = [True, False] if mask is None or is_causal_mask(mask) else [False]
    for own_masks in ways if config.attention_layer_indices else [True]:
        model, prefix = stack_model(case, config)
        names = ("x", "c0", *(f"memory.{layer}" for layer in range(config.num_hidden_layers)))
        leaves = {name: case.leaf(name) for name in names}
        embeddings, memory = stack_inputs(case, config, leaves)
        pads = batch_first(case.inputs.get("mask_pad"))
        if own_masks:
            attention_mask = None if pads is None else (~pads.bool()).long()
        else:
            attention_mask = ready_masks(case, 0 if memory is None else memory.length)
        output = model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            memory=memory,
            return_memory=True,
            output_hidden_states=True,
        )
        real = torch.ones(embeddings.shape[:2], dtype=torch.bool) if pads is None else ~pads.bool()
        for name, saved in case.outputs.items():
            if name.startswith("aux.saved_inputs."):
                layer = int(name.rpartition(".")[2])
                assert_allclose(name, output.hidden_states[layer][real], batch_first(saved)[real], atol=5e-6)
                if layer in config.attention_layer_indices:
                    assert_allclose(name, output.memory.layer_inputs[layer][real], batch_first(saved)[real], atol=5e-6)
        backward(case, {"h": batch_first(output.last_hidden_state), "c": state_of(case, output.memory, config)})
        compare_gradients(case, model, config, leaves, prefix)


def check_chunks(case: Case, attention: str):
    config = case.config(attention)
    model, prefix = stack_model(case, config)
    x = case.leaf("x")
    hidden, memory, kept = [], None, [None] * config.num_hidden_layers
    for chunk in batch_first(x).split(case.about["chunks"], dim=1):
        output = model(inputs_embeds=chunk, memory=memory, return_memory=True)
        hidden.append(output.last_hidden_state)
        for layer, inputs in enumerate(output.memory.layer_inputs):
            past = [] if kept[layer] is None else [kept[layer]]
            kept[layer] = None if inputs is None else torch.cat([*past, inputs], dim=1)
        memory = output.memory._replace(layer_inputs=tuple(kept))
    backward(case, {"h": batch_first(torch.cat(hidden, 1)), "c": state_of(case, memory, config)})
    compare_gradients(case, model, config, {"x": x}, prefix)
    whole = model(inputs_embeds=batch_first(x), return_memory=True)
    assert_allclose("h_full", batch_first(whole.last_hidden_state), case.outputs["aux.h_full"], atol=5e-6)
    assert_allclose("c_full", state_of(case, whole.memory, config), case.outputs["aux.c_full"], atol=5e-6)
    cache, cached = None, []
    with torch.no_grad():
        for chunk in batch_first(x).split(case.about["chunks"], dim=1):
            output = model(inputs_embeds=chunk, cache=cache, use_cache=True)
            cache = output.cache
            cached.append(output.last_hidden_state)
    assert_allclose("h by a cache", batch_first(torch.cat(cached, 1)), case.outputs["h"], atol=5e-6)


def check_attention(case: Case, attention: str):
    config = case.config(attention)
    module = SruppProjection(config, 0).eval()
    module.load_state_dict(convert_state_dict(case.weights, config))
    x, memory = case.leaf("x"), case.leaf("memory")
    masks = ready_masks(case, 0 if memory is None else memory.shape[0])
    u = module(batch_first(x), batch_first(memory), masks["full_attention"])
    backward(case, {"U": batch_first(u.transpose(-1, -2).flatten(2))})
    compare_gradients(case, module, config, {"x": x, "memory": memory})


def check_language_model(case: Case, attention: str):
    config = case.config(attention)
    model = SruppForCausalLM(config).eval()
    model.load_state_dict(convert_state_dict(case.weights, config))
    assert case.about["unroll_for_mask"] == max(case.about["segments"])
    window = case.about["unroll_for_mask"] if case.about["same_length_mask"] else None
    ids, targets = batch_first(case.inputs["x"]).long(), batch_first(case.inputs["y"]).long()
    logits, losses, hidden, memory = [], [], [], None
    for index, (x, y) in enumerate(
        zip(ids.split(case.about["segments"], 1), targets.split(case.about["segments"], 1), strict=True)
    ):
        arguments = {"input_ids": x, "memory": memory, "return_memory": True, "attention_window": window}
        output = model(**arguments, shift_labels=y, output_hidden_states=True)
        hidden.append(output.hidden_states[-1])
        if config.adaptive_cutoffs is None:
            nll = cross_entropy(output.logits.transpose(1, 2), y, reduction="none")
            logits.append(output.logits)
        else:
            nll = output.token_losses
            with torch.no_grad():
                logits.append(model(**arguments).logits)
        losses.append(nll)
        assert_allclose("mean loss", output.loss, nll.mean(), atol=5e-6)
        memory = output.memory.detach()
        if f"aux.c_after_segment.{index}" in case.outputs:
            assert_allclose(
                "c", torch.stack(memory.cell_states), case.outputs[f"aux.c_after_segment.{index}"], atol=5e-6
            )
    outputs = {"nll": torch.cat(losses, 1).T, "c_last": torch.stack(output.memory.cell_states)}
    if "logits" in case.probes:
        outputs["logits"] = batch_first(torch.cat(logits, 1))
    backward(case, outputs)
    compare_gradients(case, model, config, {})
    embeddings = model.model.embed_tokens(ids)
    extra = {
        "aux.log_probs": torch.cat(logits, 1),
        "aux.hidden": torch.cat(hidden, 1),
        "aux.embeddings": embeddings,
        **{f"aux.memory.{layer}": memory.layer_inputs[layer] for layer in config.attention_layer_indices},
    }
    for name in extra.keys() & case.outputs.keys():
        assert_allclose(name, batch_first(extra[name]), case.outputs[name], atol=5e-6)


CHECKS = {
    "stack": check_stack,
    "chunks": check_chunks,
    "attention": check_attention,
    "language model": check_language_model,
}


@pytest.mark.usefixtures("recurrence_backend")
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", case_names(), ids=lambda name: f"srupp-{name}")
def test_case(name: str, attention: str):
    case = Case(name)
    CHECKS[case.kind](case, attention)


@pytest.mark.parametrize("name", case_names(), ids=lambda name: f"srupp-{name}")
def test_restore_inverts_convert(name: str):
    case = Case(name)
    config = case.config("eager")
    restored = restore_state_dict(convert_state_dict(case.weights, config), config)
    assert set(restored) == set(case.weights)
    for key, tensor in case.weights.items():
        assert torch.equal(restored[key], tensor), key
        assert restored[key].dtype == tensor.dtype


@pytest.mark.parametrize("name", case_names(), ids=lambda name: f"srupp-{name}")
def test_a_checkpoint_tells_its_config(name: str):
    """All but what no tensor tells, which is given here."""
    case = Case(name)
    if case.kind == "attention":
        return
    expected = case.config("eager")
    untold = ("bidirectional", "is_causal", "num_attention_heads", "recurrence_activation", "normalize_after")
    untold = {field: getattr(expected, field) for field in (*untold, "has_skip_term", "dropout")}
    told = infer_config(case.weights, **untold)
    for field in (
        "hidden_size",
        "input_sizes",
        "projection_sizes",
        "attention_layer_indices",
        "layer_norm",
        "use_peephole",
    ):
        assert getattr(told, field) == getattr(expected, field), field
    assert told.rescale == (expected.rescale and expected.has_skip_term)
    build_model(case.weights, told)


@pytest.mark.usefixtures("recurrence_backend")
@pytest.mark.parametrize(
    "name", sorted(path.stem for path in SRU_CASES.glob("*.json")), ids=lambda name: f"srupp-sru-{name}"
)
def test_regression_case_of_sru(name: str):
    """Weights, inputs and outputs saved by an older version, with the layout that SRU 2 has."""
    about = json.loads((SRU_CASES / f"{name}.json").read_text())
    tensors = load_file(SRU_CASES / f"{name}.safetensors")
    weights = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    fields = {**DEFAULTS["sru.SRU"], **translate(about["sru_kwargs"], STACK_OPTIONS)}
    fields["hidden_size"] *= 2 if fields.get("bidirectional") else 1
    config = SruppConfig(**fields)
    model = build_model(weights, config)
    with torch.no_grad():
        output = model(inputs_embeds=batch_first(tensors["inputs"]), return_memory=True)
    assert_allclose("outputs.0", batch_first(output.last_hidden_state), tensors["outputs.0"], atol=1e-6)
    assert_allclose("outputs.1", torch.stack(output.memory.cell_states), tensors["outputs.1"], atol=1e-6)
    restored = restore_state_dict(convert_state_dict(weights, config), config, sru_2=True)
    assert set(restored) == set(weights)
    assert all(torch.equal(restored[key], tensor) for key, tensor in weights.items())


def test_there_are_cases():
    assert case_names(), f"no golden cases in {CASES}"
