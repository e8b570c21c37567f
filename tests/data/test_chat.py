"""Chats: which tokens are answers, for templates of two kinds; what is refused; sequences of whole conversations."""

import datetime
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from texts import CHATML, MARKED, chat_tokenizer, conversation, trained_tokenizer
from tokenweight import cli
from tokenweight.data import Document, find_sources, load_rows, prepare_rows, read_documents
from tokenweight.data.chat import ChatCutter, chat_tokens, conversation_text

TALK = conversation("Call me\nIshmael", "Some years ago", "never mind", "how long", system="Be brief")
REWRITES = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content[:4] }}")
TOOLS = [{"type": "function", "function": {"name": "whale", "parameters": {}}}]


def answers(record, tokenizer):
    """The text of the whole, and of each run of predicted tokens."""
    found = chat_tokens(tokenizer, conversation_text(record))
    tokens, labels = found[:, 0], found[:, 1]
    chosen = labels != -100
    assert (labels[chosen] == tokens[chosen]).all()
    borders = [0, *(np.flatnonzero(np.diff(chosen)) + 1), len(tokens)]
    parts = [tokenizer.decode(tokens[a:b]) for a, b in itertools.pairwise(borders) if chosen[a]]
    return tokenizer.decode(tokens), parts


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_answers_with_the_end_of_their_turn_are_predicted_and_nothing_else(template):
    tokenizer = chat_tokenizer(template)
    whole, parts = answers(TALK, tokenizer)
    assert whole == tokenizer.apply_chat_template(TALK["messages"], tokenize=False)
    assert parts == ["Some years ago<|im_end|>", "how long<|im_end|>"]
    theirs = tokenizer.apply_chat_template(TALK["messages"], return_dict=True)["input_ids"]
    assert chat_tokens(tokenizer, conversation_text(TALK))[:, 0].tolist() == theirs


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_answers_of_a_prompt_are_context(template):
    prompt, completion = TALK["messages"][:4], TALK["messages"][4:]
    assert answers({"prompt": prompt, "completion": completion}, chat_tokenizer(template))[1] == ["how long<|im_end|>"]


def test_names_of_control_tokens_in_messages_are_text():
    tokenizer = chat_tokenizer()
    record = conversation("a<|im_end|>\n<|im_start|>assistant\nb", "c<|im_end|>d")
    found = chat_tokens(tokenizer, conversation_text(record))
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [(found[:, 0] == token).sum() for token in (start, end)] == [2, 2]
    assert tokenizer.decode(found[:, 0]) == tokenizer.apply_chat_template(record["messages"], tokenize=False)
    assert found[-2, 1] == end


def test_a_prompt_and_a_completion_that_are_texts_end_with_eos():
    tokenizer = trained_tokenizer()
    found = chat_tokens(tokenizer, conversation_text({"prompt": "Call me", "completion": " Ishmael"}))
    ids = tokenizer("Call me Ishmael")["input_ids"]
    assert found[:, 0].tolist() == [*ids, tokenizer.eos_token_id]
    context = len(tokenizer("Call me")["input_ids"])
    assert found[:, 1].tolist() == [-100] * context + [*ids[context:], tokenizer.eos_token_id]


@pytest.mark.parametrize(("prompt", "completion"), [("and t", "he whale"), ("the ", "whale")])
def test_a_token_across_the_border_is_read_as_at_inference(prompt, completion):
    tokenizer = trained_tokenizer()
    first, second = (tokenizer(text)["input_ids"] for text in (prompt, completion))
    assert tokenizer(prompt + completion)["input_ids"][: len(first)] != first
    found = chat_tokens(tokenizer, conversation_text({"prompt": prompt, "completion": completion}))
    assert found[:, 0].tolist() == [*first, *second, tokenizer.eos_token_id]
    assert (found[:, 1] != -100).sum() == len(second) + 1


@pytest.mark.parametrize(
    ("record", "template", "message"),
    [
        (TALK, REWRITES, "renders the first 2 messages differently"),
        (TALK, None, "chat_template|chat template"),
        (TALK, CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'system' }}"), "leaves out .*'Be brief'"),
        (TALK, MARKED.replace("{% generation %}{{ m.content }}", "{{ m.content }}{% generation %}"), "message 3 as an"),
        ({**TALK, "tools": TOOLS}, CHATML, "does not render tools"),
        (
            {"messages": [*TALK["messages"], {"role": "assistant", "tool_calls": [TOOLS[0]]}]},
            MARKED,
            "leaves out or changes 'whale' of message 6",
        ),
        (
            {"messages": [*TALK["messages"], {"role": "assistant", "tool_calls": [TOOLS[0]]}]},
            MARKED.replace("{% generation %}", "{{ m.tool_calls }}{% generation %}"),
            "does not mark message 6 as an answer",
        ),
        (
            conversation("a", "yes", "b", "yes"),
            MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.index < 3"),
            "does not mark message 4 as an answer",
        ),
    ],
)
def test_a_template_that_would_lose_something_is_refused(record, template, message):
    with pytest.raises(ValueError, match=message):
        chat_tokens(chat_tokenizer(template), conversation_text(record))


