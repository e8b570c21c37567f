"""Every run of the recipes is named for what it does, says where its settings come from, and runs on a tiny model."""

import copy
import itertools
import json
import math
import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from transformers import AutoModelForCausalLM, TrainingArguments

import models
from texts import EXCERPT, trained_tokenizer
from tokenweight import cli
from tokenweight.method import parse_weighting
from tokenweight.plan import Hardware, plan, shapes
from tokenweight.train import TrainSettings, read_recipe, training_arguments

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


class Run(NamedTuple):
    """A row of a table of recipes/README.md, and the commands above it."""

    name: str
    options: list[str]
    commands: list[list[str]]
    """What comes after `tokenweight`: prepare, score for some, train."""

    @property
    def recipe(self) -> str:
        """The file that its options override."""
        return Path(self.commands[-1][-1]).stem

    @property
    def settings(self) -> dict:
        """The settings of the recipe with the options over them, as text."""
        settings = read_recipe(FOLDER / f"{self.recipe}.yaml")
        for option, value in zip(self.options[::2], self.options[1::2], strict=True):
            group, _, key = option.removeprefix("--").rpartition(".")
            (settings[group] if group else settings)[key] = value
        return settings

    @property
    def score(self) -> dict[str, str] | None:
        """Options of the command that makes the scores it reads; None if it reads none."""
        options = [options_of(command) for command in self.commands if command[0] == "score"]
        return next((found for found in options if found["out"] == self.settings["data"]), None)


def commands(text: str) -> list[list[str]]:
    """The words after `tokenweight` of the commands that follow a `$`."""
    lines = [shlex.split(line) for line in re.findall(r"^\$ ((?:.*\\\n)*.*)$", text, flags=re.MULTILINE)]
    return [[word for word in line[line.index("tokenweight") + 1 :] if word != "\n"] for line in lines]


def options_of(command: list[str]) -> dict[str, str]:
    return {name[2:]: value for name, value in itertools.pairwise(command) if name.startswith("--")}


def read_runs() -> dict[str, Run]:
    runs = []
    for section in (FOLDER / "README.md").read_text().split("\n## ")[1:]:
        table = [line.split("|") for line in section.splitlines() if line.startswith("| ")]
        rows = [(name.strip(), options.strip(" `")) for _, name, options, *_ in table if name.strip() != "run"]
        runs += [Run(name, shlex.split(options), commands(section)) for name, options in rows]
    return {run.name: run for run in runs}


RUNS = read_runs()
FAST = (
    "llama3-8b-32k-dense-0.75",
    "llama3-8b-32k-sparse-0.2-frozen-1b",
    "llama2-7b-32k-longce-5-base",
    "phi2-8k-uniform",
)
every_run = pytest.mark.parametrize("name", RUNS)
every_recipe = pytest.mark.parametrize("recipe", RECIPES)
NAME = re.compile(
    r"(?P<model>.+)-(?P<length>\d+)k-(?P<kind>[a-z]+)(-(?P<number>[\d.]+))?"
    r"(-(?P<frozen>frozen)(-(?P<size>\db))?)?(-(?P<method>linear|base))?"
)
NUMBERS = {"dense": "interpolation", "sparse": "keep", "ppmi": "keep", "npmi": "keep", "longce": "cap"}


def test_the_tables_list_23_runs_of_every_recipe_and_each_recipe_is_the_first_of_its_own():
    assert len(RUNS) == 23
    first = {run.recipe: run for run in reversed(RUNS.values())}
    assert sorted(first) == RECIPES
    for run in first.values():
        assert (run.options, run.settings["out"]) == ([], f"runs/{run.name}")


@every_run
def test_the_commands_above_a_table_make_the_data_that_its_runs_read(name):
    run = RUNS[name]
    settings, prepare = run.settings, options_of(run.commands[0])
    assert [command[0] for command in run.commands][:: len(run.commands) - 1] == ["prepare", "train"]
    length = int(prepare["length"])
    assert (prepare["tokenizer"], length) == (settings["model"], settings.get("extend", {}).get("length", length))
    if settings["scorer"] == "self":
        assert settings["data"] == prepare["out"]
        assert run.score is None
    else:
        assert settings["scorer"] == "stored"
        (scored,) = [command[1] for command in run.commands if f"{run.score['out']}" in command]
        assert scored == prepare["out"]
        assert (int(run.score["size"]), int(run.score["stride"])) == (settings["size"], settings["stride"])


