"""A GPT-2 made sparse from the command line: what is left behind, resuming after a kill, errors in one line."""

import json
import math
import multiprocessing
import os
import shutil
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, TrainerCallback, pipeline

from hf_efficient import ScalingTransformerForCausalLM
from hf_efficient.data.byte_tokenizer import byte_tokenizer
from tests.helpers.processes import run_program
from tests.training import pretraining_runs
from training import sparsify as script


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text and a GPT-2 of bytes."""
    path = tmp_path_factory.mktemp("gpt2")
    pretraining_runs.write_corpus(path / "corpus.txt", documents=40)
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).save_pretrained(path / "model")
    byte_tokenizer().save_pretrained(path / "model")
    return path


def arguments(folder, output_dir, **changes):
    settings = {
        "model": folder / "model",
        "text": folder / "corpus.txt",
        "output_dir": output_dir,
        "block_size": 4,
        "rank": 5,
        "fit_tokens": 700,
        "distill_steps": 8,
        "per_device_train_batch_size": 3,
        "learning_rate": 0.01,
        "logging_steps": 2,
        "save_steps": 3,
        "disable_tqdm": "True",
        "auto_bf16": "False",
        "use_cpu": "True",
        **changes,
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def run(argv):
    return script.run(*script.parse_arguments(argv))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    return output_dir, run(arguments(folder, output_dir))


def test_from_gpt2_to_generation(folder, whole):
    output_dir, found = whole
    assert json.loads((output_dir / "history.json").read_text()) == found
    bits = found["bits_per_byte"]
    assert list(bits) == ["dense", "sparse", "distilled"]
    assert bits["distilled"] < bits["sparse"]
    assert len(found["layers"]) == 2
    assert found["weights_read_per_token"] < found["dense_weights_read_per_token"]
    model, tokenizer = (one.from_pretrained(output_dir) for one in (AutoModelForCausalLM, AutoTokenizer))
    assert type(model) is ScalingTransformerForCausalLM
    assert (model.config.ff_sparsity, model.config.ff_rank, model.config.use_cache) == (4, 5, True)
    written = pipeline("text-generation", model=model, tokenizer=tokenizer)("The", max_new_tokens=5)
    assert written[0]["generated_text"].startswith("The")


def test_bits_are_those_of_the_model_that_is_left(folder, whole):
    """Windows of a text that one call reads: its mean loss, by bytes."""
    output_dir, _ = whole
    data = (folder / "corpus.txt").read_text()
    ids = torch.tensor(list(data[-30:].encode()))
    assert len(ids) == 30
    (folder / "end.txt").write_text(data[-30:])
    argv = arguments(folder, output_dir, validation=folder / "end.txt")
    settings, args = script.parse_arguments(argv)
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    _, measure = script.load_text(settings, args, tokenizer, 32)
    model = AutoModelForCausalLM.from_pretrained(output_dir)
    with torch.no_grad():
        loss = model(ids[None], labels=ids[None]).loss.item()
    assert measure.bits_per_byte(model) == pytest.approx(loss * 29 / 30 / math.log(2) * 30 / 29, rel=1e-4)


def test_without_distillation_the_fitted_model_is_the_result(folder, whole, tmp_path):
    found = run(arguments(folder, tmp_path, distill_steps=0))
    assert list(found["bits_per_byte"]) == ["dense", "sparse"]
    assert found["bits_per_byte"]["sparse"] == whole[1]["bits_per_byte"]["sparse"]
    weights = [
        (path / "model.safetensors").read_bytes() for path in (tmp_path, tmp_path / "fitted", whole[0] / "fitted")
    ]
    assert weights[0] == weights[1] == weights[2]


def _run_and_die(argv, step):
    class Die(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

    original = script.UnitUsageCallback
    script.UnitUsageCallback = lambda model: Die() if step else original(model)
    if not step:  # between the fit and the distillation
        script.distill = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    run(argv)


def kill_in(argv, step):
    """Run in another process, and kill it at a step of the distillation, or before the first one."""
    child = multiprocessing.get_context("fork").Process(target=_run_and_die, args=(argv, step))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


STEPS = pytest.mark.parametrize("step", [0, 5], ids=["after-the-fit", "in-distillation"])


@STEPS
def test_killed_and_resumed_is_the_same_run(folder, whole, tmp_path, step):
    argv = [*arguments(folder, tmp_path), "--resume"]
    kill_in(argv, step)
    assert (tmp_path / "fitted" / "fit.json").is_file()
    assert not (tmp_path / "history.json").exists()
    fitted = (tmp_path / "fitted" / "model.safetensors").stat().st_mtime_ns
    found = run(argv)
    assert found["bits_per_byte"] == whole[1]["bits_per_byte"]
    assert (tmp_path / "model.safetensors").read_bytes() == (whole[0] / "model.safetensors").read_bytes()
    assert (tmp_path / "fitted" / "model.safetensors").stat().st_mtime_ns == fitted
    assert run(argv)["bits_per_byte"] == found["bits_per_byte"]  # finished: taken from the folder
    with pytest.raises(ValueError, match="block_size"):
        run([*arguments(folder, tmp_path, block_size=8), "--resume"])


@pytest.mark.parametrize("step", [None, 0, 5], ids=["at-once", "killed-before-it", "killed-in-it"])
def test_a_fit_goes_on_to_a_distillation(folder, whole, tmp_path, step):
    first = run(arguments(folder, tmp_path, distill_steps=0))
    fitted = (tmp_path / "fitted" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(FileExistsError, match="--resume"):
        run(arguments(folder, tmp_path))
    with pytest.raises(ValueError, match="block_size was 4 and is 8 now"):
        run([*arguments(folder, tmp_path, block_size=8), "--resume"])
    assert run([*arguments(folder, tmp_path, distill_steps=0), "--resume"]) == first
    argv = [*arguments(folder, tmp_path), "--resume"]
    if step is not None:
        kill_in(argv, step)
        assert not (tmp_path / "history.json").exists()
    found = run(argv)
    assert found["bits_per_byte"] == whole[1]["bits_per_byte"]
    assert found["layers"] == first["layers"]
    assert (tmp_path / "model.safetensors").read_bytes() == (whole[0] / "model.safetensors").read_bytes()
    assert (tmp_path / "fitted" / "model.safetensors").stat().st_mtime_ns == fitted
    assert run(argv) == json.loads((tmp_path / "history.json").read_text())


def _change_text(folder):
    text = (folder / "corpus.txt").read_text()
    (folder / "corpus.txt").write_text(text.swapcase())


def _train_on(folder):
    model = GPT2LMHeadModel.from_pretrained(folder / "model")
    model.transformer.h[0].mlp.c_fc.weight.data *= 1.5
    model.save_pretrained(folder / "model")


@STEPS
@pytest.mark.parametrize(("change", "name"), [(_change_text, "text"), (_train_on, "weights")], ids=["text", "model"])
def test_what_was_made_of_another_text_or_model_is_not_taken_up(folder, tmp_path, change, name, step):
    """Of the same names: changed in place, after a run was killed."""
    own, output_dir = tmp_path / "own", tmp_path / "run"
    shutil.copytree(folder, own)
    argv = [*arguments(own, output_dir), "--resume"]
    kill_in(argv, step)
    before = (output_dir / "fitted" / "model.safetensors").read_bytes()
    change(own)
    if step:  # a checkpoint would be lost
        with pytest.raises(ValueError, match=f"{name} was '.*' and is '.*' now"):
            run(argv)
        return
    found = run(argv)
    assert (output_dir / "fitted" / "model.safetensors").read_bytes() != before
    assert found["bits_per_byte"] == run(arguments(own, tmp_path / "anew"))["bits_per_byte"]


FAULTS = {
    "block-size": ({"block_size": 5}, "block_size must divide the 64 units"),
    "no-model": ({"model": "/nowhere/at-all"}, "/nowhere/at-all"),
    "no-text": ({"text": "/nowhere/*.txt"}, "/nowhere"),
    "few-tokens": ({"fit_tokens": 32}, "32 tokens for layers of 64 units"),
    "window": ({"window": 33}, "from 1 to 32"),
    "steps": ({"max_steps": 5}, "--distill_steps"),
    "negative-steps": ({"distill_steps": -1}, "at least 0, not -1"),
    "nothing-to-measure": ({"validation_size": 0}, "no text to measure on"),
    "one-token-to-measure": ({"validation_size": 1}, "nothing to predict"),
    "no-eval-tokens": ({"max_eval_tokens": 0}, "--max_eval_tokens must be at least 2, not 0"),
    "weight": ({"distillation_weight": 1.5}, "from 0 to 1, not 1.5"),
    "temperature": ({"temperature": 0}, "must be positive, not 0"),
    "label-smoothing": ({"label_smoothing_factor": 0.1}, "no label smoothing"),
}


@pytest.mark.parametrize(("changes", "message"), FAULTS.values(), ids=FAULTS)
def test_what_does_not_fit_is_said(folder, tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(arguments(folder, tmp_path, **changes))
    assert not (tmp_path / "fitted").exists()


def test_the_help_teaches(capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    said = capsys.readouterr().out
    assert "--distill_steps" in said
    assert "--model my-gpt2 --text" in said


def test_a_fault_is_one_line(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run_program(script, *arguments(folder, tmp_path, block_size=7))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("Error: block_size must divide the 64 units")
