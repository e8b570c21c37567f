"""The settings of a training run, and reading them from YAML or from the `run.json` of an earlier run."""

import dataclasses
import difflib
import os
from pathlib import Path
from typing import Any

import yaml


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Train a model on rows of tokens with weighted losses.

    Settings are read by `--config FILE` from a recipe (YAML), or from the run.json of an earlier run; options override
    them. A longer context is asked for by `--extend.length N` (docs/context-extension.md). Any field of
    transformers.TrainingArguments is set as `--trainer.NAME VALUE`, or under `trainer:` in the recipe; docs/training.md
    lists those that have another default here than there.
    """

    model: str
    """Folder, hub id or .gguf file of the model to train."""
    data: str
    """Folder of scored rows; with a scorer other than "stored", a folder of rows will do."""
    out: str
    """New folder for checkpoints, the trained model, run.json and metrics.jsonl."""
    weighting: str = "dense"
    """uniform, dense, sparse, longce, ppmi or npmi, with settings as in sparse:keep=0.1; or package.module.function."""
    scorer: str = "stored"
    """Where short losses come from: "stored" (the column short_nll), "self" (the model being trained), or a model."""
    size: int | None = None
    """Tokens of the short context: which of several that are stored; else by default a quarter of a row (the paper)."""
    stride: int | None = None
    """Tokens scored by each window, unless stored; by default three quarters of size (the paper)."""
    extend: dict[str, Any] = dataclasses.field(default_factory=dict)
    """A longer context: length, method and its settings, also as `--extend.length N` (docs/context-extension.md)."""
    dtype: str = "float32"
    """Of the weights. In bfloat16, updates much smaller than a weight are rounded away; prefer --trainer.bf16 true."""
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of transformers.TrainingArguments, by their own names."""


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the settings of a recipe (YAML), or of an earlier run (its `run.json`).

    Raises:
        ValueError: if the file cannot be read, or has a key that no setting has, naming it.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from error
    if isinstance(settings, dict) and "settings" in settings:
        settings = settings["settings"]
    if not isinstance(settings, dict):
        raise ValueError(f"--config {path} holds a {type(settings).__name__}: expected settings, as in `model: …`")
    known = [field.name for field in dataclasses.fields(TrainSettings)]
    for key in settings:
        refuse_unknown(key, known, f"--config {path}")
    number, fields = ((int, type(None)), "a whole number"), ((dict,), "fields of TrainingArguments")
    arguments = ((dict,), "length, method and its settings")
    expected = {"size": number, "stride": number, "trainer": fields, "extend": arguments}
    for key, value in settings.items():
        kinds, name = expected.get(key, ((str,), "text"))
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"--config {path}: {key} is {value!r}: expected {name}")
    return settings


def refuse_unknown(key: str, known: list[str], where: str) -> None:
    """Raise a ValueError that names a key nobody knows, and what was probably meant."""
    if key not in known:
        close = difflib.get_close_matches(str(key), known, n=1)
        meant = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"
        raise ValueError(f"{where}: unknown setting {key!r}: {meant}")
