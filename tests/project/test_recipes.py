"""Every recipe says what it is and where its settings come from, and runs as its header says, on a tiny model."""

import contextlib
import copy
import dataclasses
import json
import math
import os
import re
import shlex
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from transformers import TrainingArguments

import models
from texts import EXCERPT, trained_tokenizer
from tokenweight import cli
from tokenweight.data import load_rows
from tokenweight.method import parse_weighting
from tokenweight.train import DataCollatorWithScores, TrainSettings, read_recipe, train, training_arguments

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
FAST = ("llama3-8b-32k-dense-0.75-unfrozen", "llama3-8b-32k-sparse-0.2-frozen-1b", "phi2-8k-uniform")
every_recipe = pytest.mark.parametrize("name", RECIPES)
NAME = re.compile(
    r"(?P<model>.+)-(?P<length>\d+)k-(?P<kind>[a-z]+)(-(?P<number>[\d.]+))?"
    r"(-(?P<scorer>unfrozen|frozen)(-(?P<size>\db))?)?(-(?P<method>linear|base))?"
)
NUMBERS = {"dense": "interpolation", "sparse": "keep", "ppmi": "keep", "npmi": "keep", "longce": "cap"}


def commands(text: str) -> list[list[str]]:
    """The commands of a text, in words: what comes after `$`, or in the header of a recipe after five spaces."""
    lines = re.findall(r"^(?:#     |\$ |(?=    --))(.*)$", text, flags=re.MULTILINE)
    return [shlex.split(line) for line in "\n".join(lines).replace("\\\n", "").splitlines()]


def header(name: str) -> list[list[str]]:
    return commands(RECIPES[name].read_text())


def parsed(words: list[str]) -> object:
    """A command as the command line parses it, in the folder above the recipes."""
    which, *argv = words[words.index("tokenweight") + 1 :]
    with contextlib.chdir(FOLDER.parent):
        return cli.parse([which, *argv])


def command(name: str, which: str) -> Any:
    """A command of the header, or None if the header has none of that name."""
    found = [words for words in header(name) if "tokenweight" in words and which in words]
    return parsed(found[0]) if found else None


def settings_of(name: str) -> TrainSettings:
    return TrainSettings(**read_recipe(RECIPES[name]))


def num_gpus(name: str) -> int:
    words = header(name)[-1]
    return int(words[words.index("--nproc_per_node") + 1]) if words[0] == "torchrun" else 1


@every_recipe
def test_the_header_makes_the_data_that_the_recipe_reads_and_then_runs_it(name):
    settings, prepare, score = settings_of(name), command(name, "prepare"), command(name, "score")
    assert dataclasses.asdict(command(name, "train")) == dataclasses.asdict(settings)
    assert header(name)[-1][-2:] == ["--config", f"recipes/{name}.yaml"]
    assert settings.out == f"runs/{name}"
    assert (prepare.tokenizer, prepare.length) == (settings.model, settings.extend.get("length", prepare.length))
    if settings.scorer == "self" or settings.weighting == "uniform":
        assert score is None
        assert settings.data == str(prepare.out)
    else:
        assert settings.scorer == "stored"
        assert (score.rows, str(score.out)) == (prepare.out, settings.data)
        assert (int(score.size), int(score.stride)) == (settings.size, settings.stride)
    assert all(words[0] == header(name)[-1][0] for words in header(name)[1:])
    assert header(name)[0][:2] == ["tokenweight", "prepare"]


@every_recipe
def test_the_name_of_a_recipe_says_what_it_does(name):
    said, settings, score = NAME.fullmatch(name), settings_of(name), command(name, "score")
    weighting = parse_weighting(settings.weighting)
    model = re.sub("^([a-z]+)-", r"\1", settings.model.partition("/")[2].lower().replace("meta-", ""))
    assert said["model"] == model.removesuffix("-hf")
    assert int(said["length"]) * 1024 == command(name, "prepare").length
    assert said["kind"] == type(weighting).__name__.lower()
    assert said["kind"] == "uniform" or float(said["number"]) == getattr(weighting, NUMBERS[said["kind"]])
    assert said["scorer"] == ("frozen" if score else "unfrozen" if weighting.uses_short else None)
    if score:
        assert settings.data.endswith(
            f"-by-{score.model.lower().rpartition('/')[2].replace('meta-', '').replace('llama-', 'llama')}"
        )
        assert said["size"] == (None if score.model == settings.model else score.model[-2:].lower())
    assert (said["method"] or "base") == settings.extend.get("method", "base")


@every_recipe
def test_every_setting_says_where_it_was_read_or_why_it_is_ours(name):
    text = RECIPES[name].read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    bare = [line for line in lines if not re.search(r"  # \w", line)]
    assert [line.split(":")[0] for line in bare] == ["data", "out", "trainer"]
    marks = [re.search(r"  # ([\w/.]+)", line)[1] for line in lines if line not in bare]
    explained = " ".join(re.findall(r"^# (.*)$", text, flags=re.MULTILINE))
    for mark in {"config", "code", "notes", "ours"} & set(marks):
        assert f" {mark}: " in explained