@every_run
def test_the_name_of_a_run_says_what_it_does(name):
    run, said = RUNS[name], NAME.fullmatch(name)
    settings, score, weighting = run.settings, run.score, parse_weighting(run.settings["weighting"])
    model = re.sub("^([a-z]+)-", r"\1", settings["model"].partition("/")[2].lower().replace("meta-", ""))
    assert said["model"] == model.removesuffix("-hf")
    assert int(said["length"]) * 1024 == int(options_of(run.commands[0])["length"])
    assert said["kind"] == type(weighting).__name__.lower()
    assert said["kind"] == "uniform" or float(said["number"]) == getattr(weighting, NUMBERS[said["kind"]])
    assert (said["frozen"] is None) == (score is None or not weighting.uses_short)
    if said["frozen"]:
        assert said["size"] == (None if score["model"] == settings["model"] else score["model"][-2:].lower())
    assert said["method"] is None or said["method"] == settings["extend"]["method"]


@every_recipe
def test_every_setting_says_where_it_was_read_or_why_it_is_ours(recipe):
    text = (FOLDER / f"{recipe}.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    bare = [line for line in lines if not re.search(r"  # \w", line)]
    assert [line.split(":")[0] for line in bare] == ["data", "out", "trainer"]
    marks = [re.search(r"  # ([\w/.]+)", line)[1] for line in lines if line not in bare]
    explained = " ".join(re.findall(r"^# (.*)$", text, flags=re.MULTILINE))
    for mark in {"config", "code", "notes", "ours"} & set(marks):
        assert f" {mark}: " in f" {explained}"


@every_recipe
def test_the_trainer_takes_the_settings_as_they_are_and_reads_every_option_of_fsdp(recipe, tmp_path):
    given = read_recipe(FOLDER / f"{recipe}.yaml")["trainer"]
    with mock.patch.dict(os.environ):  # TrainingArguments leaves a variable there
        arguments = training_arguments(given, tmp_path / "out")
        if "fsdp" not in given:
            assert arguments.gradient_checkpointing
            return
        plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    assert given["fsdp_config"].keys() <= set(re.findall(r"- (\w+) \(", TrainingArguments.__doc__))
    assert (plugin.fsdp_version, plugin.activation_checkpointing, plugin.reshard_after_forward) == (2, True, True)
    assert "full" in str(plugin.state_dict_type).lower()  # else the Trainer would save no model that others can load


# What their config.json say of positions, heads and embeddings, but positions as many times fewer as the sequences.
LLAMA_3_2 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3_2 = {**LLAMA_3_2, "original_max_position_embeddings": 16}
MODELS = {
    "meta-llama/Meta-Llama-3-8B": ("llama", 16, {"rope_theta": 5e5}, {"num_key_value_heads": 1}),
    "meta-llama/Llama-3.2-1B": (
        "llama-tied",
        256,
        LLAMA_3_2,
        {"num_key_value_heads": 1, "hidden_size": 8, "head_dim": 2},
    ),
    "meta-llama/Llama-3.2-3B": ("llama-tied", 256, LLAMA_3_2, {"num_key_value_heads": 2}),
    "meta-llama/Llama-2-7b-hf": ("llama", 8, {"rope_theta": 1e4}, {"num_key_value_heads": 4}),
    "microsoft/phi-2": (
        "phi",
        16,
        {"rope_theta": 1e4, "partial_rotary_factor": 0.4},
        {"hidden_size": 80, "dropout": 0.1},
    ),
    "Qwen/Qwen2.5-0.5B": ("qwen2", 64, {"rope_theta": 1e6}, {"tie_word_embeddings": True}),
}
SHAPES = {
    "meta-llama/Meta-Llama-3-8B": ("llama", 32, 8192, (4096, 14336, 32, 8, 128256)),
    "meta-llama/Llama-2-7b-hf": ("llama", 32, 4096, (4096, 11008, 32, 32, 32000)),
    "microsoft/phi-2": ("phi", 32, 2048, (2560, 10240, 32, 32, 51200)),
    "Qwen/Qwen2.5-0.5B": ("qwen2", 24, 32768, (896, 4864, 14, 2, 151936)),
}
"""Architecture, layers, context length and sizes in the config.json of each model."""
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")


def planned(recipe, folder, monkeypatch, *, num_layers=None, **hardware):
    """The plan of a recipe as it stands, where its model is gated."""
    settings = TrainSettings(**read_recipe(FOLDER / f"{recipe}.yaml"))
    known = json.loads(shapes._SHAPES.read_text())
    known[settings.model] |= {} if num_layers is None else {"num_hidden_layers": num_layers}
    (folder / "shapes.json").write_text(json.dumps(known))
    monkeypatch.setattr(shapes, "_SHAPES", folder / "shapes.json")
    monkeypatch.setattr(shapes, "load_config", mock.Mock(side_effect=ValueError("gated")))
    budget = plan(settings, hardware=Hardware(**hardware))
    assert budget.notes[0].startswith(f"{settings.model}: no config was found")
    return budget


@every_recipe
def test_a_recipe_is_planned_without_further_options_or_a_network(recipe, tmp_path, monkeypatch):
    budget = planned(recipe, tmp_path, monkeypatch, num_layers=2, gpu="H100")
    prepare = next(run.commands[0] for run in RUNS.values() if run.recipe == recipe)
    assert budget.length == int(options_of(prepare)["length"])
    assert budget.run[0].hours > 0


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_shape_of_every_model_is_known_without_its_config(name, monkeypatch):
    monkeypatch.setattr(shapes, "load_config", mock.Mock(side_effect=ValueError("no network")))
    config, kept = shapes.find_config(name)
    assert kept
    _, _, rope, _ = MODELS[name]
    found = {**config.rope_parameters, "original_max_position_embeddings": None}
    assert found.items() >= {**rope, "original_max_position_embeddings": None}.items()
    if name in SHAPES:
        kind, layers, positions, sizes = SHAPES[name]
        assert (config.model_type, config.num_hidden_layers, config.max_position_embeddings) == (
            kind,
            layers,
            positions,
        )
        assert tuple(getattr(config, size) for size in SIZES) == sizes
    for known, revision in ((name, "v2"), ("no/such-model", None)):
        with pytest.raises(ValueError, match="no network"):
            shapes.find_config(known, revision)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("meta-llama/Meta-Llama-3-8B", 8030.3),
        ("meta-llama/Llama-3.2-1B", 1235.8),
        ("meta-llama/Llama-3.2-3B", 3212.7),
        ("meta-llama/Llama-2-7b-hf", 6738.4),
        ("microsoft/phi-2", 2779.7),
        ("Qwen/Qwen2.5-0.5B", 494.0),
    ],
)
def test_a_known_shape_has_the_parameters_that_are_published(name, millions, monkeypatch):
    monkeypatch.setattr(shapes, "load_config", mock.Mock(side_effect=ValueError("no network")))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes.find_config(name)[0])
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.slow  # of all layers
@every_recipe
def test_a_recipe_fits_the_gpus_that_it_names(recipe, tmp_path, monkeypatch):
    gpus = {"gpu": "4090"} if recipe.startswith("qwen") else {"gpu": "H100", "num_gpus": 8}
    budget = planned(recipe, tmp_path, monkeypatch, **gpus)
    assert budget.advice == []
    assert all(cost.fits for cost in budget.run)


