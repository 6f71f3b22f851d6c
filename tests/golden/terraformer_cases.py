"""Replays of the cases recorded from trax's Terraformer, its encoder-decoder with cross attention, and ReformerLM."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_efficient.models.terraformer.configuration_terraformer import TerraformerConfig
from hf_efficient.models.terraformer.convert_terraformer import (
    build_model,
    heads_major_rules,
    layer_rules,
    restore_state_dict,
)
from hf_efficient.models.terraformer.layers_terraformer import DecoderCall, TerraformerDecoderLayer
from hf_efficient.modules.lsh_layers import LshAttention
from hf_efficient.modules.sparse_blocks import SparseAttention
from hf_efficient.modules.trax_layout import attention_rules
from hf_efficient.ops.backend import use_backend
from hf_efficient.ops.reversible import ReversibleChain
from tests.golden.scaling_cases import (
    RECORDING,
    Case,
    Draws,
    attention_fields,
    feed_forward_fields,
    gradients,
    injected,
    load_by_rules,
    restored,
)


_KNOWN = {
    *("vocab_size", "d_model", "d_ff", "n_layers", "n_encoder_layers", "n_decoder_layers", "n_heads", "max_len"),
    *("ff_sparsity", "ff_use_sru", "ff_dropout", "ff_chunk_size", "loss_sparsity", "enc_dec_attention_sparsity"),
    *("attn_sparsity", "length_kernel_size", "encoder_attention", "decoder_attention", "dropout", "use_bfloat16"),
    *("n_decoder_attention_layers", "reversible_encoder", "use_two_swaps_per_encoder_block", "n_layers_forget"),
    *("half_before_layer", "double_after_layer", "pos_type", "pos_start_from_zero_prob", "pos_max_offset_to_add"),
    *("source_length", "n_pads", "first_chunk"),
}


def lsh_fields(options: dict[str, Any]) -> dict[str, Any]:
    """Fields of LSH attention in the decoder."""
    buckets = options["n_buckets"]
    return {
        "decoder_long_attention": "lsh" if options["std_length"] is None else "mixed",
        "lsh_full_length": options["std_length"] or 0,
        "lsh_chunk_length": options["chunk_len"],
        "lsh_rounds": options["n_hashes"],
        "lsh_buckets": [buckets] if isinstance(buckets, int) else buckets,
        "lsh_chunks_before": options["n_chunks_before"],
        "lsh_encoder_chunks_after": options["n_chunks_after"],
        "lsh_layout": "original",
    }


@contextmanager
def injected_rotations(draws: list[Tensor], heads: int) -> Iterator[None]:
    """Let attentions hash by recorded rotations, one of each row and head, in the order in which they run."""
    left = [draw.unflatten(0, (-1, heads)) for draw in draws]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LshAttention, "_rotations", lambda self, device: left.pop(0))
        yield
    assert not left, f"{len(left)} rotations that nothing asked for"


def _shared_fields(options: dict[str, Any]) -> dict[str, Any]:
    attention, more = options.get("decoder_attention"), {}
    if not isinstance(attention, dict):  # its kind stands in the description
        attention = {"kind": "multconv", "sparsity": options["attn_sparsity"]}
        attention["length_kernel_size"] = options.get("length_kernel_size", 3)
    if attention["kind"] == "lsh":
        more = lsh_fields(attention)
        attention = {"kind": "multconv", "sparsity": attention["sparsity"], "share_qk": attention["num_weights"] == 2}
    fields = {
        **more,
        "vocab_size": options["vocab_size"],
        "hidden_size": options["d_model"],
        "num_attention_heads": options["n_heads"],
        "max_position_embeddings": options["max_len"],
        "position_zero_probability": options.get("pos_start_from_zero_prob", 1.0),
        "position_max_offset": options.get("pos_max_offset_to_add", 0),
        "dropout": options.get("dropout", 0.0),
        "activation_dropout": options.get("ff_dropout") or options.get("dropout", 0.0),
        "ff_chunk_size": options.get("ff_chunk_size", 0),
        "attn_implementation": "eager",
        **feed_forward_fields(options),
        **attention_fields({**options, "attention": attention}),
    }
    if options.get("loss_sparsity"):
        fields |= {"lm_head_type": "multiplicative", "loss_sparsity": options["loss_sparsity"]}
    return fields


def _stack_fields(options: dict[str, Any]) -> dict[str, Any]:
    """Fields of a model of two streams."""
    if "n_layers" in options:
        alone = {"is_encoder_decoder": False, "num_encoder_layers": 0, "stream_output": "concatenate"}
        return {**alone, "num_decoder_layers": options["n_layers"], "attentions_per_layer": 1}
    return {
        "num_encoder_layers": options["n_encoder_layers"],
        "num_decoder_layers": options["n_decoder_layers"],
        "attentions_per_layer": options["n_decoder_attention_layers"],
        "encoder_keeps_streams": options["reversible_encoder"],
        "encoder_swaps": 2 if options["use_two_swaps_per_encoder_block"] else 1,
        "forget_every": options.get("n_layers_forget", 0),
        "half_width_layers": options.get("half_before_layer", 0),
        "double_width_after": options.get("double_after_layer") or None,
    }


def _cross_fields(options: dict[str, Any]) -> dict[str, Any]:
    """Fields of an encoder-decoder with cross attention."""
    fields: dict[str, Any] = {
        "num_encoder_layers": options["n_encoder_layers"],
        "num_decoder_layers": options["n_decoder_layers"],
        "decoder_type": "cross_attention",
        "attentions_per_layer": 1,
        "share_dropout": False,
    }
    sparsity = options.get("enc_dec_attention_sparsity") or None
    if sparsity is None:
        return fields
    pair = (sparsity, "noop") if isinstance(sparsity, int) else sparsity
    for part, modules in zip(("query", "output"), pair, strict=True):
        fields[f"cross_{part}_type"] = "none" if modules == "noop" else "multiplicative_conv"
        fields[f"cross_{part}_sparsity"] = None if modules == "noop" else modules
    return fields


def config_of(case: Case) -> TerraformerConfig:
    """The config that the options of a case amount to; an option that nothing reads fails."""
    unknown = set(case.options) - _KNOWN - RECORDING
    assert not unknown, f"options that are not known: {sorted(unknown)}"
    more = _cross_fields(case.options) if case.kind == "encoder-decoder" else _stack_fields(case.options)
    return TerraformerConfig(**_shared_fields(case.options), **more)


def shifted(tokens: Tensor) -> Tensor:
    return nn.functional.pad(tokens[:, :-1], (1, 0)).long()


def _rolled(name: str, draw: Tensor, pads: list[int], length: int) -> Tensor:
    """
    A draw over the joined rows in the order of ours: the original leaves a tail behind each target, as long as the
    source's padding, which stands in front here.
    """
    batch = len(pads)
    if not name.startswith(("input.keep.decoder.blocks", "input.gumbel_u.decoder", "input.keep.decoder.attn")):
        return draw
    if "gumbel_u" in name:
        rows = draw.view(batch, length, *draw.shape[1:])
        return torch.cat([row.roll(tail, 0) for row, tail in zip(rows, pads, strict=True)])
    if "probs" in name:
        rows = draw.view(batch, -1, length, length)
        return torch.stack([row.roll((tail, tail), (-2, -1)) for row, tail in zip(rows, pads, strict=True)])
    return draw


def _draws(case: Case, run: str) -> Draws:
    is_rolled = not any("rotations" in name for name in case.inputs)  # LSH lays rows out as the original does
    pads, length = case.options["n_pads"], case.options["source_length"] + case.options["length"]
    named = [(entry["name"], case.tensors[entry["name"]]) for entry in case.about["draws"][run]]
    named = [draw for draw in named if ".rotations." not in draw[0]]
    named.sort(key=lambda draw: ".decoder." in draw[0])  # whose embeddings come before the encoder's layers there
    return Draws([(name, _rolled(name, draw, pads, length) if is_rolled else draw) for name, draw in named])


def _inputs(case: Case) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments of a call with the target's tokens moved by one, and the targets."""
    if "source" not in case.inputs:
        tokens = case.inputs["tokens"].long()
        return {"input_ids": shifted(tokens)}, tokens.masked_fill(tokens == 0, -100)
    source, target = case.inputs["source"].long(), case.inputs["target"].long()
    arguments = {"input_ids": source, "attention_mask": source != 0, "decoder_input_ids": shifted(target)}
    return arguments, target.masked_fill(target == 0, -100)


