"""Documents from every kind of source, and what cannot be read, by its place."""

import bz2
import gzip
import json
import random

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenweight.data import Document, find_sources, read_documents, shuffled


def read(*names, **settings):
    return list(read_documents(find_sources(names), **settings))


def test_texts_are_read_in_sorted_order_with_names_that_tell_file_and_line(tmp_path):
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    for name, text in (("c.txt", "sea"), ("a.md", "ship — Größe"), ("b/x.txt", "whale"), ("ignored.pdf", "\x00")):
        (folder / name).write_text(text, encoding="utf-8")
    lines = [json.dumps({"body": text, "text": 3}, ensure_ascii=ascii) for text, ascii in (("wahr", 1), ("naïve\n", 0))]
    (folder / "d.jsonl").write_text(f"{lines[0]}\n\n  \n{lines[1]}", encoding="utf-8")
    found = read(folder, tmp_path / "texts" / "c.txt", text_column="body")
    expected = [("a.md", "ship — Größe"), ("b/x.txt", "whale"), ("c.txt", "sea"), ("d.jsonl:1", "wahr")]
    expected += [("d.jsonl:4", "naïve\n"), ("c.txt", "sea")]
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
            "a.jsonl, line 3: no text in column 'text': found body",
        ),
        ("a.jsonl", b'{"text": null}', "a.jsonl, line 1: no text in column 'text': found text"),
        ("a.jsonl", b'["text"]', "a.jsonl, line 1: no text in column 'text': found list"),
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
    with pytest.raises(ValueError, match=f"{path}, row 2: no text in column 'text': found text"):
        read(path)
    with pytest.raises(ValueError, match=f"{path}, row 1: no text in column 'id'"):
        read(path, text_column="id")


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


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.json.gz", "a.arrow"])
def test_files_of_a_form_that_is_not_read_are_not_taken_for_a_text(name, tmp_path):
    (tmp_path / name).write_text('[{"text": "a"}]')
    with pytest.raises(ValueError, match=f"{name}: .* files are not read: expected .txt, .md, .jsonl or .parquet"):
        find_sources([tmp_path / name])


def test_what_a_folder_holds_besides_texts_is_said(tmp_path, caplog):
    for name in ("a.txt", "b.json", "c.csv", ".hidden"):
        (tmp_path / name).write_text("a")
    assert [document.name for document in read(tmp_path)] == [f"{tmp_path}/a.txt"]
    assert f"left out 2 files that are no text, such as {tmp_path}/b.json" in caplog.text


def test_half_a_character_is_refused_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "a\\ud800b"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: half a surrogate pair at character 1"):
        read(tmp_path)