@pytest.mark.slow  # of all layers
def test_the_hours_of_the_protocol_are_those_of_the_plan(tmp_path, monkeypatch):
    page = " ".join((FOLDER.parent / "docs/howto/choosing.md").read_text().split())
    uniform, dense, _ = planned("qwen2.5-0.5b-32k", tmp_path, monkeypatch, gpu="4090").run
    step = dense.step_seconds * 240 / 3600
    scoring = dense.hours - step
    assert (
        f"a uniform run {uniform.hours:.1f} hours, a dense one {step:.1f}, scoring the data once {scoring:.1f}" in page
    )
    rest = uniform.hours + 4 * step
    assert f"three rates are {3 * uniform.hours:.0f} hours, one more uniform and four weighted runs {rest:.0f}," in page
    assert f"all four steps {3 * uniform.hours + rest + scoring:.0f}." in page


LENGTH = 64
"""Tokens of a sequence here: all lengths, sizes and strides are divided by the same number."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the commands run: their names of the hub are tiny models and a text."""
    root = tmp_path_factory.mktemp("recipes")
    (root / "recipes").mkdir()
    (root / "emozilla/pg19").mkdir(parents=True)
    (root / "emozilla/pg19/book.txt").write_text(EXCERPT.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    for seed, (name, (kind, positions, rope, changes)) in enumerate(MODELS.items()):
        rope = {"rope_type": "default", **rope}
        if kind == "phi":
            changes = {**changes, "head_dim": 20, "partial_rotary_factor": 0.4}
        model = models.tiny(
            kind,
            seed=seed,
            dtype=torch.float32,
            **{"vocab_size": 301, "max_position_embeddings": positions, "rope_parameters": rope, **changes},
        )
        tokenizer = copy.deepcopy(trained_tokenizer(framed="llama" in kind))
        # One special token that no text holds has another name in Llama 3.2 than in Llama 3.
        tokenizer.add_special_tokens({"additional_special_tokens": ["<pad>" if "3.2" in name else "<reserved>"]})
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def undetermined():
    """Take back what `full_determinism` changes in the process."""
    with mock.patch.dict(os.environ):
        yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def shrunk(command: list[str], factor: int) -> list[str]:
    """A command with every number of tokens divided."""
    return [
        str(int(word) // factor) if before in ("--length", "--size", "--stride") else word
        for before, word in zip(["", *command], command)
    ]


def prepared(run: Run, factor: int) -> None:
    """Run the commands that make the data of a run, but for what another run has made already."""
    for command in run.commands[:-1]:
        out = options_of(command)["out"]
        if (command[0] == "prepare" or out == run.settings["data"]) and not Path(out).exists():
            assert cli.main(shrunk(command, factor)) == 0


def shrunk_recipe(run: Run, factor: int) -> None:
    """The recipe for the tiny model: a step, and in one process on a CPU neither bfloat16 nor shards."""
    settings = read_recipe(FOLDER / f"{run.recipe}.yaml")
    for key in ("size", "stride"):
        settings[key] //= factor
    if "extend" in settings:
        settings["extend"]["length"] //= factor
    kept = {key: value for key, value in settings["trainer"].items() if key not in ("fsdp", "fsdp_config", "bf16")}
    few = {"max_steps": 1, "gradient_accumulation_steps": 2, "save_strategy": "no", "disable_tqdm": True}
    (Path("recipes") / f"{run.recipe}.yaml").write_text(yaml.safe_dump({**settings, "trainer": {**kept, **few}}))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in RUNS])
