"""
Local files of text: found by path, folder or pattern, and decompressed.

How a file is compressed is told by its first bytes, whatever its name (but for .lzma, which has no mark of its own). A
file that holds no text (an image, a pickle, an archive that can't be read here), or is damaged, is refused by its name.
"""

import bz2
import functools
import glob
import gzip
import io
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from transformers.utils import logging


logger = logging.get_logger(__name__)

KINDS = {
    **dict.fromkeys((".txt", ".text"), "text"),
    ".parquet": "parquet",
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
}
_CHUNK = 1 << 20


def _arrow_codec(codec: str) -> Callable[[Any], Any]:
    def opened(file: Any) -> Any:
        from pyarrow import CompressedInputStream

        return CompressedInputStream(file, codec)

    return opened


# By their first bytes; the second of bzip2 is an empty file.
_COMPRESSIONS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    **{b"BZh%d%s" % (level, block): bz2.BZ2File for level in range(1, 10) for block in (b"1AY&SY", b"\x17rE8P\x90")},
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": _arrow_codec("zstd"),
    b"\x04\x22\x4d\x18": _arrow_codec("lz4"),
}
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_PARQUET = b"PAR1"
_UNPACK, _LEAVE_OUT = "unpack it first", "leave it out"
_REFUSED = {
    **dict.fromkeys(_ZIP, ("a zip archive inside another", _UNPACK)),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", _UNPACK),
    b"Rar!\x1a": ("a rar archive", _UNPACK),
    b"\x1f\x9d": ("compressed by compress", _UNPACK),
    b"version https://git-lfs.github.com/": ("the pointer of a file in Git LFS", "fetch the file by git lfs pull"),
    b"%PDF-": ("a PDF", "convert it to text"),
    b"\x89PNG": ("an image", _LEAVE_OUT),
    b"\xff\xd8\xff": ("an image", _LEAVE_OUT),
    b"GIF87a": ("an image", _LEAVE_OUT),
    b"GIF89a": ("an image", _LEAVE_OUT),
    b"SQLite format 3": ("a database", "write its texts to a jsonl file"),
    b"ARROW1": ("an Arrow file", "write it to a parquet file"),
    b"\x93NUMPY": ("an array of NumPy", _LEAVE_OUT),
    **{bytes((0x80, protocol)): ("a pickle", _LEAVE_OUT) for protocol in range(2, 6)},
}
_LZMA = ".lzma"  # of before xz
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", _LZMA}
_ARCHIVES = {*_COMPRESSED, ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".z", ".zstd", ".br"}
# The longer first: that of UTF-16 begins that of UTF-32.
_BYTE_ORDER_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_DAMAGES = (EOFError, OSError, RuntimeError, ValueError, lzma.LZMAError, zlib.error, zipfile.BadZipFile)


class CorpusError(ValueError):
    """A corpus, or a file of one, that can't be read as text; the message names it."""


class _NamedStream(io.RawIOBase):
    """A stream of bytes whose errors name the file; text is checked for what no text holds."""

    def __init__(self, stream: Any, name: str, is_text: bool = False, place: int = 0):
        self.stream, self.name, self.is_text, self.place = stream, name, is_text, place

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.stream.read(len(buffer))
        except CorpusError:
            raise
        except _DAMAGES as error:
            raise CorpusError(f"{self.name} is damaged, cut off or locked ({error}). Fetch it anew.") from error
        if self.is_text and b"\0" in data:
            raise CorpusError(
                f"{self.name} holds zero bytes (the first at {self.place + data.index(0):,}), so it is no text in "
                "UTF-8. Leave it out, or convert it, if it is text in UTF-16 without a mark."
            )
        self.place += len(data)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.stream.close()
        super().close()