def replay(case: Case) -> None:
    """Logits, loss and gradients of every run, and decoding token by token."""
    config = config_of(case)
    model: Any = build_model(case.weights, config)
    back = restore_state_dict(model.state_dict(), config)
    assert set(back) == set(case.weights)
    assert all(torch.equal(back[name], tensor.float()) for name, tensor in case.weights.items())
    if isinstance(case.options.get("decoder_attention"), dict) and case.options["decoder_attention"].get(
        "force_no_dropout"
    ):
        for layer in model.model.decoder.layers:
            for half in layer.attentions:
                half.attention.dropout = 0.0
    arguments, targets = _inputs(case)
    label = "labels" if config.is_encoder_decoder else "shift_labels"
    for run in ("eval", "train"):
        if run == "train" and "train_logits" not in case.outputs:
            continue
        # A second run in the backward pass would ask a recording once more.
        config.reversible = run == "eval"
        model.train(run == "train")
        rotations = [draw for name, draw in case.inputs.items() if name.startswith(f"rotations.{run}.")]
        config.reversible = config.reversible and not rotations
        with (
            injected(Draws([]) if run == "eval" else _draws(case, run)),
            injected_rotations(rotations, config.num_attention_heads),
        ):
            output = model(**arguments, **{label: targets}, use_cache=False)
            output.loss.backward()
        case.compare(run, output.logits, case.outputs["logits" if run == "eval" else "train_logits"])
        loss = case.tensors["output.loss" if run == "eval" else "train.output.loss"]
        case.compare(f"{run}: loss", output.loss.reshape(1), loss.reshape(1))
        prefix = "grad." if run == "eval" else "train.grad."
        case.compare_gradients(prefix, restore_state_dict(gradients(model), config), {})
    model.eval()
    if "predict_logits" in case.outputs:
        replay_steps(case, model, arguments)
    if "firstchunk_logits" in case.outputs:
        first = case.options["first_chunk"]
        replay_steps(case, model, arguments, [first, *([1] * (case.options["length"] - first))], "logits")


