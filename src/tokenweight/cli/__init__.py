"""The command line: which command, its options, and errors in one line. Torch is imported when a command runs."""

import dataclasses
import difflib
import re
import sys
import typing
from collections.abc import Sequence
from typing import Any

import tyro

from tokenweight.cli.demo import Demo
from tokenweight.cli.eval import Eval
from tokenweight.cli.export import Export
from tokenweight.cli.figures import Figures
from tokenweight.cli.plan import Plan
from tokenweight.cli.prepare import Prepare
from tokenweight.cli.report import Report
from tokenweight.cli.score import Score
from tokenweight.cli.show import Show
from tokenweight.cli.train import Train, read_config, with_groups
from tokenweight.train import TrainSettings

COMMANDS: dict[str, Any] = {
    "prepare": Prepare,
    "score": Score,
    "plan": Plan,
    "train": Train,
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
        The exit status: 0; 2 after an error, which is one line on standard error unless tyro prints it; 130 after an
        interruption.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(_versions())
        return 0
    try:
        command = parse(words)
        _without_bars_of_others()
        command.run()
    except (ValueError, OSError, ImportError) as error:
        message = with_option(" ".join(str(error).split()), COMMANDS.get(words[0]))
        print(f"tokenweight {words[0]}: {message}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # tyro has printed the help, or what is wrong with the options
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print(f"tokenweight {words[0]}: interrupted", file=sys.stderr)
        return 130
    return 0


def parse(words: Sequence[str]) -> Any:
    """A command with its options: the object whose `run` does it.

    Raises:
        ValueError: for a command or an option that does not exist.
        SystemExit: from tyro, which has printed the help (status 0), or which option is missing or wrong (2).
    """
    name, *argv = words
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}: expected one of {', '.join(COMMANDS)}")
    kind = COMMANDS[name]
    if not issubclass(kind, TrainSettings):
        command, unknown = _parsed(name, argv)
    else:
        argv, recipe = read_config(argv)
        required = {
            field.name: tyro.MISSING
            for field in dataclasses.fields(kind)
            if field.default is field.default_factory is dataclasses.MISSING
        }
        # Without the groups of the recipe: tyro would make options of them, and read them by the types found there.
        command, unknown = _parsed(name, argv, default=kind(**{**required, **recipe, "trainer": {}, "extend": {}}))
        command, unknown = with_groups(command, recipe, unknown)
    if unknown:
        known = [f"--{field.name}" for field in dataclasses.fields(kind)]
        close = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"see tokenweight {name} --help"
        raise ValueError(f"{unknown[0]}: unknown option: {hint}")
    return command


def _parsed(name: str, argv: list[str], **default: Any) -> tuple[Any, list[str]]:
    options = {"prog": f"tokenweight {name}", "args": argv, "use_underscores": True, **default}
    return tyro.cli(COMMANDS[name], return_unknown_args=True, **options)


def with_option(message: str, kind: Any) -> str:
    """A message of the library that begins with a parameter, as in `size 12: …`, with the option `--size` in its place.

    Positional parameters have no option; nor has any other word, such as the name of a folder.
    """
    if kind is None:
        return message
    hints = typing.get_type_hints(kind, include_extras=True)
    options = [field.name for field in dataclasses.fields(kind) if "Positional" not in repr(hints[field.name])]
    options += ["config"] * issubclass(kind, TrainSettings)
    begins = rf"({'|'.join(options)})(\.\w+)?( ('[^']*'|\S+))?( cannot be read)?: "
    return f"--{message}" if re.match(begins, message) else message


def _without_bars_of_others() -> None:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


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
