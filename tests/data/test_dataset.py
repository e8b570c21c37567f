"""What is read of scored rows, and what is refused because it is not what was scored."""

import json
import math

import pytest
import torch
from scored import CONTEXT, OTHER_BATCH
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import models
from models import LENGTH, NUM_ROWS, some_rows
from tokenweight import Scorer, ShortContext, load_model, token_nll
from tokenweight.data import (
    corpus_frame,
    load_rows,
    load_scores,
    read_prepared,
    read_provenance,
    read_row,
    score_folder,
    score_text,
    score_texts,
    scored_row,
    verify,
)
from tokenweight.data.row_scorer import ContextGain
from tokenweight.records import write_json


def test_the_provenance_of_scores_goes_before_that_of_rows(tmp_path):
    assert read_provenance(tmp_path) == {}
    write_json(tmp_path / "rows.json", {"length": 3})
    assert read_provenance(tmp_path) == {"length": 3}
    write_json(tmp_path / "scores.json", {"size": 2})
    assert read_provenance(str(tmp_path)) == {"size": 2}


def test_what_was_scored_is_unknown_once_its_folder_is_gone_or_out_of_reach(tmp_path, caplog):
    write_json(tmp_path / "rows.json", {"texts": ["file"]})
    assert read_prepared({"texts": ["own"]})["texts"] == ["own"]
    assert read_prepared({"rows": str(tmp_path)})["texts"] == ["file"]
    assert read_prepared({"rows": str(tmp_path / "gone")}) == read_prepared({"rows": "memory://gone"}) == {}
    assert not caplog.records
    assert read_prepared({"rows": "nosuchprotocol://bucket/rows"}) == {}
    assert "nosuchprotocol://bucket/rows" in caplog.text


def test_an_unscored_folder_holds_no_scores(folders):
    with pytest.raises(ValueError, match="rows has no column short_nll: score it with `tokenweight"):
        load_scores(folders / "rows")


@pytest.mark.parametrize("with_long", [True, False])
def test_a_row_is_read_with_stored_long_losses_or_those_of_the_scoring_model(with_long, folders):
    score_folder(folders / "rows", str(folders / "model"), [CONTEXT], folders / "scored", with_long=with_long)
    if with_long:
        (folders / "model" / "model.safetensors").unlink()  # not needed then
    row = read_row(folders / "scored", 4)
    assert (row.number, row.num_rows, row.size, row.stride) == (4, NUM_ROWS, CONTEXT.size, CONTEXT.stride)
    stored = load_rows(folders / "scored")[4]
    assert row.tokens.tolist() == [stored["input_ids"].tolist()]
    assert torch.equal(row.short_nll[0], torch.tensor(stored["short_nll_8"]))
    expected = token_nll(models.tiny(dtype=torch.float32), row.tokens)
    torch.testing.assert_close(row.long_nll, expected, **OTHER_BATCH)
    assert row.mask.tolist() == [[False] + [True] * (LENGTH - 1)]
    assert row.tokenizer is None


def test_a_row_is_read_with_the_long_losses_of_the_model_that_is_named(folders):
    score_folder(folders / "rows", str(folders / "model"), [CONTEXT], folders / "scored", with_long=True)
    other = models.tiny(seed=1, dtype=torch.float32)
    other.save_pretrained(folders / "other")
    row = read_row(folders / "scored", 2, str(folders / "other"))
    torch.testing.assert_close(row.long_nll, token_nll(other, row.tokens), **OTHER_BATCH)


@pytest.mark.parametrize("named", [True, False])
def test_the_scoring_model_is_loaded_in_the_revision_that_scored(named, folders, monkeypatch):
    name, loaded = str(folders / "model"), []
    score_folder(folders / "rows", name, [CONTEXT], folders / "scored")
    note = folders / "scored" / "scores.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "revision": "v2"}))  # as of a hub model
    load_model = scored_row.load_model
    monkeypatch.setattr(
        scored_row, "load_model", lambda *names, **settings: loaded.append(settings) or load_model(*names, **settings)
    )
    read_row(folders / "scored", 0, name if named else None)
    assert [settings["revision"] for settings in loaded] == ["v2"]