def test_the_table_lists_every_recipe_as_it_is():
    rows = []
    for name in RECIPES:
        settings, source = settings_of(name), RECIPES[name].read_text().splitlines()[1].removeprefix("# ")
        scorer = "itself, as it trains" if settings.scorer == "self" else settings.data.partition("-by-")[2] or "nobody"
        rows.append(f"| [{name}]({name}.yaml) | {settings.weighting} | {scorer} | {num_gpus(name)} | {source} |")
    shown = [line for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith("| [")]
    assert shown == rows


def test_the_commands_of_the_readme_parse():
    given = [parsed(words) for words in commands((FOLDER / "README.md").read_text())]
    assert [getattr(command, "weighting", None) for command in given] == [
        None,
        "dense:interpolation=0.75",
        "ppmi:shift=1.0,keep=0.2",
        "uniform",
    ]
    assert given[2].data == settings_of("llama3-8b-32k-dense-0.75-frozen").data


@every_recipe
def test_the_trainer_takes_the_settings_as_they_are_and_reads_every_option_of_fsdp(name, tmp_path):
    given = settings_of(name).trainer
    with mock.patch.dict(os.environ):  # TrainingArguments leaves a variable there
        arguments = training_arguments(given, tmp_path / "out")
        if "fsdp" not in given:
            assert arguments.gradient_checkpointing
            return
        plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    assert given["fsdp_config"].keys() <= set(re.findall(r"- (\w+) \(", TrainingArguments.__doc__))
    assert (plugin.fsdp_version, plugin.activation_checkpointing, plugin.reshard_after_forward) == (2, True, True)
    assert "full" in str(plugin.state_dict_type).lower()  # else the Trainer would save no model that others can load


# What their config.json say of positions, heads and embeddings, but positions as many times fewer as the rows.
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
LENGTH = 64
"""Tokens of a row here: all lengths, sizes and strides are divided by the same number."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the commands of a header run: its names of the hub are tiny models and a text."""
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


def shrunk(words: list[str], factor: int) -> list[str]:
    """A command with every number of tokens divided."""
    return [
        str(int(word) // factor) if before in ("--length", "--size", "--stride") else word
        for before, word in zip(["", *words], words)
    ]


def prepared(name: str, factor: int) -> None:
    """Run the commands of a header that make the data, but for what another recipe has made already."""
    for words in header(name)[:-1]:
        if not Path(words[words.index("--out") + 1]).exists():
            assert cli.main(shrunk(words[words.index("tokenweight") + 1 :], factor)) == 0


def shrunk_recipe(name: str, factor: int) -> TrainSettings:
    """The recipe for the tiny model: a short run, and in one process on a CPU neither bfloat16 nor shards."""
    settings = read_recipe(RECIPES[name])
    for key in ("size", "stride"):
        if key in settings:
            settings[key] //= factor
    if "extend" in settings:
        settings["extend"]["length"] //= factor
    kept = {key: value for key, value in settings["trainer"].items() if key not in ("fsdp", "fsdp_config", "bf16")}
    few = {"max_steps": 2, "gradient_accumulation_steps": 2, "save_strategy": "no", "disable_tqdm": True}
    path = Path("recipes") / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**settings, "trainer": {**kept, **few}}))
    return TrainSettings(**read_recipe(path))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in RECIPES])
def test_a_recipe_and_the_commands_of_its_header_run_on_a_tiny_model(name, place, undetermined, monkeypatch, capsys):
    monkeypatch.chdir(place)
    factor = command(name, "prepare").length // LENGTH
    prepared(name, factor)
    settings = shrunk_recipe(name, factor)
    model = train(settings)
    run = json.loads((Path(settings.out) / "run.json").read_text())
    weighting = parse_weighting(settings.weighting)
    assert run["settings"]["weighting"] == str(weighting)
    assert (run["settings"]["size"], run["settings"]["stride"]) == (settings.size, settings.stride)
    lines = [json.loads(line) for line in (Path(settings.out) / "metrics.jsonl").read_text().splitlines()]
    assert [math.isfinite(line["loss"]) for line in lines if "loss" in line] == [True, True]

    theirs = MODELS[settings.model][2]["rope_theta"]
    method, theta = settings.extend.get("method"), settings.extend.get("theta", theirs)
    assert model.config.max_position_embeddings == LENGTH
    assert run["rope_parameters"]["rope_type"] == ("linear" if method == "linear" else "default")
    assert (run["rope_parameters"]["rope_theta"] > theirs) == (method == "base")
    assert "theta" not in settings.extend or run["rope_parameters"]["rope_theta"] == float(theta)

    output = model(**DataCollatorWithScores()(list(load_rows(settings.data))[:1]))
    weights = output.weights[:, 1:]
    if settings.scorer == "stored" and weighting.uses_short:
        assert run["data"]["rope_parameters"]["rope_theta"] == theirs  # the scorer keeps its own base
    if not weighting.uses_short:
        assert (weights == 1).all()
        return
    # Where the short context is the whole one, a model that scores itself has one loss, a frozen scorer another.
    same = (output.long_nll == output.short_nll)[:, 1 : settings.size]
    assert same.all() if settings.scorer == "self" else not same.any()
    assert not (output.long_nll == output.short_nll)[:, settings.size :].all()
    if "longce" in name:
        assert 0 < weights.min() < weights.max() <= 5
    else:  # 63 weights in float32, of a mean that was 1 up to some roundings of 6e-8
        torch.testing.assert_close(weights.double().mean().item(), 1.0, rtol=0, atol=1e-6)
        assert weights.min() < 1 < weights.max()
