"""The model card says what the records say, keeps what others wrote, and never costs a model."""

import dataclasses
import json
import re
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from distributed import some_rows
from huggingface_hub import ModelCard

import models
from texts import trained_tokenizer
from tokenweight import ShortContext, cli, load_model
from tokenweight.data import Contents, Source, load_rows, read_contents, score_folder
from tokenweight.evaluate import add_evaluation
from tokenweight.method import WEIGHTINGS
from tokenweight.models import weights_fingerprint
from tokenweight.records import read_json, write_json
from tokenweight.train import TrainSettings, resolve, train
from tokenweight.train.card import write_card
from tokenweight.train.records import describe
from tokenweight.train.sequences import Sequences


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, its scored rows of known origin, and a trained folder."""
    root = tmp_path_factory.mktemp("card")
    tokenizer = trained_tokenizer()
    tokenizer.save_pretrained(root / "model")
    models.tiny(dtype=torch.float32, vocab_size=300).save_pretrained(root / "model")
    some_rows((40,) * 8, scored=False).save_to_disk(str(root / "rows"))
    noted = {"texts": ["some/books", "notes.txt"], "hub": ["some/books"], "split": "train", "seed": 0, "documents": 5}
    write_json(root / "rows" / "rows.json", {**noted, "rows": 8, "tokens": 320, "tokenizer": "model"})
    contexts = [ShortContext(10, 7), ShortContext(20, 15)]
    score_folder(root / "rows", str(root / "model"), contexts, root / "scored", with_long=True)
    train(settings(root, "trained"))
    return root


def settings(root, out, **changes):
    trainer = {"max_steps": 4, "disable_tqdm": True, "seed": 7, "save_steps": 2, "weight_decay": 0.25}
    given = TrainSettings(str(root / "model"), str(root / "scored"), str(root / out), size=10, trainer=trainer)
    return dataclasses.replace(given, **{"extend": {"length": 512}, **changes})


@pytest.fixture
def folder(place, tmp_path):
    """The card and the records of a trained folder, to be changed."""
    for name in ("README.md", "run.json", "metrics.jsonl"):
        (tmp_path / name).write_text((place / "trained" / name).read_text())
    return tmp_path


def lines(folder):
    """The table of the card, by the names of its lines."""
    text = (Path(folder) / "README.md").read_text()
    return dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", text.partition("## Evaluation")[0], flags=re.MULTILINE))


def changed(folder, **changes):
    """The lines of the card after a change of its record; None takes a fact away."""
    run = {**read_json(folder / "run.json"), **changes}
    write_json(folder / "run.json", {key: value for key, value in run.items() if value is not None})
    assert write_card(folder)
    return lines(folder)


def test_a_trained_folder_has_a_card_that_says_what_its_records_say(place):
    found, run = lines(place / "trained"), read_json(place / "trained" / "run.json")
    fingerprint = run["data"]["weights_fingerprint"]
    began = weights_fingerprint(load_model(place / "model"))
    assert run["model"]["weights_fingerprint"] == began
    loss = [json.loads(line) for line in (place / "trained" / "metrics.jsonl").read_text().splitlines()][-2]["loss"]
    assert found["Base model"] == f"`{place}/model`, fingerprint of its weights {began}"
    theta = 1e4 * 4 ** (4 / 2)  # s^(d / (d - 2)) for s = 4 and the d = 4 dimensions of a head
    context = f"default, 512 positions, theta {theta:g}; before training: default, 128 positions, theta 10000"
    assert found["Context"] == context
    weighting = (
        r"`dense:interpolation=0.75`: w = interpolation + (1 - interpolation) · s / mean(s), s = \|long - short\|"
    )
    assert found["Weighting"] == weighting
    scored = f"`{place}/model`, frozen, windows of 10 tokens, stride 7, fingerprint of its weights {fingerprint}"
    assert found["Short losses"] == scored
    texts = "`some/books`, `notes.txt`, split train, documents: 5, seed of their order: 0"
    assert found["Texts"] == texts
    assert found["Rows"].startswith("8 of 40 tokens, 320 in all, tokenizer of `model`")
    assert run["data"]["rows_fingerprint"] in found["Rows"]
    assert found["Trained"] == f"4 steps, 0.5 epochs, 4 rows, 160 tokens, last weighted loss logged {loss:.4f} nats"
    for said in ("optimizer adamw_torch_fused", "weight decay 0.25", "schedule constant_with_warmup", "seed 7"):
        assert said in found["Trainer"]
    assert f"torch {torch.__version__}" in found["Versions"]
    assert (found["Device"], found["Date"]) == (run["device"], run["date"])
    assert found["Again"].startswith("`tokenweight train --config run.json --out again`")
    card = ModelCard.load(place / "trained" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "tags": ["tokenweight", "long-context"],
        "datasets": ["some/books"],
    }
    assert not list((place / "trained").glob("checkpoint-*/README.md"))


def test_what_is_not_known_is_left_out(folder):
    (folder / "metrics.jsonl").unlink()
    full = set(lines(folder))
    gone = dict.fromkeys(["model", "rope", "texts", "rows", "arguments", "versions", "device", "commit", "date"])
    gone |= dict.fromkeys(["command", "attn_implementation"])
    found = changed(folder, data={}, **gone)
    assert set(found) == {"Base model", "Weighting", "Short losses", "Weights", "Again"} < full
    assert found["Short losses"] == "stored"
    assert "None" not in (folder / "README.md").read_text()


def test_texts_of_other_rows_and_rotary_settings_that_nobody_can_name_are_left_out(place):
    model, provenance = models.tiny(), {"rows": str(place / "rows")}
    run = resolve(dataclasses.replace(settings(place, "none"), extend={}, trainer={}))

    def read(contents):
        source = Source(str(place / "scored"), load_rows(place / "scored"), contents, provenance)
        return describe(run, Sequences([source], [1.0], None), None, model.config, model.config)

    facts = read(read_contents(place / "rows"))
    assert facts["texts"]["documents"] == 5
    assert facts["rope"] == {
        **dict.fromkeys(("before", "after"), "default, 128 positions, theta 10000"),
        "positions": 128,
    }
    model.config.rope_parameters = {"some_attention": {"rope_type": "default"}}
    facts = read(Contents(7, 7 * 40, 40, 40))
    assert facts["texts"] == {}
    assert facts["rope"] == {"before": None, "after": None, "positions": 128}


def test_names_of_the_hub_are_in_the_front_matter_and_those_of_files_are_not(folder):
    run = read_json(folder / "run.json")
    changed(folder, settings={**run["settings"], "model": "some/model"}, texts={"texts": ["books/a"], "hub": []})
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "some/model"
    (folder / "README.md").unlink()
    changed(folder)
    assert "datasets" not in ModelCard.load(folder / "README.md").data.to_dict()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"scorer": "self", "size": 16, "stride": 12},
            "the model itself, as it is trained, windows of 16 tokens, stride 12",
        ),
        (
            {"scorer": "judge", "size": 16, "stride": 12},
            "`judge`, frozen, windows of 16 tokens, stride 12, revision a1",
        ),
        ({"weighting": "uniform"}, None),
        ({"data": {"context": {"size": 20, "stride": 15}}}, "windows of 20 tokens, stride 15"),
    ],
)
def test_the_scorer_is_the_one_that_scored(given, said, folder):
    given = dict(given)
    run = read_json(folder / "run.json")
    data = {**run["data"], **given.pop("data", {})}
    scorer = {"model": "judge", "revision": "a1"}
    settings = {**run["settings"], **given}
    found = changed(folder, settings=settings, scores=settings["scorer"], data=data, scorer=scorer).get("Short losses")
    assert found == said or said in found


def test_the_weights_that_the_run_began_from_are_named(folder):
    settings = {**read_json(folder / "run.json")["settings"], "model": "some/model"}
    found = changed(folder, settings=settings, model={"revision": "a1b2", "weights_fingerprint": "0123"})
    assert found["Base model"] == "`some/model`, revision a1b2, fingerprint of its weights 0123"


@pytest.mark.parametrize(
    ("weighting", "allowed"),
    [
        ("dense", False),
        ("sparse:keep=0.1", False),
        ("my.weights", True),
        ("floor(dense(interpolation=0.5), minimum=0.1)", False),
        ("floor(my.weights, minimum=0.5)", True),
    ],
)
def test_the_command_that_repeats_a_run_allows_its_code(weighting, allowed, folder):
    found = changed(folder, settings={**read_json(folder / "run.json")["settings"], "weighting": weighting})
    assert ("--allow_code" in found["Again"]) is allowed


def test_each_weighting_of_the_library_has_its_formula(folder):
    assert all(kind.formula for kind in WEIGHTINGS)
    settings = read_json(folder / "run.json")["settings"]
    for text, said in (
        ("longce:cap=2", "`longce:cap=2`: w = min(exp(short - long), cap)"),
        (
            "mix(longce, Uniform, share=0.5)",
            "mix: w = share · first + (1 - share) · second; longce: w = min(exp(short - long), cap); uniform: w = 1",
        ),
        ("my.weights", "`my.weights`"),
    ):
        assert changed(folder, settings={**settings, "weighting": text})["Weighting"].endswith(said)


def test_a_card_that_is_written_again_keeps_what_others_wrote(folder):
    path = folder / "README.md"
    text = path.read_text().replace("---\n\n#", "license: mit\n---\n\nBefore.\n\n#", 1) + "\nAfter.\n"
    path.write_text(text)
    changed(folder, device="another device")
    assert path.read_text() == text.replace(device_of(text), "another device")
    assert ModelCard.load(path).data.license == "mit"


def device_of(text):
    return re.search(r"\| Device \| (.+) \|", text)[1]


@pytest.fixture(scope="module")
def evaluated(place):
    """Two evaluations, of different rows, by the command; and what the first one left in the card."""
    shorter = some_rows((40,) * 3, scored=False)
    shorter.save_to_disk(str(place / "held-out"))
    datasets.concatenate_datasets([shorter, shorter]).save_to_disk(str(place / "longer"))
    path = place / "trained" / "README.md"
    before = path.read_text()
    path.write_text(before + "\nBy hand.\n")
    cards, printed = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **given: printed.append(" ".join(map(str, words))))
        for data in ("held-out", "longer"):
            options = [
                "--probes",
                "none",
                "--sizes",
                "10",
                "--data",
                str(place / data),
                "--out",
                str(place / f"ev-{data}"),
            ]
            assert cli.main(["eval", str(place / "trained"), "--baseline", str(place / "model"), *options]) == 0
            cards.append(path.read_text())
    return cards, printed, before


def test_an_evaluation_is_in_the_card_with_changes_and_intervals(evaluated, place):
    cards, printed, before = evaluated
    assert printed.count(f"{place}/trained/README.md: the evaluation in the model card") == 2
    record = read_json(place / "ev-held-out" / "eval.json")
    entries = [entry for entry in record["comparison"][1] if entry["summary"]]
    section = cards[0].partition("<!-- begin: tokenweight evaluation -->")[2]
    assert len(entries) == section.count("| nats |") + section.count("| perplexity |") > 3
    (entry,) = [entry for entry in entries if entry["measure"] == "all"]
    changes = f"({entry['change']:+.4f}{'*' * entry['clear']} [{entry['low']:+.4f}, {entry['high']:+.4f}])"
    assert f"{entry['value']:.4f}" in section
    assert changes in section
    assert "95 % intervals" in section
    assert record["settings"]["rows_fingerprint"] in section
    results = {result.metric_type: result.metric_value for result in ModelCard(cards[0]).data.eval_results}
    assert results == {entry["measure"]: entry["value"] for entry in entries if entry["value"] is not None}
    training = before[before.index("<!--") : before.rindex("-->")]
    assert training in cards[0]


def test_a_later_evaluation_takes_the_place_of_the_earlier_one(evaluated):
    (first, second), *_ = evaluated
    assert first != second
    for card in (first, second):
        assert card.count("## Evaluation") == card.count("By hand.") == card.count("## Training") == 1
    assert "held-out" not in second
    assert "longer" in second


@pytest.mark.parametrize("text", [None, "# Mine\n", "---\nlicense: mit\n---\n"])
def test_a_folder_without_a_card_of_ours_is_left_alone(text, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert not add_evaluation(tmp_path, {})
    assert [path.read_text() for path in tmp_path.iterdir()] == ([] if text is None else [text])


def test_a_card_with_damaged_marks_is_left_as_it_is(folder, caplog):
    path = folder / "README.md"
    text = path.read_text().replace("<!-- end: tokenweight training -->", "")
    path.write_text(text)
    assert not write_card(folder)
    assert "expected <!-- begin: tokenweight training --> once" in caplog.text
    assert path.read_text() == text
    assert not list(folder.glob(".README*"))


def test_a_card_that_cannot_be_written_costs_no_model(place, monkeypatch, caplog):
    def full(self, path):
        Path(path).write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(ModelCard, "save", full)
    trained = train(settings(place, "full", extend={}))
    assert isinstance(trained, transformers.PreTrainedModel)
    assert (place / "full" / "model.safetensors").is_file()
    assert "README.md was not written: OSError: No space left on device" in caplog.text
    assert not list((place / "full").glob("*README*"))
    assert not list((place / "full").glob(".README*"))


def test_what_is_pushed_to_the_hub_has_our_card(place, monkeypatch):
    uploaded = []

    class Hub:
        def upload_folder(self, *, folder_path, **given):
            uploaded.append((Path(folder_path) / "README.md").read_text())

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    monkeypatch.setattr(
        transformers.Trainer, "init_hf_repo", lambda self, **given: setattr(self, "hub_model_id", "a/b")
    )
    given = settings(place, "pushed", extend={})
    train(dataclasses.replace(given, trainer={**given.trainer, "push_to_hub": True, "save_strategy": "no"}))
    assert uploaded == [(place / "pushed" / "README.md").read_text()]
    assert "<!-- begin: tokenweight training -->" in uploaded[0]
