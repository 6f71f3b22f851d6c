"""Replays the cases recorded from the original SRU and SRU++ code: outputs, states, and every gradient by name."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from hf_efficient.models.srupp.configuration_srupp import SruppConfig
from hf_efficient.models.srupp.convert_srupp import build_model, convert_state_dict, infer_config, restore_state_dict
from hf_efficient.models.srupp.layers_srupp import SruppProjection
from hf_efficient.models.srupp.memory_srupp import SegmentMemory
from hf_efficient.models.srupp.modeling_srupp import SruppForCausalLM, SruppModel


GOLDEN = Path(os.environ.get("HF_EFFICIENT_GOLDEN", Path(__file__).parent))
CASES, SRU_CASES = GOLDEN / "srupp" / "cases", GOLDEN / "sru" / "cases"
ATTENTION = ["eager", "sdpa"]

pytestmark = pytest.mark.golden

# Options of the original's classes -> fields of SruppConfig; an option that is in neither table fails.
STACK_OPTIONS = {
    "input_size": "embedding_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "proj_size": "projection_size",
    "projection_size": "projection_size",
    "num_heads": "num_attention_heads",
    "bidirectional": "bidirectional",
    "layer_norm": "layer_norm",
    "normalize_after": "normalize_after",
    "attn_layer_norm": "attention_layer_norm",
    "attention_every_n_layers": "attention_every_n_layers",
    "attention_last_n_layers": "attention_last_n_layers",
    "has_skip_term": "has_skip_term",
    "rescale": "rescale",
    "highway_bias": "highway_bias",
    "proj_input_to_hidden_first": "project_input",
    "use_tanh": "recurrence_activation",
    "v1": "use_peephole",
    "weight_c_init": "weight_c_init",
    "dropout": "dropout",
    "attn_dropout": "attention_dropout",
    "rnn_dropout": "input_dropout",
}
LM_OPTIONS = {
    "n_d": "hidden_size",
    "n_proj": "projection_size",
    "depth": "num_hidden_layers",
    "n_e": "adaptive_embedding_size",
    "div_val": "adaptive_divisor",
    "attn_heads": "num_attention_heads",
    "attn_every_n_layers": "attention_every_n_layers",
    "layer_norm": "layer_norm",
    "bias": "highway_bias",
    "dropout": "dropout",
    "emb_dropout": "embedding_dropout",
    "attn_dropout": "attention_dropout",
}
VALUES = {
    "recurrence_activation": lambda value: "tanh" if value else "identity",
    "use_peephole": lambda value: not value,
    "attention_last_n_layers": lambda value: None if value < 0 else value,
    "projection_size": lambda value: [size or 0 for size in value] if isinstance(value, list) else value or 0,
    "adaptive_divisor": int,
}
# Defaults of the original's classes where they are not ours.
SRU = {"attention_layers": [], "attention_layer_norm": False, "projection_size": 0, "projection_dropout": 0.0}
DEFAULTS = {
    "sru.SRUCell": {**SRU, "highway_bias": 0.0, "num_hidden_layers": 1, "normalize_after": True},
    "sru.SRU": {**SRU, "highway_bias": 0.0, "num_hidden_layers": 2},
    "sru.SRUpp": {"highway_bias": -2.0, "num_hidden_layers": 2},
}


def translate(options: dict, names: dict[str, str]) -> dict:
    unknown = set(options) - set(names)
    assert not unknown, f"options that this test does not know: {sorted(unknown)}"
    fields = {names[name]: value for name, value in options.items()}
    return {name: VALUES[name](value) if name in VALUES else value for name, value in fields.items()}


class Case:
    def __init__(self, name: str):
        self.name = name
        self.about = json.loads((CASES / f"{name}.json").read_text())
        tensors = load_file(CASES / f"{name}.safetensors")
        self.weights, self.inputs, self.outputs, self.probes, self.grads = (
            {key.removeprefix(part): tensor for key, tensor in tensors.items() if key.startswith(part)}
            for part in ("weights.", "input.", "output.", "probe.", "grad.")
        )
        assert self.about.get("mode", "eval") == "eval"
        self.check, self.fields = self._kind()

    def _kind(self):
        kind, options = self.about["class"], dict(self.about.get("kwargs") or {})
        if kind in DEFAULTS:
            self.flat_state = options.pop("nn_rnn_compatible_return", False)
            fields = {**DEFAULTS[kind], **translate(options, STACK_OPTIONS)}
            # The original's hidden_size is that of a direction.
            fields["hidden_size"] *= 2 if fields.get("bidirectional") else 1
            return (check_chunks if "chunks" in self.about else check_stack), fields
        if kind == "sru.modules.SRUppAttention":
            return check_attention, attention_fields(options)
        if kind.startswith("experiments/srupp_experiments/") and kind.endswith(":Model"):
            fields = translate(self.about["args"], LM_OPTIONS)
            fields["vocab_size"] = self.about["vocab"]
            if "cutoffs" in self.about:
                tied = any("emb_projs" in name for name in self.about["tied_state_dict_entries"])
                fields |= {"adaptive_cutoffs": self.about["cutoffs"], "tie_adaptive_projections": tied}
            return check_language_model, {**fields, "tie_word_embeddings": "cutoffs" in self.about}
        raise ValueError(f"{self.name}: {kind} is no kind of case that this test knows")

    @property
    def is_cell(self) -> bool:
        return self.about["class"] == "sru.SRUCell"

    def config(self, attention: str, **overrides) -> SruppConfig:
        config = SruppConfig(**{**self.fields, **overrides})
        config._attn_implementation = attention
        return config

    def leaf(self, name: str) -> torch.Tensor | None:
        """An input whose gradient is asked for, as the case has it."""
        return self.inputs[name].clone().requires_grad_() if name in self.inputs else None


def attention_fields(options: dict) -> dict:
    """A layer around an attention module of its own. Only its number of rows tells what the recurrence would have."""
    inputs, rows = options.pop("in_features"), options.pop("out_features")
    hidden = rows // 3 if rows % 3 == 0 else rows // 4
    fields = {
        "embedding_size": inputs,
        "hidden_size": hidden,
        "num_hidden_layers": 1,
        "projection_size": options.pop("proj_features"),
        "num_attention_heads": options.pop("num_heads", 1),
        "attention_layer_norm": options.pop("layer_norm", False),
        "attention_normalize_after": options.pop("normalize_after", True),
        "has_skip_term": rows % 3 != 0 or hidden == inputs,
        "dropout": options.pop("dropout", 0.0),
        "attention_dropout": options.pop("attn_dropout", 0.0),
    }
    assert not options, f"options that this test does not know: {sorted(options)}"
    return fields


def case_names() -> list[str]:
    return sorted(path.stem for path in CASES.glob("*.json"))


def compare(name: str, ours: torch.Tensor, expected: torch.Tensor, atol: float = 5e-6):
    assert ours.shape == expected.shape, f"{name}: {tuple(ours.shape)} against {tuple(expected.shape)}"
    torch.testing.assert_close(ours, expected, atol=atol, rtol=0.0, msg=lambda text: f"{name}: {text}")


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
        compare(f"gradient of {name}", restored[name], grad, atol)
    for name, grad in case.grads.items():
        if name.startswith("input."):
            leaf = leaves[name.removeprefix("input.")]
            compare(f"gradient of {name}", torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, grad, atol)


def tied_names(case: Case) -> set[str]:
    """Names that stand for a tensor with another name that has the gradient."""
    tied = case.about["tied_state_dict_entries"]
    return {name for pair in tied.items() for name in pair if f"weights.{name}" not in case.grads}


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
    inputs = [tensor if layer in config.attending else None for layer, tensor in enumerate(inputs)]
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
        compare(name, tensor, case.outputs[name])
    compare("loss", loss.reshape(1), case.outputs["loss"], atol=1e-4)
    loss.backward()


def check_stack(case: Case, attention: str):
    # By the masks of the case as they are and, where they are plainly causal or absent, by the model's own.
    mask = case.inputs.get("attn_mask")
    config = case.config(attention, is_causal=is_causal_mask(mask))
    ways = [True, False] if mask is None or is_causal_mask(mask) else [False]
    for own_masks in ways if config.attending else [True]:
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
                compare(name, output.hidden_states[layer][real], batch_first(saved)[real])
                if layer in config.attending:
                    compare(name, output.memory.layer_inputs[layer][real], batch_first(saved)[real])
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
    compare("h_full", batch_first(whole.last_hidden_state), case.outputs["aux.h_full"])
    compare("c_full", state_of(case, whole.memory, config), case.outputs["aux.c_full"])
    cache, cached = None, []
    with torch.no_grad():
        for chunk in batch_first(x).split(case.about["chunks"], dim=1):
            output = model(inputs_embeds=chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            cached.append(output.last_hidden_state)
    compare("h by a cache", batch_first(torch.cat(cached, 1)), case.outputs["h"])


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
        compare("mean loss", output.loss, nll.mean())
        memory = output.memory.detach()
        if f"aux.c_after_segment.{index}" in case.outputs:
            compare("c", torch.stack(memory.cell_states), case.outputs[f"aux.c_after_segment.{index}"])
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
        **{f"aux.memory.{layer}": memory.layer_inputs[layer] for layer in config.attending},
    }
    for name in extra.keys() & case.outputs.keys():
        compare(name, batch_first(extra[name]), case.outputs[name])


@pytest.mark.usefixtures("recurrence_backend")
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", case_names(), ids=lambda name: f"srupp-{name}")
def test_case(name: str, attention: str):
    case = Case(name)
    case.check(case, attention)


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
    if case.check is check_attention:
        return
    expected = case.config("eager")
    untold = ("bidirectional", "is_causal", "num_attention_heads", "recurrence_activation", "normalize_after")
    untold = {field: getattr(expected, field) for field in (*untold, "has_skip_term", "dropout")}
    told = infer_config(case.weights, **untold)
    for field in ("hidden_size", "input_sizes", "projection_sizes", "attending", "layer_norm", "use_peephole"):
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
    compare("outputs.0", batch_first(output.last_hidden_state), tensors["outputs.0"], atol=1e-6)
    compare("outputs.1", torch.stack(output.memory.cell_states), tensors["outputs.1"], atol=1e-6)
    restored = restore_state_dict(convert_state_dict(weights, config), config, sru_2=True)
    assert set(restored) == set(weights)
    assert all(torch.equal(restored[key], tensor) for key, tensor in weights.items())


def test_there_are_cases():
    assert case_names(), f"no golden cases in {CASES}"
