"""Lines of numbers in a .jsonl file."""

import json

from tokenweight.records import append_line


def test_lines_are_appended(tmp_path):
    lines = [{"step": 1, "loss": 0.1}, {"step": 2, "text": "a\nb"}]
    for line in lines:
        append_line(tmp_path / "a.jsonl", line)
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == lines