@pytest.mark.parametrize("number", [-1, NUM_ROWS])
def test_a_row_that_is_not_there_is_refused_with_those_that_are(number, folders):
    score_folder(folders / "rows", str(folders / "model"), [CONTEXT], folders / "scored")
    with pytest.raises(ValueError, match=f"row {number}: .*scored has rows 0 to 6"):
        read_row(folders / "scored", number)


def test_long_losses_that_nobody_stored_need_a_model(folders):
    some_rows(short_nll=[[0.0] * LENGTH] * NUM_ROWS).save_to_disk(str(folders / "foreign"))
    with pytest.raises(ValueError, match=r"model: .*foreign stores no long losses"):
        read_row(folders / "foreign", 0)
    assert read_row(folders / "foreign", 0, str(folders / "model")).short_nll.tolist() == [[0.0] * LENGTH]


LADDER = [ShortContext(4, 2), CONTEXT]


def score(folders, *contexts, **settings):
    score_folder(folders / "rows", str(folders / "model"), contexts, folders / "scored", **settings)
    return folders / "scored"


def test_of_several_contexts_one_is_chosen_by_its_size(folders):
    scored = score(folders, *LADDER)
    for context in LADDER:
        rows, provenance = load_scores(scored, size=context.size)
        assert torch.equal(
            torch.tensor(rows["short_nll"][:]), torch.tensor(load_rows(scored)[f"short_nll_{context.size}"][:])
        )
        assert provenance["contexts"] == [{"size": 4, "stride": 2}, {"size": 8, "stride": 5}]
        assert provenance["context"] == {"size": context.size, "stride": context.stride}
        assert "context" not in read_provenance(scored)
    assert torch.equal(read_row(scored, 3, size=4).short_nll[0], torch.tensor(load_rows(scored)["short_nll_4"][3]))
    for size, name in ((None, "size"), (5, "size 5")):
        with pytest.raises(ValueError, match=f"^{name}: .*scored holds scores with short contexts of 4, 8 tokens"):
            load_scores(scored, size=size)


def test_the_only_context_needs_no_name_and_another_one_is_refused(folders):
    scored = score(folders, CONTEXT)
    expected = torch.tensor(load_rows(scored)["short_nll_8"][:])
    for size in (None, 8):
        rows, provenance = load_scores(scored, size=size)
        assert torch.equal(torch.tensor(rows["short_nll"][:]), expected)
        assert provenance["context"] == {"size": 8, "stride": 5}
    assert read_row(scored, 0).size == 8
    with pytest.raises(ValueError, match=r"^size 9: .*scored holds scores with short contexts of 8 tokens"):
        load_scores(scored, size=9)


def test_a_plain_column_that_others_wrote_is_taken_as_it_is_but_not_for_a_size(folders, caplog):
    plain, sized = [[0.5] * LENGTH] * NUM_ROWS, [[0.25] * LENGTH] * NUM_ROWS
    some_rows(short_nll=plain).save_to_disk(str(folders / "foreign"))
    rows, provenance = load_scores(folders / "foreign")
    assert (rows["short_nll"][0].tolist(), provenance) == ([0.5] * LENGTH, {})
    assert "foreign does not say who scored it" in caplog.text
    with pytest.raises(ValueError, match=r"^size 8: .*foreign has a column short_nll, which does not say its size"):
        load_scores(folders / "foreign", size=8)
    some_rows(short_nll=plain, short_nll_8=sized).save_to_disk(str(folders / "both"))
    assert load_scores(folders / "both", size=8)[0]["short_nll"][0].tolist() == [0.25] * LENGTH
    with pytest.raises(ValueError, match=r"^size 4: .*both has a column short_nll, which does not"):
        load_scores(folders / "both", size=4)


@pytest.mark.parametrize(
    ("contexts", "settings", "warning"),
    [
        ([CONTEXT], {"size": 8, "stride": 4}, "scored was scored with stride 5, not 4"),
        (LADDER, {"size": 4, "stride": 3}, "scored was scored with stride 2, not 3"),
        ([CONTEXT], {"size": 8, "stride": 5}, None),
        ([CONTEXT], {}, None),
        (LADDER, {"size": 8, "stride": 5}, None),
    ],
)
def test_settings_of_other_windows_are_warned_of_with_the_difference(contexts, settings, warning, folders, caplog):
    scored = score(folders, *contexts)
    load_scores(scored, **settings)
    assert caplog.text == "" if warning is None else warning in caplog.text