@dataclass(frozen=True)
class TextFile:
    """
    A local file, or a member of a zip archive.

    Args:
        path (`str`): the file.
        member (`str`, *optional*): the member.
    """

    path: str
    member: str | None = None

    @property
    def name(self) -> str:
        return self.path if self.member is None else f"{self.path}/{self.member}"

    @property
    def suffix(self) -> str:
        """The suffix that tells the kind, in lower case, before that of a compression."""
        return _suffix(self.member or self.path)

    @property
    def _name_suffix(self) -> str:
        return PurePath(self.member or self.path).suffix.lower()

    @property
    def kind(self) -> str:
        """`"text"`, `"json"`, `"csv"` or `"parquet"`: by its first bytes, then its name; text if it says nothing."""
        with self.open() as stream:
            if stream.peek(4).startswith(_PARQUET):
                return "parquet"
        return KINDS.get(self.suffix, "text")

    def open(self) -> io.BufferedReader:
        """
        Open the decompressed content.

        Raises:
            CorpusError: for what is known to be no text, or a compressed file that is damaged, here or when it is read.
        """
        try:
            source: Any = io.FileIO(self.path) if self.member is None else _archive(self.path).open(self.member)
        except (*_DAMAGES, NotImplementedError) as error:
            raise CorpusError(f"{self.name} can't be opened ({error}). Fetch it anew, or unpack it first.") from error
        stream = self._buffered(source)
        is_compressed = False
        while opener := _opener(_head(stream), None if is_compressed else self._name_suffix):
            stream, is_compressed = self._buffered(opener(stream)), True
        self._refuse(_head(stream), is_compressed)
        return stream

    def _buffered(self, source: Any, is_text: bool = False, place: int = 0) -> io.BufferedReader:
        return io.BufferedReader(_NamedStream(source, self.name, is_text, place), _CHUNK)

    def _refuse(self, head: bytes, is_compressed: bool) -> None:
        found = next((_REFUSED[mark] for mark in _REFUSED if head.startswith(mark)), None)
        if head[257:262] == b"ustar":
            found = ("a tar archive", _UNPACK)
        elif head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30:
            found = ("a file of safetensors", _LEAVE_OUT)
        if found is not None:
            raise CorpusError(f"{self.name} is {found[0]}, not text: {found[1]}.")
        suffix = self._name_suffix
        if suffix == ".br" and not is_compressed:
            raise CorpusError(
                f"{self.name} is compressed by Brotli, by its name: unpack it first, or rename it if it is plain text."
            )
        if suffix in _ARCHIVES and not is_compressed:
            raise CorpusError(
                f"{self.name} does not begin as a {suffix} file does: fetch it anew, or rename it if it is plain text."
            )

    @property
    def is_plain(self) -> bool:
        """True for a file that is read as it lies on the disk, neither compressed nor in an archive."""
        if self.member is not None:
            return False
        with open(self.path, "rb") as file:
            return _opener(file.read(16), self._name_suffix) is None

    def open_text(self, start: int = 0) -> io.BufferedReader:
        """
        Open the text as bytes in UTF-8, without a byte order mark. What is not in UTF-8 stays as it is, unless a mark
        says that it is in UTF-16 or UTF-32.

        Args:
            start (`int`, *optional*, defaults to 0): bytes of the text to leave out at its beginning. Only what is
                compressed has to be read up to there.

        Raises:
            CorpusError: as [`~TextFile.open`], and for bytes that no text holds.
        """
        stream = self.open()
        head = stream.peek(4)
        for mark, encoding in _BYTE_ORDER_MARKS.items():
            if head.startswith(mark):
                try:
                    content = stream.read().decode(encoding)
                except UnicodeDecodeError as error:
                    raise CorpusError(
                        f"{self.name} begins as text in {encoding.upper()} and is not: {error}"
                    ) from error
                return self._buffered(io.BytesIO(content.encode()[start:]), is_text=True, place=start)
        self._skip(stream, start + 3 * head.startswith(b"\xef\xbb\xbf"))
        return self._buffered(stream, is_text=True, place=start)

    def _skip(self, stream: io.BufferedReader, count: int) -> None:
        if count > _CHUNK and self.is_plain:
            stream.read(len(stream.peek()))  # what was read ahead
            stream.raw.stream.seek(count)  # type: ignore[attr-defined]
            return
        while count and (part := stream.read(min(count, _CHUNK))):
            count -= len(part)

    def refuse_encoding(self) -> CorpusError:
        """Make the error that says where the file is not text in UTF-8."""
        with self.open_text() as stream:
            for number, line in enumerate(stream, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    return CorpusError(
                        f"{self.name} is not text in UTF-8: line {number} has the byte 0x{line[error.start]:02x}. "
                        "Convert it, as by: iconv -f LATIN1 -t UTF-8"
                    )
        raise AssertionError(f"{self.name} is text in UTF-8.")

    def read_text(self) -> str:
        """Read all of the text, with line breaks as they are."""
        try:
            with self.open_text() as stream:
                return stream.read().decode()
        except UnicodeDecodeError as error:
            raise self.refuse_encoding() from error


@functools.lru_cache(maxsize=1)
def _archive(path: str) -> zipfile.ZipFile:
    """A zip archive, whose list of members may be long."""
    return zipfile.ZipFile(path)


def _head(stream: io.BufferedReader) -> bytes:
    return stream.peek(512)


def _opener(head: bytes, suffix: str | None) -> Callable[[Any], Any] | None:
    """Return the function that opens a file that begins so, decompressed; `None` for one that is not compressed."""
    if suffix == _LZMA and head:
        try:
            lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(head[:13], max_length=0)
        except lzma.LZMAError:
            pass
        else:
            return lzma.LZMAFile
    return next((_COMPRESSIONS[mark] for mark in _COMPRESSIONS if head.startswith(mark)), None)


def _suffix(path: str) -> str:
    name = PurePath(path.lower())
    return PurePath(name.stem).suffix if name.suffix in _COMPRESSED else name.suffix


def plain_stem(path: str) -> str:
    """Name of a file without the suffixes of its kind and its compression: other dots in it stay."""
    name = PurePath(path).name
    if PurePath(name).suffix.lower() in _COMPRESSED:
        name = PurePath(name).stem
    return PurePath(name).stem if PurePath(name).suffix.lower() in KINDS else name


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def _walk(folder: str) -> Iterator[str]:
    """Files of known kinds in a folder, through links too, without what is hidden."""
    seen, others = set(), []
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(name for name in folders if not _is_hidden(name))
        if real in seen:  # a link to a folder above, or to one that was read
            continue
        seen.add(real)
        for name in sorted(name for name in names if not _is_hidden(name)):
            if _suffix(name) in KINDS or name.lower().endswith(".zip"):
                yield os.path.join(parent, name)
            else:
                others.append(name)
    if others:
        logger.warning(
            f"Files of other kinds in the folder {folder} are left out ({len(others)}, as {others[0]}). Name them to "
            "read them as text."
        )


def _looks_local(pattern: str) -> bool:
    known = _suffix(pattern) in KINDS or PurePath(pattern).suffix.lower() in _ARCHIVES
    rooted = pattern.startswith((os.sep, ".", "~")) or pattern.count(os.sep) > 1 or os.path.isabs(pattern)
    return known or rooted or os.path.isdir(pattern) or glob.has_magic(pattern)


def find_files(source: str | Sequence[str]) -> list[TextFile]:
    """
    Find the files that paths, folders and patterns mean. A path that exists is no pattern, whatever its characters; a
    folder means its files of known kinds, but for hidden ones.

    Args:
        source (`str` or `Sequence[str]`): a path, or several; `~` is the home folder.

    Returns:
        `list[TextFile]`: files, and each member of zip archives; empty for one that looks like none of these.

    Raises:
        FileNotFoundError: for a path or pattern that means no file.
        CorpusError: for an archive that can't be read.
    """
    patterns = [source] if isinstance(source, str | os.PathLike) else list(source)
    found: list[TextFile] = []
    for given in patterns:
        pattern = os.path.expanduser(os.fspath(given))
        if os.path.isdir(pattern):
            paths = sorted(_walk(pattern))
        elif os.path.lexists(pattern):
            paths = [pattern]
        else:
            paths = sorted(path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path))
        if not paths and (_looks_local(pattern) or len(patterns) > 1):
            raise FileNotFoundError(f"No text files match {given!r}. Known kinds: {', '.join(KINDS)}.")
        found += [file for path in paths for file in _members(path)]
    return found