def test_a_run_and_the_commands_before_it_work_on_a_tiny_model(name, place, undetermined, monkeypatch, capsys):
    monkeypatch.chdir(place)
    run, settings = RUNS[name], RUNS[name].settings
    factor = int(options_of(run.commands[0])["length"]) // LENGTH
    prepared(run, factor)
    shrunk_recipe(run, factor)
    assert cli.main([*run.commands[-1], *run.options, "--out", f"runs/{name}"]) == 0, capsys.readouterr().err
    done = json.loads((Path("runs") / name / "run.json").read_text())
    weighting, size = parse_weighting(settings["weighting"]), settings["size"] // factor
    resolved = {"weighting": str(weighting), "size": size, "stride": settings["stride"] // factor}
    assert {key: done["settings"][key] for key in resolved} == resolved
    assert done["settings"]["scorer"] == settings["scorer"]

    theirs, extend = MODELS[settings["model"]][2]["rope_theta"], settings.get("extend", {})
    rope = done["rope_parameters"]
    assert json.loads((Path("runs") / name / "config.json").read_text())["max_position_embeddings"] == LENGTH
    assert rope["rope_type"] == ("linear" if extend.get("method") == "linear" else "default")
    assert (rope["rope_theta"] > theirs) == (extend.get("method") == "base")
    assert "theta" not in extend or rope["rope_theta"] == float(extend["theta"])
    if run.score is not None and weighting.uses_short:  # the scorer keeps its own base
        assert done["data"]["rope_parameters"]["rope_theta"] == MODELS[run.score["model"]][2]["rope_theta"]

    lines = [json.loads(line) for line in (Path("runs") / name / "metrics.jsonl").read_text().splitlines()]
    (step,) = [line for line in lines if "loss" in line]
    assert math.isfinite(step["loss"])
    # At the first step, a scorer that computed the scores before is the model itself unless that was extended.
    other = run.score is not None and (run.score["model"] != settings["model"] or bool(extend))
    assert_weights(step, weighting, size, scored_by_other=other)


def assert_weights(step, weighting, size, *, scored_by_other):
    """What was logged of the weights is what the weighting makes of them, and the scorer read the short context."""
    num_predicted = LENGTH - 1
    if not weighting.uses_short:
        assert (step["weight_mean"], step["weight_std"], "first_window_share" in step) == (1, 0, False)
        return
    assert step["weight_std"] > 0
    kind = type(weighting).__name__
    if kind != "LongCE":
        assert step["weight_mean"] == pytest.approx(1, abs=1e-6)
    if kind == "Sparse":  # equal weights of the tokens that are kept
        assert step["effective_share"] == pytest.approx(int(weighting.keep * num_predicted) / num_predicted, rel=1e-6)
    # Within the first window a model that scores itself has one loss, so no contrast; another scorer has another.
    floor = {"Dense": getattr(weighting, "interpolation", 0), "LongCE": 1 / step["weight_mean"]}.get(kind, 0)
    share = floor * (size - 1) / num_predicted
    if not scored_by_other or kind == "Dense":  # sparse may keep none of the first window
        assert (step["first_window_share"] != pytest.approx(share, rel=1e-5, abs=1e-9)) == scored_by_other
