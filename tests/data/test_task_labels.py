"""Labels: the task that they speak of, names and numbers, what is held out, and faults named by their row."""

from collections import Counter

import numpy as np
import pytest

from hf_efficient.data.labelled import LabelledTable
from hf_efficient.data.task_labels import (
    CLASSIFICATION,
    MULTI_LABEL,
    REGRESSION,
    TOKEN_CLASSIFICATION,
    balanced_weights,
    find_label_names,
    fold_booleans,
    hold_out,
    infer_task_type,
    label_ids,
    label_table,
    name_numbers,
    read_labels,
)


def table(labels, names=(), **inputs):
    inputs = inputs or {"text": [f"text {i}" for i in range(len(labels))]}
    return LabelledTable(
        "a.csv", {**inputs, "label": labels}, [f"a.csv, line {i + 2}" for i in range(len(labels))], names
    )


@pytest.mark.parametrize(
    ("labels", "separator", "expected"),
    [
        (["good", "bad", "good"], None, CLASSIFICATION),
        (["0", "1", "1"], None, CLASSIFICATION),
        ([1.0, 0.0], None, CLASSIFICATION),
        ([True, False], None, CLASSIFICATION),
        ([str(i % 77) for i in range(770)], None, CLASSIFICATION),
        (list(range(100)), None, REGRESSION),
        (["3.5", "2"], None, REGRESSION),
        ([["a"], [], ["a", "b"]], None, MULTI_LABEL),
        (["a|b", "a"], "|", MULTI_LABEL),
        (['["a"]', '["a", "b"]', ""], None, MULTI_LABEL),
        (["['a']", "b"], None, MULTI_LABEL),
        (["[other]", "a"], None, CLASSIFICATION),
    ],
    ids=[
        *("names", "digits", "floats", "booleans", "77-classes", "numbers", "decimals", "lists", "separated"),
        *("json-in-cells", "python-in-cells", "brackets-in-names"),
    ],
)
def test_the_task_follows_from_the_labels(labels, separator, expected):
    assert infer_task_type(table(labels), separator)[0] == expected


def test_tokens_and_named_classes_say_the_task():
    assert infer_task_type(table([[0]], tokens=[["a"]]))[0] == TOKEN_CLASSIFICATION
    assert infer_task_type(table(list(range(100)), names=tuple(map(str, range(100)))))[0] == CLASSIFICATION


@pytest.mark.parametrize("label", ["['a' 'b']", "['a', 'b'"], ids=["numpy", "cut-off"])
def test_a_list_in_a_cell_that_cannot_be_read_is_named(label):
    with pytest.raises(ValueError, match=r"a.csv, line 3: the label is .*where a list is wanted"):
        infer_task_type(table(['["a"]', label]))
    for kind in (MULTI_LABEL, TOKEN_CLASSIFICATION):
        with pytest.raises(ValueError, match=r"a.csv, line 3: the column 'y' holds .*where a list is wanted"):
            read_labels(table(['["a"]', label], tokens=[["x"], ["x"]]), kind, "y")


def test_texts_are_no_labels():
    with pytest.raises(ValueError, match=r"a.csv: 30 different labels in 30 rows.*--label_column"):
        infer_task_type(table([f"a long text {i}" for i in range(30)]))