def flipped(content):
    return content[:-200] + bytes([content[-200] ^ 1]) + content[-199:]


@pytest.mark.parametrize(
    ("read", "damage"),
    [
        (load_scores, lambda content: content[:-1]),
        (load_rows, lambda content: content + b"\0"),
        (verify, flipped),
        (lambda folder: read_row(folder, 0), flipped),
    ],
)
def test_a_shard_that_changed_since_is_refused_with_what_mends_it(read, damage, folders):
    scored = score(folders, CONTEXT)
    (shard,) = scored.glob("*.arrow")
    shard.write_bytes(damage(shard.read_bytes()))
    message = f"{shard} is damaged.*; `tokenweight score` with the same options makes it again"
    with pytest.raises(ValueError, match=message):
        read(scored)
    score(folders, CONTEXT)
    read(scored)


def test_rows_edited_after_they_were_scored_are_refused(folders):
    scored = score(folders, CONTEXT)
    edited = load_rows(scored).with_format(None).map(lambda row: {"input_ids": row["input_ids"][::-1]})
    edited.save_to_disk(str(folders / "edited"))
    assert load_scores(folders / "edited")[1] == {"context": {"size": 8}}  # its origin is unknown
    (folders / "edited" / "scores.json").write_bytes((scored / "scores.json").read_bytes())
    with pytest.raises(ValueError, match=r"edited was changed after it was scored: its rows are in data-00000"):
        load_scores(folders / "edited")


