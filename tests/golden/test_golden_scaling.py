"""Replays the cases recorded from trax: outputs, steps of decoding, training with its draws, gradients by name."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache

from hf_efficient.models.scaling_transformer.configuration_scaling_transformer import ScalingTransformerConfig
from hf_efficient.models.scaling_transformer.convert_scaling_transformer import (
    build_model,
    infer_config,
    name_leaves,
    restore_state_dict,
)
from hf_efficient.models.scaling_transformer.modeling_scaling_transformer import ScalingTransformerForCausalLM
from hf_efficient.models.terraformer import convert_terraformer
from hf_efficient.models.terraformer.configuration_terraformer import TerraformerConfig
from hf_efficient.modules.causal_window import CausalWindow
from hf_efficient.modules.lm_heads import LowRankHead, MixedHead
from hf_efficient.modules.sparse_blocks import FeedForwardBlock, SparseAttention
from hf_efficient.modules.sparse_layers import (
    ModularDense,
    ModuleConv,
    MultiplicativeDense,
    SparseFeedForward,
    UnitDraws,
)
from hf_efficient.modules.token_positions import FixedBasePositions, LearnedPositions
from hf_efficient.modules.trax_layout import attention_rules, feed_forward_rules, head_rules
from hf_efficient.ops.backend import use_backend
from hf_efficient.ops.sparse_ff import controller_logits, draw_winners, sparse_ff
from hf_efficient.ops.sru import sru_recurrence
from hf_efficient.utils.weight_stream import read_weight_stream
from tests.golden import terraformer_cases
from tests.golden.scaling_cases import (
    CASES,
    TRAINED,
    Case,
    Draws,
    attention_fields,
    case_names,
    feed_forward_fields,
    gradients,
    injected,
    language_model_config,
    load_by_rules,
    restored,
)
from tests.golden.scaling_lsh import lsh_core


pytestmark = pytest.mark.golden


def small_config(**fields) -> ScalingTransformerConfig:
    """A config of which only one part is built."""
    return ScalingTransformerConfig(vocab_size=8, num_hidden_layers=1, attn_implementation="eager", **fields)


def input_of(case: Case) -> Tensor:
    return case.inputs["x"].clone().requires_grad_()


def replay_layer(case: Case, layer: nn.Module, renamed: dict[str, str]) -> None:
    """Output and gradients of a layer without a state; `renamed` gives our names of weights that are laid out alike."""
    layer.load_state_dict({renamed[name]: tensor for name, tensor in case.weights.items()})
    x = input_of(case)
    y = layer(x)
    case.compare("y", y, case.outputs["y"])
    y.backward(case.inputs["cotangent"])
    ours = {name: case_name for case_name, name in renamed.items()}
    case.compare_gradients("grad.", {ours[n]: g for n, g in gradients(layer).items()}, {"x": x.grad})


def multiplicative_dense(case: Case) -> None:
    o = case.options
    layer = MultiplicativeDense(o["d_in"], o["d_out"], o["n_modules"], o["use_bias"])
    replay_layer(case, layer, {name: name.removeprefix("mult.") for name in case.weights})


def modular_dense(case: Case) -> None:
    layer = ModularDense(case.options["d_feature"], case.options["sparsity"])
    names = {name: name.removeprefix("multmod.").replace("module_kernel", "kernel") for name in case.weights}
    replay_layer(case, layer, names)


class _Windowed(nn.Module):
    """A convolution with its window, over a text and token by token."""

    def __init__(self, conv: ModuleConv, width: int):
        super().__init__()
        self.conv, self.window = conv, CausalWindow(conv.kernel.shape[2], width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.window(x, None, None, False)[0])

    def steps(self, x: Tensor) -> Tensor:
        outputs, state = [], None
        for token in x.split(1, dim=1):
            windows, after = self.window(token, state, None, False)
            state = None if after is None else after.squeeze(1)
            outputs.append(self.conv(windows))
        return torch.cat(outputs, dim=1)


def conv(case: Case) -> None:
    o = case.options
    channels = o["d_in"] // o["n_modules"]
    layer = _Windowed(ModuleConv(channels, o["n_units"], o["length_kernel_size"], o["kernel_size"]), o["d_in"])
    kernel, bias = case.weights["conv.kernel"], case.weights["conv.bias"]
    layer.load_state_dict({"conv.kernel": kernel.permute(3, 2, 0, 1), "conv.bias": bias})
    x = input_of(case)
    y = layer(x)
    case.compare("y", y, case.outputs["y"])
    case.compare("steps", layer.steps(case.inputs["x"]), case.outputs["predict_steps"])
    y.backward(case.inputs["cotangent"])
    found = gradients(layer)
    grads = {"conv.kernel": found["conv.kernel"].permute(2, 3, 1, 0), "conv.bias": found["conv.bias"]}
    case.compare_gradients("grad.", grads, {"x": x.grad})


def causal_mask(length: int, past: int = 0) -> Tensor:
    hidden = torch.ones(length, past + length, dtype=torch.bool).triu(past + 1)
    return torch.zeros(1, 1, length, past + length).masked_fill(hidden, torch.finfo(torch.float32).min)


def attention(case: Case) -> None:
    o, kind = case.options, case.about["description"].split()[0].rstrip(":")
    config = small_config(
        hidden_size=o["d_feature"],
        num_attention_heads=o["n_heads"],
        dropout=0.0,
        **attention_fields({"attention": kind, **o}),
    )
    layer, rules = SparseAttention(config, 0).eval(), attention_rules(config, "attn", "x")
    rules = [rule._replace(ours=rule.ours.removeprefix("x.")) for rule in rules]
    load_by_rules(layer, rules, case.weights)
    x = input_of(case)
    y, _, _ = layer(x, causal_mask(x.shape[1]))
    case.compare("y", y, case.outputs["y"])
    outputs, state, cache = [], None, DynamicCache(config=config)
    first, length = o.get("predict_first_chunk", 1), x.shape[1]
    for start, end in [(0, first), *((place, place + 1) for place in range(first, length))]:
        with torch.no_grad():
            mask = causal_mask(end - start, start)
            step, _, states = layer(case.inputs["x"][:, start:end], mask, cache, state)
        state = torch.cat(states, dim=-1).squeeze(1) if states else None
        outputs.append(step)
    case.compare("steps", torch.cat(outputs, dim=1), case.outputs["predict_steps"])
    y.backward(case.inputs["cotangent"])
    case.compare_gradients("grad.", restored(rules, gradients(layer)), {"x": x.grad})


def sparse_ff_case(case: Case) -> None:
    o = case.options
    layer = SparseFeedForward(
        o["d_model"],
        o["d_ff"],
        o["n_elements_in_block"],
        o["d_lowrank"],
        temperature=o["temperature"],
        hard_probability=o["quant_prob"],
        multiply_by_controller=o["multiply_by_controller_output"],
    )
    rules = [
        rule._replace(original=rule.original.replace("ff.sparse_ff.", "ff."), ours=rule.ours.rpartition("sparse.")[2])
        for rule in feed_forward_rules(0)
        if ".sparse_ff." in rule.original
    ]
    load_by_rules(layer, rules, case.weights)
    x = case.inputs["x"]
    flat = x.flatten(0, 1)
    weights = (layer.controller_down, layer.controller_up, layer.controller_bias, layer.up, layer.down, layer.bias)
    logits = controller_logits(flat, *weights[:3])
    case.compare("logits", logits, case.outputs["controller_logits"])
    layer.eval()
    for backend in ("reference", "auto"):
        with use_backend(backend), torch.no_grad():
            multiply = layer.multiply_by_controller
            y, winners = sparse_ff(x, *weights, multiply_by_controller=multiply)
            steps = [sparse_ff(t, *weights, multiply_by_controller=multiply)[0] for t in x.split(1, dim=1)]
        assert torch.equal(winners.flatten(0, 1), case.outputs["quant_index"])
        case.compare(f"eval by {backend}", y, case.outputs["eval"])
        case.compare(f"steps by {backend}", torch.cat(steps, dim=1), case.outputs["predict_steps"])
    uniforms = case.inputs["gumbel_u"]
    drawn = draw_winners(logits, layer.temperature, uniforms)
    assert torch.equal(drawn.int(), case.outputs["train_quant_index"])
    case.compare("soft mask", logits.softmax(-1), case.outputs["train_soft_mask"])
    for run in ("eval", "train_quant", "train_soft"):
        layer.train(run != "eval")
        x = input_of(case)
        select = case.inputs.get(f"select_{run.removeprefix('train_')}", torch.zeros(1)).reshape(())
        y = layer(x, UnitDraws(select=select, uniforms=uniforms))
        case.compare(run, y, case.outputs[run])
        y.backward(case.inputs["cotangent"])
        case.compare_gradients(f"{run}_grad.", restored(rules, gradients(layer)), {"x": x.grad})


def feed_forward_runs(case: Case) -> dict[str, dict]:
    """For each recorded run of a feed-forward block the fields that differ from the case's, and whether it trains."""
    chunk, runs = case.options.get("chunk", 0), {}
    for run in case.outputs:
        if run == "predict_steps":
            continue
        trains = run not in ("y", "eval", "eval_gelu")
        runs[run] = {
            "trains": trains,
            "hidden_act": "gelu_new" if "gelu" in run else "relu",
            "share_dropout": run not in ("elementwise",),
            "ff_chunk_size": chunk if run == "chunked" else 0,
        }
    return runs


