"""Readers: every format and every kind of bad input."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path

import pytest

from hanmo.data.readers import Document, Reader, read_documents
from hanmo.data.settings import DataSettings
from hanmo.data.sources import find_sources
from hanmo.errors import DataError, HanmoError, UsageError

POEM = "床前明月光，疑是地上霜。"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def read(path: Path, **options: object) -> tuple[list[Document], Reader]:
    reader = Reader(find_sources([path]).sources, DataSettings(**options))  # type: ignore[arg-type]
    return list(reader.documents()), reader


def texts(path: Path, **options: object) -> list[str]:
    return [document.text for document in read(path, **options)[0]]


FORMATS = [
    ("a.txt", "one\r\ntwo", ["one\ntwo"], ""),
    ("a.md", "# title\n", ["# title\n"], ""),
    ("README", "no suffix", ["no suffix"], ""),
    ("a.py", "x = 1\n", ["x = 1\n"], ""),
    ("a.jsonl", '{"id": 1, "text": "one"}\n\n{"id": 2, "text": "二"}\n', ["one", "二"], "text (by its name)"),
    ("a.jsonl", '{"Text": "one"}', ["one"], "Text (by its name)"),
    ("a.jsonl", '{"文本": "一", "标题": "很长的标题"}', ["一"], "文本 (by its name)"),
    ("a.jsonl", '{"k": "x", "verse": "longer"}', ["longer"], "verse (the longest text of the fields k, verse)"),
    ("a.jsonl", '{"paragraphs": ["a", "b"]}\n{"paragraphs": []}', ["a\nb", ""], "paragraphs (by its name)"),
    ("a.jsonl", '"just"\n"strings"\n', ["just", "strings"], "each record is a string"),
    ("a.jsonl", '{"text": null}\n{"text": "x\\ud800"}', ["", "x\ufffd"], "text (by its name)"),
    ("a.json", '[{"text": "one"},\n {"text": "two, [x]"}]', ["one", "two, [x]"], "text (by its name)"),
    ("a.json", '["one", "two"]', ["one", "two"], "each record is a string"),
    ("a.json", '{"text": "one"}\n{"text": "two"}\n', ["one", "two"], "text (by its name)"),
    ("a.csv", "id,text\r\n1,one\r\n2,\"two, 2\"\r\n", ["one", "two, 2"], "column text (by its name)"),
    ("a.csv", '\ufeff,split,TEXT\n1,dev,"a ""q"""\n', ['a "q"'], "column TEXT (by its name)"),
    ("a.csv", 'id,text\n1,"line one\nline two"\n2,x\n', ["line one\nline two", "x"], "column text (by its name)"),
    ("a.csv", "id;text\n1;one, and\n", ["one, and"], "column text (by its name)"),
    ("a.csv", "sent_a,b\nlonger,x\n", ["longer"], "column sent_a (the longest text of the columns sent_a, b)"),
    ("a.tsv", "ham\tGo until point.\nspam\tWin a prize!\n", ["Go until point.", "Win a prize!"],
     "column 2 (the longest text of the columns 1, 2; no header)"),
    ("a.tsv", 'ham\t"Hi" she said\nham\tan "open quote\n', ['"Hi" she said', 'an "open quote'],
     "column 2 (the longest text of the columns 1, 2; no header)"),
    ("a.tsv", '"Hi!" he said.\t“嗨！”\n"No!"\t“不！”\nA "Yes."\t好\n', ['"Hi!" he said.', '"No!"', 'A "Yes."'],
     "column 1 (the longest text of the columns 1, 2; no header)"),
    ("a.tsv", '1\t"Wait!"\n2\tCome here.\n3\t"Go!"\n', ['"Wait!"', "Come here.", '"Go!"'],
     "column 2 (the longest text of the columns 1, 2; no header)"),
    ("a.tsv", 'id\ttext\n1\t"one"\n2\t"an ""inner"" one"\n', ["one", 'an "inner" one'], "column text (by its name)"),
    ("a.tsv", 'id\ttext\n1\t"two\nlines"\n2\t"x"\n', ["two\nlines", "x"], "column text (by its name)"),
]  # fmt: skip


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(("name", "content", "expected", "field"), FORMATS)
def test_formats(tmp_path: Path, name: str, content: str, expected: list[str], field: str, compressed: bool) -> None:
    data = content.encode("utf-8")
    path = write(tmp_path / (name + ".gz" * compressed), gzip.compress(data) if compressed else data)
    documents, reader = read(path)
    assert [document.text for document in documents] == expected
    assert reader.sources[0].field == field


