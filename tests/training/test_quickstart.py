"""The demo with tiny models, what stays when it is called again, and what it says of a folder of another run."""

import functools
import json
import os
import re
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from hf_efficient.data.byte_tokenizer import byte_tokenizer
from hf_efficient.data.python_docs import builtin_word_order
from training import quickstart as script
from training import quickstart_all
from training.benchmarks import demo


ENCODER = "hidden_size=24,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,max_position_embeddings=64"
LANGUAGE_MODEL = "hidden_size=24,projection_size=8,num_hidden_layers=1"
SUMMARIZER = (
    "hidden_size=24,intermediate_size=32,num_encoder_layers=1,num_decoder_layers=1,num_attention_heads=2,"
    "max_position_embeddings=192,ff_sparsity=4,ff_rank=4"
)
FIRST = ("text", "pretraining", "finetuning", "pipelines", "language_model")
FURTHER = ("meta_controller", "decoders", "summaries")


@pytest.fixture(scope="module")
def pairs():
    return quickstart_all.builtin_summaries().take(48)


@pytest.fixture(autouse=True)
def tiny(monkeypatch, pairs):
    for module in (script, quickstart_all):
        monkeypatch.setattr(module, "ENCODER", ENCODER)
        monkeypatch.setattr(module, "SHORT", script.Length(0, 1, 10, 10))
    monkeypatch.setattr(script, "LANGUAGE_MODEL", LANGUAGE_MODEL)
    monkeypatch.setattr(quickstart_all, "SUMMARIZER_CONFIG", SUMMARIZER)
    monkeypatch.setattr(script, "builtin_word_order", functools.partial(builtin_word_order, 60, 44))
    monkeypatch.setattr(quickstart_all, "builtin_summaries", lambda: pairs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quickstart") / "demo"


def demonstrate(folder, *options):
    return script.main(["--short", "--output_dir", str(folder), *options])


def test_all_steps_once_on_a_screen_and_not_again(folder, capfd):
    first = demonstrate(folder, "--all")
    short = folder.with_name("demo-short")
    said, errors = capfd.readouterr()
    lines = said.replace(str(short), short.name).splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 119, max(lines, key=len)
    assert "Warning:" not in errors  # transformers' reports of loading go to the log where there is no pytest
    assert not [line for line in lines if line.lstrip().startswith("{") or "%|" in line]
    assert re.findall(r"^(\d)\. ", said, re.MULTILINE) == list("123456789")
    assert re.search(rf"SRU\+\+ +{first['language_model']['bits_per_byte']:.2f}$", said, re.MULTILINE)
    assert re.search(rf"pretrained +{100 * first['finetuning']['accuracy']:.1f} %$", said, re.MULTILINE)
    assert json.loads((short / "quickstart.json").read_text()) == first
    assert list(first) == ["plan", *FIRST, *FURTHER, "seconds"]
    assert (short / "meta-controller" / "meta-controller.png").stat().st_size > 10_000
    assert "Tokenising" in (short / "log.txt").read_text()

    before = {path: path.stat().st_mtime_ns for path in short.rglob("*.safetensors")}
    assert len(before) > 6
    second = demonstrate(folder, "--all")
    assert {path: path.stat().st_mtime_ns for path in short.rglob("*.safetensors")} == before
    assert {**second, "seconds": 0} == {**first, "seconds": 0}
    assert capfd.readouterr().out.count("(done before)") == len(FIRST + FURTHER)


@pytest.mark.parametrize("lost", ["pretraining", "finetuning", "language_model", "summaries"])
def test_a_stage_whose_result_is_lost_takes_up_its_run(folder, lost, capfd):
    """As after a kill between the end of a run and that of its stage, and one before the end of a run."""
    short = folder.with_name("demo-short")
    if not (short / "quickstart.json").is_file():
        demonstrate(folder, "--all")
    result = json.loads((short / f"{lost}.json").read_text())
    weights = next(
        (short / {"pretraining": "pretrained"}.get(lost, lost.replace("_", "-"))).glob("*.safetensors"), None
    )
    before = weights and weights.read_bytes()
    for name in (f"{lost}.json", *({"pretraining": ["pretrained/history.json"]}.get(lost, []))):
        (short / name).unlink()
    again = demonstrate(folder, "--all")[lost]
    times = {"seconds": 0, "core_seconds": 0}
    assert {**again, **times} == {**result, **times}
    assert before is None or weights.read_bytes() == before


def test_the_plan_of_a_demo_that_was_begun_stays(tmp_path, monkeypatch):
    plan = script.make_plan(tmp_path, True)
    monkeypatch.setattr(script, "measure", lambda short: pytest.fail("measured again"))
    assert script.make_plan(tmp_path, True) == plan
    assert plan.threads == torch.get_num_threads()
    assert plan.fp32_gflops > 0
    assert plan.bf16 == (plan.bf16_gflops > 1.5 * plan.fp32_gflops)


@pytest.mark.parametrize(("fp32", "bf16"), [(40, 0), (40, 55), (40, 2), (40, 400)], ids=lambda rate: f"{rate}")
def test_bf16_is_chosen_where_it_was_measured_to_be_fast(monkeypatch, fp32, bf16):
    monkeypatch.setattr(script, "matrix_rate", lambda dtype, seconds: fp32 if dtype == torch.float32 else bf16)
    monkeypatch.setattr(script, "bf16_support", lambda: "units" if bf16 else None)
    plan = script.measure(False)
    assert plan.bf16 == (bf16 == 400)
    assert plan.gflops == (400 if plan.bf16 else 40)
    assert plan.pretraining_steps == script.PRETRAINING.steps(plan.gflops)


def test_steps_follow_the_rate_between_bounds():
    length = script.Length(seconds=60, gflop=4, least=100, most=900)
    steps = [length.steps(rate) for rate in (1, 20, 33.4, 1000)]
    assert steps == [100, 300, 500, 900]
    assert {type(count) for count in steps} == {int}


def test_a_folder_of_another_run_is_refused(tmp_path):
    folder = tmp_path / "demo-short" / "pretrained"
    (folder / "checkpoint-30").mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps({"block_size": 64}))
    with pytest.raises(ValueError, match="was started otherwise") as refusal:
        demonstrate(tmp_path / "demo")
    message = str(refusal.value)
    assert "\n" not in message
    assert "block_size was 64 and is 32 now" in message
    assert message.endswith("choose another output_dir (--output_dir), or remove the folder.")