def feed_forward_draws(case: Case, run: str) -> Draws:
    draws = []
    for entry in case.about.get("draws", {}).get(run, []):
        tensor = case.tensors[entry["name"]]
        draws.append((entry["name"], tensor[entry["row"]] if "row" in entry else tensor))
    return Draws(draws)


def feed_forward(case: Case) -> None:
    o = case.options
    for run, fields in feed_forward_runs(case).items():
        trains = fields.pop("trains")
        config = small_config(
            hidden_size=o["d_model"],
            num_attention_heads=1,
            dropout=o.get("dropout", 0.0),
            activation_dropout=o.get("ff_dropout") or 0.0,
            **{**feed_forward_fields(o), **fields},
        )
        block = FeedForwardBlock(config).train(trains)
        rules = [
            rule._replace(original=rule.original.replace("ff.", "block.", 1), ours=rule.ours.partition(".")[2])
            for rule in feed_forward_rules(config.ff_sru_layers)
        ]
        load_by_rules(block, rules, case.weights)
        x = input_of(case)
        with injected(feed_forward_draws(case, run)):
            y, _ = block(x)
        case.compare(run, y, case.outputs[run])
        y.backward(case.inputs["cotangent"])
        prefix = "grad." if run == "y" else f"{run}_grad."
        case.compare_gradients(prefix, restored(rules, gradients(block)), {"x": x.grad})
        if run == "y" and "predict_steps" in case.outputs:
            outputs, state = [], None
            for token in case.inputs["x"].split(1, dim=1):
                with torch.no_grad():
                    step, states = block(token, state)
                state = torch.cat(states, dim=-1).squeeze(1) if states else None
                outputs.append(step)
            case.compare("steps", torch.cat(outputs, dim=1), case.outputs["predict_steps"])


