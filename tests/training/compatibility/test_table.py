"""The page of the matrix: written, read back, and partly renewed."""

from collections import Counter
from pathlib import Path

import pytest

from training.compatibility.table import FAILED, NOT_RUN, REFUSED, YES, Cell, merge, read, render, write


VERSIONS = {"Python": "3.11.1", "torch": "2.13.0"}
CELLS = [
    Cell("peft", "0.21.2", "2026-11-28", "tupe", YES, "LoRA on 4 layers"),
    Cell("peft", "0.21.2", "2026-11-28", "srupp", REFUSED, "it says `no | yes`, by name"),
    Cell("TRL", "-", "2026-11-27", "tupe", NOT_RUN, "trl is not installed"),
    Cell("TRL", "-", "2026-11-27", "srupp", FAILED, "ValueError: two\nlines  of words"),
]


def test_what_is_written_is_read_again():
    cells = read(render(CELLS, VERSIONS))
    assert cells[:3] == CELLS[:3]
    assert cells[3].detail == "ValueError: two lines of words"


def test_the_matrix_has_a_row_for_each_consumer():
    page = render(CELLS, VERSIONS)
    assert "The last run was with Python 3.11.1, torch 2.13.0." in page
    assert "| consumer | version | run on | tupe | srupp |" in page
    assert "| peft | 0.21.2 | 2026-11-28 | yes | refused |" in page
    assert "| TRL | - | 2026-11-27 | not run | fails |" in page


def test_a_consumer_that_lacks_a_family_has_not_run_it():
    page = render([CELLS[0], CELLS[2], CELLS[3]], VERSIONS)
    assert "| peft | 0.21.2 | 2026-11-28 | yes | not run |" in page


def test_new_cells_take_the_place_of_earlier_ones():
    new = Cell("TRL", "1.16.0", "2026-11-29", "tupe", YES, "RewardTrainer")
    order = [(consumer, family) for consumer in ("TRL", "peft") for family in ("tupe", "srupp")]
    assert merge(CELLS, [new], order) == [new, CELLS[3], CELLS[0], CELLS[1]]


def test_the_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    page = tmp_path / "docs" / "page.md"
    write(page, "first")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        write(page, "second")
    assert page.read_text() == "first"


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="A result is one of yes, refused, fails, not run, not 'green'"):
        Cell("peft", "1", "2026-11-28", "tupe", "green", "")
    with pytest.raises(ValueError, match="no cells to go on from"):
        read("# Another page")
    with pytest.raises(ValueError, match="has 6 columns"):
        read(render(CELLS, VERSIONS).replace("| tupe | yes | LoRA on 4 layers |", "| tupe | yes |"))


def test_the_page_of_the_repository():
    cells = read(Path(__file__).parents[3].joinpath("docs", "compatibility.md").read_text())
    assert not [cell for cell in cells if cell.result == FAILED]
    refusals = Counter(cell.family for cell in cells if cell.result == REFUSED)
    assert max(refusals.values()) <= 3
    assert {cell.family for cell in cells} == {"srupp", "scaling_transformer", "terraformer", "tupe"}
