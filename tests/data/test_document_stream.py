"""Documents of a stream are those in memory, go on from any place, and are dealt out to processes."""

import bz2
import csv
import gzip
import json
import lzma
import random
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_efficient.data.corpus import load_corpus, split_documents
from hf_efficient.data.document_readers import cut_place, read_documents
from hf_efficient.data.document_stream import DocumentSettings, DocumentStream, FirstTexts
from hf_efficient.data.text_files import CorpusError, TextFile


def texts(count=37, seed=3):
    """Texts of one paragraph and several lines, with characters of one to four bytes."""
    rng = random.Random(seed)
    words = ["red", "dog", "naïve", "東京", "🐟", "a,b", 'say "no"', "line\nbreak"]
    return [f"{i} " + " ".join(rng.choices(words, k=rng.randint(1, 30))) for i in range(count)]


def write_txt(path, found):
    path.write_text("\n\n".join(found), encoding="utf-8")


def write_windows_txt(path, found):
    path.write_bytes("\n\n".join(found).replace("\n", "\r\n").encode())


def write_marked_txt(path, found):
    path.write_text("\n\n".join(found), encoding="utf-8-sig")


def write_jsonl(path, found):
    path.write_text("\n".join(json.dumps({"n": i, "text": text}) for i, text in enumerate(found)), encoding="utf-8")


def write_json_list(path, found):
    path.write_text(json.dumps([{"text": text} for text in found], indent=1), encoding="utf-8")


def write_json_lists(path, found):
    lines = [json.dumps([{"text": text} for text in found[i : i + 5]]) for i in range(0, len(found), 5)]
    path.write_text("\n".join(lines), encoding="utf-8")


def write_csv(path, found):
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["n", "text"])
        rows.writerows(enumerate(found))


def write_parquet(path, found):
    pq.write_table(pa.table({"text": found}), path, row_group_size=7)


