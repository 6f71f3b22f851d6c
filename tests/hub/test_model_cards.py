"""The model cards say what the results say, and the commands in them exist."""

import json
import re
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
from transformers import TrainingArguments

from hf_efficient import ScalingTransformerConfig, ScalingTransformerForCausalLM, TupeConfig, TupeForMaskedLM


ROOT = Path(__file__).parents[2]
CARDS = sorted((ROOT / "model_cards").glob("*.md"))
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def build():
    loader = SourceFileLoader("build_cards", str(ROOT / "model_cards" / "build.py"))
    module = ModuleType(loader.name)
    module.__file__ = loader.path
    loader.exec_module(module)
    return module


def test_the_cards_are_up_to_date(build, capsys):
    objectives = ["objectives-meta-controller", "objectives-notes", "objectives-replaced-token"]
    names = [
        "scaling_transformer-14x9216-all",
        "scaling_transformer-24x1024-all",
        "srupp-enwik8-base",
        "srupp-wikitext103-base",
        "terraformer-17b",
        "terraformer-medium",
        "tupe-base",
        "tupe-large",
    ]
    assert [card.stem for card in CARDS] == objectives + names
    assert build.main(["--check"]) == 0, capsys.readouterr().err


def test_every_page_with_blocks_is_kept_up_to_date(build):
    """A page elsewhere in the repository would go stale unseen."""
    pages = build.pages(build.CARDS)
    assert {"README.md", "kernels/sru-recurrence/CARD.md", "model_cards/tupe-base.md"} <= pages.keys()
    folders = ("docs", "kernels", "model_cards", "training")
    here = [ROOT.glob("*.md"), *(ROOT.glob(f"{folder}/**/*.md") for folder in folders)]
    filled = {path for found in here for path in found if build.BLOCK.search(path.read_text())}
    assert filled <= set(pages.values())


