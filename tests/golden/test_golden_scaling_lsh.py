"""What trax recorded of LSH attention behind dense projections: its core, and decoding with memory that drops."""

import pytest
import torch
from torch import Tensor, nn

from hf_efficient.ops.lsh_attention import lsh_attention, lsh_decode
from hf_efficient.ops.lsh_hashing import hash_buckets
from tests.golden.scaling_cases import Case, case_names
from tests.golden.scaling_lsh import by_row, factors_of, form_of, keep_mask, recorded_buckets


pytestmark = pytest.mark.golden


def project(case: Case, x: Tensor) -> tuple[Tensor, Tensor]:
    """q and v, `(batch, heads, length, head size)`."""
    weights, heads = case.weights, case.options["n_heads"]
    if "lsh.w_q" in weights:
        query_key, value = (torch.einsum("bld,hdk->bhlk", x, weights[f"lsh.{name}"]) for name in ("w_q", "w_v"))
        return query_key, value
    query, key, value = (x @ weights[f"attn.{n}.kernel"] + weights[f"attn.{n}.bias"] for n in ("q", "k", "v"))
    return tuple(part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in ((query + key) / 2, value))


def collect(case: Case, output: Tensor) -> Tensor:
    if "lsh.w_o" in case.weights:
        return torch.einsum("bhlk,hkd->bld", output, case.weights["lsh.w_o"])
    return output.transpose(1, 2).flatten(2) @ case.weights["attn.o.kernel"] + case.weights["attn.o.bias"]


def dense_cases(names: str) -> list[str]:
    return [name for name in case_names() if name in names.split()]


RUNS = [
    ("lsh_wrapper_model_3w", "16", "{}.16"),
    ("lsh_decode_selected", "8", "{}.8"),
    ("mixed_lsh_encoder_masked", "12", "{}.12"),
    ("heads_major_attention", None, "{}_lsh"),
]


@pytest.mark.parametrize(("name", "length", "run_name"), [run for run in RUNS if run[0] in case_names()])
def test_scaling_lsh_core_behind_projections(name, length, run_name):
    case = Case(name)
    options, suffix = case.options, f".{length}" if length else ""
    query_key, value = project(case, case.inputs[f"x{suffix}"])
    mask = case.inputs.get(f"mask{suffix}")
    mask = None if mask is None else mask.bool()
    for run in (run_name.format("eval"), run_name.format("train")):
        if run not in case.outputs:
            continue
        rotations = by_row(case.inputs[f"rotations.{run}"], options["n_heads"])
        buckets = hash_buckets(query_key, rotations, factors_of(options))
        assert torch.equal(recorded_buckets(buckets, options, mask), case.outputs[f"{run}_buckets"])
        form = {"chunks_before": 1, "chunks_after": 0} if length is None else {}
        form = form_of({"n_chunks_before": 1, "n_chunks_after": 0, **options}) | form
        keep = case.inputs.get(f"keep.{run}", case.inputs.get(f"keep_probs.{run}"))
        dropout_mask = keep_mask(keep, options.get("attention_dropout", 0.0))
        output = collect(case, lsh_attention(query_key, value, buckets, mask=mask, dropout_mask=dropout_mask, **form))
        if (kept := case.inputs.get(f"keep_out.{run}")) is not None:
            output = output * kept / (1 - options["output_dropout"])
        case.compare(run, output, case.outputs[run])


@pytest.mark.parametrize("name", dense_cases("lsh_decode_selected lsh_wrapper_model_3w heads_major_attention"))
def test_scaling_lsh_decoding_with_memory_that_drops(name):
    case = Case(name)
    options, suffix = case.options, "_lsh" if name.startswith("heads_major") else ""
    prefix, chunk_length = options["prefix"], options["chunk_len"]
    before = options.get("n_chunks_before", 1)
    rotations = by_row(case.inputs[f"rotations.predict{suffix}"], options["n_heads"])
    query_key, value = project(case, case.inputs["x_predict" if suffix else "x.predict"])
    factors = factors_of(options)

    # trax fills up the first call's chunks with tokens of zeros.
    filled = [nn.functional.pad(x[:, :, :prefix], (0, 0, 0, -prefix % chunk_length)) for x in (query_key, value)]
    form = form_of({"n_chunks_before": before, "n_chunks_after": 0, **options})
    output = lsh_attention(*filled, hash_buckets(filled[0], rotations, factors), **form)[:, :, :prefix]
    case.compare("prefix", collect(case, output), case.outputs[f"predict{suffix}_prefix"])

    keys, values, steps = query_key[:, :, :prefix], value[:, :, :prefix], []
    for step in range(prefix, query_key.shape[2]):
        if keys.shape[2] == options["predict_mem_len"]:
            keys, values = keys[:, :, options["predict_drop_len"] :], values[:, :, options["predict_drop_len"] :]
        new = query_key[:, :, step : step + 1]
        keys, values = torch.cat([keys, new], 2), torch.cat([values, value[:, :, step : step + 1]], 2)
        output = lsh_decode(
            new,
            keys,
            values,
            hash_buckets(keys, rotations, factors),
            chunk_length=chunk_length,
            chunks_before=before,
            layout="original",
            memory_length=options["predict_mem_len"],
        )
        steps.append(collect(case, output))
    case.compare("steps", torch.cat(steps, 1), case.outputs[f"predict{suffix}_steps"])
