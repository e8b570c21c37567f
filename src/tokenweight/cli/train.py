"""The command `train`, and code shared with `plan`: options from a recipe, and options of the trainer."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from tokenweight import train
from tokenweight.train import TrainSettings

Settings = TypeVar("Settings", bound=TrainSettings)
GROUPS = ("trainer", "extend", "lora", "distill")
"""Settings that are groups of fields, each an option `--GROUP.NAME VALUE`."""


def _folders(words: list[str]) -> str | list[dict[str, Any]]:
    """Parse `--data`: a folder; or several, each with its share of the tokens after a colon."""
    if len(words) == 1:
        return words[0]
    parts = [(word, *word.rpartition(":")) for word in words]
    return [{"path": path, "share": share} if path else {"path": word} for word, path, _, share in parts]


def _words(data: Any) -> list[str]:
    return [data] if isinstance(data, str) else [f"{part.get('path')}:{part.get('share')}" for part in data]


Data = Annotated[
    str | list[dict[str, Any]],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="FOLDER | FOLDER:SHARE …",
        instance_from_str=_folders,
        is_instance=lambda value: isinstance(value, str | list),
        str_from_instance=_words,
    ),
]


@dataclasses.dataclass(frozen=True)
class Train(TrainSettings):
    """Train a model with token-weighted losses.

    Settings come from `--config FILE`, a recipe (YAML) or the run.json of an earlier run; options override them. A
    weighting that such a file names is imported if its package is installed, otherwise only with `--allow_code`. To
    extend the context of the model, set `--extend.length N` (docs/models.md). Any field of
    transformers.TrainingArguments can be set as `--trainer.NAME VALUE`; docs/train.md lists those whose default
    differs from that of transformers. `--lora.NAME VALUE` sets a field of peft.LoraConfig and trains an adapter.
    """

    data: Data
    """Folder of scored sequences; if the scorer is not "stored", a folder of sequences without scores. For a mixture,
    each folder with its share of the tokens, as in books:0.6 code:0.4; in YAML a list of {path, share}."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Do everything up to the first step, show what would be run, and leave nothing behind."""
    print_config: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the settings as a recipe that --config reads, and do nothing else."""

    def run(self) -> None:
        """Train, printing progress."""
        if self.print_config:
            print(train.config_text(self), end="")
        else:
            train.train(self, dry_run=self.dry_run)


@dataclasses.dataclass(frozen=True)
class _Config:
    config: Path | None = None
    allow_code: tyro.conf.FlagCreatePairsOff[bool] = False


def read_config(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take `--config FILE` and `--allow_code` out of the words of a command line, and read the settings of that recipe.

    A weighting on the command line comes from the user, and replaces that of the recipe.
    """
    given, rest = tyro.cli(_Config, args=argv, return_unknown_args=True, add_help=False, use_underscores=True)
    own = any(word.partition("=")[0] == "--weighting" for word in rest)
    recipe = {} if given.config is None else train.read_recipe(given.config, allow_code=given.allow_code or own)
    return rest, recipe


def with_groups(command: Settings, recipe: dict[str, Any], words: list[str]) -> tuple[Settings, list[str]]:
    """Apply groups of options, as `--trainer.NAME VALUE`, to a command, overriding those of a recipe.

    Several values after an option are a list.

    Returns:
        The command, and the words that belong to no group.

    Raises:
        ValueError: for an option without a value that is no flag.
    """
    groups: dict[str, Any] = {name: dict(recipe.get(name, {})) for name in GROUPS}
    left = []
    while words:
        option, *words = words
        name, equals, value = option.partition("=")
        group, dot, field = name.removeprefix("--").partition(".")
        if not (option.startswith("--") and dot and group in groups):
            left.append(option)
            continue
        field = field.replace("-", "_")
        given: str | list[str] | None = value if equals else None
        values: list[str] = []
        while given is None and words and not words[0].startswith("--"):
            values.append(words.pop(0))
        if values:
            given = values[0] if len(values) == 1 else values
        if given is None and not (group == "trainer" and train.is_flag(field)):
            raise ValueError(f"{name}: expected a value, as in {name} VALUE")
        groups[group][field] = True if given is None else given
    return dataclasses.replace(command, **groups), left