def sru(case: Case) -> None:
    assert case.options["activation"] is None
    rule = next(r for r in feed_forward_rules(1) if r.original.endswith("sru.0.kernel"))
    layer = nn.Linear(case.options["n_units"], 3 * case.options["n_units"])
    bias = case.weights["sru.bias"]
    layer.load_state_dict({"weight": rule.convert(case.weights["sru.kernel"]), "bias": torch.cat(bias.chunk(3)[::-1])})

    def run(x: Tensor, c0: Tensor | None = None):
        return sru_recurrence(layer(x).unflatten(-1, (3, -1)), x, c0=c0, scale_x=3**0.5)

    x = input_of(case)
    y, _ = run(x)
    case.compare("y", y, case.outputs["y"])
    outputs, c = [], None
    for token in case.inputs["x"].split(1, dim=1):
        step, c = run(token, c)
        outputs.append(step)
    case.compare("steps", torch.cat(outputs, dim=1), case.outputs["predict_steps"])
    y.backward(case.inputs["cotangent"])
    found = gradients(layer)
    grads = {"sru.kernel": rule.restore(found["weight"]), "sru.bias": torch.cat(found["bias"].chunk(3)[::-1])}
    case.compare_gradients("grad.", grads, {"x": x.grad})


def heads(case: Case) -> None:
    o = case.options
    width, vocab_size = o["d_model"], o["vocab_size"]
    makes = {
        "mult": ("multiplicative", lambda: MultiplicativeDense(width, vocab_size, o["loss_sparsity"])),
        "lowrank": ("low_rank", lambda: LowRankHead(width, vocab_size, o["d_lowrank"])),
        "einsum": ("einsum", lambda: nn.Linear(width, vocab_size)),
        "prob": ("multiplicative", lambda: MixedHead(width, vocab_size, o["loss_sparsity"], o["prob_sparse"])),
    }
    for run, expected in case.outputs.items():
        name = run.partition("_")[0]
        kind, make = makes[name]
        prob = o["prob_sparse"] if name == "prob" else None
        like = SimpleNamespace(lm_head_type=kind, lm_head_sparse_probability=prob)
        rules = [rule._replace(ours=rule.ours.partition(".")[2]) for rule in head_rules(like)]
        layer = make().train("_train" in run)
        weights = {f"lm_head.{n.partition('.')[2]}": t for n, t in case.weights.items() if n.startswith(f"{name}.")}
        load_by_rules(layer, rules, weights)
        x = input_of(case)
        draws = [(n, t) for n, t in case.inputs.items() if n == f"uniform.{run}" and layer.training]
        with injected(Draws(draws)):
            y = layer(x)
        case.compare(run, y, expected)
        y.backward(case.inputs["cotangent"])
        found = restored(rules, gradients(layer))
        grads = {f"{name}.{n.partition('.')[2]}": grad for n, grad in found.items()}
        case.compare_gradients(f"{run}_grad.", grads, {"x": x.grad})