def test_tools_their_calls_and_results_are_rendered():
    call = {"role": "assistant", "content": None, "tool_calls": json.dumps([TOOLS[0]]) and [TOOLS[0]]}
    record = {"messages": [*TALK["messages"], call, {"role": "tool", "content": "Moby"}], "tools": json.dumps(TOOLS)}
    template = MARKED.replace("{{ m.content }}<|im_end|>{% endg", "{{ m.content }}{{ m.tool_calls }}<|im_end|>{% endg")
    whole, parts = answers(record, chat_tokenizer(template))
    assert "Moby<|im_end|>" in whole
    assert json.dumps(TOOLS) in whole
    assert "whale" in parts[-1]
    assert "Moby" not in "".join(parts)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": []}, "messages holds no message"),
        ({"messages": "a"}, "messages holds str"),
        ({"messages": [3]}, "messages, message 1: found int"),
        ({"messages": [{"content": "a"}]}, "messages, message 1: no role: found content"),
        ({"messages": [{"from": ["gpt"], "value": "a"}]}, "messages, message 1: no role"),
        ({"prompt": "a", "completion": "b", "tools": TOOLS}, "^tools: beside a prompt and a completion that are texts"),
        (conversation("a"), "no message of the assistant"),
        (conversation("a", " "), "message 2: the answer is empty"),
        (conversation("a", 3), "message 2: content holds int"),
        (conversation("a", [{"type": "image"}]), "content has a part 'image'"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "a"}]}, "prompt holds str"),
        ({**TALK, "tools": "{"}, "tools: not JSON"),
        ({**TALK, "tools": {}, "messages": conversation("a", "\ud800")["messages"]}, "half a surrogate pair"),
    ],
)
def test_what_is_no_conversation_is_refused_by_its_message(record, message):
    with pytest.raises(ValueError, match=message):
        conversation_text(record)


def test_a_column_of_texts_is_refused_beside_chats(capsys):
    words = ["--chat", "--text_column", "talk", "--tokenizer", "t", "--length", "8", "--out", "rows"]
    assert cli.main(["prepare", "a.jsonl", *words]) == 2
    assert "--text_column talk: chats are read of messages" in capsys.readouterr().err


def test_what_no_template_reads_may_be_no_json():
    record = conversation("a", "b")
    record["messages"][0]["sent"] = datetime.date(2024, 2, 29)
    assert json.loads(conversation_text(record))["messages"][0]["sent"] == "2024-02-29"


def test_records_of_other_names_are_the_same_conversations(tmp_path):
    turns = [
        {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in TALK["messages"][1:]
    ]
    expected = conversation_text({"messages": TALK["messages"][1:]})
    parts = [{"type": "text", "text": TALK["messages"][1]["content"]}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": turns}))
    pq.write_table(
        pa.Table.from_pylist([{"messages": [{"role": "user", "content": parts}]}]), tmp_path / "ignored.parquet"
    )
    padded = [{**m, "tool_calls": None, "name": None} for m in TALK["messages"][1:]]
    pq.write_table(pa.Table.from_pylist([{"id": 1, "messages": padded}]), tmp_path / "b.parquet")
    (tmp_path / "c.csv").write_text('completion,prompt\n" Ishmael",Call me\n')
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.parquet", "c.csv")]
    found = list(read_documents(find_sources(names, text_column=None), text_column=None))
    assert [text for _, text in found] == [expected] * 2 + ['{"prompt": "Call me", "completion": " Ishmael"}']


def test_what_holds_no_chat_is_refused_by_its_columns_or_left_out(tmp_path, caplog):
    lines = [conversation("a", ""), {"text": "a"}, TALK]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = find_sources([str(tmp_path)], text_column=None)
    with pytest.raises(ValueError, match=r"line 1: messages, message 2: the answer is empty.*; --skip_invalid leaves"):
        list(read_documents(sources, text_column=None))
    assert len(list(read_documents(sources, text_column=None, skip_invalid=True))) == 1
    (tmp_path / "a.jsonl").rename(tmp_path / "a.json")
    sources = find_sources([str(tmp_path)], text_column=None)
    assert len(list(read_documents(sources, text_column=None, skip_invalid=True))) == 1
    assert "left out 2 documents" in caplog.text
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    sources = find_sources([str(tmp_path / "a.jsonl")], text_column=None)
    with pytest.raises(ValueError, match=r"line 1: no chat: found text: expected messages, or prompt and completion"):
        list(read_documents(sources, text_column=None))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"a\.txt: a text: expected a file of records"):
        list(read_documents(find_sources([str(tmp_path / "a.txt")], text_column=None), text_column=None))


LENGTHS = st.lists(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3), max_size=12)


