import json
import os
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, concatenate_datasets

from hf_efficient.data.glue import GLUE_TASKS, content_digest, load_glue
from hf_efficient.metrics.glue_metric import METRIC_KEYS


DATA = Path(os.environ.get("HF_EFFICIENT_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
LOCAL_TASKS = [task for task in GLUE_TASKS.values() if task.name != "topic_pairs"]
AWKWARD = ['He said "no', "None", "", "NA", "an odd \r return", "naïve \u2028 café", " spaces "]

RAW_HEADERS = {
    "cola": None,
    "sst2": "sentence\tlabel",
    "mrpc": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "stsb": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "mnli": "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
    "qnli": "index\tquestion\tsentence\tlabel",
    "rte": "index\tsentence1\tsentence2\tlabel",
    "wnli": "index\tsentence1\tsentence2\tlabel",
}
# Where the texts and the label stand, counted from 0, as the scripts of earlier GLUE projects number them.
RAW_PLACES = {
    "cola": ([3], 1),
    "sst2": ([0], 1),
    "mrpc": ([3, 4], 0),
    "stsb": ([7, 8], 9),
    "qqp": ([3, 4], 5),
    "mnli": ([4, 5], 7),
    "qnli": ([1, 2], 3),
    "rte": ([1, 2], 3),
    "wnli": ([1, 2], 3),
}
NAMED_IN_RAW = ("mnli", "qnli", "rte")  # the other tasks' raw labels are numbers
# What nyu-mll/glue on the Hub calls the classes 0, 1 and 2. A checkpoint fine-tuned elsewhere has its outputs in this
# order, and the raw numbers of cola, sst2, mrpc, qqp and wnli mean these names.
PUBLISHED_LABELS = {
    "cola": ("unacceptable", "acceptable"),
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "stsb": (),
    "qqp": ("not_duplicate", "duplicate"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
    "wnli": ("not_entailment", "entailment"),
}


def make_rows(task, shift=0):
    rows = []
    for i, text in enumerate(AWKWARD):
        label = (i + shift) * 0.6 if task.is_regression else (i + shift) % len(task.label_names)
        texts = dict(zip(task.text_columns, (text, f"other {i}"), strict=False))
        rows.append({**texts, "label": label, "idx": i})
    return rows


def write_parquet(task, folder, stem, rows):
    Dataset.from_list(rows, features=task.features).to_parquet(folder / f"{stem}-00000-of-00001.parquet")


def write_jsonl(task, folder, stem, rows):
    (folder / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tsv(task, folder, stem, rows):
    header = RAW_HEADERS[task.name]
    places, label_place = RAW_PLACES[task.name]
    lines = [] if header is None else [header]
    width = 4 if header is None else header.count("\t") + 1
    for row in rows:
        cells = ["x"] * width
        for place, column in zip(places, task.text_columns, strict=True):
            cells[place] = row[column]
        label = row["label"]
        cells[label_place] = task.label_names[label] if task.name in NAMED_IN_RAW else str(label)
        lines.append("\t".join(cells))
    stem = stem.replace("validation", "dev")
    (folder / f"{stem}.tsv").write_bytes(("\n".join(lines) + "\n").encode())


WRITERS = {"parquet": write_parquet, "jsonl": write_jsonl, "tsv": write_tsv}


@pytest.mark.parametrize("name", PUBLISHED_LABELS)
def test_classes_stand_in_the_published_order(name):
    assert GLUE_TASKS[name].label_names == PUBLISHED_LABELS[name]


def test_every_task_of_glue_is_compared_with_its_publication():
    assert {task.name for task in LOCAL_TASKS} == set(PUBLISHED_LABELS)
    assert GLUE_TASKS["stsb"].label_range == (0.0, 5.0)
    assert GLUE_TASKS["topic_pairs"].label_names == ("different_topic", "same_topic")


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("task", LOCAL_TASKS, ids=lambda task: task.name)
def test_local_files_of_every_format_give_the_same_rows(task, form, tmp_path):
    folder = tmp_path / (task.raw_folder if form == "tsv" else task.name)
    folder.mkdir()
    splits = ("train", *task.validation_splits)
    rows = {split: make_rows(task, shift) for shift, split in enumerate(splits)}
    for split in splits:
        WRITERS[form](task, folder, split, rows[split])
    loaded = load_glue(task.name, tmp_path)
    assert list(loaded) == list(splits)
    for split in splits:
        assert loaded[split].features == task.features
        expected = Dataset.from_list(rows[split], features=task.features)
        assert loaded[split].to_list() == expected.to_list()


def test_the_folder_of_the_task_itself_may_be_given(tmp_path):
    folder = tmp_path / "CoLA"
    folder.mkdir()
    write_tsv(GLUE_TASKS["cola"], folder, "train", make_rows(GLUE_TASKS["cola"]))
    assert list(load_glue("cola", folder)) == ["train"]


def test_labels_may_be_names(tmp_path):
    (tmp_path / "rte").mkdir()
    row = {"sentence1": "a", "sentence2": "b", "label": "not_entailment", "note": "dropped"}
    write_jsonl(None, tmp_path / "rte", "validation", [row])
    assert load_glue("rte", tmp_path)["validation"].to_list() == [
        {"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}
    ]


def test_broken_raw_rows_are_left_out_and_counted(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_efficient.data.glue.logger.warning", warnings.append)
    (tmp_path / "QQP").mkdir()
    lines = [RAW_HEADERS["qqp"], "1\t2\t3\twhy\thow\t1", "4\t5\t6\tonly one question"]
    (tmp_path / "QQP" / "train.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert load_glue("qqp", tmp_path)["train"].to_list() == [
        {"question1": "why", "question2": "how", "label": 1, "idx": 0}
    ]
    assert "1 of 2 rows" in warnings[0]


def test_missing_data_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"sst2.*sst2 or .*SST-2.*parquet, jsonl"):
        load_glue("sst2", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"wnli.*nyu-mll/glue.*data_dir"):
        load_glue("wnli")
    with pytest.raises(ValueError, match=r"'sst-2'.*sst2"):
        load_glue("sst-2", tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence1": "a", "label": 1}, "lacks the column 'sentence2'"),
        ({"sentence1": "a", "sentence2": "b", "label": "maybe"}, "does not hold the types"),
        ({"sentence1": "a", "sentence2": "b", "label": 7}, "7"),
        ({"sentence1": "a", "sentence2": "b", "label": -1}, "outside 0 to 1"),
        ({"sentence1": "a", "sentence2": None, "label": 1}, "rows without 'sentence2'"),
    ],
)
def test_bad_rows_are_refused_with_the_file(row, message, tmp_path):
    (tmp_path / "mrpc").mkdir()
    write_jsonl(None, tmp_path / "mrpc", "train", [row, row])
    with pytest.raises(ValueError, match=message) as error:
        load_glue("mrpc", tmp_path)
    assert str(tmp_path / "mrpc" / "train.jsonl") in str(error.value)


def test_a_wrong_raw_header_is_refused(tmp_path):
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "dev.tsv").write_text("index\tpremise\thypothesis\tlabel\n0\ta\tb\tentailment\n")
    with pytest.raises(ValueError, match=r"dev.tsv lacks the column 'sentence1'.*premise"):
        load_glue("rte", tmp_path)


def test_the_digest_of_rows_tells_contents_and_nothing_else():
    task = GLUE_TASKS["rte"]
    rows = Dataset.from_list(make_rows(task) * 300)
    digest = content_digest("rte", DatasetDict({"train": rows}))
    pieces = concatenate_datasets([rows.select(range(7)), rows.select(range(7, len(rows)))])
    renumbered = pieces.map(lambda row, i: {"idx": i}, with_indices=True)
    assert content_digest("rte", DatasetDict({"train": renumbered})) == digest
    others = [
        {"validation": rows},
        {"train": rows, "validation": rows},
        {"train": rows.select(range(1, len(rows)))},
        {"train": rows.select([1, 0, *range(2, len(rows))])},
        {"train": rows.map(lambda row: {"label": 1 - row["label"]})},
        {"train": rows.rename_columns({"sentence1": "sentence2", "sentence2": "sentence1"})},
    ]
    digests = {content_digest("rte", DatasetDict(other)) for other in others}
    assert len(digests | {digest}) == len(others) + 1


def test_every_task_has_a_metric():
    assert set(GLUE_TASKS) <= set(METRIC_KEYS)


@pytest.mark.data
@pytest.mark.skipif(not (DATA / "glue").is_dir(), reason=f"no real GLUE data in {DATA / 'glue'}")
def test_real_data_have_the_known_sizes():
    sizes = {
        "cola": {"train": 8551, "validation": 1043},
        "sst2": {"train": 67349, "validation": 872},
        "mrpc": {"train": 3668, "validation": 408},
        "stsb": {"train": 5749, "validation": 1500},
        "qqp": {"train": 32263, "validation": 10000},
        "mnli": {"validation_matched": 9815},
        "qnli": {"validation": 5463},
        "rte": {"train": 2490, "validation": 277},
        "wnli": {"train": 635, "validation": 71},
    }
    loaded = {task: load_glue(task, DATA / "glue") for task in sizes}
    assert {task: {name: len(rows) for name, rows in splits.items()} for task, splits in loaded.items()} == sizes
    counts = {"cola": [322, 721], "sst2": [428, 444], "mrpc": [129, 279], "rte": [146, 131], "wnli": [40, 31]}
    for task, expected in counts.items():
        labels = loaded[task]["validation"]["label"][:]
        assert [labels.count(0), labels.count(1)] == expected


class TestHostileFiles:
    """Local files that are damaged, in another encoding, or hold more than was asked for."""

    ROWS = ({"sentence": "fine", "label": 1}, {"sentence": "Grüße", "label": 0})

    def load(self, folder, name, content):
        (folder / "sst2").mkdir(exist_ok=True)
        (folder / "sst2" / name).write_bytes(content)
        return load_glue("sst2", folder)["train"].to_list()

    def lines(self, *extra):
        return "".join(json.dumps({**row, **more}) + "\n" for row, more in zip(self.ROWS, extra, strict=True)).encode()

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
    def test_marked_encodings_and_other_columns(self, tmp_path, encoding):
        expected = [{**row, "idx": i} for i, row in enumerate(self.ROWS)]
        content = self.lines({"meta": 1}, {"meta": {"a": "b"}}).decode().encode(encoding)
        assert self.load(tmp_path, "train.jsonl", content) == expected
        (tmp_path / "sst2" / "train.jsonl").unlink()
        table = "sentence\tlabel\r\nfine\t1\r\nGrüße\t0\r\n".encode(encoding)
        assert self.load(tmp_path, "train.tsv", table) == expected

    def test_shards_with_other_columns(self, tmp_path):
        (tmp_path / "sst2").mkdir()
        for number, extra in enumerate(({"meta": 1, "idx": 5}, {"meta": "x"})):
            rows = Dataset.from_list([{**self.ROWS[number], **extra}])
            rows.to_parquet(tmp_path / "sst2" / f"train-0000{number}-of-00002.parquet")
        assert load_glue("sst2", tmp_path)["train"].to_list() == [{**row, "idx": i} for i, row in enumerate(self.ROWS)]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("train.parquet", b"PAR1 cut off", "is damaged"),
            ("train.parquet", b"", "is damaged"),
            ("train.jsonl", b'{"sentence": "a", "label": 1}\n{"sentence', "line 2 is not JSON"),
            ("train.jsonl", b'{"sentence": "a\xfc", "label": 1}\n', "not text in UTF-8: line 1"),
            ("train.jsonl", b'{"sentence": ["a"], "label": 1}\n', "does not hold the types of sst2"),
            ("train.jsonl", b'{"sentence": "a", "label": "good"}\n', "does not hold the types of sst2"),
            ("train.jsonl", b'{"sentence": null, "label": 1}\n', "has rows without 'sentence'"),
            ("train.jsonl", b'{"text": "a", "label": 1}\n', "of sst2; it has 'text', 'label'"),
            ("train.jsonl", b"", "lacks the column 'sentence'"),
            ("train.tsv", "sentence\tlabel\nGrüße\t1\n".encode("latin-1"), "not text in UTF-8: line 2"),
            ("train.tsv", b"\x89PNG\r\n\x1a\n", "is an image"),
            ("train.tsv", b"", "lacks the column 'sentence'"),
        ],
    )
    def test_errors_name_the_file(self, tmp_path, name, content, message):
        with pytest.raises(ValueError, match=rf"{name}.*{message}"):
            self.load(tmp_path, name, content)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "texts", "label"),
    [
        ("cola", ("Who does John visit Sally because he likes?",), "unacceptable"),
        ("sst2", ("it 's a charming and often affecting journey . ",), "positive"),
        ("mnli", ("The new rights are nice enough", "Everyone really likes the newest benefits "), "neutral"),
        (
            "wnli",
            ("The drain is clogged with hair. It has to be cleaned.", "The hair has to be cleaned."),
            "not_entailment",
        ),
    ],
)
def test_labels_of_real_rows_mean_what_people_would_say(data_dir, name, texts, label):
    task = GLUE_TASKS[name]
    rows = load_glue(name, data_dir / "glue")[task.validation_splits[0]]
    (row,) = [row for row in rows.to_list() if tuple(row[column] for column in task.text_columns) == texts]
    assert task.label_names[row["label"]] == label
