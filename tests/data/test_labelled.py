"""Labelled tables: every kind of file, splits of a folder, data sets on the Hub, faults named by file and row."""

import gzip
import json
import os
import shutil

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from hf_efficient.data.labelled import Columns, hub_splits, load_labelled, local_splits, split_list
from hf_efficient.data.text_files import CorpusError


ROWS = [
    {"text": 'he said "no', "label": "bad"},
    {"text": "None", "label": "good"},
    {"text": "naïve café", "label": "good"},
]


def write(path, rows):
    columns = list(rows[0])
    suffix = path.name.removesuffix(".gz").rpartition(".")[2]
    if suffix == "parquet":
        Dataset.from_list(rows).to_parquet(path)
        return path
    if suffix == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    elif suffix == "tsv":
        text = "".join("\t".join(map(str, cells)) + "\n" for cells in [columns, *(row.values() for row in rows)])
    else:
        quoted = [['"{}"'.format(str(cell).replace('"', '""')) for cell in row.values()] for row in rows]
        text = "".join(",".join(cells) + "\n" for cells in [columns, *quoted])
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.csv.gz", "a.tsv.gz"])
def test_every_kind_of_file_gives_the_same_rows(name, tmp_path):
    table = load_labelled(str(write(tmp_path / name, ROWS)), Columns())
    assert table.values == {name: [row[name] for row in ROWS] for name in ("text", "label")}
    assert len(table) == len(set(table.places)) == 3
    assert all(name in place for place in table.places)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet"])
def test_other_columns_are_kept_where_they_are_wanted(name, tmp_path):
    path = write(tmp_path / name, [{"id": f"k{i}", **row, "note": "x"} for i, row in enumerate(ROWS)])
    table = load_labelled(str(path), Columns(), with_others=True)
    assert table.values == {name: [row[name] for row in ROWS] for name in ("text", "label")}
    assert table.others == [{"id": f"k{i}", "note": "x"} for i in range(3)]
    assert table.take([2]).others == [{"id": "k2", "note": "x"}]
    unlabelled = load_labelled(str(path), Columns(), labelled=False, with_others=True)
    assert unlabelled.others[0] == {"id": "k0", "label": "bad", "note": "x"}
    assert load_labelled(str(path), Columns()).others == []


def test_patterns_folders_and_two_texts(tmp_path):
    for number in range(2):
        write(tmp_path / f"part-{number}.jsonl", [{"a": f"x{number}", "b": "y", "stars": number}])
    columns = Columns("a", "b", None, "stars")
    for source in (tmp_path, tmp_path / "part-*.jsonl"):
        table = load_labelled(str(source), columns)
        assert table.values == {"text": ["x0", "x1"], "text_pair": ["y", "y"], "label": [0, 1]}
    assert table.take([1]).inputs == {"text": ["x1"], "text_pair": ["y"]}


def test_a_folder_of_splits_is_not_mixed(tmp_path):
    for number, name in enumerate(("train-0.csv", "train-1.csv", "dev.csv", "test.csv")):
        write(tmp_path / name, [{"text": f"text {number}", "label": number}])
    assert {split: len(files) for split, files in local_splits(str(tmp_path)).items()} == {
        "train": 2,
        "validation": 1,
        "test": 1,
    }
    assert load_labelled(str(tmp_path), Columns()).values["text"] == ["text 0", "text 1"]
    assert load_labelled(str(tmp_path), Columns(), split="validation").values["text"] == ["text 2"]
    (tmp_path / "dev.csv").unlink()
    with pytest.raises(ValueError, match="no files of a split 'validation'; it has those of test, train"):
        load_labelled(str(tmp_path), Columns(), split="validation")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["reviews_train.csv", "reviews_test.csv"], {"train": [0], "test": [1]}),
        (["train/a.csv", "test/a.csv", "val/1/a.csv"], {"train": [0], "test": [1], "validation": [2]}),
        (["Training-0.csv", "my.valid.csv", "evaluation 2.csv"], {"train": [0], "validation": [1], "test": [2]}),
        (["train/a_dev.csv", "train/b.csv"], {"validation": [0], "train": [1]}),
        (["reviews.csv", "reviews_test.csv"], {"train": [0], "test": [1]}),
        (["train.csv", "dev.csv", "more.csv"], {"train": [0], "validation": [1]}),
        (["a_test.csv", "b_test.csv"], {"": [0, 1]}),
        (["latest.csv", "retrain.csv", "evaluate.csv"], {"": [0, 1, 2]}),
    ],
    ids=["ends", "folders", "words", "name-before-folder", "others-train", "left-out", "one-split", "inside-words"],
)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_names_of_files_and_folders_say_the_split(kind, names, expected, tmp_path):
    root = tmp_path / "test"  # whose own name says nothing
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write(root / name, [{"text": f"text {number}", "label": number}])
    if kind == "zip":
        root = shutil.make_archive(str(tmp_path / "test"), "zip", root)
    found = {
        split: sorted(
            names.index((file.member or os.path.relpath(file.path, root)).replace(os.sep, "/")) for file in files
        )
        for split, files in local_splits(str(root)).items()
    }
    assert found == expected