def position_module(case: Case, name: str, dropout: float) -> nn.Module:
    """Position vectors of a kind."""
    o = case.options
    own = {n.partition(".")[2]: t for n, t in case.weights.items() if n.startswith(f"{name}.")}
    if name == "fixed_base":
        module: nn.Module = FixedBasePositions(o["d_model"], o["bases"], o["n_digits"])
        vectors = [[own[f"base.{b}.{i}"][0] for i in range(o["n_digits"])] for b in range(len(o["bases"]))]
        stacked = torch.stack([torch.stack(row) for row in vectors])
        module.load_state_dict({"vectors": stacked, "start": own["start_vec"].flatten()})
        return module
    rank = own["table"].shape[1] if "ff" in own else None
    module = LearnedPositions(
        len(own["table"]),
        o["d_model"],
        rank,
        dropout,
        o.get("max_offset_to_add", 0),
        o.get("start_from_zero_prob", 1.0),
    )
    module.load_state_dict({"table": own["table"], **({"projection": own["ff"]} if "ff" in own else {})})
    return module


def position_gradients(module: nn.Module, name: str) -> dict[str, Tensor]:
    """Gradients by the names of the weights that [`position_module`] was made of."""
    found = gradients(module)
    if "vectors" not in found:
        ours = {"table": "table", "projection": "ff"}
        return {f"{name}.{ours[own]}": grad for own, grad in found.items()}
    digits = {
        f"{name}.base.{base}.{digit}": vector.unsqueeze(0)
        for base, vectors in enumerate(found["vectors"])
        for digit, vector in enumerate(vectors)
    }
    return {**digits, f"{name}.start_vec": found["start"].view(1, 1, -1)}


