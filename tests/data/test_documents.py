"""Documents from every kind of source, and what cannot be read, by its place."""

import bz2
import csv
import errno
import gzip
import json
import os
import random

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenweight.data import Document, find_sources, read_documents, shuffled, sources_note


def read(*names, glob=(), **settings):
    text_column = settings.get("text_column", "text")
    return list(read_documents(find_sources(names, text_column=text_column, glob=glob), **settings))


def test_texts_are_read_in_sorted_order_with_names_that_tell_file_and_line(tmp_path):
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    for name, text in (("c.txt", "sea"), ("a.md", "ship — Größe"), ("b/x.txt", "whale"), ("ignored.pdf", "\x00")):
        (folder / name).write_text(text, encoding="utf-8")
    lines = [json.dumps({"body": text, "text": 3}, ensure_ascii=ascii) for text, ascii in (("wahr", 1), ("naïve\n", 0))]
    (folder / "d.jsonl").write_text(f"{lines[0]}\n\n  \n{lines[1]}", encoding="utf-8")
    found = read(folder, text_column="body")
    expected = [("a.md", "ship — Größe"), ("b/x.txt", "whale"), ("c.txt", "sea"), ("d.jsonl:1", "wahr")]
    expected += [("d.jsonl:4", "naïve\n")]
    assert found == [(f"{folder}/{name}", text) for name, text in expected]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "missing.txt: no such file or folder"),
        ("a.txt", b"abc\xff", r"a.txt: not UTF-8 text \(byte 3 is 0xff\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"', r"a.jsonl, line 2: not JSON \(.+\)"),
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"body": "b", "id": 4}',
            "a.jsonl, line 3: no column 'text': found body, id",
        ),
        ("a.jsonl", b'{"text": null}', "a.jsonl, line 1: column 'text' holds null: expected a text"),
        ("a.jsonl", b'{"text": ["a"]}', "a.jsonl, line 1: column 'text' holds a list: expected a text"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl, line 1: column 'text' holds a number: expected a text"),
        ("a.jsonl", b'["text"]', "a.jsonl, line 1: found a list: expected an object"),
        ("a.jsonl", b'{"text": "a"}\n{"a": ' + b"[" * 100_000, "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"7" * 5000 + b"}", "a.jsonl, line 1: not JSON"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "a.jsonl, line 1: not UTF-8.*UTF-16"),
        ("a.txt", "Größe".encode("utf-16"), "a.txt: not UTF-8.*UTF-16"),
        ("a.txt", "whale".encode("utf-16-le"), r"a.txt: no text \(byte 1 is 0\)"),
        ("a.bin", b"ELF\0", r"a.bin: no text \(byte 3 is 0\)"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "a.jsonl.*: not UTF-8"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused_by_file_and_line(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_a_bad_byte_far_into_a_jsonl_file_is_refused_by_its_place(tmp_path):
    good = b'{"text": "%s"}\n' % (b"a" * 1000)
    (tmp_path / "a.jsonl").write_bytes(good * 50 + b'{"text": "\xe9"}\n')
    place = 50 * len(good) + 10
    with pytest.raises(ValueError, match=rf"a\.jsonl.*(line 51\b|byte {place}\b)"):
        read(tmp_path / "a.jsonl")


def test_a_folder_without_text_is_refused_by_name(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"")
    with pytest.raises(ValueError, match=f"{tmp_path}: found no text in this folder"):
        read(tmp_path)


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {"gz": gzip.compress, "zst": zstd, "bz2": bz2.compress}
LINES = "".join(json.dumps({"text": f"naïve {number} " * number}) + "\n" for number in range(200))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_hold_what_they_hold_plain(suffix, tmp_path):
    compress = COMPRESS[suffix]
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / f"b.jsonl.{suffix}").write_bytes(compress(LINES.encode()))
    (tmp_path / f"c.txt.{suffix}").write_bytes(compress("Größe".encode()))
    found = read(tmp_path)
    assert [text for _, text in found[200:400]] == [text for _, text in found[:200]]
    assert found[400:] == [(f"{tmp_path}/c.txt.{suffix}", "Größe")]
    assert found[200].name == f"{tmp_path}/b.jsonl.{suffix}:1"


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_parts_compressed_one_after_the_other_are_all_read(suffix, tmp_path):
    half = len(LINES) // 2
    parts = COMPRESS[suffix](LINES[:half].encode()) + COMPRESS[suffix](LINES[half:].encode())
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(parts)
    assert len(read(tmp_path)) == 200


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"no" + content])
def test_a_damaged_compressed_file_is_refused_by_name_and_line(suffix, damage, tmp_path):
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(damage(COMPRESS[suffix](LINES.encode())))
    with pytest.raises(ValueError, match=rf"a\.jsonl\.{suffix}, line \d+: ") as refusal:
        read(tmp_path)
    assert "\n" not in str(refusal.value)


