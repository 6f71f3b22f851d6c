"""The benchmark of decoding: what it counts, how it measures in turn, and a run with tiny models."""

import json
import sys

import pytest
import torch

from hf_efficient import ScalingTransformerConfig, ScalingTransformerForCausalLM
from hf_efficient.ops.quantized import record_bytes
from training.benchmarks import decode_speed
from training.benchmarks.decoding import gguf_files, report, torch_engine
from training.benchmarks.decoding.counting import bytes_read, own_bytes
from training.benchmarks.decoding.races import FULL, IN_TORCH, KINDS, NARROW, RACES, TINY, WIDE
from training.benchmarks.decoding.worker import EngineError, Worker, in_turn


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["fp32", "bf16"])
def test_counted_bytes_are_those_of_the_weights_that_the_model_says_it_reads(kind, form):
    preset, settings = TINY["full"].settings(kind)
    model = torch_engine.build(preset, form, settings)
    itemsize = torch_engine.FLOATS[form].itemsize
    assert {parameter.dtype for parameter in model.parameters()} == {torch_engine.FLOATS[form]}
    assert sum(bytes_read(model).values()) == model.weights_read_per_token() * itemsize


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_counted_bytes_of_quantised_models(form):
    """Of units one record in each block; of all else what is stored, scales too."""
    preset, settings = TINY["full"].settings("all")
    model = torch_engine.build(preset, form, settings)
    layers = [layer.feed_forward.sparse for layer in model.model.layers]
    blocks = settings["intermediate_size"] // 64
    for layer in layers:
        stored = sum(tensor.nbytes for tensor in layer.state_dict().values())
        assert own_bytes(layer) == stored - layer.units.nbytes + blocks * record_bytes(32, form)
    tables = (model.model.embed_tokens.weight, model.model.positions.table)
    unread = sum(table.nbytes - table[0].nbytes for table in tables)
    unread += sum(layer.units.nbytes * 63 // 64 for layer in layers)
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert sum(bytes_read(model).values()) == stored - unread


def test_the_dense_twin_and_gpt2_read_the_same():
    """But for what GPT-2 has in other places: a bias of its output layer less."""
    size = TINY["full"]
    preset, settings = size.settings("dense")
    ours = bytes_read(torch_engine.build(preset, "fp32", settings))
    gpt2 = bytes_read(torch_engine.build("gpt2", "fp32", size.gpt2()))
    assert ours["feed-forward"] + ours["attention"] + ours["norms"] == (
        gpt2["feed-forward"] + gpt2["attention"] + gpt2["norms"]
    )
    assert ours["embeddings"] == gpt2["embeddings"]
    assert ours["output layer"] - gpt2["output layer"] == 4 * size.vocabulary


def test_presets_are_measured_at_their_own_sizes():
    for kind in KINDS:
        name, settings = FULL.settings(kind)
        preset = ScalingTransformerConfig.preset(name)
        for field, value in settings.items():
            if not (field == "ff_rank" and kind.endswith("r16")):
                assert getattr(preset, field) == value, (kind, field)
    assert FULL.settings("all-r16")[1]["ff_rank"] == 16
    assert WIDE.settings("dense")[0] == "15x9216-dense"
    assert WIDE.settings("all")[1]["intermediate_size"] == 65536
    for size in (NARROW, *TINY.values()):
        for kind in ("dense", "all"):
            preset, settings = size.settings(kind)
            ScalingTransformerConfig.preset(preset, **settings)


def test_tensors_of_a_gguf_file_are_those_of_gpt2():
    shape = gguf_files.Shape(layers=24, width=1024, hidden=4096, heads=16, vocabulary=32_000)
    sizes = gguf_files.tensors_of(shape)
    matrices = 24 * (4 * 1024**2 + 2 * 1024 * 4096) + 2 * 32_000 * 1024 + 4096 * 1024
    assert sum(torch.Size(size).numel() for size in sizes.values() if len(size) == 2) == matrices
    assert len(sizes) == 5 + 24 * 12
    # 18 bytes for 32 numbers, a row of the embeddings, one of the positions in float32, norms and biases.
    vectors = 24 * (4 * 1024 + 3 * 1024 + 1024 + 4096 + 1024) + 2 * 1024
    expected = (24 * 12 * 1024**2 + 32_000 * 1024 + 1024) // 32 * 18 + 4 * 1024 + 4 * vectors
    assert gguf_files.bytes_read(gguf_files.planned(shape, "Q4_0")) == expected
    assert expected == pytest.approx(188.8e6, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [("Q4_0", (3, 64), 108), ("Q8_0", (64,), 68), ("Q4_K", (2, 256), 288), ("F16", (5, 7), 70), ("F32", (63,), 252)],
)
def test_bytes_of_a_tensor(kind, size, expected):
    assert gguf_files.bytes_of(size, kind) == expected


def test_formats_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="Rows of 500 numbers are no whole blocks of Q4_0, which have 32"):
        gguf_files.bytes_of((3, 500), "Q4_0")
    with pytest.raises(ValueError, match="'Q3_K' is none of"):
        gguf_files.bytes_of((3, 256), "Q3_K")