# trax cuts a table of low rank to the length of the call: token by token every token gets position 0, which is a fault
# of its own, and a random start has no effect.
NOT_WORTH_COPYING, WITHOUT_START = {"lowrank_predict"}, {"lowrank_train"}


def positions(case: Case) -> None:
    x, length = case.inputs["x"], case.inputs["x"].shape[1]
    for run, expected in case.outputs.items():
        name = next(kind for kind in ("learned", "lowrank", "fixed_base") if run.startswith(kind))
        rest = run.removeprefix(name).strip("_")
        trains = rest in ("offset", "zero", "train") and run not in WITHOUT_START
        entries = case.about.get("draws", {}).get(run, []) if trains else []
        draws = [(entry["name"], case.tensors[entry["name"]]) for entry in entries]
        dropout = case.options.get("dropout", 0.0) if any("keep" in n and "base" not in n for n, _ in draws) else 0.0
        module = position_module(case, name, dropout)
        module.train(trains)
        if run in NOT_WORTH_COPYING:
            wanted = module.eval()(torch.arange(length)[None])
            assert not torch.allclose(x + wanted, expected, atol=1e-3)
            continue
        if rest == "predict":
            vectors = torch.cat([module(torch.tensor([[place]])) for place in range(length)], dim=1)
        else:
            with injected(Draws(draws)):
                vectors = module(torch.arange(length).expand(len(x) if trains else 1, -1))
        case.compare(run, x + vectors, expected)
        if case.group(f"{run}_grad."):
            leaf = input_of(case)
            (leaf + vectors).backward(case.inputs["cotangent"])
            case.compare_gradients(f"{run}_grad.", position_gradients(module, name), {"x": leaf.grad})


def shifted(tokens: Tensor) -> Tensor:
    return nn.functional.pad(tokens[:, :-1], (1, 0)).long()


def language_model_draws(case: Case, run: str) -> Draws:
    entries = case.about.get("draws", {}).get(run)
    if entries is not None:
        return Draws([(entry["name"], case.tensors[entry["name"]]) for entry in entries])
    select = torch.tensor(case.options[f"select_{run.removeprefix('train_')}"])
    draws = []
    for name in sorted(n for n in case.inputs if n.startswith("gumbel_u.")):
        draws += [(name, case.inputs[name]), (f"select.{name}", select)]
    return Draws(draws)


def compare_language_model_gradients(case: Case, model: ScalingTransformerForCausalLM, prefix: str) -> None:
    case.compare_gradients(prefix, restore_state_dict(gradients(model), model.config), {})


def language_model(case: Case) -> None:
    config = language_model_config(case.options)
    files = [name for name in case.options.get("files", []) if name.endswith(".npy.gz")]
    for name in files:
        named = name_leaves(read_weight_stream(CASES / case.name / name))
        assert list(restore_state_dict(build_model(named, config).state_dict(), config)) == list(named)
        assert set(named) == set(case.weights)
        assert all(torch.equal(named[leaf], case.weights[leaf]) for leaf in named)
    told = {name: getattr(config, name) for name in ("num_attention_heads", "attention_value_input", "lm_head_type")}
    inferred = infer_config(case.weights, **told)
    assert inferred.state_size == config.state_size
    model = build_model(case.weights, config)
    back = restore_state_dict(model.state_dict(), config)
    assert set(back) == set(case.weights)
    assert all(torch.equal(back[name], tensor) for name, tensor in case.weights.items())
    tokens = case.inputs["tokens"].long()
    targets = tokens.masked_fill(tokens == 0, -100)
    runs = [name.removesuffix("_logits") for name in case.outputs if name.endswith("_logits")]
    for run in [*(["logits"] if "logits" in case.outputs else []), *runs]:
        if run == "predict":
            replay_steps(case, model.eval())
            continue
        is_eval = run == "logits"
        model.train(not is_eval)
        with injected(Draws([]) if is_eval else language_model_draws(case, run)):
            output = model(shifted(tokens), shift_labels=targets)
        case.compare(run, output.logits, case.outputs["logits" if is_eval else f"{run}_logits"])
        loss = case.tensors.get("output.loss" if is_eval else f"{run}.output.loss")
        if loss is None:
            continue
        case.compare(f"{run}: loss", output.loss.reshape(1), loss)
        output.loss.backward()
        compare_language_model_gradients(case, model, "grad." if is_eval else f"{run}.grad.")


