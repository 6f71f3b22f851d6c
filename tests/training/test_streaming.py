"""Training on a stream: killed and resumed to the same losses, as in memory, by several processes; what is refused."""

import gzip
import json
import random
import shutil
import signal

import pytest
import torch
import transformers
from packaging import version

from hf_efficient.trainer import EfficientTrainer
from tests.helpers.processes import run_distributed
from tests.training import pretraining_runs, streaming_worker
from training import pretrain, train_lm


STREAM = {"streaming": "True", "shuffle_buffer_size": 20, "validation_size": 0.1}
LANGUAGE_MODELS = {
    "columns of SRU++": {
        "model_type": "srupp",
        "config_overrides": "hidden_size=8,num_hidden_layers=2,projection_size=4,attention_layers=[1]",
    },
    "segments of GPT-2": {
        "model_type": "gpt2",
        "level": "subword",
        "vocab_size": 300,
        "config_overrides": "n_embd=8,n_layer=1,n_head=2,n_positions=32",
    },
}


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def folder(tmp_path):
    pretraining_runs.write_corpus(tmp_path / "corpus.txt", documents=90)
    return tmp_path


def run_lm(argv):
    return train_lm.train_lm(*train_lm.parse_arguments(argv))


def language_model(folder, output_dir, **changes):
    """Command line of a tiny language model on the corpus in `folder`."""
    options = {
        "unroll_size": 16,
        "sample_tokens": 0,
        "max_eval_tokens": 200,
        "per_device_eval_batch_size": 3,
        "report_to": "none",
    }
    left_out = ("--block_size", "--vocab_size", "--config_overrides")
    argv = pretraining_runs.arguments(folder, output_dir, **STREAM)
    pairs = zip(argv[::2], argv[1::2], strict=True)
    kept = [part for name, value in pairs if name not in left_out for part in (name, value)]
    return [*kept, *(str(part) for name, value in {**options, **changes}.items() for part in (f"--{name}", value))]


def kill_and_resume(run, argv, output_dir, monkeypatch):
    """Kill a run at two steps, and resume it to its end."""
    monkeypatch.setattr(pretraining_runs, "run_here", run)
    for step in (7, 16):
        assert pretraining_runs.run_in_child(argv, pretraining_runs.at_step(step)) == -signal.SIGKILL
        assert not (output_dir / "history.json").exists()
    assert pretraining_runs.run_in_child(argv) == 0


def check_equal_runs(one, other):
    assert pretraining_runs.history(one) == pretraining_runs.history(other)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_pretraining_killed_and_resumed_is_the_same_run(folder, monkeypatch):
    whole, parts = folder / "whole", folder / "parts"
    run = pretraining_runs.run_here
    # More rows than the corpus has: the masks of the second pass are others.
    changes = {**STREAM, "per_device_train_batch_size": 7, "whole_word_mask": "True"}
    run(pretraining_runs.arguments(folder, whole, **changes))
    argv = [*pretraining_runs.arguments(folder, parts, **changes), "--resume"]
    kill_and_resume(run, argv, parts, monkeypatch)
    check_equal_runs(parts, whole)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_model_killed_and_resumed_is_the_same_run(folder, monkeypatch, name):
    whole, parts = folder / "whole", folder / "parts"
    trainer = run_lm(language_model(folder, whole, **LANGUAGE_MODELS[name]))
    assert hasattr(trainer.train_dataset, "columns") == (name == "columns of SRU++")
    argv = [*language_model(folder, parts, **LANGUAGE_MODELS[name]), "--resume"]
    kill_and_resume(run_lm, argv, parts, monkeypatch)
    check_equal_runs(parts, whole)


def losses(output_dir, name="loss"):
    return [entry[name] for entry in pretraining_runs.history(output_dir) if name in entry]


def test_a_stream_in_order_gives_the_losses_of_memory(folder, monkeypatch):
    """With Trainer's shuffling taken away: the same rows, masks and weights. Loaders draw from the random numbers of
    dropout, each in its own way."""
    overrides = pretraining_runs.OVERRIDES + pretraining_runs.NO_DROPOUT
    changes = {"validation_size": 0.1, "max_steps": 9, "config_overrides": overrides}
    run = pretraining_runs.run_here
    run(pretraining_runs.arguments(folder, folder / "stream", **changes, streaming="True", shuffle_buffer_size=0))
    monkeypatch.setattr(
        EfficientTrainer, "_get_train_sampler", lambda self, *_: torch.utils.data.SequentialSampler(self.train_dataset)
    )
    run(pretraining_runs.arguments(folder, folder / "memory", **changes))
    assert losses(folder / "stream") == losses(folder / "memory")
    assert losses(folder / "stream", "eval_loss") == pytest.approx(losses(folder / "memory", "eval_loss"))


def test_one_column_of_a_stream_gives_the_losses_of_memory(folder):
    changes = {**LANGUAGE_MODELS["columns of SRU++"], "per_device_train_batch_size": 1, "validation_size": 0}
    for name, streaming in (("stream", "True"), ("memory", "False")):
        run_lm(language_model(folder, folder / name, **{**changes, "streaming": streaming}))
    assert losses(folder / "stream") == losses(folder / "memory")


