"""The command line: parsing, and errors in one line. Torch is imported when a command runs: help comes at once."""

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from tokenweight import train
from tokenweight.cli.demo import Demo
from tokenweight.cli.eval import Eval
from tokenweight.cli.export import Export
from tokenweight.cli.figures import Figures
from tokenweight.cli.plan import Plan
from tokenweight.cli.prepare import Prepare
from tokenweight.cli.report import Report
from tokenweight.cli.score import Score
from tokenweight.cli.show import Show
from tokenweight.train import TrainSettings

COMMANDS: dict[str, Any] = {
    "prepare": Prepare,
    "score": Score,
    "plan": Plan,
    "train": TrainSettings,
    "export": Export,
    "show": Show,
    "figures": Figures,
    "eval": Eval,
    "report": Report,
    "demo": Demo,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, or 2 after one line on standard error for a bad input, 130 after an interruption.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(_versions())
        return 0
    try:
        if words[0] not in COMMANDS:
            raise ValueError(f"unknown command {words[0]!r}: expected one of {', '.join(COMMANDS)}")
        parse = _parse_recipe if issubclass(COMMANDS[words[0]], TrainSettings) else _parse
        command = parse(words[0], words[1:])
        if command is not None:
            _run(command)
    except (ValueError, OSError, ImportError) as error:
        print(f"tokenweight {words[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"tokenweight {words[0]}: interrupted", file=sys.stderr)
        return 130
    return 0


def _run(command: Any) -> None:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    if type(command) is TrainSettings:
        train.train(command)
        if os.environ.get("RANK", "0") == "0":
            print(f"{command.out}: the trained model, run.json and metrics.jsonl")
    else:
        command.run()


def _overview() -> str:
    lines = [
        "usage: tokenweight COMMAND …",
        "",
        "Train language models that use a long context, by weighting the loss of each token.",
        "",
    ]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:<9}{(command.__doc__ or '').splitlines()[0]}")
    lines += ["", "tokenweight COMMAND --help lists the options of a command."]
    return "\n".join([*lines, "tokenweight --version prints the versions and the device that a bug report needs."])


def _versions() -> str:
    """What a bug report needs: a line for each version, then one for the device."""
    from tokenweight.records import device_name, versions

    lines = {"tokenweight": "", **versions(), "device": device_name()}
    return "\n".join(f"{name} {value}" for name, value in lines.items())


def _parse(name: str, argv: list[str], default: Any = tyro.MISSING) -> Any:
    """The command's dataclass, or None after its help was printed. What tyro prints of an error becomes one line."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            extra = {} if default is tyro.MISSING else {"default": default}
            return tyro.cli(COMMANDS[name], prog=f"tokenweight {name}", args=argv, use_underscores=True, **extra)
    except SystemExit as stop:
        if not stop.code:
            return None
        raise ValueError(_one_line(re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue()))) from None


def _one_line(box: str) -> str:
    """What tyro says of an error, without its title, its frame, and the help of options, which it indents by nine."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰", "│" + 9 * " "))]
    return re.sub(" ─+ ", "; ", " ".join(lines))


def _parse_recipe(name: str, argv: list[str]) -> TrainSettings | None:
    """A recipe, overridden by options, of which `--trainer.NAME` are fields of TrainingArguments, `--extend.NAME`
    arguments of `extend_context`."""
    argv, recipes = _take(argv, "--config")
    settings = train.read_recipe(recipes["--config"]) if recipes else {}
    for group in ("trainer", "extend"):
        argv, taken = _take(argv, f"--{group}.")
        named = {option.removeprefix(f"--{group}."): value for option, value in taken.items()}
        settings[group] = {**settings.get(group, {}), **named}
    kind = COMMANDS[name]
    required = {
        field.name: tyro.MISSING
        for field in dataclasses.fields(kind)
        if field.default is field.default_factory is dataclasses.MISSING
    }
    return _parse(name, argv, kind(**{**required, **settings}))


def _take(argv: list[str], prefix: str) -> tuple[list[str], dict[str, str]]:
    """Remove options that begin with `prefix`, `--name value` or `--name=value`, and return what is left, and them."""
    left, taken = [], {}
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if not (name == prefix or (prefix.endswith(".") and name.startswith(prefix))):
            left.append(word)
            continue
        found = value if equals else next(words, None)
        if found is None:
            raise ValueError(f"{name}: expected a value")
        taken[name] = found
    return left, taken