@pytest.mark.parametrize(
    ("labels", "kind", "expected"),
    [
        ([" good ", "1.0", 2.0, True, "².0"], CLASSIFICATION, ["good", "1", "2", "true", "².0"]),
        (["a, b", "", ["c"], '["d,e"]', "['f']"], MULTI_LABEL, [["a", "b"], [], ["c"], ["d,e"], ["f"]]),
        (["3.5", 2], REGRESSION, [3.5, 2.0]),
    ],
    ids=["names", "lists", "numbers"],
)
def test_labels_are_brought_into_one_form(labels, kind, expected):
    assert read_labels(table(labels), kind, "label") == expected


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        (["a", "", None], CLASSIFICATION, r"a.csv, line 3: no label in the column 'y', as in 1 more row"),
        (["a", float("nan")], CLASSIFICATION, "a.csv, line 3: no label"),
        (["a", "nan"], CLASSIFICATION, "a.csv, line 3: no label"),
        ([["a"], None], MULTI_LABEL, "a.csv, line 3: no label"),
        ([1.5, "high"], REGRESSION, "a.csv, line 3: the column 'y' holds 'high', where a number is wanted"),
        ([1.5, float("inf")], REGRESSION, "line 3: .*where a number is wanted"),
        (["a", ["b"]], CLASSIFICATION, "line 3: .*where one label is wanted"),
    ],
    ids=["empty", "nan", "nan-text", "none", "word", "infinite", "list"],
)
def test_labels_that_cannot_be_used_are_named(labels, kind, message):
    with pytest.raises(ValueError, match=message):
        read_labels(table(labels), kind, "y")


def test_each_token_needs_a_label():
    given = table([["O"], ["O"]], tokens=[["a"], ["a", "b"]])
    with pytest.raises(ValueError, match=r"a.csv, line 3: 2 tokens and 1 labels"):
        read_labels(given, TOKEN_CLASSIFICATION, "label")


def test_a_name_may_begin_with_a_bracket_where_a_separator_is_given():
    assert read_labels(table(["[x]|y"]), MULTI_LABEL, "label", "|") == [["[x]", "y"]]


def test_names_stand_in_a_lasting_order():
    assert find_label_names(["10", "9", "-1"]) == ("-1", "9", "10")
    assert find_label_names(["3", "²", "+-1"]) == ("+-1", "3", "²")
    assert find_label_names([["I-X", "O"], ["B-X"]]) == ("O", "B-X", "I-X")


def test_names_become_numbers():
    given = table(["b", "a"])
    assert label_ids(given, ["b", "a"], ("a", "b"), CLASSIFICATION) == [1, 0]
    assert label_ids(given, [["b"], []], ("a", "b"), MULTI_LABEL) == [[0.0, 1.0], [0.0, 0.0]]
    assert label_ids(given, [["b", "a"], ["a"]], ("a", "b"), TOKEN_CLASSIFICATION) == [[1, 0], [0]]


def test_numbers_get_the_names_of_their_classes():
    assert name_numbers(["1", "a", "2"], ("a", "b")) == ["b", "a", "2"]
    assert name_numbers([["0", "1"], []], ("1", "2")) == [["1", "1"], []]


def test_booleans_have_one_spelling():
    assert fold_booleans({"train": ["true", "False"], "validation": ["TRUE", "Maybe"]}) == {
        "train": ["true", "false"],
        "validation": ["true", "Maybe"],
    }
    others = {"train": ["True", "Maybe"], "validation": ["true"]}
    assert fold_booleans(others) == others


@pytest.mark.parametrize("label", ["c", "1", "-1"])
def test_a_label_that_training_does_not_know_is_named(label):
    with pytest.raises(ValueError, match=rf"a.csv, line 3: the label '{label}' is none of .*\(a, b\)"):
        label_ids(table(["a", label]), ["a", label], ("a", "b"), CLASSIFICATION)


def test_of_each_class_its_share_is_held_out():
    labels = ["a"] * 50 + ["b"] * 10 + ["c"] * 2 + ["d"]
    given = table(labels)
    train, validation = hold_out(given, labels, 0.1)
    assert sorted([*train, *validation]) == list(range(63))
    assert Counter(labels[row] for row in validation) == {"a": 5, "b": 1}
    # The rows alone decide, not their order
    turned = list(reversed(range(63)))
    again = hold_out(given.take(turned), [labels[row] for row in turned], 0.1)[1]
    assert sorted(turned[row] for row in again) == validation