def test_processes_see_other_rows_and_resume_to_the_same_losses(folder):
    whole, rng = folder / "whole", random.Random(5)
    texts = [" ".join(rng.choices(pretraining_runs.WORDS, k=22)) for _ in range(240)]  # none like another
    (folder / "corpus.txt").write_text("\n\n".join(texts))
    argv = pretraining_runs.arguments(folder, whole, **{**STREAM, "seed": 0, "vocab_size": 200})
    run_distributed(streaming_worker, folder, *argv)
    seen = [json.loads((folder / f"rows-{process}.json").read_text()) for process in range(2)]
    assert [found["steps"] for found in seen] == [17, 17]
    rows = [{tuple(row) for row in found["rows"]} for found in seen]
    assert all(len(shard) > 60 for shard in rows)
    assert not rows[0] & rows[1]

    parts = folder / "parts"
    shutil.copytree(whole, parts)
    for path in (parts / "history.json", parts / "model.safetensors"):
        path.unlink()
    shutil.rmtree(parts / "checkpoint-17")
    again = [str(parts) if part == str(whole) else part for part in argv]
    with pytest.raises(ValueError, match="processes was 2 and is 1 now"):
        pretraining_runs.run_here([*again, "--resume", "--per_device_train_batch_size", "6"])
    if version.parse(transformers.__version__) < version.parse("5.22"):
        pytest.skip("Trainer of this release cannot load the optimizer of several processes on a CPU (cpu:0)")
    run_distributed(streaming_worker, folder, *again, "--resume")
    check_equal_runs(parts, whole)


def test_a_checkpoint_of_another_number_of_processes_is_refused(folder):
    argv = pretraining_runs.arguments(folder, folder / "run", **STREAM)
    trainer = pretraining_runs.run_here(argv)
    trainer._numbered_rows.file_name = "stream_state-00001-of-00002.safetensors"
    with pytest.raises(ValueError, match="holds the places of 1 streams"):
        trainer._numbered_rows.load(str(folder / "run" / "checkpoint-15"))
    assert next(iter(trainer._numbered_rows.loader(list))) is not None  # row 0 begins anew
    with pytest.raises(IndexError, match="row 5 is asked for"):
        trainer._numbered_rows[5]


def test_compressed_files_and_files_for_validation(folder, capfd):
    text = (folder / "corpus.txt").read_text()
    for number in range(3):
        rows = [json.dumps({"text": document}) for document in text.split("\n\n")[number::3]]
        (folder / f"part-{number}.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    (folder / "held-out.txt").write_text(text)
    changes = {**STREAM, "corpus": folder / "part-*.jsonl.gz", "validation": folder / "held-out.txt"}
    for streaming in ("True", "False"):
        output = folder / f"run-{streaming}"
        pretraining_runs.run_here(
            pretraining_runs.arguments(folder, output, **{**changes, "streaming": streaming, "max_steps": 4})
        )
        assert len(losses(output, "eval_loss")) == 1
    out, err = capfd.readouterr()
    assert "Warning" not in out + err
    assert "{" not in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": -1}, "--streaming does not know how long the corpus is: give --max_steps"),
        ({"dataloader_num_workers": 2}, "leave out --dataloader_num_workers"),
        ({"shuffle_buffer_size": -1}, "`shuffle_buffer_size` must not be negative"),
        ({"corpus": "nowhere*.txt"}, "No text files match"),
    ],
    ids=["no steps", "workers", "buffer", "corpus"],
)
def test_what_a_stream_cannot_do_is_said_in_one_line(folder, changes, message):
    for run, arguments in (
        (pretraining_runs.run_here, pretraining_runs.arguments(folder, folder / "run", **{**STREAM, **changes})),
        (run_lm, language_model(folder, folder / "run", **changes)),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            run(arguments)
        assert "\n" not in str(caught.value)
    assert not (folder / "run").exists()


def test_what_is_at_the_end_of_a_stream_is_not_known(folder):
    with pytest.raises(ValueError, match="The end of a stream is not known"):
        run_lm(language_model(folder, folder / "run", validation_size=500))
    with pytest.raises(ValueError, match="Which bytes occur in a stream is not known"):
        run_lm(language_model(folder, folder / "run", alphabet="corpus"))


def test_another_corpus_is_not_resumed(folder):
    argv = pretraining_runs.arguments(folder, folder / "run", **{**STREAM, "max_steps": 5})
    pretraining_runs.run_here(argv)
    pretraining_runs.write_corpus(folder / "corpus.txt", documents=80)
    with pytest.raises(ValueError, match="rows was"):
        pretraining_runs.run_here([*argv, "--resume"])


def test_the_settings_of_a_run_in_memory_are_those_of_before(folder):
    settings, args = pretrain.parse_arguments(pretraining_runs.arguments(folder, folder / "run"))
    assert not {"streaming", "shuffle_buffer_size", "validation", "processes"} & set(settings.resume_critical(args))
