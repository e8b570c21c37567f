"""Documents from every kind of source, and what cannot be read, by its place."""

import json

import pytest

from tokenweight.documents import find_sources, read_documents


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