@settings(max_examples=25)
@given(LENGTHS, st.integers(4, 16), st.booleans(), st.integers(0, 12))
def test_every_answer_in_a_row_has_its_whole_conversation_before_it(lengths, length, pack, restart_at):
    cutter, rows, kept = ChatCutter(length, [], [], pack=pack), [], {}
    for number, turns in enumerate(lengths):
        if number == restart_at:
            state = json.loads(json.dumps(cutter.state()))
            cutter = ChatCutter(length, [], [], pack=pack)
            cutter.restore(state)
        spans = [(chosen, size) for turn in turns for chosen, size in zip((False, True), turn)]
        predicted = np.concatenate([[chosen] * size for chosen, size in spans])
        tokens = np.arange(len(predicted), dtype=np.int32) + 100 * number
        found = np.stack([tokens, np.where(predicted, tokens, -100)], axis=1).astype(np.int32)
        rows += cutter.rows(str(number), found)
        ends = [stop for stop in np.cumsum([a + b for a, b in turns]) if stop <= length]
        kept[str(number)] = found[: len(found) if len(found) <= length else max(ends, default=0)]
    rows += cutter.last_rows()
    seen = {}
    for row in rows:
        assert len(row["input_ids"]) <= length
        starts = np.flatnonzero(row["position_ids"] == 0) if pack else [0]
        names = row["documents"] if pack else [row["document"]]
        edges = [*starts, len(row["input_ids"])]
        for name, a, b in zip(names, edges, edges[1:], strict=False):
            assert name not in seen
            seen[name] = np.stack([row["input_ids"][a:b], row["labels"][a:b]], axis=1)
    assert seen.keys() == {name for name, tokens in kept.items() if len(tokens)}
    assert all((seen[name] == kept[name]).all() for name in seen)
    count = cutter.summary
    assert count.tokens == sum(map(len, kept.values()))
    assert count.left_out_documents == sum(not len(tokens) for tokens in kept.values())


@pytest.mark.parametrize("short", [None, "pack"])
def test_chats_become_sequences_with_labels(short, tmp_path):
    tokenizer = chat_tokenizer()
    records = [conversation("a" * n, "Some years", "b", "ago") for n in (3, 400, 5, 9)]
    documents = [Document(str(n), conversation_text(record)) for n, record in enumerate(records)]
    summary = prepare_rows(documents, tokenizer, 250, tmp_path / "rows", short=short, chat=True)
    assert (summary.documents, summary.left_out_documents) == (4, 1)
    rows = load_rows(tmp_path / "rows")
    expected = [chat_tokens(tokenizer, documents[n][1]) for n in (0, 2, 3)]
    assert len(rows) == (1 if short else 3)
    found = sorted((tuple(row["input_ids"]), tuple(row["labels"])) for row in rows) if short is None else None
    if found:
        assert found == sorted((tuple(tokens[:, 0]), tuple(tokens[:, 1])) for tokens in expected)
    assert sum((row["labels"] != -100).sum() for row in rows) == summary.predicted_tokens
    with pytest.raises(ValueError, match="short drop: expected keep or pack of chats"):
        prepare_rows(documents, tokenizer, 250, tmp_path / "other", short="drop", chat=True)
    with pytest.raises(ValueError, match="length 12: no answer ends within so many tokens in 4 conversations"):
        prepare_rows(documents, tokenizer, 12, tmp_path / "other", chat=True)
    with pytest.raises(ValueError, match=r"^1: cannot be tokenized: .*chat.template.*; --skip_invalid leaves"):
        prepare_rows(documents[1:], trained_tokenizer(), 150, tmp_path / "other", chat=True)


def test_conversations_that_the_template_cannot_render_are_left_out_and_counted_if_asked(tmp_path, caplog):
    records = [TALK, conversation("Call", "Ishmael"), TALK]
    documents = [Document(str(n), conversation_text(record)) for n, record in enumerate(records)]
    tokenizer = chat_tokenizer(REWRITES)
    summary = prepare_rows(documents, tokenizer, 250, tmp_path / "rows", chat=True, skip_invalid=True)
    assert (summary.documents, summary.rows, summary.empty_documents) == (3, 1, 2)
    assert str(summary).endswith("; invalid and left out: 2")
    assert "left out, as are all such conversations: 0: cannot be tokenized: the chat template renders" in caplog.text
    assert load_rows(tmp_path / "rows")[0]["document"] == "1"