def test_origins(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '\n{"text": "one"}\n\n{"text": "two"}\n')
    write(tmp_path / "b.csv", 'id,text\n1,"a\nb"\n2,c\n')
    write(tmp_path / "c.json", '[\n{"text": "a"},\n\n{"text":\n"b"}, {"text": "c"}]')
    places = [(document.file, document.line) for document in read_documents([tmp_path])]
    assert places == [("a.jsonl", 2), ("a.jsonl", 4), ("b.csv", 2), ("b.csv", 4), ("c.json", 2), ("c.json", 4), ("c.json", 5)]  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("compressed", [False, True])
def test_parquet(tmp_path: Path, compressed: bool) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": list(range(3000)), "content": [f"第{i}篇" for i in range(2999)] + [None]})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path, row_group_size=700)
    if compressed:
        path = write(tmp_path / "a.parquet.gz", gzip.compress(path.read_bytes()))
    documents, reader = read(path)
    assert [document.text for document in documents] == [f"第{i}篇" for i in range(2999)] + [""]
    assert documents[1234].line == 1235
    assert reader.sources[0].field == "content (by its name)"
    with pytest.raises(DataError, match="no field 'body'"):
        read(path, text_field="body")


def test_a_cut_off_parquet_file(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match="not a readable parquet file"):
        read(write(tmp_path / "a.parquet", b"PAR1" + bytes(50)))


def test_named_fields_and_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "one", "title": "t1"}\n')
    assert texts(path, text_field="title") == ["t1"]
    with pytest.raises(DataError, match="no field 'titel'") as error:
        read(path, text_field="titel")
    assert "did you mean 'title'" in error.value.fix
    path = write(tmp_path / "b.tsv", "Hello there.\t你好。\nBye.\t再见。\n")
    assert texts(path, text_field="2") == ["你好。", "再见。"]
    with pytest.raises(DataError, match="no field '3'"):
        read(path, text_field="3")


BAD_RECORDS = [
    ("a.jsonl", '{"text": "one"}\n{"text": "two"\n{"text": "three"}\n', 2, "not valid JSON", ["one", "three"]),
    ("a.jsonl", '{"text": "one"}\n{"txet": "two"}\n', 2, "no text in 'text'", ["one"]),
    ("a.jsonl", '{"text": "one"}\n{"text": 7}\n', 2, "no text in 'text'", ["one"]),
    ("a.jsonl", '{"text": "one"}\n{"text": ["a", 1]}\n', 2, "no text in 'text'", ["one"]),
    ("a.jsonl", '{"text": "one"}\n' + "[" * 100_000 + "\n", 2, "not valid JSON", ["one"]),
    ("a.jsonl", b'{"text": "one"}\n{"text": "caf\xe9!"}\n{"text": "two"}\n', 2, "invalid UTF-8: the byte 0xE9", ["one", "two"]),  # noqa: E501
    ("a.json", '[{"text": "one"},\n{"text": "two"},\n{"text": x}]', 3, "not valid JSON", ["one", "two"]),
    ("a.json", '[{"text": "one"},\n{"text": "tw', 2, "not valid JSON", ["one"]),
    ("a.json", '[{"text": "one"},\n', 2, "cut off", ["one"]),
    ("a.csv", "id,text\n1,one\n2,two,more\n3,three\n", 3, "the row has 3 columns", ["one", "three"]),
    ("a.csv", 'id,text\n1,one\n2,"two"x\n3,three\n', 3, "not a valid row", ["one", "three"]),
    ("a.csv", 'id,text\n1,one\n2,"never closed\n3,three\n', 3, "not a valid row", ["one"]),
    ("a.txt", b"good one\nbad \xff\xfe line\ngood two\n", 2, "invalid UTF-8: the bytes 0xFF 0xFE", ["good one\ngood two\n"]),  # noqa: E501
    ("a.txt", "第一行\n".encode() + b"\xe4\xb8\n" + "末行\n".encode(), 2, "invalid UTF-8", ["第一行\n末行\n"]),
    ("a.txt", b"caf\xe9 au lait\nfin\n", 1, "invalid UTF-8: the byte 0xE9", ["fin\n"]),
    ("a.txt", (POEM * 9 + "他说的是\n").encode("gb18030") + b"\xff\xff\n", 2, "invalid GB18030", [POEM * 9 + "他说的是\n"]),  # noqa: E501
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "line", "message", "kept"), BAD_RECORDS)
def test_bad_records(tmp_path: Path, name: str, content: str | bytes, line: int, message: str, kept: list[str]) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert error.value.where == f"{path}:{line}"
    assert "--skip-bad" in error.value.fix and "expected" in error.value.why and error.value.zh
    documents, reader = read(path, skip_bad=True)
    assert [document.text for document in documents] == kept
    assert reader.problems.count == 1
    assert reader.problems.first[0]["where"] == f"{path}:{line}"
    assert message.split(":")[0] in reader.problems.first[0]["what"]