@torch.no_grad()
def replay_steps(
    case: Case, model: Any, arguments: dict[str, Tensor], lengths: list[int] | None = None, name: str = "predict_logits"
) -> None:
    """Decode on every backend that there is, token by token or in calls of several."""
    given = case.inputs.get("predict_target", case.inputs.get("predict_tokens"))
    key = "decoder_input_ids" if "decoder_input_ids" in arguments else "input_ids"
    tokens = arguments[key] if given is None else given.long()
    for backend in ("reference", "auto"):
        cache, outputs = None, []
        for part in tokens.split(lengths or 1, dim=1):
            with use_backend(backend):
                output = model(**{**arguments, key: part}, cache=cache, use_cache=True)
            cache = output.cache
            outputs.append(output.logits)
        case.compare(f"steps by {backend}", torch.cat(outputs, dim=1), case.outputs[name])


def _part_config(options: dict[str, Any], **fields: Any) -> TerraformerConfig:
    """A config of which one attention or one layer is built."""
    width = options.get("d_feature", options.get("d_model"))
    return TerraformerConfig(
        vocab_size=8,
        hidden_size=width,
        num_attention_heads=options["n_heads"],
        num_encoder_layers=0,
        num_decoder_layers=1,
        is_encoder_decoder=False,
        max_position_embeddings=512,
        dropout=0.0,
        activation_dropout=0.0,
        attn_implementation="eager",
        **fields,
    )


def _lsh_part(options: dict[str, Any]) -> LshAttention:
    """An attention by hashing, or by all keys for texts that are short."""
    defaults = {"std_length": None, "n_chunks_before": 1, "n_chunks_after": 0, "chunk_len": 4, "n_hashes": 1}
    options = {**defaults, "n_buckets": 4, **options}
    projections: dict[str, Any] = {"attention_share_qk": options["num_weights"] == 2}
    if options["weights_format"] == "sparse":
        projections |= {"attention_type": "multiplicative_conv", "attention_sparsity": options["sparsity"]}
    config = _part_config(
        options, attention_dropout=options.get("attention_dropout", 0.0), **lsh_fields(options), **projections
    )
    kind = config.decoder_long_attention
    attention = LshAttention(config, 0, kind, 512, options["n_chunks_after"])
    attention.is_causal = options["causal"]
    return attention


def _seen(length: int, causal: bool, mask: Tensor | None) -> Tensor:
    seen = torch.ones(length, length, dtype=torch.bool)
    seen = (seen.tril() if causal else seen)[None, None]
    return seen if mask is None else seen & mask[:, None, None]


def replay_lsh_wrapper(case: Case) -> None:
    """Outputs and gradients of an attention with its maps, of texts of several lengths."""
    options = case.options
    attention = _lsh_part(options)
    rules = [rule._replace(ours=rule.ours.removeprefix("attention.")) for rule in attention_rules(attention.config)]
    load_by_rules(attention, rules, case.weights)
    for run in [name for name in case.outputs if name.startswith(("eval", "train", "y")) and "buckets" not in name]:
        suffix = f".{run.partition('.')[2]}" if "." in run else ""
        attention.train(run.startswith("train"))
        x = case.inputs[f"x{suffix}"].clone().requires_grad_()
        mask = case.inputs.get(f"mask{suffix}")
        mask = None if mask is None else mask.bool()
        rotations = [case.inputs[f"rotations.{run}"]] if f"rotations.{run}" in case.inputs else []
        draws = [(name, draw) for name, draw in case.inputs.items() if name == f"keep.{run}"]
        seen = _seen(x.shape[1], options["causal"], mask)
        with injected(Draws(draws)), injected_rotations(rotations, options["n_heads"]):
            y = attention(x, seen, real=mask)[0]
        case.compare(run, y, case.outputs[run])
        y.backward(case.inputs[f"cotangent{suffix}"])
        prefix = "grad." if run == "y" else f"{run}_grad."
        case.compare_gradients(prefix, restored(rules, gradients(attention)), {"x": x.grad})