TEXTS = ["one", "", "zwei — drei", "four"]


def test_parquet_files_are_read_row_by_row(tmp_path):
    pq.write_table(pa.table({"id": [1, 2, 3, 4], "body": TEXTS}), tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path, text_column="body") == [
        (f"{tmp_path}/a.parquet:{number}", text) for number, text in enumerate(TEXTS, 1)
    ]


def test_a_folder_that_datasets_wrote_is_read_row_by_row(tmp_path):
    rows = datasets.Dataset.from_dict({"id": [1, 2, 3, 4], "text": TEXTS})
    rows.save_to_disk(str(tmp_path / "rows"))
    assert read(tmp_path / "rows") == [(f"{tmp_path}/rows:{number}", text) for number, text in enumerate(TEXTS, 1)]
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(ValueError, match=r"both holds several splits \(train, test\): name one of its folders"):
        read(tmp_path / "both")
    assert len(read(tmp_path / "both" / "test")) == 4


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_a_missing_column_or_a_missing_text_is_refused_with_what_is_there(kind, tmp_path):
    columns = {"id": [1, 2], "text": ["a", None]}
    path = tmp_path / ("a.parquet" if kind == "parquet" else "rows")
    if kind == "parquet":
        pq.write_table(pa.table(columns), path)
    else:
        datasets.Dataset.from_dict(columns).save_to_disk(str(path))
    with pytest.raises(ValueError, match=f"{path}: no column 'body': found id, text"):
        read(path, text_column="body")
    with pytest.raises(ValueError, match=f"{path}, row 2: column 'text' holds null"):
        read(path)
    with pytest.raises(ValueError, match=f"{path}, row 1: column 'id' holds a number"):
        read(path, text_column="id")
    assert [text for _, text in read(path, skip_invalid=True)] == ["a"]


def test_what_is_no_parquet_file_is_refused_by_name(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match=r"a\.parquet: cannot be read: "):
        read(tmp_path)


def test_a_hub_id_is_streamed_from_the_split_that_is_named(monkeypatch):
    asked = []

    def load_dataset(*args, **settings):
        asked.append((*args, settings))
        return iter([{"text": text} for text in TEXTS])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("org/books-1.5", subset="en", split="test") == [
        (f"org/books-1.5:{number}", text) for number, text in enumerate(TEXTS, 1)
    ]
    assert asked == [("org/books-1.5", "en", {"split": "test", "streaming": True})]


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"no/such: no such file or folder, and no data set of the hub") as refusal:
        read("no/such")
    assert "\n" not in str(refusal.value)


def test_a_later_name_that_is_missing_is_refused_before_the_first_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"b\.txt: no such file or folder"):
        find_sources([tmp_path / "a.txt", tmp_path / "b.txt"])


@given(st.lists(st.text(max_size=5), max_size=30), st.integers(0, 5), st.integers(0, 60))
def test_shuffling_loses_nothing_and_depends_on_the_seed_alone(texts, seed, num_characters):
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    drawn = list(shuffled(iter(documents), seed, num_characters=num_characters))
    assert sorted(drawn) == sorted(documents)
    random.seed(1)
    assert list(shuffled(iter(documents), seed, num_characters=num_characters)) == drawn