def test_copies_are_never_on_both_sides():
    texts = ["same"] * 6 + ["other", "third"]
    given = table(list("abababab"), text=texts)
    train, validation = hold_out(given, given.values["label"], 0.4)
    assert not {texts[row] for row in train} & {texts[row] for row in validation}


def test_copies_count_in_the_share():
    texts = ["often"] * 60 + [f"text {i}" for i in range(40)]
    given = table(["a"] * 100, text=texts)
    assert len(hold_out(given, given.values["label"], 0.1)[1]) == 10
    given = table(["a", "b"] * 6, text=[f"text {i // 4}" for i in range(12)])  # no text fits into a tenth
    assert len(hold_out(given, given.values["label"], 0.1)[1]) == 4


def test_many_small_classes_share_what_is_held_out():
    labels = [f"c{i % 30}" for i in range(90)]
    train, validation = hold_out(table(labels), labels, 0.1)
    assert len(validation) == 9
    assert max(Counter(labels[row] for row in validation).values()) == 1
    # And whatever the share, one of each class is trained on
    train, validation = hold_out(table(labels), labels, 0.9)
    assert len(validation) == 60
    assert set(Counter(labels[row] for row in train).values()) == {1}


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_every_label_of_several_stays_in_training(share):
    labels = [["a"], ["a", "rare"], ["a", "b"], ["b"], [], ["a", "b"]] * 2
    train, validation = hold_out(table(labels, text=[f"text {i % 6}" for i in range(12)]), labels, share)
    assert {name for row in train for name in labels[row]} == {"a", "b", "rare"}
    assert validation


def test_every_class_of_a_text_with_two_stays_in_training():
    labels = ["a", "b", "a", "a", "a"]
    train, _ = hold_out(table(labels, text=["same", "same", "x", "y", "z"]), labels, 0.6)
    assert {0, 1} <= set(train)


def test_one_input_cannot_be_held_out():
    with pytest.raises(ValueError, match=r"a.csv: all 40 rows have the same input.*--validation"):
        hold_out(table(["a"] * 40, text=["x"] * 40), ["a"] * 40, 0.1)


def test_one_row_is_too_few_to_hold_out():
    with pytest.raises(ValueError, match=r"a.csv: 1 rows are too few.*--validation"):
        hold_out(table([1.5]), [1.5], 0.1)


def test_imbalance_is_seen():
    assert label_table(
        {"train": ["a"] * 9 + ["bb"], "validation": ["a"]}, ("a", "bb"), CLASSIFICATION
    ).splitlines() == [
        "label  train  share  validation   share",
        "a          9  90.0%           1  100.0%",
        "bb         1  10.0%           0    0.0%",
    ]
    assert label_table({"train": [["a", "b"], ["a"]]}, ("a", "b"), MULTI_LABEL).splitlines()[1:] == [
        "a          2  100.0%",
        "b          1   50.0%",
    ]
    assert label_table({"train": [["O", "X", "O", "O"]]}, ("O", "X"), TOKEN_CLASSIFICATION).splitlines()[2] == (
        "X          1  25.0%"
    )
    assert label_table({"train": [1.0, 2.5]}, (), REGRESSION).splitlines()[1].split() == [
        "train",
        "2",
        "1",
        "1.75",
        "2.5",
    ]


def test_balanced_weights_let_classes_count_alike():
    from sklearn.utils.class_weight import compute_class_weight

    ids = [0] * 6 + [1] * 2 + [2]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=ids)
    assert balanced_weights(ids, 3, CLASSIFICATION) == pytest.approx(list(expected))
    assert balanced_weights([[0] * 6, [1, 1, 2]], 3, TOKEN_CLASSIFICATION) == pytest.approx(list(expected))
    assert balanced_weights([[1.0, 0.0]] * 3 + [[0.0, 1.0]], 2, MULTI_LABEL) == [1 / 3, 3.0]
    with pytest.raises(ValueError, match="--class_weights"):
        balanced_weights([1.0], 1, REGRESSION)
