"""The commands as a user runs them: `python -m tokenweight`, with real files."""

import io
import json
import platform
import re
import subprocess
import sys
from importlib.metadata import version

import datasets
import faulty
import pytest
import torch
from transformers import AutoModelForCausalLM

import models
from texts import EXCERPT, chat_tokenizer, conversation, trained_tokenizer
from tokenweight import cli
from tokenweight.records import device_name, read_json

TRAIN = ["train", "--model", "model", "--data", "scored", "--out", "out"]
SCORE = ["score", "rows", "--model", "model", "--size", "16", "--stride", "12"]
EVAL = ["eval", "model", "--data", "rows", "--probes", "none"]
PREPARE = ["--tokenizer", "model", "--length", "64"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder that commands run in: a model with its tokenizer, texts, rows, scores and recipes."""
    root = tmp_path_factory.mktemp("cli")
    for name, tokenizer in {
        "model": trained_tokenizer(framed=True),
        "other": trained_tokenizer(vocab_size=299),
    }.items():
        special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        models.tiny(dtype=torch.float32, vocab_size=300, **special).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "empty.txt").write_text("")
    (root / "binary.txt").write_bytes(b"\xff\xfe")
    (root / "bad.jsonl").write_text('{"text": "a"}\n{"body": "a"}\n')
    (root / "book.txt").write_text(EXCERPT.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    (root / "notes").mkdir()
    (root / "notes" / "mine").write_text("mine")
    recipe = (
        "model: model\ndata: scored\nout: trained\nweighting: longce\ntrainer:\n  max_steps: 9\n  learning_rate: 1e-3\n"
    )
    (root / "recipe.yaml").write_text(recipe + "  disable_tqdm: true\n")
    for name, extra in (("typo", "wieghting: dense"), ("mistyped", "size: small"), ("number", "weighting: 3")):
        (root / f"{name}.yaml").write_text(f"model: model\ndata: rows\nout: out\nscorer: self\n{extra}\n")
    return root


@pytest.fixture(scope="module")
def run(place):
    """Runs a command in `place`: (exit status, standard output, standard error)."""
    return lambda *argv: faulty.run(place, *argv, small=False)


@pytest.fixture(scope="module")
def rows(run, place):
    status, printed, _ = run("prepare", "book.txt", *PREPARE, "--out", "rows")
    assert status == 0
    return printed


@pytest.fixture(scope="module")
def scored(run, rows):
    status, printed, _ = run(*SCORE, "--out", "scored")
    assert status == 0
    return printed


def test_prepare_writes_rows_and_prints_what_became_of_the_text(rows, place):
    data, note = datasets.load_from_disk(str(place / "rows")), read_json(place / "rows" / "rows.json")
    assert (len(data), note["length"], note["texts"]) == (note["rows"], 64, ["book.txt"])
    assert rows == (
        f"rows: {len(data)} rows, {note['tokens']:,} tokens from 1 document; {note['dropped_tokens']} of their tokens "
        "are in no row; documents shorter than a row: 0 (0 of them empty)\n"
        "predicted tokens with more context than 16, a quarter of the length:\n"
        f"  76.2% of {63 * len(data):,} in book.txt\n"
    )
    assert note["environment"]["command"] == ["tokenweight", "prepare", "book.txt", *PREPARE, "--out", "rows"]


def test_prepare_given_again_says_that_it_is_complete(rows, run, place):
    before = (place / "rows" / "rows.json").read_bytes()
    status, printed, errors = run("prepare", "book.txt", *PREPARE, "--out", "rows")
    assert (status, errors) == (0, "")
    assert printed == rows.replace("rows: ", "rows: complete already, ", 1)
    assert (place / "rows" / "rows.json").read_bytes() == before
    (place / "more").mkdir(exist_ok=True)
    (place / "more" / "a.txt").write_text("a" * 3000)
    assert run("prepare", "more", *PREPARE, "--out", "of-more")[0] == 0
    (place / "more" / "b.txt").write_text("a")
    status, _, errors = run("prepare", "more", *PREPARE, "--out", "of-more")
    assert status == 2
    assert "sources is {'files': 1, 'bytes': 3000} there, {'files': 2, 'bytes': 3001} now" in errors


@pytest.mark.slow
def test_chats_are_prepared_scored_trained_and_shown(run, place):
    tokenizer = chat_tokenizer()
    models.tiny(dtype=torch.float32, vocab_size=304).save_pretrained(place / "chat-model")
    tokenizer.save_pretrained(place / "chat-model")
    talks = [conversation("a" * number, "some years ago", "never", "mind") for number in (20, 9, 30)]
    (place / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    of_model = ["--model", "chat-model"]
    options = ["--tokenizer", "chat-model", "--length", "128", "--chat"]
    status, printed, errors = run("prepare", "talks.jsonl", *options, "--out", "talks")
    assert (status, errors) == (0, "")
    note = read_json(place / "talks" / "rows.json")
    assert f"talks: 3 rows, {note['tokens']} tokens from 3 conversations, {note['predicted_tokens']} of them" in printed
    assert run("score", "talks", *of_model, "--size", "16", "--long", "--out", "talks-scored")[0] == 0
    of_teacher = ["--as", "teacher", "--top_k", "4", "--out", "talks-taught"]
    assert run("score", "talks-scored", *of_model, *of_teacher)[0] == 0
    of_data = [*of_model, "--data", "talks-taught", "--distill.weight", "0.5"]
    assert run("train", *of_data, "--out", "of-talks", "--trainer.max_steps", "1")[0] == 0
    assert read_json(place / "of-talks" / "run.json")["settings"]["distill"] == {"weight": "0.5"}
    assert "--top_k 4: is that of --as teacher" in run(*SCORE, "--top_k", "4", "--out", "no")[2]
    status, printed, _ = run("show", "talks-scored", "--row", "1")
    assert status == 0
    assert "some years" in printed
    assert run("prepare", "talks.jsonl", *options[:-1], "--out", "texts")[2].count("--chat reads it") == 1


def test_numbers_of_tokens_are_typed_with_units_and_sequences_are_kept_in_parquet(run, place, own_cache):
    options = ["--tokenizer", "model", "--length", "0_064", "--format", "parquet"]
    status, _, errors = run("prepare", "book.txt", *options, "--out", "rows-parquet")
    assert (status, errors) == (0, "")
    options = ["--model", "model", "--format", "parquet", "--shard_tokens", "1k", "--max_tokens", "32K"]
    status, printed, errors = run("score", "rows-parquet", *options, "--out", "parquet", "--shard", "0/1")
    assert (status, errors) == (0, "")
    assert printed.startswith("parquet: size 16, a quarter of the longest sequence, and stride 12\n")
    assert read_json(place / "parquet" / "scores.json")["shard_tokens"] == 1024
    assert run("export", "parquet", "--out", "lines", "--format", "jsonl")[0] == 0
    trained = run("train", "--model", "model", "--data", "parquet", "--out", "of-parquet", "--trainer.max_steps", "1")
    assert (trained[0], run("show", "parquet", "--row", "1")[0]) == (0, 0)


def test_score_scores_once(scored, run, place):
    num = 64 * len(datasets.load_from_disk(str(place / "rows")))
    assert re.search(rf"{num:,} tokens, {num:,} of them scored now in [\d,]+ s, [\d,]+ tokens/s", scored)
    status, printed, errors = run(*SCORE, "--out", "scored")
    assert (status, errors) == (0, "")
    assert printed.endswith(f"{num:,} tokens, 0 of them scored now\n")


def test_show_prints_text_and_draws_a_picture(scored, run, place):
    for name, begins in (("shown.svg", b"<svg"), ("shown.png", b"\x89PNG"), ("shown.HTML", b"<!doctype html>")):
        status, printed, errors = run("show", "scored", "--row", "1", "--start", "4", "--num", "60", "--save", name)
        assert (status, errors) == (0, "")
        assert (place / name).read_bytes().startswith(begins)
    num_rows = len(datasets.load_from_disk(str(place / "scored")))
    assert printed.startswith(f"scored · row 1 of {num_rows} · tokens 4 to 63 of 64\n")
    assert "weight  ((0, not trained)) (below 1) [above 1] [[2 or more]]" in printed  # no terminal, no color: marks
    assert "dense:interpolation=0.75" in printed


def test_show_scores_a_text_at_once(run, place):
    options = ["--model", "model", "--length", "100", "--row", "1", "--size", "20", "--stride", "10"]
    kernel = ["--attn_implementation", "eager"]
    status, printed, errors = run("show", "book.txt", *options, *kernel, "--weighting", "sparse:keep=0.2")
    assert (status, errors) == (0, "")
    assert printed.startswith("book.txt · row 1 of ")
    assert "effective tokens 19.0 of 99" in printed
    text = (place / "book.txt").read_text(encoding="utf-8")
    assert run("show", "--text", text, *options, "--weighting", "sparse:keep=0.2") == (
        0, printed.replace("book.txt", "text", 1), "",
    )  # fmt: skip


def test_show_scores_what_it_reads_from_standard_input(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for words in (["book.txt"], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO((place / "book.txt").read_text(encoding="utf-8")))
        assert cli.main(["show", *words, "--model", "model", "--length", "90", "--top", "0"]) == 0
    file, _, read = capsys.readouterr().out.rpartition("standard input ")
    assert file == f"book.txt {read}"


def logged(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


@pytest.mark.slow
def test_train_takes_a_recipe_with_overrides_and_its_record_as_a_recipe(scored, run, place):
    overrides = ["--trainer.max_steps", "2", "--trainer.bf16", "--weighting", "sparse:keep=0.5", "--trainer.seed=3"]
    status, printed, _ = run("train", "--config", "recipe.yaml", *overrides)
    assert status == 0
    assert "trained: the trained model, run.json and metrics.jsonl\n" in printed
    settings = read_json(place / "trained" / "run.json")["settings"]
    assert settings["weighting"] == "sparse:keep=0.5,seed=0"
    assert {name: str(value) for name, value in settings["trainer"].items()} == {
        "max_steps": "2", "learning_rate": "1e-3", "disable_tqdm": "True", "seed": "3",
        "bf16": "True",
    }  # fmt: skip
    assert [step for step, _, _ in logged(place / "trained")] == [1, 2]
    trained = AutoModelForCausalLM.from_pretrained(place / "trained")
    before = AutoModelForCausalLM.from_pretrained(place / "model")
    assert not torch.equal(trained.lm_head.weight, before.lm_head.weight)
    assert run("train", "--config=trained/run.json", "--out=again")[0] == 0
    assert logged(place / "again") == logged(place / "trained")


def test_eval_prints_the_table_that_it_writes_and_goes_on_from_its_folder(rows, run, place):
    assert run(*EVAL, "--out", "before")[0] == 0
    status, printed, errors = run(*EVAL, "--baseline", "before", "--out", "after")
    assert (status, errors) == (0, "")
    assert printed.endswith("after: eval.json, table.csv, and table.md with every measure\n")
    assert max(map(len, printed.splitlines())) <= 100
    assert "+0.0000" in printed
    assert "too few documents" in printed  # all rows are of one book
    record = read_json(place / "after" / "eval.json")
    assert [model["model"] for model in record["models"]] == ["model", "model"]
    loss = record["models"][0]["measures"][0]["value"]
    assert f" {loss:.4f} " in printed
    assert f"| {loss:.4f} |" in (place / "after" / "table.md").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["prepare", "missing.txt", *PREPARE, "--out", "out"], "missing.txt: no such file or folder"),
        (["prepare", "empty.txt", *PREPARE, "--out", "out"], "the text is empty"),
        (["prepare", "book.txt", *PREPARE, "--out", "out", "--subset", "en"], "--subset en: found no data set"),
        (["prepare", "book.txt", *PREPARE, "--out", "out", "--split", "test"], "--split test: found no data set"),
        (["prepare", "book.txt", "binary.txt", *PREPARE, "--out", "out"], "binary.txt: not UTF-8 text (byte 0"),
        (["prepare", "bad.jsonl", *PREPARE, "--out", "out"], "bad.jsonl, line 2: no column 'text': found body"),
        (["prepare", "book.txt", *PREPARE, "--out", "notes"], "--out notes: exists already"),
        (["prepare", "book.txt", *PREPARE, "--out", "rows", "--short", "pack"], "short is 'drop' there, 'pack' now"),
        (["prepare", "book.txt", *PREPARE, "--out", "out", "--glob", "*.txt"], "--glob *.txt: applies to folders"),
        (["prepare", "book.txt", *PREPARE, "--out", "out", "--num_proc", "0"], "--num_proc 0: expected at least 1"),
        (["prepare", "book.txt", *PREPARE[:-1], "9999", "--out", "out"], "lower it, or pack them by --short pack"),
        (["prepare", "book.txt", "--tokenizer", "gone", "--length", "64", "--out", "out"], "'gone' cannot be loaded"),
        (["prepare", "book.txt", *PREPARE, "--out", "out", "--size", "64"], "--size 64: expected less than length, 64"),
        (["prepare", "book.txt", *PREPARE, "--out", "out", "--order", "similar"], "--order similar: such sequences"),
        (["prepare", "book.txt", *PREPARE, "--out", "out", "--shortest", "8"], "--shortest 8: only with short"),
        (["prepare", *PREPARE, "--out", "out"], "name at least one text file, folder or data set"),
        (["prepare", "book.txt", *PREPARE, "--out", "out", "--lenght", "3"], "--lenght: unknown option: did you mean"),
        (
            ["prepare", "book.txt", *PREPARE, "--out", "out", "--skip_invalid", "true"],
            "--skip_invalid true: a switch, which takes no value: expected --skip_invalid alone",
        ),
        (
            ["prepare", "book.txt", *PREPARE, "--out", "out", "--skip_invalid", "False"],
            "--skip_invalid False: a switch, which takes no value: expected --no_skip_invalid",
        ),
        ([*SCORE[:4], "--size", "64", "--stride", "48", "--out", "out"], "--size 64: sequences hold 64 tokens"),
        ([*SCORE[:4], "--size", "8", "--stride", "8", "--out", "out"], "stride=8 does not fit size=8"),
        ([*SCORE[:4], "--size", "small", "--stride", "8", "--out", "out"], "--size small: expected a number of tokens"),
        ([*SCORE[:4], "--size", "8,16", "--stride", "8", "--out", "out"], "--stride 8: expected one number for each"),
        ([*SCORE[:4], "--size", "8,8", "--out", "out"], "size: expected different sizes, found 8, 8"),
        ([*SCORE[:4], "--stride", "8", "--out", "out"], "--stride 8: belongs to --size, which is not given"),
        ([*SCORE, "--shard", "2/2", "--out", "out"], "--shard 2/2: expected i/n, from 0/n to n-1/n"),
        ([*SCORE, "--shard", "1", "--out", "out"], "--shard 1: expected i/n"),
        ([*SCORE[:-1], "11", "--out", "scored"], "contexts is [{'size': 16, 'stride': 12}] there"),
        ([*SCORE, "--long", "--out", "scored"], "long is False there, True now"),
        ([*SCORE, "--out", "notes"], "--out notes: exists and holds no scores"),
        ([*SCORE, "--out", "out", "--dtype", "float77"], "float77"),
        (["score", "scored", *SCORE[2:], "--out", "out"], "the rows have a column short_nll_16 already"),
        (["score", "notes", *SCORE[2:], "--out", "out"], "notes is not a finished `datasets` folder"),
        (["score", "gone", *SCORE[2:], "--out", "out"], "gone: no such folder of rows"),
        (["score", "rows", "--model", "gone", *SCORE[4:], "--out", "out"], "'gone' cannot be loaded"),
        (["train", "--model", "other", *TRAIN[3:]], "scored was made with the tokenizer of model ("),
        (["train", "--model", "gone", *TRAIN[3:]], "'gone' cannot be loaded"),
        ([*TRAIN, "--data", "rows"], "rows has no column short_nll"),
        ([*TRAIN, "--out", "notes"], "--out notes: exists; name a new folder"),
        ([*TRAIN, "--weighting", "sprase"], "unknown weighting 'sprase' (did you mean 'sparse'?)"),
        ([*TRAIN, "--weighting", "sparse:keeps=1"], "unknown setting 'keeps' of weighting 'sparse' (did you"),
        ([*TRAIN, "--weighting", "nowhere.at.all"], "weighting 'nowhere.at.all' cannot be imported"),
        ([*TRAIN, "--trainer.max_step", "3"], "--trainer: unknown setting 'max_step': did you mean 'max_steps'?"),
        ([*TRAIN, "--trainer.hub_token", "hf_x"], "trainer.hub_token would be written into run.json: "),
        ([*TRAIN, "--trainer.max_steps", "few"], "--trainer.max_steps 'few': expected a whole number"),
        ([*TRAIN, "--trainer.max_steps"], "--trainer.max_steps: expected a value"),
        ([*TRAIN[:1], "--trainer.run_name", *TRAIN[1:]], "--trainer.run_name: expected a value"),
        ([*TRAIN, "--extend.length", "--trainer.bf16"], "--extend.length: expected a value"),
        ([*TRAIN, "--trainer.bf17"], "--trainer: unknown setting 'bf17': did you mean 'bf16'?"),
        ([*TRAIN, "--trainer", "max_steps"], "--trainer: unknown option: expected --trainer.NAME VALUE"),
        ([*TRAIN, "--learning_rate", "1e-3"], "a field of the trainer: --trainer.learning_rate"),
        ([*TRAIN, "--learning-rate=1e-3"], "a field of the trainer: --trainer.learning_rate"),
        ([*TRAIN, "--lr", "1e-3"], "a field of the trainer: --trainer.learning_rate"),
        ([*TRAIN, "--batch_size", "8"], "a field of the trainer: --trainer.per_device_train_batch_size"),
        ([*TRAIN, "--max_step", "8"], "a field of the trainer: --trainer.max_steps"),
        ([*TRAIN, "--trainer.max_steps", "-3"], "--trainer.max_steps -3: expected at least 1, or -1"),
        ([*TRAIN, "--trainer.report_to", "neptune"], "--trainer.report_to 'neptune': "),
        ([*TRAIN, "--trainer.report_to", "[trackio, nonsense]"], "--trainer.report_to 'nonsense': "),
        ([*TRAIN, "--trainer.lr_scheduler_type", "cosine_with_min_lr"], "--trainer.lr_scheduler_type cosine_with_min"),
        ([*TRAIN, "--trainer.lr_scheduler_type=linear", "--trainer.lr_scheduler_kwargs={x: 1}"], "kwargs {'x': 1}: "),
        ([*TRAIN, "--trainer.optim_args", "nonsense"], "--trainer.optim adamw_torch_fused: optim_args nonsense: "),
        ([*TRAIN, "--trainer.deepspeed", "gone.json"], "--trainer.deepspeed gone.json: no such file"),
        ([*TRAIN, "--trainer.log_level", "loud"], "--trainer.log_level 'loud': expected one of detail, debug"),
        ([*TRAIN, "--out", "notes/mine"], "--out notes/mine: is a file"),
        ([*TRAIN, "--out", "notes/mine/out"], "--out notes/mine/out: cannot be written to: Not a directory"),
        ([*TRAIN, "--trainer.optim", "adamw_bnb_8bit"], "bitsandbytes"),
        ([*TRAIN, "--trainer.resume_from_checkpoint", "gone"], "gone"),
        ([*TRAIN, "--weigthing", "dense"], "--weigthing: unknown option: did you mean --weighting?"),
        (["train", "--config", "gone.yaml"], "--config gone.yaml cannot be read"),
        (["train", "--config", "typo.yaml"], "unknown setting 'wieghting': did you mean 'weighting'?"),
        (["train", "--config", "mistyped.yaml"], "size"),
        (["train", "--config", "number.yaml"], "weighting"),
        (["export", "scored", "--out", "out", "--size", "17"], "scored has no column long_nll: score it with"),
        (["export", "scored", "--out", "out", "--format", "parquet", "--size", "16"], "--size 16: --format parquet"),
        (["show", "scored", "--size", "17"], "--size 17: scored holds scores with short contexts of 16 tokens"),
        ([*TRAIN, "--size", "17"], "--size 17: scored holds scores with short contexts of 16 tokens"),
        (["show", "rows"], "rows has no column short_nll"),
        (["show", "scored", "--row", "999"], "--row 999: scored has rows 0 to"),
        (["show", "scored", "--weighting", "dens"], "unknown weighting 'dens' (did you mean 'dense'?)"),
        (["show", "scored", "--length", "9"], "--length and --stride apply to a text: scored is"),
        (["show", "book.txt"], "--model: book.txt is a text: name the model that scores it"),
        (["show"], "expected a folder of scored sequences, a file or - (standard input), or --text"),
        (["show", "scored", "--text", "a"], "expected a folder of scored sequences, a file or - (standard input)"),
        (["show", "Call me Ishmael", "--model", "model"], "Call me Ishmael: no such folder or file; a text itself is"),
        (["show", "--text", "Ahab", "--model", "model"], "tokens: expected at least 8"),
        (["show", "scored", "--save", "out.jpg"], "--save out.jpg: expected a name that ends in .svg, .png or .html"),
        (["show", "scored", "--save", "none/out.svg"], "--save none/out.svg: no such folder"),
        (["show", "book.txt", "--model", "gone"], "'gone' cannot be loaded"),
        (["show", "bad.jsonl", "--model", "model", "--row", "1"], "--row 1: bad.jsonl has rows 0 to 0"),
        (["show", "scored", "--model", "other"], "scored was made with the tokenizer of model ("),
        ([*EVAL, "--out", "notes"], "--out notes: exists already; name a new folder"),
        ([*EVAL, "--out", "out", "--sizes", "64"], "--sizes 64: expected rising numbers from 2 to 63, below the 64"),
        ([*EVAL, "--out", "out", "--baseline", "other"], "rows was made with the tokenizer of model ("),
        ([*EVAL, "--out", "out", "--evaluator", "gone"], "'gone' cannot be loaded"),
        ([*EVAL, "--out", "out", "--haystack", "gone.txt"], "--haystack gone.txt: cannot be read"),
        ([*EVAL[:4], "--out", "out"], "length 16 is too short for probes 'single': they need at least"),
        (["demo", "--out", "notes"], "--out notes: exists already"),
        (["demo", "--out", "out", "--weighting", "dens"], "unknown weighting 'dens'"),
        (["trian"], "unknown command 'trian': did you mean 'train'?"),
        (["nonsense"], "unknown command 'nonsense': expected one of prepare, score, plan, train, export, upload"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)  # fmt: skip
def test_a_bad_input_gets_one_line_and_status_2_and_leaves_nothing(argv, message, scored, run, place):
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    status, printed, errors = run(*argv)
    left = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    for path in sorted(left.keys() - before.keys(), reverse=True):  # so that the next test is not misled
        path.rmdir() if path.is_dir() else path.unlink()
    assert (status, errors.count("\n")) == (2, 1), errors
    assert errors.startswith(f"tokenweight {argv[0]}: ")
    assert message in errors
    assert printed == ""
    assert left == before


@pytest.mark.parametrize(
    ("argv", "option"),
    [
        (["prepare", "book.txt", *PREPARE], "--out"),
        (["prepare", "book.txt", *PREPARE[:-1], "long", "--out", "out"], "--length"),
        (TRAIN[:-2], "--out"),
        ([*TRAIN, "--size", "small"], "--size"),
        (EVAL, "--out"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)  # fmt: skip
def test_an_option_that_tyro_misses_or_cannot_read_is_named_with_status_2(argv, option, place, run):
    before = sorted(place.rglob("*"))
    status, printed, errors = run(*argv)
    assert (status, printed) == (2, "")
    assert option in errors
    assert sorted(place.rglob("*")) == before


def test_a_message_about_a_parameter_names_the_option_and_no_other_word_becomes_one():
    for message in ("size 12: a", "size: a", "trainer.seed 'a b': a", "config x.yaml: a", "config x cannot be read: a"):
        assert cli.with_option(message, cli.COMMANDS["train"]) == f"--{message}"
    for message in ("sizes 12: expected", "size of windows: 3", "data holds no rows", "config of a model: 3 layers"):
        assert cli.with_option(message, cli.COMMANDS["train"]) == message
    assert cli.with_option("rows gone: no such folder", cli.COMMANDS["score"]) == "rows gone: no such folder"
    assert cli.with_option("unknown command", None) == "unknown command"


@pytest.mark.parametrize(
    ("argv", "field"),
    [
        (["prepare", "a.txt", "--tokenizer", "m", "--out", "o", "--length", "32k"], "length"),
        (["score", "rows", "--model", "m", "--out", "o", "--max_tokens", "32k"], "max_tokens"),
        (["score", "rows", "--model", "m", "--out", "o", "--shard_tokens", "0_032K"], "shard_tokens"),
        (["export", "scored", "--out", "o", "--size", "32k"], "size"),
        (["show", "scored", "--size", "32k"], "size"),
        (["train", "--model", "m", "--data", "d", "--out", "o", "--size", "32k"], "size"),
        (["plan", "--model", "m", "--stride", "32k"], "stride"),
        (["show", "a.txt", "--stride", "32k"], "stride"),
        (["show", "a.txt", "--length", "32k"], "length"),
        (["figures", "scored", "--out", "o", "--size", "32k"], "size"),
        (["report", "scored", "--size", "32k"], "size"),
        (["plan", "--model", "m", "--length", "32k"], "length"),
        (["eval", "m", "--data", "rows", "--out", "o", "--max_tokens", "32k"], "max_tokens"),
        (["eval", "m", "--data", "rows", "--out", "o", "--short", "32k"], "short"),
        (["eval", "m", "--data", "rows", "--out", "o", "--long_size", "32k"], "long_size"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)  # fmt: skip
def test_a_number_of_tokens_is_typed_with_its_unit(argv, field, unchecked):
    assert getattr(cli.parse(argv), field) == 32768


@pytest.mark.parametrize("argv", [["prepare"], ["train", "--config", "gone.yaml"], ["nonsense"]])
def test_a_process_of_its_own_leaves_with_status_2(argv, tmp_path):
    done = subprocess.run([sys.executable, "-m", "tokenweight", *argv], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert argv[0] in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_of_every_command_comes_without_torch():
    script = """
import sys
from tokenweight.cli import COMMANDS, main
assert {main(words) for words in ([], ["-h"], ["--help"], *([name, "--help"] for name in COMMANDS))} == {0}
assert main(["train", "--model", "m", "--help"]) == 0
assert not {"torch", "transformers", "datasets", "matplotlib"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("usage: tokenweight COMMAND") == 3
    for name, option in {"prepare": "--length", "score": "--stride", "train": "--weighting", "show": "--save"}.items():
        assert re.search(rf"usage: tokenweight {name} .*{option}", done.stdout, re.DOTALL)


def test_version_prints_what_a_bug_report_needs(capsys):
    assert cli.main(["--version"]) == 0
    printed = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    packages = ("tokenweight", "torch", "transformers", "accelerate", "datasets")
    expected = {name: version(name) for name in packages}
    assert printed == {**expected, "python": platform.python_version(), "device": device_name()}