def test_the_files_of_each_split_are_told(tmp_path, caplog):
    for name in ("a_train.csv", "a_dev.csv", "more.csv", "other.csv"):
        write(tmp_path / name, ROWS[:1])
    with caplog.at_level("INFO"):
        local_splits(str(tmp_path), verbose=True)
    assert [record.message.partition(str(tmp_path))[::2] for record in caplog.records] == [
        ("The validation split of ", ": a_dev.csv."),
        ("The train split of ", ": a_train.csv."),
        (
            "Files in ",
            " that belong to no split are left out (2, as more.csv). Name them after one, such as train_2.csv, or give "
            "a pattern of all files.",
        ),
    ]
    assert caplog.records[-1].levelname == "WARNING"


def test_names_that_only_begin_like_a_split_are_all_one(tmp_path):
    for name in ("trains.csv", "testimonials.csv"):
        write(tmp_path / name, ROWS[:1])
    assert list(local_splits(str(tmp_path))) == [""]


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ('["a b", "c"]', ["a b", "c"]),
        ("a b  c", ["a", "b", "c"]),
        (["a"], ["a"]),
        ("[1", ["[1"]),
        (None, None),
        (" ['O', \"it's\", 'B-X'] ", ["O", "it's", "B-X"]),
        ("[1, 2.5, -3]", [1, 2.5, -3]),
        ("[]", []),
    ],
    ids=["json", "words", "list", "bracket", "none", "python", "numbers", "empty"],
)
def test_lists_in_cells(cell, expected):
    assert split_list(cell) == expected


@pytest.mark.parametrize(
    "cell",
    ["['O' 'B-X']", "['O'\n 'B-X']", "[O, B-X]", "['O', 'B-X'", "[['O'], 'B-X']", "[print()]", "[1 2]"],
    ids=["numpy", "numpy-lines", "bare", "cut-off", "nested", "call", "numpy-numbers"],
)
def test_a_list_that_cannot_be_read_is_named(cell, tmp_path):
    with pytest.raises(ValueError, match="where a list is wanted"):
        split_list(cell)
    write(tmp_path / "a.csv", [{"tokens": "a b", "label": "O O"}, {"tokens": cell, "label": "O O"}])
    with pytest.raises(CorpusError, match=r"a.csv, line \d: the column 'tokens' holds .*where a list is wanted"):
        load_labelled(str(tmp_path / "a.csv"), Columns(tokens="tokens"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "review,label\nfine,1\n", r"a.csv has no column 'text'; it has 'review', 'label'. .*--text_column"),
        ("a.csv", "text,stars\nfine,1\n", r"has no column 'label'; it has 'text', 'stars'. .*--label_column"),
        ("a.csv", "text,label\nfine,1\nHello, world,1\n", "a.csv, line 3, has more cells than the 2 of the header"),
        ("a.csv", "text,label\nfine\n", "a.csv, line 2, has fewer cells"),
        ("a.csv", "text,label\nfine,1\n ,1\n,0\n", r"a.csv, line 3: the column 'text' is empty, as in 1 more row"),
        ("a.csv", "text,label\n", "a.csv holds no row"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", '{"text": null, "label": 1}\n', "a.jsonl, line 1: the column 'text' is empty"),
        ("a.jsonl", '{"text": 7, "label": 1}\n', "a.jsonl, line 1: the column 'text' holds int, not text"),
        ("a.parquet", "PAR1 cut off", "a.parquet is damaged"),
        ("a.csv.gz", "no gzip", "a.csv.gz does not begin as a .gz file does"),
        ("a.txt", "only text", "a.txt is text without columns"),
    ],
)
def test_faults_name_file_and_row(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_labelled(str(tmp_path / name), Columns())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": [], "label": []}, "line 1: the column 'tokens' is empty"),
        ({"tokens": ["a", 1], "label": []}, "line 1: the column 'tokens' holds no list of words"),
        ({"tokens": ["a", " "], "label": []}, "line 1: the column 'tokens' holds an empty word"),
    ],
    ids=["none", "number", "blank"],
)
def test_faults_of_tokens(row, message, tmp_path):
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(ValueError, match=message):
        load_labelled(str(path), Columns(tokens="tokens"))


def test_absent_files_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="No text files match"):
        load_labelled(str(tmp_path / "absent.csv"), Columns())
    with pytest.raises(FileNotFoundError, match="no data set of that name"):
        load_labelled("somebody/absent", Columns())
    with pytest.raises(FileNotFoundError, match="no data set of that name"):
        hub_splits("somebody/absent", None)


def test_a_data_set_of_the_hub_gives_its_names(monkeypatch):
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-X"]))})
    rows = Dataset.from_list([{"tokens": ["a", "b"], "ner_tags": [0, 1]}], features=features)

    def load_dataset(name, config, split):
        assert (name, config, split) == ("some/ner", "en", "train[:1]")
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    columns = Columns(tokens="tokens", label="ner_tags")
    table = load_labelled("some/ner", columns, config_name="en", split="train[:1]")
    assert table.values == {"tokens": [["a", "b"]], "label": [[0, 1]]}
    assert table.label_names == ("O", "B-X")
    assert table.places == ["some/ner, train[:1], row 1"]
    assert table.others == []
    with pytest.raises(ValueError, match="'some/ner' has no column 'text'; it has 'tokens', 'ner_tags'"):
        load_labelled("some/ner", Columns(), config_name="en", split="train[:1]")