def replay_steps(case: Case, model: ScalingTransformerForCausalLM) -> None:
    """Decode token by token, on every backend that there is."""
    given = case.inputs.get("predict_tokens")
    tokens = shifted(case.inputs["tokens"].long()) if given is None else given.long()
    for backend in ("reference", "auto"):
        cache, outputs = DynamicCache(config=model.config), []
        for token in tokens.split(1, dim=1):
            with torch.no_grad(), use_backend(backend):
                outputs.append(model(token, past_key_values=cache).logits)
        case.compare(f"steps by {backend}", torch.cat(outputs, dim=1), case.outputs["predict_logits"])


REPLAYS = {
    "multiplicative_dense": multiplicative_dense,
    "modular_dense": modular_dense,
    "conv": conv,
    "attention": attention,
    "sparse_ff": sparse_ff_case,
    "feed_forward": feed_forward,
    "sru": sru,
    "heads": heads,
    "positions": positions,
    "language_model": language_model,
    "encoder-decoder": terraformer_cases.replay,
    "Terraformer": terraformer_cases.replay,
    "reversible": terraformer_cases.replay_reversible,
    "LSH wrapper": terraformer_cases.replay_lsh_wrapper,
    "heads-major attention": terraformer_cases.replay_heads_major,
    "lsh_core": lsh_core,
}


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", case_names())
def test_scaling_case(name):
    case = Case(name)
    REPLAYS[case.kind](case)


@pytest.mark.parametrize(
    ("given", "expected"), [("4 8 0.1 0.3", [4, 8, 0.1, 0.3]), ("4 8", [4, 8]), ("4", 4), ("0", 0)]
)
def test_a_sparsity_in_words_is_that_in_numbers(given, expected):
    fields = feed_forward_fields({"d_ff": 24, "ff_sparsity": given})
    assert fields == feed_forward_fields({"d_ff": 24, "ff_sparsity": expected})


def test_there_are_cases():
    kinds = {Case(name).kind for name in case_names()}
    assert set(REPLAYS) <= kinds, f"no case of {sorted(set(REPLAYS) - kinds)} in {CASES}"


# Names of the trained checkpoints' leaves that differ from those of the cases.
TRAINED_NAMES = {"embed": "embedding", "pos": "position_table", "ln_attn": "attn_norm", "ln_ff": "ff.norm"}
TRAINED_NAMES |= {"ln_f": "final_norm", "head": "lm_head", "w": "kernel", "b": "bias", "ln_cross": "cross_norm"}
SIDES = {"enc": "encoder", "dec": "decoder"}
SYMBOLS = [3, 7, 5, 3, 2, 4]