def test_output_goes_to_the_log_and_comes_back_after_an_error(tmp_path, capfd):
    def fail():
        with script.output_in(tmp_path / "log.txt"):
            print("by Python")
            os.write(2, b"by compiled code\n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    print("after")
    assert capfd.readouterr() == ("after\n", "")
    assert sorted((tmp_path / "log.txt").read_text().split("\n")) == ["", "by Python", "by compiled code"]


def test_bits_of_byte_frequencies():
    """Of a text of one byte in two, and of bytes that were never seen."""
    text = "ab" * 5000
    assert script.bits_of_byte_frequencies(text, text) == pytest.approx(1, abs=0.05)
    assert script.bits_of_byte_frequencies(text, "z") == pytest.approx(13.3, abs=0.1)  # log2(10,256)


def test_hidden_words_are_whole_tokens():
    class Tokenizer:
        vocab = {"return": 1, "values": 2, "which": 3, "a": 4}
        mask_token = "[MASK]"

    texts = ["Return the values which follow", "of a", "All values, values"]
    assert script.masked_words(texts, Tokenizer) == [
        ("[MASK] the values which follow", "return"),
        ("All values, [MASK]", "values"),
    ]
    assert script.around_mask("a b c d e f g h i [MASK] j", 2) == "... h i [MASK] j"


def test_streamed_text_is_wrapped_between_words(capsys):
    streamer = script.WrappedStreamer(byte_tokenizer(), width=20)
    for text in ("One two", " three four fi", "ve, ", "six\nseven"):
        streamer.on_finalized_text(text)
    streamer.on_finalized_text(".", stream_end=True)
    lines = capsys.readouterr().out.split("\n")
    assert [line.strip() for line in lines] == ["One two three", "four five, six", "seven. ...", ""]
    assert all(line.startswith("   ") for line in lines[:-1])


def test_figures_of_the_demo(folder):
    short = folder.with_name("demo-short")
    if not (short / "quickstart.json").is_file():
        demonstrate(folder, "--all")
    report = json.loads((short / "quickstart.json").read_text())
    rows = {row["name"]: row["value"] for row in demo.summary_of(report, {"seconds": 2 * report["seconds"]})}
    assert rows["time beside one busy core, over that alone"] == pytest.approx(2)
    assert rows["accuracy on word order, pretrained"] == report["finetuning"]["accuracy"]
    assert f"{report['language_model']['bits_per_byte']:.2f} bits per byte" in demo.headline_of(report)
    assert AutoTokenizer.from_pretrained(short / "pretrained").mask_token == "[MASK]"
    shutil.rmtree(short)


def test_the_record_of_a_demo_names_no_folder_of_the_machine(monkeypatch):
    def main(words):
        return {"finetuning": {"model": os.path.join(words[words.index("--output_dir") + 1], "finetuned", "model")}}

    monkeypatch.setattr(script, "main", main)
    assert demo.run_demo(short=True) == {"finetuning": {"model": "demo/finetuned/model"}}
