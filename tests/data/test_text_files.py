"""Local files as users have them: compressed in any way, damaged, of other encodings, of no text at all."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
from safetensors.numpy import save as save_safetensors

from hf_efficient.data import byte_tokenizer, corpus
from hf_efficient.data.corpus import load_corpus
from hf_efficient.data.text_files import find_files, plain_stem
from hf_efficient.data.token_stream import load_documents


TEXT = "Él ate an apple — 漢字.\nThe cat ate the rest.\n"
ROWS = "".join(json.dumps({"text": f"{TEXT}{i}", "more": [i]}) + "\n" for i in range(3))


def arrow(codec):
    def compress(data):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, codec) as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()

    return compress


def zipped(data, **names):
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (names or {"inner": data}).items():
            archive.writestr(name, content)
    return sink.getvalue()


COMPRESSIONS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": arrow("zstd"),
    "lz4": arrow("lz4"),
    "zip": zipped,
}


def lzma_alone(data):
    return lzma.compress(data, lzma.FORMAT_ALONE)


def texts(path, **options):
    return load_corpus(str(path), **options)["text"][:]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", ["a.txt.{}", "A.TXT.{}", "without-suffix", "misnamed.txt"])
def test_compressed_text_is_told_by_its_first_bytes(tmp_path, name, compression):
    path = tmp_path / name.format(compression.upper())
    path.write_bytes(COMPRESSIONS[compression](TEXT.encode()))
    assert texts(path) == [TEXT]
    assert load_documents(str(path)) == [TEXT.encode()]
    assert load_documents(str(path), "char") == [TEXT]


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz", "zst", "lz4"])
def test_compressed_tables(tmp_path, compression):
    path = tmp_path / f"rows.jsonl.{compression}"
    path.write_bytes(COMPRESSIONS[compression](ROWS.encode()))
    assert texts(path) == [f"{TEXT}{i}" for i in range(3)]
    assert list(load_documents(str(path))["text"]) == texts(path)


def test_lzma_of_before_xz_is_told_by_its_suffix(tmp_path):
    for name, content in {"a.txt.lzma": TEXT, "rows.jsonl.LZMA": ROWS}.items():
        (tmp_path / name).write_bytes(lzma_alone(content.encode()))
    assert texts(tmp_path / "a.txt.lzma") == load_documents(str(tmp_path / "a.txt.lzma"), "char") == [TEXT]
    assert texts(tmp_path / "rows.jsonl.LZMA") == [f"{TEXT}{i}" for i in range(3)]
    (tmp_path / "xz.lzma").write_bytes(lzma.compress(TEXT.encode()))
    assert texts(tmp_path / "xz.lzma") == [TEXT]
    (tmp_path / "a.txt.br").write_bytes(b"\x8b\x01\x80text\x03")
    with pytest.raises(ValueError, match=r"a\.txt\.br is compressed by Brotli, by its name: unpack it first"):
        texts(tmp_path / "a.txt.br")


@pytest.mark.parametrize("level", ["byte", "char"])
@pytest.mark.parametrize("compression", [*COMPRESSIONS, "lzma"])
def test_damaged_files_are_named(tmp_path, compression, level):
    path = tmp_path / f"a.txt.{compression}"
    whole = {**COMPRESSIONS, "lzma": lzma_alone}[compression](os.urandom(5000).hex().encode())
    for content in (whole[: len(whole) // 2], whole[:-6], whole[:9], b"plain text", b""):
        path.write_bytes(content)
        for read in (load_corpus, lambda source: load_documents(source, level)):
            with pytest.raises(
                ValueError, match=rf"^\S*a\.txt\.{compression}\S* (is damaged|can't|does not begin).*(?i:fetch it anew)"
            ):
                read(str(path))


def test_zip_archives_of_several_texts(tmp_path):
    path = tmp_path / "texts.zip"
    path.write_bytes(zipped(None, **{"b/two.txt": "two", "__MACOSX/._two.txt": b"\0", "a.txt": "one", ".x": "no"}))
    assert texts(path) == ["two", "one"]
    assert load_documents(str(path)) == [b"two", b"one"]
    assert texts(tmp_path) == ["two", "one"]
    path.write_bytes(zipped(None, **{"a.txt": "one", "b.png": b"\x89PNG\r\n\x1a\n"}))
    with pytest.raises(ValueError, match=r"texts\.zip/b\.png is an image, not text"):
        texts(path)
    path.write_bytes(zipped(None, **{"[Content_Types].xml": "<x/>", "word/document.xml": "<w/>"}))
    with pytest.raises(ValueError, match=r"texts\.zip is a document of an office program"):
        texts(path)


def tar(data):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        entry = tarfile.TarInfo("a.txt")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return sink.getvalue()


NO_TEXT = {
    "tar": (tar(b"text"), "a tar archive"),
    "tar.gz": (gzip.compress(tar(b"text")), "a tar archive"),
    "zip.gz": (gzip.compress(zipped(b"text")), "a zip archive inside another"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(20), "a 7z archive"),
    "png": (b"\x89PNG\r\n\x1a\n\0\0", "an image"),
    "jpg": (b"\xff\xd8\xff\xe0\0\x10JFIF", "an image"),
    "pdf": (b"%PDF-1.7\n%", "a PDF"),
    "pkl": (pickle.dumps({"text": "a"}), "a pickle"),
    "safetensors": (save_safetensors({}), "a file of safetensors"),
    "bin": (b"some text\0and more", r"zero bytes \(the first at 9\)"),
    "late": (b"text" * 500_000 + b"\0", r"zero bytes \(the first at 2,000,000\)"),
    "utf16": ("text".encode("utf-16-le"), "zero bytes"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "the pointer of a file in Git LFS"),
}


@pytest.mark.parametrize("kind", NO_TEXT)
@pytest.mark.parametrize("suffix", ["", ".txt", ".jsonl"])
def test_what_is_no_text_is_refused_by_name(tmp_path, kind, suffix):
    content, message = NO_TEXT[kind]
    path = tmp_path / f"file.{kind}{suffix}"
    path.write_bytes(content)
    for read in (load_corpus, load_documents):
        with pytest.raises(ValueError, match=rf"file\.{kind}{suffix} .*{message}"):
            read(str(path))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
    (tmp_path / "a.jsonl").write_bytes(ROWS.encode(encoding))
    (tmp_path / "a.csv").write_bytes(b"".join((f'text,n\n"{TEXT}",1\n'.encode(encoding),)))
    assert texts(tmp_path / "a.txt") == [TEXT]
    assert load_documents(str(tmp_path / "a.txt")) == [TEXT.encode()]
    assert texts(tmp_path / "a.jsonl") == [f"{TEXT}{i}" for i in range(3)]
    assert texts(tmp_path / "a.csv") == [TEXT]


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv", "tsv"])
def test_other_encodings_are_refused_with_their_place(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    lines = {"txt": "plain\nGrüße\n", "csv": "text\nplain\nGrüße\n", "tsv": "text\nplain\nGrüße\n"}
    path.write_bytes(lines.get(suffix, '{"text": "plain"}\n{"text": "Grüße"}\n').encode("latin-1"))
    for options in ({}, {"txt_documents": "line"}):
        with pytest.raises(ValueError, match=rf"a\.{suffix} is not text in UTF-8: line [23] has the byte 0xfc.*iconv"):
            texts(path, **options)
    if suffix == "txt":
        assert load_documents(str(path)) == ["plain\nGrüße\n".encode("latin-1")]
        with pytest.raises(ValueError, match=r"a\.txt is not text in UTF-8.*--level byte"):
            load_documents(str(path), "word")


def test_line_breaks_of_windows(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n\r\nthree\r\n")
    assert texts(tmp_path / "a.txt") == ["one\ntwo\n\nthree\n"]
    assert texts(tmp_path / "a.txt", txt_documents="blank_line") == ["one\ntwo", "three\n"]
    assert texts(tmp_path / "a.txt", txt_documents="line") == ["one", "two", "three"]
    assert load_documents(str(tmp_path / "a.txt"), "char") == ["one\ntwo\n\nthree\n"]
    assert load_documents(str(tmp_path / "a.txt")) == [b"one\r\ntwo\r\n\r\nthree\r\n"]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    assert texts(tmp_path / "a.jsonl") == ["one", "two"]


@pytest.mark.parametrize("separator", ["line", "blank_line"])
def test_parts_do_not_depend_on_where_reading_stops(tmp_path, monkeypatch, separator):
    (tmp_path / "a.txt").write_bytes(b"ab\n\n\ncd\r\n\r\nef\rgh\n")
    expected = {"line": ["ab", "cd", "ef", "gh"], "blank_line": ["ab", "\ncd", "ef\ngh\n"]}[separator]
    for chunk in (1, 2, 3, 100):
        monkeypatch.setattr("hf_efficient.data.document_readers._CHUNK", chunk)
        monkeypatch.setattr(corpus, "_READING_VERSION", chunk)
        assert texts(tmp_path / "a.txt", txt_documents=separator) == expected


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_columns_that_nobody_asked_for(tmp_path, kind):
    tables = [
        {"body": ["one", "two"], "meta": [1, 2]},
        {"meta": [{"a": 1.5}, {"b": "x"}], "body": ["three", None], "more": [None, "y"]},
    ]
    for number, table in enumerate(tables):
        rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
        path = tmp_path / f"{number}.{kind}"
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.table(table), path)
        elif kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif kind == "json":
            path.write_text(json.dumps(rows, indent=1 if number else None))
        else:
            tab = "\t" if kind == "tsv" else ","
            lines = [
                tab.join(rows[0]),
                *(tab.join(str(v or "").replace(",", ";") for v in row.values()) for row in rows),
            ]
            path.write_text("\n".join(lines))
    assert texts(tmp_path, text_column="body") == ["one", "two", "three"]
    with pytest.raises(ValueError, match=r"0\.\w+ has no column 'txt'; it has 'body', 'meta'\. .*--text_column"):
        texts(tmp_path, text_column="txt")


def test_types_of_text_columns_in_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    for kind in (pyarrow.large_string(), pyarrow.string_view(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())):
        strings = pyarrow.array(["one", None, "two"])
        column = strings.dictionary_encode() if pyarrow.types.is_dictionary(kind) else strings.cast(kind)
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
        assert texts(path) == ["one", "two"]
    path.rename(tmp_path / "no-suffix")
    assert texts(tmp_path / "no-suffix") == ["one", "two"]
    for values, name in (([1, 2], "int64"), ([["a"]], r"list<.*>"), ([b"a"], "binary")):
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)
        with pytest.raises(ValueError, match=rf"a\.parquet: the column 'text' holds {name}, not text"):
            texts(path)
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.nulls(2)}), path)
    with pytest.raises(ValueError, match="holds no text"):
        texts(path)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one two"] * 100}), path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"a\.parquet is damaged or cut off"):
        texts(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', r"a\.jsonl, line 2 is not JSON"),
        ('{"text": "a"}\n{"text": 3}\n', r"a\.jsonl, line 2: the column 'text' holds int, not text"),
        ('{"text": ["a"]}\n', r"a\.jsonl, line 1: the column 'text' holds list, not text"),
        ('{"text": null}\n', "holds no text"),
        ("3\n", r"a\.jsonl, line 1 is no object of JSON"),
        ('[{"text": "a"},\n{"text": 1.5}]', r"a\.jsonl, row 2: the column 'text' holds float"),
        ('[{"text": "a"},\n{"text": 1', r"a\.jsonl is not JSON: Expecting"),
        ("", "holds no text"),
        ("[" * 100_000, r"a\.jsonl is not JSON: maximum recursion"),
    ],
    ids=["broken-line", "number", "list", "null", "no-object", "list-of-rows", "broken-list", "empty", "deep"],
)
def test_lines_of_json(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        texts(tmp_path / "a.jsonl")


def test_json_that_python_writes(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "a\\ud83d\\ude00b\\ud800c"}\n\n"a plain string"\n{"other": 1}\n')
    assert texts(tmp_path / "a.jsonl") == ["a😀b\ufffdc", "a plain string"]
    (tmp_path / "b.json").write_text(json.dumps({"text": "one", "n": 1}, indent=2))
    assert texts(tmp_path / "b.json") == ["one"]


def test_broken_tables(tmp_path):
    (tmp_path / "a.csv").write_text('text,n\n"one, ""two""\nthree",1\nfour,2\nfive\n')
    assert texts(tmp_path / "a.csv") == ['one, "two"\nthree', "four", "five"]
    (tmp_path / "a.csv").write_text('text,n\none,1\n"two,2\nthree,3\n')
    with pytest.raises(ValueError, match=r"a\.csv is not a table: unexpected end of data, after line 2"):
        texts(tmp_path / "a.csv")


def test_names_of_files(tmp_path, monkeypatch):
    for name in ("a [1].txt", "b*?.txt", "c ü.txt", "~.txt"):
        (tmp_path / name).write_text(name)
        assert texts(tmp_path / name) == [name]
        assert load_documents(str(tmp_path / name)) == [name.encode()]
    assert texts(tmp_path / "[bc]*.txt") == ["b*?.txt", "c ü.txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("~/c ü.txt") == ["c ü.txt"]
    assert load_documents("~/c*.txt") == ["c ü.txt".encode()]
    assert len(texts("~")) == 4


@pytest.mark.parametrize(
    ("path", "stem"),
    [
        ("a/new.v1.csv", "new.v1"),
        ("new.v2.jsonl.gz", "new.v2"),
        ("NEW.TSV.ZST", "NEW"),
        ("b/new.2024", "new.2024"),
        ("folder.csv/", "folder"),
        ("validation", "validation"),
    ],
)
def test_stems_keep_their_other_dots(path, stem):
    assert plain_stem(path) == stem


def test_folders(tmp_path, caplog):
    folder = tmp_path / ".cache" / "texts [1]"
    for name in (
        "b/2.txt",
        "a.TXT",
        ".hidden.txt",
        "._a.txt",
        ".ipynb_checkpoints/a.txt",
        "b/.DS_Store",
        "folder.txt/3.txt",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "empty.txt").touch()
    (tmp_path / "elsewhere.txt").write_text("linked")
    (folder / "link.txt").symlink_to(tmp_path / "elsewhere.txt")
    (folder / "loop").symlink_to(folder)
    expected = ["a.TXT", "b/2.txt", "folder.txt/3.txt", "linked"]
    assert texts(folder) == expected
    assert load_corpus([str(folder), str(tmp_path / "elsewhere.txt")])["text"][:] == [*expected, "linked"]
    (folder / "readme.md").write_text("# no text")
    assert texts(folder) == expected
    assert "are left out (1, as readme.md)" in caplog.text
    (folder / "broken.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match=r"broken\.txt"):
        texts(folder)
    (tmp_path / "nothing").mkdir()
    for source in (
        tmp_path / "nothing",
        tmp_path / "missing.TXT.GZ",
        "./missing",
        "/missing",
        "a/b/c",
        tmp_path / "*.x",
    ):
        for read in (load_corpus, load_documents):
            with pytest.raises(FileNotFoundError, match="No text files match"):
                read(str(source))
    (folder / "broken.txt").unlink()
    (folder / "rows.jsonl").write_text(ROWS)
    with pytest.raises(ValueError, match=r"must be of one kind; got text .* and json \(.*rows\.jsonl\)"):
        texts(folder)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    file = find_files(str(tmp_path / "a.txt"))[0]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"a\.txt can't be opened"):
        file.open()


def test_read_corpora_are_kept_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text(ROWS + "{")
    cache = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    with pytest.raises(ValueError, match="line 4"):
        texts(path)
    assert not list(cache.rglob("*.*"))
    path.write_text(ROWS)
    monkeypatch.setattr(corpus, "_BATCH", 2)
    first = texts(path)
    (kept,) = cache.rglob("*.arrow")
    monkeypatch.setattr(corpus, "_write_documents", None)
    assert texts(path) == first
    whole = kept.read_bytes()
    for end in (8, len(whole) // 2, len(whole)):
        kept.write_bytes(whole[:-end])
        with pytest.raises(ValueError, match=rf"{kept.name} of the cache is cut off: remove it"):
            texts(path)
    monkeypatch.undo()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    kept.unlink()
    path.write_text(ROWS + json.dumps({"text": "new"}))
    assert texts(path) == [*first, "new"]


def test_the_bytes_of_a_damaged_file_make_no_tokenizer(tmp_path):
    path = tmp_path / "cut.gz"
    path.write_bytes(gzip.compress(os.urandom(900).hex().encode())[:-20])
    with pytest.raises(ValueError, match=r"cut\.gz is damaged"):
        byte_tokenizer.main(["--text", str(path), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.data
def test_real_files(data_dir, tmp_path):
    """A compressed text under another name, and tables of other columns side by side."""
    source = data_dir / "lm" / "ptb" / "ptb.valid.txt.xz"
    whole = lzma.decompress(source.read_bytes())
    (tmp_path / "PTB").symlink_to(source)
    assert load_documents(str(tmp_path / "PTB")) == [whole]
    assert texts(tmp_path / "PTB") == [whole.decode()]
    aeslc = sorted((data_dir / "summarization").glob("aeslc-*valid*.parquet"))[0]
    mixed = load_corpus(
        [str(aeslc), str(sorted((data_dir / "summarization").glob("qmsum-*valid*"))[0])], text_column="document"
    )
    assert len(mixed) > 2000
