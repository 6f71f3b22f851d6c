import json
from dataclasses import dataclass, field

import pytest

from hf_efficient.trainer.arguments import PretrainingArguments, ScriptParser, parse_overrides, parse_with_preset
from training.pretrain import PretrainingSettings


@dataclass
class Settings:
    """Settings of a script."""

    model: str = field(metadata={"help": "The model."})
    rows: int = field(default=3, metadata={"help": "Number of rows."})
    rate: float = field(default=0.5, metadata={"help": "The rate."})
    lowercase: bool = field(default=True, metadata={"help": "Lower-case."})
    names: str | None = field(default=None, metadata={"help": "Names, aliased.", "aliases": ["--words"]})


PRESETS = {
    "json": json.dumps({"model": "tupe", "rows": 5, "rate": 1e-4, "lowercase": False}),
    "yaml": "model: tupe\nrows: 5\nrate: 1e-4  # a text to PyYAML\nlowercase: false\n",
    "yml": "{model: tupe, rows: 5, rate: 0.0001, lowercase: no}",
}


@pytest.mark.parametrize("suffix", PRESETS)
def test_a_preset_stands_for_settings_and_options_override_it(tmp_path, suffix):
    preset = tmp_path / f"preset.{suffix}"
    preset.write_text(PRESETS[suffix])
    (settings,) = parse_with_preset([Settings], [str(preset), "--rows", "7"])
    assert settings == Settings(model="tupe", rows=7, rate=1e-4, lowercase=False)
    (settings,) = parse_with_preset([Settings], [str(preset), "--model", "bert", "--lowercase"])
    assert settings == Settings(model="bert", rows=5, rate=1e-4)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("preset.json", '{"colour": 1}', "settings that do not exist: colour"),
        ("preset.yaml", "- model\n- rows\n", "holds no settings by name"),
        ("preset.yaml", "model: [", r"preset.yaml cannot be read"),
        ("preset.json", "{", r"preset.json cannot be read"),
        ("preset.toml", "model = 1", "neither"),
    ],
)
def test_a_faulty_preset_is_named(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        parse_with_preset([Settings], [str(tmp_path / name)])


@pytest.mark.parametrize("name", ["tupe_small", "tupe_small.json", "training/configs/tupe_small.json"])
def test_presets_of_a_script_go_by_their_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kinds = [PretrainingSettings, PretrainingArguments]
    settings, args = parse_with_preset(kinds, [name, "--vocab_size", "99", "--use_cpu"])
    assert (settings.model_type, settings.vocab_size, args.learning_rate) == ("tupe", 99, 1e-3)


@pytest.mark.parametrize("name", ["tupe_tiny", "other/tupe_small.json", "tupe_small.yaml", "nowhere.json"])
def test_a_preset_that_is_not_there_is_refused_with_the_names_of_those_that_are(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"no preset {name}: .*tupe_small, ") as error:
        parse_with_preset([PretrainingSettings], [name])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["--model", "x", "--row_s", "4"],
            "Error: there is no option --row_s, but --rows. --help shows the options.\n",
        ),
        (["--model", "x", "stray"], "Error: there is no option stray. --help shows the options.\n"),
        (["--model", "x", "--rows", "many"], "Error: argument --rows: invalid int value: 'many'."),
        ([], "Error: the following arguments are required: --model."),
    ],
    ids=["unknown", "stray", "no-number", "missing"],
)
def test_faults_of_a_command_line_are_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as end:
        parse_with_preset([Settings], argv)
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(said)
    assert printed.count("\n") == 1


def test_help_shows_each_option_once(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = ScriptParser([Settings], "What it does.").format_help().splitlines()
    assert lines[:3] == [
        "usage: " + lines[0].split()[1] + " [PRESET] --model VALUE [--setting value ...]",
        "",
        "What it does.",
    ]
    assert [line.split("  ")[1] for line in lines if line.startswith("  ")] == [
        "-h, --help",
        "--model TEXT",
        "--rows INT",
        "--rate FLOAT",
        "--[no_]lowercase",
        "--names, --words TEXT",
        "--help-all",
    ]
    assert [line.split("  ")[-1].strip() for line in lines if "default" in line] == [
        "Number of rows. (default: 3)",
        "The rate. (default: 0.5)",
        "Lower-case. (default: True)",
    ]


def test_help_of_the_console_command_speaks_of_it(monkeypatch):
    text = """What it does.

python training/train_lm.py training/configs/tupe_small.json --corpus texts
python -m training.count_rare_words --corpus texts
torchrun --nproc_per_node 2 training/pretrain.py
"""
    monkeypatch.setattr("sys.argv", ["hf-efficient train-lm"])
    lines = ScriptParser([Settings], text).format_help().splitlines()
    assert lines[0].startswith("usage: hf-efficient train-lm [PRESET]")
    assert lines[4:7] == [
        "hf-efficient train-lm tupe_small --corpus texts",
        "hf-efficient count-rare-words --corpus texts",
        "torchrun --nproc_per_node 2 -m hf_efficient.cli pretrain",
    ]
    monkeypatch.setattr("sys.argv", ["train_lm.py"])
    assert text.splitlines()[2] in ScriptParser([Settings], text).format_help()


def test_help_shows_our_options_and_help_all_those_of_trainer(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    parser = ScriptParser([PretrainingSettings, PretrainingArguments])
    short = parser.format_help()
    assert len(short.splitlines()) < 110
    shown = {line.split()[0] for line in short.splitlines() if line.startswith("  --")}
    assert {"--corpus", "--learning_rate", "--max_steps", "--seed", "--[no_]auto_bf16"} <= shown
    assert not {"--fsdp", "--torch_compile", "--no_auto_bf16"} & shown
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--help-all"])
    assert end.value.code == 0
    everything = capsys.readouterr().out
    assert shown | {"--fsdp", "--torch_compile"} <= {
        line.split()[0] for line in everything.splitlines() if line.strip()
    }


def test_overrides_hold_numbers_words_truths_and_lists():
    text = "hidden_size=16, attention_layers=[6,9],rescale=True,pad_token_id=null,recurrence_activation=tanh"
    assert parse_overrides(text) == {
        "hidden_size": 16,
        "attention_layers": [6, 9],
        "rescale": True,
        "pad_token_id": None,
        "recurrence_activation": "tanh",
    }
    assert parse_overrides(None) == {}
    with pytest.raises(ValueError, match="must look like 'name=value,name=value'; got 'depth'"):
        parse_overrides("depth")
