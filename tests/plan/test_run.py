"""`tokenweight plan` from a config and a recipe alone, and what it refuses."""

import itertools
import json
import shlex
import tempfile

import datasets
import huggingface_hub
import pytest
import torch

import models
from texts import some_documents, trained_tokenizer
from tokenweight import cli
from tokenweight.data import context_shares, prepare_rows, score_folder, upload
from tokenweight.method import TOP_K, ShortContext, parse_weighting, sliding_windows
from tokenweight.method.device import products
from tokenweight.plan import Hardware, plan
from tokenweight.plan.alternatives import alternatives
from tokenweight.plan.flops import count_forward, step_flops
from tokenweight.train import TrainSettings, training_arguments

RECIPE = """
model: blank
data: rows-to-come
out: run
weighting: sparse:keep=0.25
extend: {length: 512, theta: 2e5}
trainer: {max_steps: 50, per_device_train_batch_size: 2, gradient_accumulation_steps: 3, bf16: true}
"""


@pytest.fixture
def place(tmp_path, monkeypatch, unchecked):
    """A folder with config.json and nothing else, a recipe for it, and `rows`, a data set of 24 tokens a sequence."""
    models.tiny(dtype=torch.float32).config.save_pretrained(tmp_path / "blank")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    models.some_rows().save_to_disk(str(tmp_path / "rows"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def run(*words):
    return cli.main(["plan", *words])


@pytest.mark.slow
def test_a_recipe_is_planned_from_its_config_alone(place, capsys):
    before = {path.name for path in place.iterdir()}
    words = [
        "--config",
        "recipe.yaml",
        "--gpu",
        "A100",
        "--num_gpus",
        "2",
        "--lengths",
        "1k,2048",
        "--json",
        "plan.json",
    ]
    assert run(*words) == 0
    assert {path.name for path in place.iterdir()} - before == {"plan.json"}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("blank: 50 steps of 12 sequences of 512 tokens")
    assert max(map(len, printed)) <= 80
    assert "…" not in "".join(printed)
    found = json.loads((place / "plan.json").read_text())
    forward = count_forward(models.tiny().config)
    uniform, sparse = (
        step_flops(forward, 512, parse_weighting(w), num_sequences=12) for w in ("uniform", "sparse:keep=0.25")
    )
    scored = step_flops(
        forward, 512, parse_weighting("sparse:keep=0.25"), sliding_windows(512, 128, 96), num_sequences=12
    )
    costs = {cost["mode"]: cost for cost in found["run"]}
    totals = {mode: cost["flops"]["total"] for mode, cost in costs.items()}
    assert totals == {"uniform": uniform.total, "precomputed": sparse.total, "self-scored": scored.total}
    per_s = 2 * 312e12 * 0.4  # the share that is assumed where none is given
    assert costs["self-scored"]["hours"] == pytest.approx(50 * scored.total / per_s / 3600)
    # Once, before training: the windows that the model would read to score itself, and the first one, of all rows.
    first = forward.decoder(128) + 127 * forward.head
    once = 50 * (12 * first + scored.scoring)
    once_hours = once / per_s / 3600
    assert costs["precomputed"]["hours"] == pytest.approx(50 * sparse.total / per_s / 3600 + once_hours)
    assert any(f"{once_hours:,.3g} are for scoring the data once" in note for note in found["notes"])
    assert [(cost["length"], cost["mode"]) for cost in found["growth"]] == [
        (length, mode) for length in (1024, 2048) for mode in ("uniform", "precomputed", "self-scored")
    ]


def settings(**changes):
    return TrainSettings(**{"model": "blank", "data": "", "out": "", **changes})


@pytest.mark.slow
@pytest.mark.parametrize("by", [{"gradient_checkpointing": True}, {"fsdp_config": {"activation_checkpointing": True}}])
def test_recomputation_is_counted_whoever_makes_it(by, place):
    kept, recomputed = (
        plan(settings(trainer={"fsdp": True, **given}), length=64, hardware=Hardware(num_gpus=2)).run[0]
        for given in ({}, by)
    )
    decoder = count_forward(models.tiny().config).decoder(64)
    assert recomputed.flops.recompute == pytest.approx(2 * decoder)  # a sequence on each GPU
    assert kept.flops.recompute == 0
    assert recomputed.peak.activations < kept.peak.activations


def test_the_data_says_how_many_tokens_have_more_context_than_the_short_one(place, capsys):
    rows = datasets.Dataset.from_dict({"input_ids": [[5] * 24] * 3 + [[5] * 9] * 9})
    rows.save_to_disk(str(place / "mixed"))
    data = [{"path": "rows", "share": 1.0}, {"path": "mixed", "share": 3.0}]
    budget = plan(settings(data=data, size=10))
    longest, num = 24, len(datasets.load_from_disk("rows"))
    assert [(part.source, part.tokens, part.beyond) for part in budget.shares] == [
        ("rows", num * 23, num * (longest - 10)),
        ("mixed", 3 * 23 + 9 * 8, 3 * (longest - 10)),
    ]
    assert budget.as_json()["shares"][1]["beyond"] == 42
    tokens = num * 24 + 3 * 24 + 9 * 9  # of an epoch, a quarter from rows
    assert budget.num_steps == round(tokens / 4 / 24 + tokens * 3 / 4 / (153 / 12))
    assert run("--model", "blank", "--data", "rows:1", "mixed:3", "--size", "10", "--lengths", "none") == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["mixed", "141", "29.8%"] in shown


def test_data_at_a_url_is_planned_as_the_folder_that_was_sent(place, own_cache):
    prepare_rows(some_documents(), trained_tokenizer(), 16, place / "sent", provenance={"texts": ["file"]})
    url = f"memory://{place.name}/rows"
    upload(place / "sent", url)
    budget = plan(settings(data=url, size=4))
    assert (budget.length, budget.length_from) == (16, "data")
    assert budget.num_steps == len(datasets.load_from_disk(str(place / "sent")))
    assert budget.shares == context_shares(place / "sent", 4)


def test_a_curriculum_has_steps_of_as_many_tokens_as_its_longest_pieces(place):
    lengths = [33] * 3 + [9] * 5 + [5] * 3
    datasets.Dataset.from_dict({"input_ids": [[5] * length for length in lengths]}).save_to_disk(str(place / "pieces"))
    budget = plan(settings(data="pieces", curriculum="pow2", trainer={"per_device_train_batch_size": 2}))
    assert (budget.length, budget.num_steps) == (32, (3 * 32 + 5 * 8 + 3 * 4) // 64)
    with pytest.raises(ValueError, match=r"^curriculum long: expected uniform"):
        plan(settings(data="pieces", curriculum="long"))


@pytest.mark.slow
def test_the_growth_is_drawn(place):
    assert run("--config", "recipe.yaml", "--lengths", "600", "--figure", "growth") == 0
    assert (place / "growth.svg").read_text().startswith("<?xml")
    assert (place / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_all_grows_with_the_length_of_sequences(place, monkeypatch):
    (uniform, precomputed, _) = plan(settings(size=32), length=48).run[:3]
    assert uniform.flops == precomputed.flops  # all logits fit the buffer
    monkeypatch.setattr(products, "BUFFER_BYTES", 1)
    budget = plan(settings(size=32), length=48, lengths=[64, 256])
    for mode in range(3):
        costs = [budget.run[mode], *budget.growth[mode::3]]
        for one, more in itertools.pairwise(costs):
            assert one.flops.total < more.flops.total
            assert one.flops.attention / one.flops.total < more.flops.attention / more.flops.total
            assert one.peak.total <= more.peak.total
    for uniform, precomputed, scored in zip(budget.run[::3], budget.run[1::3], budget.run[2::3]):
        assert uniform.flops.total < precomputed.flops.total < scored.flops.total
        assert uniform.peak.total == precomputed.peak.total <= scored.peak.total
    assert {cost.hours for cost in budget.run} == {None}


@pytest.mark.parametrize(
    ("weighting", "products"),
    [("sparse:keep=0.25", 1 + 2 * 5 / 23), ("rho1:keep=0.25", 1 + 3 * 5 / 23), ("uniform", 3)],
)
def test_stored_scores_by_counts_have_the_scorers_contrast_and_cost_nothing(weighting, products, place):
    score_folder("rows", "count", [ShortContext(8, 6)], "counted")
    settings = TrainSettings("blank", "counted", "run", weighting=weighting, size=8, trainer={"max_steps": 5})
    found = plan(settings, hardware=Hardware("H100"))
    uniform, precomputed = (
        next(cost for cost in found.run if cost.mode == mode) for mode in ("uniform", "precomputed")
    )
    assert precomputed.flops.head / uniform.flops.head == pytest.approx(products / 3)
    assert precomputed.hours * 3600 == pytest.approx(5 * precomputed.step_seconds)
    assert not any("scoring the data once" in note for note in found.notes)


def test_what_a_stored_teacher_leaves_on_disk_is_counted(place):
    given = TrainSettings("blank", "rows", "run", weighting="uniform", distill={"weight": 0.5})
    tokens = models.NUM_ROWS * models.LENGTH
    assert plan(given).disk.scored == 4 * tokens * (1 + 2 * TOP_K)


def test_data_says_how_many_rows_there_are_and_how_long(place, capsys):
    words = ["--model", "blank", "--data", "rows", "--lengths", "none", "--tokens_per_s", "1000"]
    assert run(*words, "--trainer.num_train_epochs", "2", "--json", "plan.json") == 0
    found = json.loads((place / "plan.json").read_text())
    assert (found["length"], found["num_steps"]) == (models.LENGTH, 2 * models.NUM_ROWS)
    # What was measured is the uniform run.
    assert found["run"][0]["hours"] == pytest.approx(2 * models.NUM_ROWS * models.LENGTH / 1000 / 3600)
    assert found["run"][1]["hours"] > found["run"][0]["hours"]


@pytest.mark.slow
def test_without_data_or_extension_a_sequence_is_as_long_as_the_model_reads(place, monkeypatch):
    budget = plan(settings())
    assert (budget.length, budget.length_from) == (
        models.tiny().config.max_position_embeddings,
        "the model's context length",
    )
    assert plan(settings(extend={"length": 512, "theta": 2e5})).length == 512
    monkeypatch.setattr("tokenweight.plan.run.context_length", lambda config: None)
    with pytest.raises(ValueError, match=r"^length: neither data, extend.length nor the model"):
        plan(settings())


SCORED = {"size": 32, "weighting": "longce", "scorer": "self"}
FOUR = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
SMALL = {"gradient_checkpointing": True, "bf16": True, **ONE}
SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "activation_checkpointing": True}, "bf16": True}


def total(trainer, num_gpus=1):
    """Bytes on one GPU."""
    return plan(settings(**SCORED, trainer=trainer), length=64, hardware=Hardware(num_gpus=num_gpus)).run[2].peak.total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "num_gpus"),
    [
        ({"gradient_checkpointing": True}, 1),
        (SMALL, 1),
        ({**SHARDED, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}, 8),
    ],
    ids=["checkpointing", "all", "FSDP"],
)
def test_what_does_not_fit_is_said_with_the_first_change_that_does(change, num_gpus, place, capsys):
    changed = total({**FOUR, **change}, num_gpus)
    hardware = Hardware(gpu_memory=changed * 1.1000001 / 1e9)
    budget = plan(settings(**SCORED, trainer=FOUR), length=64, hardware=hardware)
    assert budget.run[2].fits is False
    (advice,) = budget.advice
    assert (advice.length, advice.needed, advice.peak.total) == (64, total(FOUR), changed)
    assert (advice.change.trainer, advice.change.num_gpus) == (change, num_gpus)
    # The options as they are printed are a recipe that fits.
    words = ["--model", "blank", "--length", "64", "--lengths", "none", "--gpu_memory", str(hardware.gpu_memory)]
    words += [word for name, value in SCORED.items() for word in (f"--{name}", str(value))]
    left = {name: value for name, value in FOUR.items() if name not in change}
    words += [word for name, value in left.items() for word in (f"--trainer.{name}", str(value))]
    assert run(*words, "--num_gpus", str(num_gpus), *shlex.split(advice.change.options)) == 0
    assert "Fits: " in capsys.readouterr().out


