"""The command `train`, and what it shares with `plan`: options from a recipe, and options of the trainer."""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import tyro

from tokenweight import train
from tokenweight.train import TrainSettings

Settings = TypeVar("Settings", bound=TrainSettings)


@dataclasses.dataclass(frozen=True)
class Train(TrainSettings):
    """Train a model with token-weighted losses.

    Settings come from `--config FILE`, a recipe (YAML) or the run.json of an earlier run; options override them. A
    weighting that such a file names is imported if its package is installed, otherwise only with `--allow_code`. To
    extend the context of the model, set `--extend.length N` (docs/models.md). Any field of
    transformers.TrainingArguments can be set as `--trainer.NAME VALUE`; docs/train.md lists those whose default
    differs from that of transformers.
    """

    def run(self) -> None:
        """Train, and say where the model is."""
        from torch import distributed

        train.train(self)
        if not distributed.is_initialized() or distributed.get_rank() == 0:
            print(f"{self.out}: the trained model, run.json and metrics.jsonl")


@dataclasses.dataclass(frozen=True)
class _Config:
    config: Path | None = None
    allow_code: tyro.conf.FlagCreatePairsOff[bool] = False


def read_config(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take `--config FILE` and `--allow_code` out of the words of a command line, and read the settings of that recipe.

    A weighting on the command line is the user's own word, and takes the place of that of the recipe.
    """
    given, rest = tyro.cli(_Config, args=argv, return_unknown_args=True, add_help=False, use_underscores=True)
    own = any(word.partition("=")[0] == "--weighting" for word in rest)
    recipe = {} if given.config is None else train.read_recipe(given.config, allow_code=given.allow_code or own)
    return rest, recipe


def with_groups(command: Settings, recipe: dict[str, Any], words: list[str]) -> tuple[Settings, list[str]]:
    """A command with its groups of options, `--trainer.NAME VALUE` and `--extend.NAME VALUE`, over those of a recipe.

    Returns:
        The command, and the words that belong to neither group.

    Raises:
        ValueError: for an option without a value that is no flag.
    """
    groups: dict[str, Any] = {name: dict(recipe.get(name, {})) for name in ("trainer", "extend")}
    left = []
    while words:
        option, *words = words
        name, equals, value = option.partition("=")
        group, dot, field = name.removeprefix("--").partition(".")
        if not (option.startswith("--") and dot and group in groups):
            left.append(option)
            continue
        field, given = field.replace("-", "_"), value if equals else None
        if given is None and words and not words[0].startswith("--"):
            given, *words = words
        if given is None and not (group == "trainer" and train.is_flag(field)):
            raise ValueError(f"{name}: expected a value, as in {name} VALUE")
        groups[group][field] = True if given is None else given
    return dataclasses.replace(command, **groups), left