def trained_leaves(name: str, **renamed: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Leaves of a trained checkpoint by the cases' names, and what it was recorded to give; `renamed` says in which
    words one family's names differ."""
    content = load_file(TRAINED / f"{name}.safetensors")
    names = TRAINED_NAMES | renamed
    leaves = {}
    for key, tensor in content.items():
        if not key.startswith("golden."):
            side, _, rest = key.partition(".")
            if side in SIDES:
                key = f"{SIDES[side]}.{'blocks.' if rest[0].isdigit() else ''}{rest}"
            leaf = ".".join(names.get(part, part) for part in key.split("."))
            leaves[leaf.removeprefix("decoder.") if "final_norm" in leaf else leaf] = tensor
    tables = {key: tensor.squeeze(0) for key, tensor in leaves.items() if "position_table" in key}
    return leaves | tables, {key.partition(".")[2]: x for key, x in content.items() if key.startswith("golden.")}


def copied(model, **options) -> list[int]:
    """What a language model writes behind 0, the symbols and 0: the symbols once more. Inputs are shifted, so that 0
    stands in front as well."""
    prompt = torch.tensor([[0, 0, *SYMBOLS, 0]])
    # The original's padding is a token here, which a mask has to say.
    options |= {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False}
    return model.generate(prompt, **options)[0, -6:].tolist()


def test_scaling_trained_checkpoint_gives_its_logits_and_its_decode():
    leaves, golden = trained_leaves("transformerlm_copy")
    model = build_model(leaves, infer_config(leaves, num_attention_heads=2))
    with torch.no_grad():
        logits = model(shifted(golden["input_ids"][None])).logits[0]
    torch.testing.assert_close(logits, golden["logits"], atol=2e-5, rtol=1e-4)
    assert copied(model) == SYMBOLS


SMALL = {"vocab_size": 13, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}


def round_trip(leaves: dict[str, Tensor], config: TerraformerConfig):
    """The model of a checkpoint, whose leaves come back from it to the bit."""
    model = convert_terraformer.build_model(leaves, config)
    back = convert_terraformer.restore_state_dict(model.state_dict(), config)
    assert set(back) == set(leaves)
    assert all(torch.equal(back[name], leaf) for name, leaf in leaves.items())
    return model


def test_scaling_trained_reformer_gives_its_logits_and_its_decode():
    """Weights of a head each, heads of the whole width, and both streams beside each other in front of the head."""
    leaves, golden = trained_leaves(
        "reformerlm_copy", ln_attn="attn_half.0.norm", attn="attn_half.0.attn", ff="ff_half"
    )
    leaves = {name.replace("ff.norm", "ff_half.norm"): leaf for name, leaf in leaves.items()}
    alone = {"is_encoder_decoder": False, "num_encoder_layers": 0, "num_decoder_layers": 2, "eos_token_id": None}
    heads = {"head_dim": 64, "attention_bias": False, "attentions_per_layer": 1, "stream_output": "concatenate"}
    model = round_trip(leaves, TerraformerConfig(**SMALL, **alone, **heads, max_position_embeddings=256))
    with torch.no_grad():
        logits = model(shifted(golden["input_ids"][None])).logits[0]
    torch.testing.assert_close(logits, golden["logits"], atol=2e-5, rtol=1e-4)
    assert copied(model) == copied(model, use_cache=False) == SYMBOLS


def test_scaling_trained_encoder_decoder_gives_its_logits_and_its_decode():
    leaves, golden = trained_leaves("transformer_copy")
    layers = {"num_encoder_layers": 2, "num_decoder_layers": 2, "decoder_type": "cross_attention"}
    config = TerraformerConfig(**SMALL, **layers, attentions_per_layer=1, max_position_embeddings=256)
    model = round_trip(leaves, config)
    source, target = golden["src_ids"][None], golden["tgt_ids"][None]
    with torch.no_grad():
        output = model(source, decoder_input_ids=shifted(target))
    torch.testing.assert_close(output.encoder_last_hidden_state[0], golden["encoder_out"], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(output.logits[0], golden["logits"], atol=2e-5, rtol=1e-4)
    written = model.generate(torch.tensor([[*SYMBOLS, 1, 8]]), max_new_tokens=9, do_sample=False)
    assert written[0].tolist() == [0, *SYMBOLS, 1]