def test_sizes_are_those_of_the_built_model(build, monkeypatch):
    tiny = {"vocab_size": 50, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
    monkeypatch.setitem(TupeConfig.published_settings, "tiny", tiny)
    table = build.sizes("tupe", "tiny")
    count = sum(parameter.numel() for parameter in TupeForMaskedLM(TupeConfig.preset("tiny")).parameters())
    assert f"| `TupeForMaskedLM` | {count:,} |" in table
    assert "| `hidden_size` | 12 |" in table


def test_sizes_of_a_preset_are_those_of_the_classes_that_are_named(build):
    table = build.sizes("srupp", "enwik8-42m", "SruppForCausalLM")
    assert "| `SruppForCausalLM` | 42,345,815 |" in table
    assert "| `projection_size` | 480 |" in table
    assert "SruppModel" not in table
    with pytest.raises(ValueError, match="no preset 'enwik9'"):
        build.sizes("srupp", "enwik9")


def test_sizes_of_sparse_models_say_what_a_token_reads(build, monkeypatch):
    tiny = {
        "vocab_size": 40,
        "hidden_size": 12,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 19,
    }
    sparse = {"ff_sparsity": 4, "ff_rank": 2, "lm_head_type": "multiplicative", "loss_sparsity": 4}
    published = {"tiny-dense": tiny, "tiny-all": {**tiny, **sparse}}
    monkeypatch.setattr(ScalingTransformerConfig, "published_settings", published)
    config = ScalingTransformerConfig.preset("tiny-all")
    total = ScalingTransformerForCausalLM(config).num_parameters()
    # Of 40 rows of the embedding, of 19 positions, and of 4 units in each of 2 * 6 blocks, with 2 rows of 12, one.
    read = total - (39 + 18) * 12 - 3 * 2 * 6 * 2 * 12
    table = build.sizes("scaling_transformer", "tiny-all", "ScalingTransformerForCausalLM")
    assert f"| of them a token of `ScalingTransformerForCausalLM` reads | {read:,} |" in table
    assert "| `lm_head_type` | multiplicative |" in table
    assert "`attention_sparsity`" not in table
    dense, sparse = build.sparse_models("scaling_transformer").splitlines()[2:]
    assert dense.endswith("| nothing | -, -, - |")
    assert sparse.endswith(f"({read / total:.0%}) | feed-forward, loss | 4, -, 4 |")


def test_results_are_rendered_checked_and_never_invented(build, tmp_path, capsys):
    card, results = tmp_path / "card.md", tmp_path / "results"
    results.mkdir()
    card.write_text("# Card\n\n<!-- results: speed glue* -->\nold\n<!-- end -->\n\nText stays.\n")
    arguments = ["--cards", str(tmp_path), "--results", str(results)]
    assert build.main([*arguments, "--check"]) == 1
    assert "old" in card.read_text()
    assert build.main(arguments) == 0
    assert "`speed`: not measured yet.\n\n`glue*`: not measured yet." in card.read_text()

    summary = [
        {"name": "step time | ratio", "value": 1.03456, "unit": "times", "goal": "<= 1.10"},
        {"name": "on a GPU", "value": None, "unit": "times", "goal": None},
    ]
    measured = {"machine": {"processor": "A chip", "threads": 1}, "commit": "0123456789abcdef", "summary": summary}
    (results / "glue_small.json").write_text(json.dumps(measured))
    assert build.main([*arguments, "--check"]) == 1
    assert "card.md" in capsys.readouterr().err
    assert build.main(arguments) == 0
    text = card.read_text()
    assert "`glue_small`: A chip, 1 thread(s), at commit 0123456789\n" in text
    assert "| step time \\| ratio | 1.035 | times | <= 1.10 |" in text
    assert "| on a GPU | not measured yet | times | - |" in text
    assert text.startswith("# Card\n\n<!-- results: speed glue* -->\n")
    assert text.endswith("<!-- end -->\n\nText stays.\n")
    assert build.main([*arguments, "--check"]) == 0

    (results / "speed.json").write_text("{}")
    with pytest.raises(ValueError, match=r"speed\.json has no list `summary`"):
        build.main(arguments)
    with pytest.raises(ValueError, match="1 blocks begin, but 0"):
        build.fill("<!-- results: speed -->\n")


@pytest.fixture
def recorded(tmp_path):
    """A folder of results with one recorded table."""
    columns = ["encoder", "loss, nats", "loss of a discriminator", "cola, %", "rte, %"]
    rows = [
        ["BERT", 6.26, None, "2.6", "57.0"],
        ["TUPE", "-", 0.8, "8.9", "-"],
        ["never trained", "-", "-", "8.8", "-"],
    ]
    (tmp_path / "race.json").write_text(json.dumps({"table": {"columns": columns, "rows": rows}}))
    return tmp_path


def test_a_table_shows_the_chosen_columns_in_the_order_and_by_the_names_of_its_block(build, recorded):
    """An unmeasured row is left out of a selection, and a table without a selection stays whole."""
    card = "<!-- table: race | encoder = method,\n     4 = CoLA, 2 = validation loss -->\nold\n<!-- end -->\n"
    chosen = build.fill(card, recorded)
    assert chosen.splitlines()[3:8] == [
        "| method | CoLA | validation loss |",
        "| --- | ---: | ---: |",
        "| BERT | 2.6 | 6.26 |",
        "| TUPE | 8.9 | - |",
        "| never trained | 8.8 | - |",
    ]
    assert build.fill(chosen, recorded) == chosen
    without = build.table("race", columns="encoder, loss of", folder=recorded)
    assert without.splitlines()[2:] == ["| TUPE | 0.8 |"]
    whole = build.table("race", folder=recorded).splitlines()
    assert whole[0] == "| encoder | loss, nats | loss of a discriminator | cola, % | rte, % |"
    assert len(whole) == 5


@pytest.mark.parametrize("column", ["loss", "sst2", "0", "6", ""], ids=["two", "none", "zero", "beyond", "empty"])
def test_a_column_that_is_not_exactly_one_is_refused(build, recorded, column):
    with pytest.raises(ValueError, match=f"Column '{column}' stands for [02345] columns"):
        build.table("race", columns=f"encoder, {column}", folder=recorded)


def test_only_tables_have_columns_to_choose_from(build, recorded):
    with pytest.raises(ValueError, match="Only a table has columns"):
        build.fill("<!-- headline: race | encoder -->\n<!-- end -->\n", recorded)


def test_the_readme_has_one_table_and_every_cell_of_it_is_measured():
    """What is not measured yet, and long tables, are in docs/."""
    text = (ROOT / "README.md").read_text()
    assert "not measured" not in text
    (table,) = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    heads, rules, *rows = [line.strip("| \n").split(" | ") for line in table.splitlines()]
    assert len(rows) == 4
    assert {len(row) for row in (heads, rules, *rows)} == {5}
    assert not [cell for row in rows for cell in row if cell.strip() in ("", "-")]
    assert all(re.search(r"\d", cell) for row in rows for cell in row[-2:])
    assert re.findall(r"!\[[^]]+\]\(([^)]+)\)", text) == ["training/results/pretrain_race.png"]
    families = text.partition("<!-- families -->")[2].partition("<!-- end -->")[0].strip().splitlines()
    assert all(re.match(r"- \*\*.*\d.*\[More\]\(docs/", line) for line in families)
    assert len(families) == len(rows) + 1


def test_a_figure_that_is_not_measured_is_refused(build, tmp_path):
    for path in build.RESULTS.glob("*.json"):
        (tmp_path / path.name).symlink_to(path)
    block = "<!-- overview -->\n<!-- end -->\n"
    assert "training step" in build.fill(block, tmp_path)
    result = json.loads((build.RESULTS / "long_input.json").read_text())
    for entry in result["summary"]:
        entry["value"] = None
    result["entries"] = result["entries"][:1]
    (tmp_path / "long_input.json").unlink()
    (tmp_path / "long_input.json").write_text(json.dumps(result))
    for kind in ("overview", "families"):
        with pytest.raises(ValueError, match=r"long_input\.json has no measured"):
            build.fill(block.replace("overview", kind), tmp_path)


def test_links_to_cards_begin_where_the_page_lies(build):
    block = "<!-- models: tupe -->\n<!-- end -->\n<!-- overview -->\n<!-- end -->\n"
    for prefix in ("", "../"):
        links = re.findall(r"\]\((.*?)\)", build.fill(block, prefix=prefix))
        assert links
        assert all(link.startswith(f"{prefix}model_cards/") for link in links)


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", [*GUIDES, *CARDS, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_links_of_a_page_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        name, _, part = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if part else []
        assert not part or part in map(anchor, headings), link


def commands_of(page: Path) -> list[tuple[str, str]]:
    """Scripts or modules that a page calls, and the options that it gives them."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    text = re.sub(r"\s#.*$", "", "\n".join(blocks).replace("\\\n", " "), flags=re.MULTILINE)
    pattern = r"^(?:python|accelerate launch|torchrun(?: --\S+ \d+)*) (?:-m )?([\w/.]+)(.*?)$"
    return re.findall(pattern, text, re.MULTILINE)


def check_command(name: str, options: str) -> None:
    """Assert that a script or module, and the options that it is given, exist."""
    script = ROOT / (name if name.endswith(".py") else f"{name.replace('.', '/')}.py")
    script = script if script.is_file() else script.with_suffix("") / "__main__.py"
    near = [
        *script.parent.glob(f"{script.stem}_*.py"),
        ROOT / "hf_efficient" / "trainer" / "arguments.py",
        ROOT / "hf_efficient" / "utils" / "conversion.py",
        *script.parent.glob("*_args.py"),
        *script.parent.glob("small_models.py"),
    ]
    sources = [script.read_text(), *(path.read_text() for path in near)]
    for option in re.findall(r"--(\w+)", options):
        defined = re.search(rf"^    {option}: |\"--{option}\"", "\n".join(sources), re.MULTILINE)
        assert defined or option in TrainingArguments.__dataclass_fields__, f"{name} --{option}"


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_commands_in_a_guide_name_scripts_and_options_that_exist(page):
    """Options of a benchmark are its module's."""
    for name, options in commands_of(page):
        if name != "training.benchmarks":
            check_command(name, options)
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= set(targets)


def test_the_readme_names_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert re.findall(r"^make (\w+)", text, re.MULTILINE) == ["demo", "test"]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_commands_in_a_card_name_scripts_and_options_that_exist(card):
    commands = commands_of(card)
    family = card.stem.partition("-")[0]
    encoder = {"training/pretrain.py", "training/finetune_glue.py"}
    language_model = {"training/train_lm.py"}
    scripts = {
        "tupe": encoder,
        "srupp": language_model,
        "scaling_transformer": language_model,
        "terraformer": {"training/train_seq2seq.py"},
        "objectives": encoder,
    }
    convert = f"hf_efficient.models.{family}.convert_{family}"
    if family == "objectives":
        convert = (
            "training/count_rare_words.py"
            if card.stem == "objectives-notes"
            else "hf_efficient.objectives.convert_mcbert"
        )
    assert scripts[family] | {"hf_efficient.hub", convert} <= {name for name, _ in commands}
    for name, options in commands:
        check_command(name, options)