WRITERS = {
    "lines.txt": write_txt,
    "windows.txt": write_windows_txt,
    "marked.txt": write_marked_txt,
    "rows.jsonl": write_jsonl,
    "list.json": write_json_list,
    "lists.jsonl": write_json_lists,
    "table.csv": write_csv,
    "table.parquet": write_parquet,
}
COMPRESSIONS = {"plain": None, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def make(tmp_path, name, compression="plain", found=None):
    path = tmp_path / name
    WRITERS[name](path, texts() if found is None else found)
    if COMPRESSIONS[compression] is None:
        return path
    packed = path.with_name(f"{name}.{compression}")
    packed.write_bytes(COMPRESSIONS[compression](path.read_bytes()))
    path.unlink()
    return packed


def settings(corpus, **options):
    return DocumentSettings(corpus=str(corpus), **{"txt_documents": "blank_line", **options})


def read(stream, count=None):
    found = []
    for document in stream:
        found.append(document.text)
        if len(found) == count:
            break
    return found


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", WRITERS)
def test_documents_are_those_in_memory_and_go_on_from_every_place(tmp_path, name, compression):
    path = make(tmp_path, name, compression)
    expected = load_corpus(str(path), txt_documents="blank_line")["text"][:]
    assert expected == texts()
    for count in (1, 6, 7, 20, 36, 37):
        stream = DocumentStream(settings(path), passes=1)
        first = read(stream, count)
        state = json.loads(json.dumps(stream.state_dict()))
        other = DocumentStream(settings(path), passes=1)
        other.load_state_dict(state)
        assert first + read(other) == expected, count


def test_a_large_file_is_opened_at_its_place_and_not_read_up_to_there(tmp_path, monkeypatch):
    path = tmp_path / "large.txt"
    path.write_text("\n".join(f"line {i} " + "x" * 1000 for i in range(5000)))
    stream = DocumentStream(settings(path, txt_documents="line"), passes=1)
    read(stream, 4900)
    other = DocumentStream(settings(path, txt_documents="line"), passes=1)
    other.load_state_dict(stream.state_dict())
    taken = []
    readinto = TextFile.open_text

    def counting(self, start=0):
        taken.append(start)
        opened = readinto(self, start)
        taken.append(opened.raw.stream.raw.stream.tell())
        return opened

    monkeypatch.setattr(TextFile, "open_text", counting)
    assert read(other, 1)[0].startswith("line 4900 ")
    assert taken[0] > 4_900_000
    assert taken[1] >= taken[0]  # moved there, and not by reading


def test_blank_lines_cut_at_any_place_of_the_chunks(tmp_path, monkeypatch):
    found = ["one\ntwo", "three", "\nfour\n", "five"]
    data = "\n\n".join(found).replace("\n", "\r\n").encode()
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    expected = [text for text in "\n\n".join(found).split("\n\n") if text.strip()]
    for chunk in range(1, len(data) + 2):
        monkeypatch.setattr("hf_efficient.data.document_readers._CHUNK", chunk)
        assert [document.text for document in read_documents(TextFile(str(path)), "text", "blank_line")] == expected


@pytest.mark.parametrize("separator", ["file", "blank_line"])
def test_time_of_a_long_document_is_that_of_its_size(tmp_path, monkeypatch, separator):
    monkeypatch.setattr("hf_efficient.data.document_readers._CHUNK", 1 << 9)
    seconds = []
    for size in (1 << 18, 1 << 22):
        path = tmp_path / f"{size}.txt"
        path.write_bytes(b"no blank line\n" * (size // 14))
        runs = []
        for _ in range(3):
            start = time.process_time()
            (document,) = read_documents(TextFile(str(path)), "text", separator)
            runs.append(time.process_time() - start)
            assert len(document.text) == path.stat().st_size
        seconds.append(min(runs))
    assert seconds[1] < 64 * seconds[0]  # 16 times where it grows linearly, 256 times with the square


@pytest.mark.parametrize("kind", [str, bytes])
def test_long_texts_are_cut_before_white_space_or_between_characters(kind):
    words, unbroken = "abc déf " * 10, "東" * 40
    for text in (words, unbroken):
        data = text if kind is str else text.encode()
        parts, rest = [], data
        while (place := cut_place(rest, 11)) is not None:
            parts.append(rest[:place])
            rest = rest[place:]
        parts.append(rest)
        assert kind().join(parts) == data
        assert len(parts) > 1
        assert all(len(part) <= 22 for part in parts)
        if kind is bytes:
            assert "".join(part.decode() for part in parts) == text
    assert cut_place(words[:22], 11) is None


@pytest.mark.parametrize("name", ["lines.txt", "rows.jsonl", "table.parquet"])
def test_parts_of_long_documents_go_on_from_every_place(tmp_path, name):
    found = [" ".join(f"w{i}" for i in range(count)) for count in (200, 3, 150, 90)]
    path = make(tmp_path, name, found=found)
    whole = [(document.text, document.begins) for document in DocumentStream(settings(path, longest=100), passes=1)]
    assert "".join(text for text, _ in whole) == "".join(found)
    assert sum(begins for _, begins in whole) == len(found)
    assert len(whole) > 10
    for count in range(1, len(whole)):
        stream = DocumentStream(settings(path, longest=100), passes=1)
        read(stream, count)
        other = DocumentStream(settings(path, longest=100), passes=1)
        other.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert [(document.text, document.begins) for document in other] == whole[count:], count


@pytest.mark.parametrize(("files", "processes"), [(1, 2), (1, 3), (3, 2), (4, 2), (3, 3)], ids=lambda value: str(value))
def test_processes_see_disjoint_documents_that_cover_the_corpus(tmp_path, files, processes):
    found = texts(31)
    for number in range(files):
        write_jsonl(tmp_path / f"{number}.jsonl", found[number::files])
    shards = [
        read(DocumentStream(settings(tmp_path / "*.jsonl"), process=process, processes=processes, passes=1))
        for process in range(processes)
    ]
    assert all(shards)
    assert sorted(text for shard in shards for text in shard) == sorted(found)
    if files % processes == 0:
        assert set(shards[0]) == {text for number in range(0, files, processes) for text in found[number::files]}


def test_a_process_goes_on_from_its_place(tmp_path):
    path = make(tmp_path, "lines.txt")
    options = {"process": 1, "processes": 3, "passes": 2}
    expected = read(DocumentStream(settings(path), **options))
    stream = DocumentStream(settings(path), **options)
    first = read(stream, 15)
    other = DocumentStream(settings(path), **options)
    other.load_state_dict(stream.state_dict())
    assert other.epoch == 1
    assert first + read(other) == expected


def test_documents_for_validation_are_those_of_memory(tmp_path):
    path = make(tmp_path, "rows.jsonl", found=texts(200))
    train, validation = split_documents(load_corpus(str(path)), 0.1)
    chosen = settings(path, validation_size=0.1)
    assert read(DocumentStream(chosen, passes=1)) == train["text"][:]
    assert read(DocumentStream(chosen, "validation", passes=1)) == validation["text"][:]


def test_the_corpus_begins_again(tmp_path):
    path = make(tmp_path, "table.csv")
    stream = DocumentStream(settings(path))
    assert read(stream, 80) == (texts() * 3)[:80]
    assert stream.epoch == 2


def test_a_dataset_of_the_hub_streams_and_goes_on(tmp_path, monkeypatch):
    import datasets

    found = texts(40)
    for number in range(4):
        table = pa.table({"body": found[number * 10 : number * 10 + 10], "n": list(range(10))})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=3)
    load, asked = datasets.load_dataset, []

    def local(name, config_name=None, *, split, streaming):
        asked.append((name, config_name, split, streaming))
        return load("parquet", data_files=str(tmp_path / "*.parquet"), split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", local)
    chosen = DocumentSettings(corpus="someone/texts", config_name="en", text_column="body")
    assert read(DocumentStream(chosen, passes=1)) == found
    assert asked[0] == ("someone/texts", "en", "train", True)
    for count in (1, 9, 10, 25):
        stream = DocumentStream(chosen, passes=2)
        first = read(stream, count)
        other = DocumentStream(chosen, passes=2)
        other.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert first + read(other) == found * 2, count
    shards = [read(DocumentStream(chosen, process=process, processes=2, passes=1)) for process in range(2)]
    assert sorted(shards[0] + shards[1]) == sorted(found)
    assert not set(shards[0]) & set(shards[1])
    with pytest.raises(CorpusError, match="has no column 'text'; it has 'body', 'n'"):
        DocumentStream(DocumentSettings(corpus="someone/texts"))


def test_faults_are_named(tmp_path):
    path = make(tmp_path, "lines.txt", found=["one", "two"])
    with pytest.raises(CorpusError, match=r"has 2 documents to train on, fewer than processes \(3\)"):
        read(DocumentStream(settings(path), process=2, processes=3), 1)
    with pytest.raises(CorpusError, match=r"no document to validate on among 0\.00%"):
        read(DocumentStream(settings(path, validation_size=1e-9), "validation", passes=1))
    with pytest.raises(FileNotFoundError, match="No text files match"):
        DocumentStream(settings(tmp_path / "none*.txt"))
    with pytest.raises(ValueError, match="`txt_documents` must be one of"):
        settings(path, txt_documents="page")
    with pytest.raises(ValueError, match="`validation_size` of a stream"):
        settings(path, validation_size=1)
    (tmp_path / "blank.txt").write_text("\n \n\n")
    both = settings(tmp_path / "*.txt")  # in the order of their names
    with pytest.raises(CorpusError, match=r"that process 1 of 2 reads, one in 2 of its files or shards, holds no text"):
        read(DocumentStream(both, process=0, processes=2))
    with pytest.raises(CorpusError, match="holds no text"):
        read(DocumentStream(settings(tmp_path / "blank.txt")), 1)
    damaged = make(tmp_path, "rows.jsonl", "gz")
    damaged.write_bytes(damaged.read_bytes()[:-30])
    with pytest.raises(CorpusError, match=r"rows\.jsonl\.gz is damaged"):
        read(DocumentStream(settings(damaged), passes=1))


def test_the_first_texts_end_after_so_many_characters_and_are_read_anew(tmp_path):
    path = make(tmp_path, "rows.jsonl")
    first = FirstTexts(settings(path), 300)
    found = list(first)
    assert found == texts()[: len(found)]
    assert sum(map(len, found[:-1])) < 300 <= sum(map(len, found))
    assert list(first) == found
    assert FirstTexts.sample(settings(path)) == texts()


def test_the_digest_follows_names_and_sizes(tmp_path):
    path = make(tmp_path, "lines.txt")
    before = DocumentStream(settings(path)).digest
    assert DocumentStream(settings(path)).digest == before
    path.write_text(path.read_text() + " more")
    assert DocumentStream(settings(path)).digest != before


def test_the_builtin_corpus_streams(monkeypatch, tmp_path):
    import datasets

    small = datasets.Dataset.from_dict({"text": texts(12)})
    monkeypatch.setattr("hf_efficient.data.document_stream.load_corpus", lambda source: small)
    assert read(DocumentStream(DocumentSettings(corpus="builtin")), 20) == (texts(12) * 2)[:20]