def test_shuffling_holds_no_more_than_its_buffer():
    held = 0
    largest = 0

    def documents():
        nonlocal held, largest
        for number in range(500):
            held += 1
            largest = max(largest, held)
            yield Document(str(number), "x" * 10)

    order = []
    for document in shuffled(documents(), 3, num_characters=200):
        held -= 1
        order.append(int(document.name))
    assert largest == 21
    assert order != sorted(order)
    assert max(abs(place - number) for place, number in enumerate(order)) > 30


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("a.json", r"jq -c '.\[\]' a.json > a.jsonl"),
        ("a.JSON", "jq"),
        ("a.json.gz", "jq"),
        ("a.html", "pandoc -t plain a.html -o a.html.txt"),
        ("a.HTM", "pandoc"),
        ("a.pdf", "pdftotext a.pdf a.pdf.txt"),
        ("a.ipynb", "pandoc"),
        ("a.arrow", "folder of the data set"),
        ("a.parquet.gz", "unpack it first"),
    ],
)
@pytest.mark.parametrize("chosen", ["named", "matched"])
def test_files_of_a_form_that_is_not_read_are_refused_with_what_mends_it(name, remedy, chosen, tmp_path):
    content = b'[{"text": "a"}]'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("json.gz") else content)
    with pytest.raises(ValueError, match=f"{name}: such files are not read: .*{remedy}"):
        read(tmp_path / name) if chosen == "named" else read(tmp_path, glob=["*"])


def test_what_a_file_is_called_does_not_decide_what_may_be_left_out(tmp_path):
    (tmp_path / "columns.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match=r"; --skip_invalid leaves such documents out$"):
        read(tmp_path / "columns.jsonl")


def test_a_json_file_with_other_columns_is_refused_by_them(tmp_path):
    (tmp_path / "a.json").write_text('{"body": "a"}\n')
    with pytest.raises(ValueError, match=r"a\.json: no column 'text': found body; name another with --text_column"):
        read(tmp_path / "a.json")


CHATS = [{"messages": [{"role": "user", "content": "a"}]}, {"prompt": "a", "completion": "b"}]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_chat_among_texts_is_refused_with_what_reads_it(chat, kind, tmp_path):
    path, column = tmp_path / f"a.{kind}", next(iter(chat))
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([chat]), path)
    else:
        path.write_text(json.dumps(chat))
    with pytest.raises(ValueError, match=rf"a\.{kind}.*: column '{column}' holds a chat: --chat reads it"):
        read(path)
    if column == "messages":
        with pytest.raises(ValueError, match=r"row 1|line 1") as refusal:
            read(path, text_column="messages") if kind != "json" else read(path.rename(path.with_suffix(".jsonl")))
        assert "holds a chat" in str(refusal.value)


ROWS = [("1", "one, two"), ("2", 'three\n"four"'), ("3", "x" * 200_000), ("4", "fünf")]


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("CSV", ","), ("tsv", "\t")])
def test_tables_are_read_row_by_row(suffix, separator, tmp_path):
    with open(tmp_path / f"a.{suffix}", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([("id", "body"), *ROWS])
    (tmp_path / f"meta.{suffix}").write_text(f"id{separator}title\n1{separator}Sea\n")  # what a folder may hold besides
    expected = [(f"{tmp_path}/a.{suffix}:{number}", text) for number, text in ROWS]
    assert [(name, text) for name, text in read(tmp_path, text_column="body")] == [
        (name, text) for name, text in expected
    ]
    assert read(tmp_path / f"a.{suffix}", text_column="body") == expected
    with pytest.raises(ValueError, match=rf"meta\.{suffix}: no column 'body': found id, title"):
        read(tmp_path / f"meta.{suffix}", text_column="body")


def test_rows_of_a_table_that_are_no_rows_are_refused_or_left_out(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("id,text\n1,sea\n2,a ship, a whale\n3\n4,wind\n")
    with pytest.raises(ValueError, match=r"a\.csv, row 2: expected 2 values, as in the first line, found 3"):
        read(tmp_path)
    assert [text for _, text in read(tmp_path, skip_invalid=True)] == ["sea", "wind"]
    (tmp_path / "a.csv").write_text('id,text\n1,sea\n2,"a ship\n3,wind\n')
    with pytest.raises(ValueError, match=r"a\.csv, after row 1: cannot be read"):
        read(tmp_path)


GLOBS = {
    "*.py": ["a.py", "b/c.py", "b/d/e.py"],
    "**/*.py": ["a.py", "b/c.py", "b/d/e.py"],
    "b/*.py": ["b/c.py"],
    "b/**": ["b/c.py", "b/d/e.py", "b/x.rs"],
    "[!a].py": ["b/c.py", "b/d/e.py"],
    "?.[pr][ys]": ["a.py", "b/c.py", "b/d/e.py", "b/x.rs"],
    "notes.txt": ["notes.txt"],
}


@pytest.mark.parametrize("glob", GLOBS)
def test_files_of_a_folder_are_chosen_by_a_pattern(glob, tmp_path):
    (tmp_path / "b" / "d").mkdir(parents=True)
    for name in ("a.py", "b/c.py", "b/d/e.py", "b/x.rs", "notes.txt", "apy", ".hidden.py"):
        (tmp_path / name).write_text(name)
    assert [text for _, text in read(tmp_path, glob=[glob])] == GLOBS[glob]
    assert [text for _, text in read(tmp_path, glob=["*.rs", glob])] == sorted({"b/x.rs", *GLOBS[glob]})
    assert [text for _, text in read(tmp_path)] == ["apy", "notes.txt"]


def test_a_pattern_that_nothing_matches_or_that_has_no_folder_is_refused(tmp_path, caplog):
    (tmp_path / "a.py").write_text("a")
    with pytest.raises(ValueError, match=r"found no text in this folder: .*read by --glob '\*\.py'$"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"found no text in this folder: nothing matches \*\.rs"):
        read(tmp_path, glob=["*.rs"])
    with pytest.raises(ValueError, match=r"^glob \*\.py: applies to folders"):
        read(tmp_path / "a.py", glob=["*.py"])
    with pytest.raises(ValueError, match=r"\*\.py: no such file or folder; .*--glob"):
        read(tmp_path / "*.py")
    (tmp_path / "b.pyc").write_bytes(b"\xa7\r\r\n\0\0")
    (tmp_path / "c.html").write_text("<p>")
    (tmp_path / "d.1.gz").write_bytes(gzip.compress(b".TH"))
    with pytest.raises(ValueError, match=r"read by --glob '\*\.py' or --glob '\*\.gz'$"):  # no programs, no pages
        read(tmp_path)
    assert read(tmp_path / "a.py") == read(tmp_path, glob=["*.py"])  # what is chosen is read alike


def test_the_note_of_sources_changes_with_their_number_and_size(tmp_path):
    (tmp_path / "a.txt").write_text("sea")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "rows"))
    assert sources_note(find_sources([tmp_path / "a.txt"])) == {"files": 1, "bytes": 3}
    assert sources_note(find_sources([tmp_path / "rows", tmp_path / "a.txt"]))["files"] == 2