def _members(path: str) -> list[TextFile]:
    """The file itself, or the members of a zip archive."""
    try:
        with open(path, "rb") as file:
            if not file.read(4).startswith(_ZIP):
                return [TextFile(path)]
        _archive.cache_clear()  # the file may have changed
        names = [info.filename for info in _archive(path).infolist() if not info.is_dir()]
    except (OSError, zipfile.BadZipFile) as error:
        raise CorpusError(f"{path} is damaged, cut off or locked ({error}). Fetch it anew.") from error
    if {"[Content_Types].xml", "mimetype"} & set(names):
        raise CorpusError(f"{path} is a document of an office program, not text: save it as text first.")
    return [TextFile(path, name) for name in names if not any(_is_hidden(part) for part in PurePath(name).parts)]


def modification(file: TextFile) -> tuple[str, str | None, int, int]:
    """Name, size in bytes and time of change of a file: other content has another."""
    status = Path(file.path).stat()
    return os.path.abspath(file.path), file.member, status.st_size, status.st_mtime_ns


def check_arrow_file(path: str | os.PathLike) -> None:
    """
    Make sure that a file of Arrow's stream format is whole, which its reader does not.

    Raises:
        CorpusError: if its end is missing.
    """
    end = b"\xff\xff\xff\xff\0\0\0\0"
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - len(end)))
        if file.read() != end:
            raise CorpusError(f"{path} of the cache is cut off: remove it, and it is made anew.")