def test_random_values_have_the_shapes_and_are_not_all_the_same():
    sizes = gguf_files.tensors_of(gguf_files.Shape(1, 32, 96, 1, 63, positions=5))
    drawn = dict(gguf_files.random_values(sizes))
    assert {name: values.shape for name, values in drawn.items()} == sizes
    assert drawn["position_embd.weight"].dtype == "float32"
    assert (drawn["blk.0.ffn_norm.weight"] == 1).all()
    assert not drawn["blk.0.ffn_up.bias"].any()
    assert drawn["output.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert (drawn["output.weight"] != drawn["token_embd.weight"]).any()


@pytest.mark.parametrize("kind", ["dense", "all"])
def test_a_cache_of_any_length_without_reading_a_text(kind):
    preset, settings = TINY["full"].settings(kind)
    decoder = torch_engine.Decoder(torch_engine.build(preset, "bf16", settings))
    for context in (16, 63, 16):
        seconds = decoder.decode(context, 3)
        assert {name: len(values) for name, values in seconds.items()} == {"core": 3, "wall": 3}
        assert decoder.cache.get_seq_length() == context + 3
    assert decoder.bytes_of_a_position() == 2 * 2 * 32 * 2
    decoder.prompt(5)
    assert decoder.cache.get_seq_length() == 5
    decoder.decode(16, 1)
    assert decoder.cache.get_seq_length() == 17


def test_the_first_layer_of_a_model_shares_its_weights():
    preset, settings = TINY["full"].settings("all")
    model = torch_engine.build(preset, "fp32", settings)
    cut = torch_engine.first_layer(model)
    assert (len(cut.model.layers), cut.config.num_hidden_layers) == (1, 1)
    assert (len(model.model.layers), model.config.num_hidden_layers) == (2, 2)
    ids = torch.tensor([[3, 1, 4]])
    alone = ScalingTransformerForCausalLM(cut.config).eval()
    state = model.state_dict()
    alone.load_state_dict({name: state[name] for name in alone.state_dict()})
    torch.testing.assert_close(cut(input_ids=ids).logits, alone(input_ids=ids).logits)
    assert {p.data_ptr() for p in cut.parameters()} < {p.data_ptr() for p in model.parameters()}
    for one in (cut, model):
        decoder = torch_engine.Decoder(one)
        decoder.decode(5, 2)
        assert len(decoder.cache.layers) == one.config.num_hidden_layers


def test_engines_take_turns_and_first_calls_do_not_count():
    calls = []

    def engine(name, base):
        def run():
            calls.append(name)
            return {"core": [100.0, base + len(calls), base + len(calls)], "wall": [100.0, 1.0, 3.0]}

        return run

    found = in_turn({"a": engine("a", 0.0), "b": engine("b", 10.0)}, repeats=2)
    assert calls == ["a", "b"] * 3
    assert found["a"] == {"core": [3.0, 5.0], "wall": [2.0, 2.0]}
    assert found["b"]["core"] == [14.0, 16.0]


def test_an_engine_that_fails_or_ends_says_so():
    worker = Worker("training.benchmarks.decoding.torch_engine")
    with pytest.raises(EngineError, match=r"asked to load .*has no preset 'no-such-preset'"):
        worker.ask("load", name="x", kind="no-such-preset", form="fp32", settings={})
    worker.process.kill()
    with pytest.raises(EngineError, match="ended with exit code -9 when asked to free"):
        worker.ask("free")
    worker.close()


def test_both_sides_are_held_to_one_instruction_set():
    assert decode_speed.limits_of("native") == {}
    limits = decode_speed.limits_of("avx2")
    assert limits["SPARSE_FF_CPU_CAPABILITY"] == limits["DECODE_LAYER_CPU_CAPABILITY"] == "avx2"
    assert limits["ONEDNN_MAX_CPU_ISA"] == limits["MKL_ENABLE_INSTRUCTIONS"] == "AVX2"
    decode_speed.check_instruction_set("native", "AVX2 = 1 | AVX512 = 1")
    decode_speed.check_instruction_set("avx2", "AVX2 = 1 | FMA = 1")
    with pytest.raises(ValueError, match="compiled for AVX-512, and the other side is held to AVX2"):
        decode_speed.check_instruction_set("avx2", "AVX2 = 1 | AVX512 = 1 | AVX512_VNNI = 1")


def test_every_race_can_be_told_apart_and_has_its_anchor():
    for race in RACES.values():
        assert "llama Q4_0" in race.engines
        assert len(set(race.engines)) == len(race.engines)
        for name in race.engines:
            form, kind = name.removesuffix("/1").split(" ")
            assert form in (*torch_engine.FORMATS, "llama")
            assert form == "llama" or kind.removesuffix(IN_TORCH) in (*KINDS, "gpt2")
            assert not kind.endswith(IN_TORCH) or name.replace(IN_TORCH, "") in race.engines


def toy_race(name, context, seconds, **changes):
    engine = {"bytes_read": 1000, "resident_bytes": 2000, "bytes_of_a_position": 10}
    found = {"race": name, "context": context, "threads": 1, "prompt": None}
    found["size"] = {"layers": 2, "width": 8, "vocabulary": 320}
    found |= {"read_bandwidth": 1e6, "engines": dict.fromkeys(seconds, engine)}
    found["seconds"] = {n: {"core": [s, s], "wall": [9.0, 9.0]} for n, s in seconds.items()}
    found["machine"] = {"processor": "P", "instructions": ["avx2"]}
    found |= {"versions": {}, "commit": "", "command": "", "llama": None, "limits": {}}
    return {**found, "instruction_set": "avx2", **changes}


def test_a_report_compares_within_a_race():
    wide = {"bf16 dense": 0.21, "bf16 dense/1": 0.11, "bf16 all": 0.012, "bf16 all/1": 0.01}
    wide |= {"bf16 dense-in-torch": 0.33, "bf16 dense-in-torch/1": 0.18}
    races = [
        toy_race("fp32", 16, {"fp32 dense": 0.012, "fp32 all": 0.002, "llama Q4_0": 0.004}),
        toy_race("fp32", 2048, {"fp32 dense": 0.03, "fp32 all": 0.0223, "llama Q4_0": 0.01}),
        toy_race("formats", 16, {"fp32 all": 0.5, "int4 all": 0.001, "llama Q4_0": 0.004}),
        toy_race("overhead", 16, {"fp32 all": 1e-4}),
        toy_race("wide-bf16", 16, wide),
        toy_race("prompt", 0, {"int8 all": 4.0, "llama Q4_0": 6.0}, prompt=512, commit="a"),
    ]
    result = report.result_of(races)
    goals = {row["name"]: (row["value"], row["goal"]) for row in result["summary"]}
    assert goals["fp32 all against its dense twin at 16"] == (pytest.approx(6.0), "at least 6")
    assert goals["int4 all against llama Q4_0 at 16"] == (pytest.approx(4.0), "at least 3.5"), "of all formats"
    assert goals["overhead a layer, fp32 all"] == (pytest.approx(50.0), "at most 40")
    name = "added from 16 to 2,048 tokens over reading K and V, fp32 all"
    assert goals[name] == (pytest.approx(0.0203 / 0.02032), "at most 1.5")
    assert goals["prompt of 512 tokens, int8 all against llama Q4_0"] == (pytest.approx(1.5), "at least 1")
    assert goals["17B block, bf16 all, against dense bf16"][0] == pytest.approx(50.0)
    composed = (15 * 0.1 + 0.01) / (14 * 0.002 + 0.008)
    assert goals["17B model, composed, bf16 all against dense bf16"][0] == pytest.approx(composed)
    row = next(row for row in result["tables"]["1 thread"]["speed"] if row["engine"] == "fp32 all")
    assert (row["x Q4_0 at 16"], row["tokens/s"]) == (pytest.approx(2.0), pytest.approx(500.0))
    assert row["share of bandwidth"] == pytest.approx(1160 / 0.002 / 1e6)
    growth = next(r for r in result["tables"]["1 thread"]["growth"] if r["engine"] == "fp32 all")
    shares = [growth[f"{part} at 16"] for part in ("attention", "overhead", "weights")]
    assert sum(shares) == pytest.approx(1.0)
    assert result["commits"] == ["", "a"]
    two = report.result_of([*races, toy_race("fp32", 16, {"fp32 all": 1.0, "fp32 dense": 5.0}, threads=2)])
    assert [row["value"] for row in two["summary"] if "against its dense twin at 16" in row["name"]] == [
        6.0,
        1.0,
    ]  # wall time
    assert len({row["name"] for row in two["summary"]}) == len(two["summary"])
    assert goals["17B block, bf16 all, against dense bf16"][1] is None
    assert goals["17B block, bf16 all, against dense bf16 in torch"] == (pytest.approx(75.0), "at least 45")
    name = "17B model, composed, bf16 all against dense bf16 in torch"
    assert goals[name] == (pytest.approx((15 * 0.15 + 0.03) / (14 * 0.002 + 0.008)), "at least 40")
    assert "| fp32 all |" in report.text_of(result)
    assert result["headline"].startswith("Tokens a second at batch 1 on one core (P, avx2) of 2 layers, 8 wide, ")
    expected = "Sparse in fp32: 500 / 44.8, 2 / 0.448 times that; 6 times its dense twin at 16, 0 MB."
    assert expected in result["headline"]


def test_a_quick_run_is_kept_and_reported(tmp_path, capsys):
    folder = ["--output_dir", str(tmp_path / "runs")]
    with pytest.raises(SystemExit, match="Nothing was measured yet"):
        decode_speed.main(["report", *folder])
    command = ["run", "--quick", "--repeats", "1", "--tokens", "2", *folder]
    command += ["--races", "fp32-sparse", "--contexts", "16", "512", "--llama_python", sys.executable, "--no_llama"]
    decode_speed.main(command)
    assert "fp32 all-r16: " in capsys.readouterr().out
    files = sorted((tmp_path / "runs").rglob("*.json"))
    assert [file.name for file in files] == ["fp32-sparse-16.json", "fp32-sparse-512.json"]
    before = [file.stat().st_mtime_ns for file in files]
    decode_speed.main(command)
    assert [file.stat().st_mtime_ns for file in files] == before
    found = json.loads(files[0].read_text())
    assert found["missing"] == {"llama Q4_0": "llama.cpp does not run here"}
    assert found["engines"]["fp32 all"]["bytes_read"] == sum(
        found["engines"]["fp32 all"]["bytes_read_by_part"].values()
    )
    assert {len(times["core"]) for times in found["seconds"].values()} == {1}
    with pytest.raises(SystemExit, match="Nothing was measured yet"):
        decode_speed.main(["report", *folder, "--results", str(tmp_path)])
    decode_speed.main(["report", "--quick", *folder, "--results", str(tmp_path)])
    assert "### speed, 1 thread" in capsys.readouterr().out
    result = json.loads((tmp_path / "decode_speed_native-quick.json").read_text())
    assert [row["engine"] for row in result["tables"]["1 thread"]["speed"]] == [
        "fp32 dense",
        "fp32 ff-qkv",
        "fp32 all",
        "fp32 all-r16",
    ]