@pytest.mark.parametrize("name", ["books.tar.gz", "BOOKS.TAR", "books.tgz", "books.zip", "a.txt.xz", "a.7z"])
def test_an_archive_is_not_taken_for_a_text(name, tmp_path, caplog):
    (tmp_path / name).write_bytes(b"not looked at")
    with pytest.raises(ValueError, match=f"{name}: .*unpack it"):
        find_sources([tmp_path / name])
    (tmp_path / "a.txt").write_text("a")
    assert [name for name, _ in read(tmp_path)] == [f"{tmp_path}/a.txt"]
    assert f"left out 1 file of no text, such as {tmp_path}/{name}" in caplog.text


def test_suffixes_mean_the_same_in_upper_case(tmp_path):
    (tmp_path / "A.JSONL").write_text(LINES)
    (tmp_path / "B.NdJson.GZ").write_bytes(gzip.compress(LINES.encode()))
    (tmp_path / "C.TXT.Gz").write_bytes(gzip.compress(b"sea"))
    (tmp_path / "D.TXT").write_text("whale")
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "E.Parquet")
    texts = [json.loads(line)["text"] for line in LINES.splitlines()]
    assert [text for _, text in read(tmp_path)] == [*texts, *texts, "sea", "whale", *TEXTS]
    assert read(*sorted(tmp_path.iterdir())) == read(tmp_path)


@pytest.mark.parametrize("name", ["c4.json", "c4.00000-of-01024.json.gz", "part-00000", "part-00000.zst"])
def test_json_lines_are_found_by_the_first_line_where_the_name_leaves_it_open(name, tmp_path):
    content = b"\xef\xbb\xbf\r\n" + LINES.replace("\n", "\r\n").encode()
    compress = COMPRESS.get(name.rpartition(".")[2], bytes)
    (tmp_path / name).write_bytes(compress(content))
    expected = [json.loads(line)["text"] for line in LINES.splitlines()]
    for source in (tmp_path, tmp_path / name):
        assert [text for _, text in read(source)] == expected
    (tmp_path / name).write_bytes(compress(json.dumps({"version": 1}).encode()))
    (tmp_path / "a.txt").write_text("a")
    others = [] if ".json" in name else ['{"version": 1}']
    assert [text for _, text in read(tmp_path)] == ["a", *others]


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffwhale\ufeff".encode())
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "sea"}\r\n\ufeff{"text": "ship"}\r\n'.encode())
    assert [text for _, text in read(tmp_path)] == ["whale\ufeff", "sea", "ship"]