@pytest.mark.slow
def test_an_answer_is_given_for_every_length_and_for_none_where_nothing_helps(place, capsys):
    words = ["--model", "blank", "--length", "64", "--lengths", "128", "--num_gpus", "8"]
    assert run(*words, "--gpu_memory", "0.00001", "--json", "plan.json") == 0
    printed = " ".join(capsys.readouterr().out.split())
    for length in (64, 128):
        assert f"{length} tokens do not fit" in printed
    assert printed.count("Nor do they") == 2
    found = json.loads((place / "plan.json").read_text())
    assert {cost["fits"] for cost in [*found["run"], *found["growth"]]} == {False}
    assert [advice["change"] for advice in found["advice"]] == [None, None]


def test_an_alternative_keeps_what_the_recipe_says_of_fsdp_and_the_sequences_of_a_step(place):
    given = {
        "fsdp": True,
        "fsdp_config": {"reshard_after_forward": True},
        "gradient_accumulation_steps": 8,
        "fp16": True,
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(given, folder)
    here, sharded = alternatives(given, arguments, torch.float32, 2, bfloat16=True)
    own = {"reshard_after_forward": True, "activation_checkpointing": True}
    assert [change.trainer for change in here] == [{"fsdp_config": own}]
    found = [(change.num_gpus, change.trainer) for change in sharded]
    assert [num for num, _ in found] == [4, 8, 16, 32, 64]  # with 2 it is the recipe itself
    assert [trainer["gradient_accumulation_steps"] for _, trainer in found] == [4, 2, 1, 1, 1]
    assert all(trainer["fsdp_config"] == {"version": 2, **own} for _, trainer in found)


@pytest.mark.slow
def test_time_and_money_are_those_of_the_flops(place):
    hardware = Hardware("L4", num_gpus=2, mfu=0.5, price=0.25)
    steps = {"max_steps": 10, "per_device_train_batch_size": 3}
    uniform, stored, _ = plan(settings(size=32, trainer=steps), length=64, hardware=hardware).run
    assert uniform.step_seconds == pytest.approx(uniform.flops.total / (2 * 0.5 * 121e12))
    assert uniform.hours == pytest.approx(10 * uniform.step_seconds / 3600)
    for cost in (uniform, stored):
        assert cost.gpu_hours == pytest.approx(2 * cost.hours)
        assert cost.dollars == pytest.approx(0.25 * cost.gpu_hours)
        assert cost.dollars_per_million_tokens == pytest.approx(cost.dollars / (10 * 6 * 64 / 1e6))
    endless = plan(settings(size=32, trainer={"per_device_train_batch_size": 3}), length=64, hardware=hardware)
    assert endless.num_steps is None
    for cost, known in zip(endless.run, (uniform, stored)):
        assert (cost.hours, cost.gpu_hours, cost.dollars) == (None, None, None)
        assert cost.step_seconds == known.step_seconds
        assert cost.dollars_per_million_tokens == pytest.approx(known.dollars_per_million_tokens)
    assert any("max_steps" in note for note in endless.notes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpu", "trainer", "said"), [("H100", {}, "trainer.bf16"), ("V100", {"bf16": True}, "trainer.fp16")]
)
def test_a_speed_that_the_recipe_cannot_have_is_said(gpu, trainer, said, place):
    notes = plan(settings(trainer=trainer), length=64, hardware=Hardware(gpu)).notes
    assert any(said in note for note in notes)
    assert not any(
        "set trainer" in note
        for note in plan(settings(trainer={"bf16": True}), length=64, hardware=Hardware("H100")).notes
    )


@pytest.mark.slow
def test_an_adapter_costs_less_than_all_weights(place, capsys):
    pytest.importorskip("peft")
    words = ["--model", "blank", "--length", "64", "--lengths", "128", "--json", "plan.json"]
    assert run(*words, "--lora.r", "2", "--lora.target_modules", "q_proj", "v_proj") == 0
    # Of each of 2 layers: 16 x 2 and 2 x 16 for queries, 16 x 2 and 2 x 8 for values.
    assert "an adapter of 224 parameters is trained" in " ".join(capsys.readouterr().out.split())
    found = json.loads((place / "plan.json").read_text())
    assert found["adapter"] == 224
    full = plan(settings(), length=64, lengths=[128])
    assert full.adapter is None
    for cost, whole in zip(found["run"] + found["growth"], full.run + full.growth, strict=True):
        assert cost["flops"]["total"] < whole.flops.total
        assert cost["peak"]["total"] < whole.peak.total


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "blank", "--lora.r", "2", "--extend.length", "256"], "extend: an adapter is saved without"),
        (["--model", "blank", "--lora.target_modules", "nowhere"], "lora: Target modules"),
        (["--model", "blank", "--length", "1"], "length 1: expected at least 2"),
        (["--model", "blank", "--length", "999"], "999"),
        (["--model", "blank", "--length", "64", "--size", "64"], "--size 64: sequences hold 64 tokens"),
        (["--model", "blank", "--length", "64", "--size", "32", "--lengths", "32"], "--size 32: sequences hold"),
        (["--model", "blank", "--length", "64", "--lengths", "32k,long"], "--lengths 32k,long: expected"),
        (["--model", "blank", "--length", "64", "--gpu", "H1000"], "--gpu H1000: did you mean H100? Expected one of"),
        (["--model", "blank", "--length", "64", "--price", "2"], "--price 2: needs a speed"),
        (["--model", "blank", "--length", "64", "--gpu_memory", "0"], "--gpu_memory 0: expected a number above 0"),
        (["--model", "blank", "--length", "64", "--mfu", "0.5"], "mfu 0.5: expected"),
        (["--model", "blank", "--length", "64", "--gpu", "H100", "--mfu", "1.5"], "mfu 1.5: expected"),
        (["--model", "blank", "--length", "64", "--tokens_per_s", "0"], "tokens_per_s 0: expected a number"),
        (["--model", "blank", "--length", "64", "--num_gpus", "0"], "num_gpus 0: expected at least 1"),
        (["--model", "blank", "--length", "64", "--scorer", "other"], "scorer 'other': expected stored, self, base"),
        (
            ["--model", "blank", "--length", "64", "--distill.weight", "0.5", "--distill.teacher", "other"],
            "distill.teacher 'other': expected stored",
        ),
        (["--model", "blank", "--length", "64", "--weighting", "dens"], "unknown weighting 'dens'"),
        (["--model", "blank", "--length", "64", "--dtype", "small"], "dtype 'small': expected float32"),
        (["--model", "blank", "--length", "64", "--trainer.max_step", "1"], "did you mean 'max_steps'?"),
        (["--model", "blank", "--extend.theta", "1e6"], "extend: found theta: expected length"),
        (["--model", "gone", "--length", "64"], "model 'gone' cannot be loaded from the hub, and there is no"),
        (["--model", "gone.gguf", "--length", "64"], "model 'gone.gguf': no such file"),
        (["--model", "blank", "--length", "64", "--json", "gone/plan.json"], "--json gone/plan.json: no such folder"),
        (["--model", "blank", "--length", "64", "--figure", "gone/plan"], "--figure gone/plan: no such folder"),
        (["--model", "blank", "--length", "64", "--lengths", "none", "--figure", "a"], "--figure: --lengths none"),
        (["--config", "gone.yaml"], "--config gone.yaml cannot be read"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else None,
)  # fmt: skip
def test_a_bad_input_gets_one_line_and_status_2(words, message, place, capsys):
    assert run(*words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    line = [line for line in printed.err.splitlines() if line.startswith("tokenweight plan: ")]
    assert len(line) == 1
    assert message in line[0]