def test_bad_records_are_all_counted_and_the_first_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "x"}\n' + "oops\n" * 50)
    _, reader = read(path, skip_bad=True)
    assert reader.problems.count == 50
    assert len(reader.problems.first) == 20


def test_invalid_utf8_deep_in_a_large_file_has_its_true_line(tmp_path: Path) -> None:
    lines = [b"an ordinary line of text"] * 200_000
    lines[170_000] = b"caf\xe9"
    with pytest.raises(DataError) as error:
        read(write(tmp_path / "a.txt", b"\n".join(lines)))
    assert error.value.where.endswith(":170001")


def test_another_encoding_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "café".encode("latin-1"))
    assert texts(path, encoding="latin-1") == ["café"]
    assert texts(write(tmp_path / "b.txt", "\ufeffcafé"), encoding="utf-8") == ["café"]
    with pytest.raises(UsageError, match="unknown encoding") as error:
        DataSettings(encoding="gb18031").check()
    assert "gb18030" in error.value.fix
    with pytest.raises(UsageError):
        DataSettings(encoding="base64").check()


@pytest.mark.parametrize(
    ("encoding", "name"),
    [("utf-8", "utf-8"), ("utf-8-sig", "utf-8-sig"), ("gb18030", "gb18030"), ("utf-16", "utf-16-le"), ("utf-16-be", "utf-16-be")],  # noqa: E501
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv"])
def test_encodings(tmp_path: Path, encoding: str, name: str, suffix: str) -> None:
    line = POEM + "他说：这是我们的。"
    content = {"txt": line, "jsonl": json.dumps({"text": line}, ensure_ascii=False), "csv": f'id,text\n1,"{line}"\n'}
    documents, reader = read(write(tmp_path / f"a.{suffix}", content[suffix].encode(encoding)))
    assert [document.text for document in documents] == [line]
    assert reader.sources[0].encoding == name


def test_binary_and_empty_files(tmp_path: Path) -> None:
    write(tmp_path / "data" / "a.txt", "text")
    binary = write(tmp_path / "data" / "b.bin", bytes(range(256)))
    empty = write(tmp_path / "data" / "c.txt", b"")
    pdf = write(tmp_path / "data" / "d.txt", b"%PDF-1.4 text")
    archive = write(tmp_path / "data" / "e.txt.gz", gzip.compress(bytes(range(256))))
    documents, reader = read(tmp_path / "data")
    assert [document.text for document in documents] == ["text"]
    assert [source.skipped for source in reader.sources] == ["", "binary", "empty", "binary (PDF)", "binary"]
    for path, message in ((binary, "binary"), (empty, "empty"), (pdf, "PDF"), (archive, "binary")):
        with pytest.raises(DataError, match=message):
            read(path)


def test_damaged_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(os.urandom(50_000).hex().encode())
    path = write(tmp_path / "a.txt.gz", whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged or cut off"):
        read(path)
    _, reader = read(path, skip_bad=True)
    assert reader.problems.count == 1


def test_which_files_are_found(tmp_path: Path) -> None:
    for name in (
        "b.txt",
        "a.txt",
        "sub/c.txt",
        ".hidden",
        ".git/d.txt",
        "__pycache__/e.txt",
        "run/hanmo.json",
        "run/f.txt",
    ):
        write(tmp_path / name, "{}" if name.endswith("json") else name)
    listing = find_sources([tmp_path])
    assert [source.name for source in listing.sources] == ["a.txt", "b.txt", "sub/c.txt"]
    assert listing.hidden == 2
    names = [
        source.path.name for source in find_sources([tmp_path / "b.txt", f"{tmp_path}/*.txt", tmp_path / "sub"]).sources
    ]
    assert names == ["b.txt", "a.txt", "c.txt"]
    assert [s.path.name for s in find_sources([f"{tmp_path}/**/*.txt"]).sources][-1] == "c.txt"


def test_paths_that_give_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "corpus.txt", "x")
    write(tmp_path / "run" / "hanmo.json", "{}")
    cases = [
        ([tmp_path / "empty"], "no file was found", ""),
        ([tmp_path / "corpsu.txt"], "there is no 'corpsu.txt'", "did you mean 'corpus.txt'"),
        ([tmp_path / "nowhere" / "deep" / "a.txt"], "there is no 'nowhere'", ""),
        ([f"{tmp_path}/*.md"], "no file matches", ""),
        ([tmp_path / "run"], "written by Hanmo", ""),
        ([], "no path", ""),
    ]
    for paths, message, fix in cases:
        with pytest.raises(DataError, match=message) as error:
            find_sources(paths)
        assert fix in error.value.fix and error.value.zh


def test_json_that_is_no_list_of_texts(tmp_path: Path) -> None:
    for content in ('{"a": {"b": 1}}', "[1, 2]", '[{"id": 1, "turns": [{"said": "a long text in a nested record"}]}]'):
        path = write(tmp_path / "folder" / "a.json", content)
        assert texts(tmp_path / "folder") == [content]  # beside source code it is source text
        with pytest.raises(DataError, match="not an array of records"):
            read(path)
    with pytest.raises(DataError, match="no field of these records holds text"):
        read(write(tmp_path / "b.jsonl", '{"id": 1}\n'))


def test_long_texts_are_cut_and_short_ones_are_not(tmp_path: Path) -> None:
    paragraph = "这里有一段文字，说的是从前的事情。" * 20 + "\n\n"
    book = paragraph * 1000
    write(tmp_path / "book.txt", book)
    write(tmp_path / "note.txt", paragraph * 10)
    documents, reader = read(tmp_path)
    parts = [document for document in documents if document.file == "book.txt"]
    assert "".join(document.text for document in parts) == book
    assert all(5000 < len(document.text.encode()) < 13000 for document in parts)
    assert reader.cut_files == 1
    lines = book.split("\n")
    assert all(lines[document.line - 1] == document.text.split("\n")[0] for document in parts)


def test_source_files_stay_whole_among_many(tmp_path: Path) -> None:
    program = "value = compute(value)\n" * 2000
    for number in range(25):
        write(tmp_path / f"{number}.py", program)
    assert texts(tmp_path) == [program] * 25
    one = tmp_path / "one"
    write(one / "a.py", program)
    assert len(texts(one)) > 10 and "".join(texts(one)) == program


def test_a_line_of_50_mb(tmp_path: Path) -> None:
    text = write(tmp_path / "a.txt", "很长的一行，没有尽头。" * 1_500_000)
    start = time.monotonic()
    documents, _ = read(text)
    assert sum(len(document.text) for document in documents) == 11 * 1_500_000
    assert max(len(document.text.encode()) for document in documents) < 13_000
    record = write(tmp_path / "b.jsonl", json.dumps({"text": "x" * 50_000_000}) + '\n{"text": "y"}\n')
    assert [len(document.text) for document in read_documents([record])] == [50_000_000, 1]
    array = write(tmp_path / "c.json", json.dumps([{"text": "x" * 50_000_000}, {"text": "y"}]))
    assert [len(document.text) for document in read_documents([array])] == [50_000_000, 1]
    table = write(tmp_path / "d.csv", "id,text\n1," + "x" * 50_000_000 + "\n")
    assert [len(document.text) for document in read_documents([table])] == [50_000_000]
    assert time.monotonic() - start < 30


def test_unreadable_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x")
    sources = find_sources([path]).sources
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        list(Reader(sources, DataSettings()).documents())


def test_missing_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(HanmoError, match="pyarrow") as error:
        read(write(tmp_path / "a.parquet", b"PAR1"))
    assert error.value.exit_code == 5 and "hanmo[parquet]" in error.value.fix