def test_documents_that_are_no_text_are_left_out_and_counted_if_asked(tmp_path, caplog):
    bad = [
        '{"text": null}',
        '{"text": ["a"]}',
        "{",
        '{"body": "b"}',
        "7",
        '{"text": "\\ud800"}',
        '{"a": ' + "[" * 100_000,
    ]
    lines = [line for number, text in enumerate(bad) for line in (json.dumps({"text": f"good {number}"}), text)]
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xe9"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xe9")
    (tmp_path / "c.txt").write_bytes(b"sea")
    with pytest.raises(ValueError, match=r"b\.txt: not UTF-8 text .*; --skip_invalid leaves such documents out$"):
        read(tmp_path / "b.txt")
    found = read(tmp_path, skip_invalid=True)
    assert [text for _, text in found] == [*(f"good {number}" for number in range(len(bad))), "sea"]
    assert found[1].name == f"{tmp_path}/a.jsonl:3"
    assert "left out 9 documents of no text, such as " in caplog.text
    assert f"{tmp_path}/a.jsonl, line 2: column 'text' holds null" in caplog.text
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"whale")[:-9])
    with pytest.raises(ValueError, match=r"d\.txt\.gz: cannot be read"):  # who knows how much is lost
        read(tmp_path, skip_invalid=True)


def test_linked_folders_are_followed_once_and_links_to_nothing_are_told(tmp_path, caplog):
    (tmp_path / "texts").mkdir()
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text("sea")
    (tmp_path / "elsewhere" / "deep" / "b.txt").write_text("whale")
    for name, target in (("linked", "../elsewhere"), ("loop", "."), ("gone.txt", "nowhere.txt"), ("c.txt", "a.txt")):
        (tmp_path / "texts" / name).symlink_to(target)
    (tmp_path / "elsewhere" / "back").symlink_to("../texts")
    assert [text for _, text in read(tmp_path / "texts")] == ["sea", "whale"]
    assert f"left out 1 file behind broken links, such as {tmp_path}/texts/gone.txt" in caplog.text
    assert f"1 files are named twice or linked, and taken once, such as {tmp_path}/texts/c.txt" in caplog.text
    with pytest.raises(ValueError, match=r"gone\.txt: a link to nowhere\.txt, which does not exist"):
        find_sources([tmp_path / "texts" / "gone.txt"])


def test_a_file_that_is_named_again_is_taken_once(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("sea")
    (tmp_path / "b.txt").write_text("sea")  # another file, if the same text
    (tmp_path / "c.txt").hardlink_to(tmp_path / "a.txt")
    found = read(tmp_path / "b.txt", tmp_path, tmp_path / "a.txt")
    assert [name for name, _ in found] == [f"{tmp_path}/b.txt", f"{tmp_path}/a.txt"]
    assert "3 files are named twice" in caplog.text


def test_a_folder_that_cannot_be_read_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("sea")
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(ValueError, match=r"closed: cannot be read: Permission denied"):
        read(tmp_path)


def test_names_that_are_not_utf_8_are_shown_as_text(tmp_path):
    folder = os.fsencode(tmp_path)
    for name, text in ((b"caf\xe9.txt", b"sea"), (b"caf\xe9.jsonl", b'{"text": "whale"}\n{"text": 3}')):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(text)
    found = read(tmp_path, skip_invalid=True)
    assert found == [(f"{tmp_path}/caf\\xe9.jsonl:1", "whale"), (f"{tmp_path}/caf\\xe9.txt", "sea")]
    with pytest.raises(ValueError, match=r"caf\\xe9\.jsonl, line 2: column 'text' holds a number"):
        read(os.fsdecode(os.path.join(folder, b"caf\xe9.jsonl")))


def test_what_a_folder_holds_besides_texts_is_said(tmp_path, caplog):
    for name in ("a.txt", "b.json", "c.csv", ".hidden"):
        (tmp_path / name).write_text("a")
    assert [document.name for document in read(tmp_path)] == [f"{tmp_path}/a.txt"]
    assert f"left out 2 files of no text, such as {tmp_path}/b.json" in caplog.text


def test_half_a_character_is_refused_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "a\\ud800b"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: half a surrogate pair at character 1"):
        read(tmp_path)