def word_tokenizer():
    """Words w3 to w60, and a BOS before a text, as llama's tokenizer puts one there."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{token}": token for token in range(3, models.VOCABULARY)}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def text(tmp_path):
    """A file, its tokens, and the folder of a model with its tokenizer."""
    tokenizer = word_tokenizer()
    models.tiny(dtype=torch.float32).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    path = tmp_path / "book.txt"
    path.write_text(" ".join(f"w{token}" for token in models.some_tokens(1, 58)[0].tolist()))
    return path, tokenizer(path.read_text())["input_ids"], str(tmp_path / "model")


@pytest.mark.parametrize(("number", "length"), [(0, 30), (1, 30), (1, 48), (0, None)])
def test_a_text_is_scored_as_its_rows_would_be(number, length, text):
    path, tokens, name = text
    row = score_text(path, name, number=number, length=length, size=8, stride=3)
    expected = tokens[number * (length or 128) : (number + 1) * (length or 128)]
    assert row.tokens.tolist() == [expected]
    model, batch = load_model(name), torch.tensor([expected])
    torch.testing.assert_close(row.long_nll, token_nll(model, batch), **OTHER_BATCH)
    short_nll = Scorer(model, ShortContext(8, 3), prefix=[1])(batch)
    torch.testing.assert_close(row.short_nll[:, 8:], short_nll[:, 8:], **OTHER_BATCH)
    assert torch.equal(row.short_nll[:, :8], row.long_nll[:, :8])
    assert row.mask.tolist() == [[False] + [True] * (len(expected) - 1)]
    default = score_text(path, name, number=number, length=length)
    sizes = ShortContext(size=len(expected) // 4, stride=len(expected) // 4 * 3 // 4)
    again = score_text(path, name, number=number, length=length, size=sizes.size, stride=sizes.stride)
    assert torch.equal(default.short_nll, again.short_nll)
    assert (again.size, again.stride, again.number) == (sizes.size, sizes.stride, number)
    assert again.num_rows == math.ceil(len(tokens) / (length or 128))


def test_a_text_may_be_given_as_it_is(text, tmp_path):
    path, _, name = text
    row = score_text("anything", name, text=path.read_text(), size=8)
    assert torch.equal(row.short_nll, score_text(path, name, size=8).short_nll)
    with pytest.raises(ValueError, match="anything holds no text"):
        score_text("anything", name, text=" \n")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"number": 2, "length": 30}, r"^row 2: .*book.txt has rows 0 to 1 of 30 tokens"),
        ({"number": -1, "length": 30}, r"^row -1: .*book.txt has rows 0 to 1 of 30 tokens"),
        ({"length": 30, "size": 30}, "^size 30: sequences hold 30 tokens: no token would have a shorter context"),
        ({"length": 129}, r"book.txt: rows of 129 tokens: the model has 128 positions"),
        ({"size": 8, "stride": 8}, "stride=8 does not fit size=8"),
        ({"text": "w5 w6 w7"}, r"book.txt: row 0 has 4 tokens: expected at least 8"),
        ({"number": 8, "length": 7}, r"book.txt: row 8 has 3 tokens: expected at least 8"),
    ],
)
def test_what_no_text_can_be_scored_with_is_refused(settings, message, text):
    with pytest.raises(ValueError, match=message):
        score_text(text[0], text[2], **settings)


@pytest.mark.parametrize(("name", "content"), [("empty.txt", " \n"), ("empty.jsonl", "")])
def test_a_file_without_text_is_refused(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} holds no text"):
        score_text(tmp_path / name, "never loaded")


def test_texts_are_scored_by_a_model_that_is_loaded_as_a_file_is(text):
    path, tokens, name = text
    model, tokenizer = load_model(name), word_tokenizer()
    rows = score_texts(model, tokenizer, [path.read_text(), "w5 w6 w7 w8 w9 w10 w11"], size=6, stride=2)
    expected = score_text(path, name, size=6, stride=2)
    assert [row.tokens[0].tolist() for row in rows] == [tokens, [1, *range(5, 12)]]
    for column in ("long_nll", "short_nll", "mask"):
        assert torch.equal(getattr(rows[0], column), getattr(expected, column)), column
    assert [row.size for row in rows] == [6, 6]
    assert [row.size for row in score_texts(model, tokenizer, [path.read_text(), "w5 " * 11])] == [len(tokens) // 4, 3]
    assert score_texts(model, tokenizer, []) == []


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ("w5 w6", {}, "^texts is a text: expected a list"),
        (["w5 " * 20, "w5"], {}, "^text 1 has 2 tokens: expected at least 8"),
        (["w5 " * 20], {"size": 21}, "^size 21: sequences hold 21 tokens"),
        (["w5 " * 20], {"size": 8, "stride": 8}, "stride=8 does not fit size=8"),
        (["w5 " * 20, "w5 " * 128], {}, "^text 1: rows of 129 tokens: the model has 128 positions"),
    ],
)
def test_texts_that_cannot_be_scored_are_named(texts, settings, message, text):
    with pytest.raises(ValueError, match=message):
        score_texts(load_model(text[2]), word_tokenizer(), texts, **settings)


def test_a_tokenizer_of_another_model_is_refused():
    model = models.tiny(vocab_size=20, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^text 0: token 59 is not in the vocabulary of the model, which has 20"):
        score_texts(model, word_tokenizer(), ["w5 w59 " * 10])


def test_a_scored_row_is_a_table_with_a_line_for_each_token(text):
    path, tokens, name = text
    row = score_text(path, name, size=8, stride=3)
    frame = row.to_pandas()
    assert list(frame) == ["position", "token", "text", "long_nll", "short_nll", "mask"]
    assert frame["position"].tolist() == list(range(len(tokens)))
    assert (frame["token"].tolist(), frame["mask"].tolist()) == (tokens, row.mask[0].tolist())
    assert "".join(frame["text"]) == word_tokenizer().decode(tokens)
    assert torch.equal(torch.tensor(frame["long_nll"]), row.long_nll[0])
    assert torch.equal(torch.tensor(frame["short_nll"]), row.short_nll[0])


def test_a_corpus_is_a_table_with_a_line_for_each_row(folders):
    frame = corpus_frame(score(folders, *LADDER, with_long=True))
    rows = load_rows(folders / "scored")
    statistics = [f"{name}_{size}" for size in (4, 8) for name in ContextGain._fields]
    assert list(frame) == ["num_tokens", "document", "offset", *statistics]
    assert frame["num_tokens"].tolist() == [LENGTH] * NUM_ROWS
    assert frame["document"].tolist() == list("abcdefg")
    assert torch.equal(torch.tensor(frame["gain_mean_8"]), torch.tensor(rows["gain_mean_8"][:]))
    assert list(corpus_frame(folders / "rows")) == ["num_tokens", "document", "offset"]