def _of_all(draws: list[Tensor]) -> Callable:
    """Dropout by recorded masks, one for all rows and heads."""

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * draws.pop(0).to(x.dtype) / (1 - p) if training and p else x

    return dropout


# What a case of weights of one head each calls its runs: fields of the attention that they amount to.
_ALL_IN_ONE_CHUNK = {"std_length": None, "n_hashes": 1, "n_buckets": 2, "n_chunks_before": 0, "n_chunks_after": 0}
_HEADS_MAJOR = {
    "self": None,
    "shareqk": _ALL_IN_ONE_CHUNK,  # queries that are keys of unit length
    "lsh": {"std_length": None, "n_chunks_before": 1, "n_chunks_after": 0},
}


def _heads_major_part(options: dict[str, Any], kind: str) -> Any:
    fields = {"head_dim": options["d_head"], "attention_bias": False, "attention_dropout": options["attention_dropout"]}
    more = _HEADS_MAJOR[kind]
    if more is None:
        return SparseAttention(_part_config(options, **fields), 0)
    chunk = {"chunk_len": options["length"]} if kind == "shareqk" else {}
    fields |= lsh_fields({**options, **more, **chunk})
    return LshAttention(_part_config(options, **fields, attention_share_qk=True), 0, "lsh", 512)


def replay_heads_major(case: Case) -> None:
    """Attention whose weights are of one head each: to all keys, with queries that are keys, and by hashing."""
    options, heads = case.options, case.options["n_heads"]
    for run in [name for name in case.outputs if name.startswith(("eval", "train")) and "buckets" not in name]:
        kind = run.partition("_")[2]
        attention = _heads_major_part(options, kind).train(run.startswith("train"))
        group, letters = ("self", "qkvo") if kind == "self" else ("lsh", "qvo")
        rules = [
            rule._replace(original=rule.original.replace("attn", group), ours=rule.ours.removeprefix("attention."))
            for letter in letters
            for rule in heads_major_rules(letter, heads)
        ]
        load_by_rules(attention, rules, {name: t for name, t in case.weights.items() if name.startswith(f"{group}.")})
        x = case.inputs["x"].clone().requires_grad_()
        rotations = [case.inputs[f"rotations.{run}"]] if kind == "lsh" else []
        if kind == "shareqk":  # in one bucket, places are positions
            rotations = [x.new_zeros(len(x) * heads, options["d_head"], 1, 1)]
        masks = [draw for name, draw in case.inputs.items() if name == f"keep_probs.{run}"]
        with pytest.MonkeyPatch.context() as patch, injected_rotations(rotations, heads):
            patch.setattr(nn.functional, "dropout", _of_all(masks))
            y = attention(x, _seen(x.shape[1], True, None))[0]
        assert not masks
        if (keep := case.inputs.get(f"keep_out.{run}")) is not None:
            y = y * keep / (1 - options["output_dropout"])
        case.compare(run, y, case.outputs[run])
        y.backward(case.inputs["cotangent"])
        case.compare_gradients(f"{run}_grad.", restored(rules, gradients(attention)), {"x": x.grad})


def replay_reversible(case: Case) -> None:
    """A decoder layer over two streams: outputs, inputs rebuilt from them, and gradients by the reversible pass."""
    o = case.options
    fields = {**feed_forward_fields(o), "attention_type": "multiplicative_conv", "attention_sparsity": o["sparsity"]}
    config = _part_config(o, **fields, attentions_per_layer=o["n_attention_layers"])
    layer = TerraformerDecoderLayer(config, config, 0).eval()
    rules = layer_rules(config)
    load_by_rules(layer, rules, case.weights)
    streams = [case.inputs[name].clone().requires_grad_() for name in ("x1", "x2")]
    chain = ReversibleChain()
    call = DecoderCall(_seen(streams[0].shape[1], True, None))
    first, second = chain.close(*layer(*chain.open(*streams), chain, call))
    case.compare("y1", first, case.outputs["y1"])
    case.compare("y2", second, case.outputs["y2"])
    torch.autograd.backward([first, second], [case.inputs["cotangent1"], case.inputs["cotangent2"]])
    grads = {"x1": streams[0].grad, "x2": streams[1].grad}
    case.compare_gradients("grad.", restored(rules, gradients(layer)), grads)
