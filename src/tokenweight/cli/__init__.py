"""The command line: dispatch, options, and one-line errors. Torch is imported when a command runs."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import select
import sys
import traceback
import typing
from collections.abc import Sequence
from typing import Any

import tyro

from tokenweight.cli.demo import Demo
from tokenweight.cli.doctor import Doctor
from tokenweight.cli.eval import Eval
from tokenweight.cli.export import Export, Upload, Verify
from tokenweight.cli.plan import Plan
from tokenweight.cli.prepare import Prepare
from tokenweight.cli.report import Figures, Report
from tokenweight.cli.score import Score
from tokenweight.cli.show import Show
from tokenweight.cli.stats import CompareScores, Stats
from tokenweight.cli.train import GROUPS, Train, read_config, with_groups
from tokenweight.train import TrainSettings, trainer_field

COMMANDS: dict[str, Any] = {
    "prepare": Prepare,
    "score": Score,
    "plan": Plan,
    "train": Train,
    "export": Export,
    "upload": Upload,
    "verify": Verify,
    "show": Show,
    "stats": Stats,
    "compare-scores": CompareScores,
    "figures": Figures,
    "eval": Eval,
    "report": Report,
    "demo": Demo,
    "doctor": Doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    All exceptions are caught here, and become one line on stderr. `TOKENWEIGHT_DEBUG=1` prints the traceback
    before it.

    Returns:
        The exit status: 0; 2 after an error, whoever raised it; 130 after an interruption; 141, as after SIGPIPE, if
        nobody reads the output any more (`| head`).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _status(words)
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()  # here, where an exception is caught, rather than at the exit of the interpreter
        return status
    except BrokenPipeError:
        _drop_output()
        return 141


def _status(words: list[str]) -> int:
    command = words[0] if words else ""
    try:
        _run(words)
    except SystemExit as stop:  # tyro has printed the help, or what is wrong with the options
        if isinstance(stop.__context__, BrokenPipeError):  # rich turns it into a SystemExit
            raise stop.__context__ from None
        return stop.code if isinstance(stop.code, int) else 2 * (stop.code is not None)
    except KeyboardInterrupt:
        print(f"tokenweight {command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and any(map(_has_no_reader, (sys.stdout, sys.stderr))):
            raise
        if os.environ.get("TOKENWEIGHT_DEBUG", "0") not in ("", "0"):
            traceback.print_exception(error)
        print(f"tokenweight {command}: {_message(error, COMMANDS.get(command))}", file=sys.stderr)
        return 2
    return 0


def _run(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
    elif words[0] == "--version":
        print(_versions())
    elif words[0] == "--print-completion":
        print(_completion(" ".join(words[1:])))
    else:
        command = parse(words)
        _without_bars_of_others()
        command.run()


def _message(error: Exception, kind: Any) -> str:
    """An exception in one line: ours by its message; others also with their type and where they were raised."""
    text = " ".join(str(error).split())
    frames = [frame.f_globals.get("__name__", "?") for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = isinstance(error, ValueError | ImportError) and frames[-1].partition(".")[0] == "tokenweight"
    if own or (isinstance(error, OSError) and text):
        return with_option(text, kind)
    text = text if len(text) <= 500 else f"{text[:500]}…"
    what = f"{text or 'no message'} ({type(error).__name__} in {frames[-1]})"
    return f"{with_option(what, kind)}: set TOKENWEIGHT_DEBUG=1 for the traceback"


def _has_no_reader(stream: Any) -> bool:
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no stream, or one without a descriptor
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    return False


def _drop_output() -> None:
    """Discard whatever is still printed, for which the interpreter would print an exception."""
    for stream in (sys.stdout, sys.stderr):
        if _has_no_reader(stream):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def parse(words: Sequence[str]) -> Any:
    """Parse a command line into the command object, whose `run` executes it.

    Raises:
        ValueError: for a command or an option that does not exist.
        SystemExit: from tyro, which has printed the help (status 0), or the option that is missing or wrong (2).
    """
    name, *argv = words
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}? Expected" if close else "expected"
        raise ValueError(f"unknown command {name!r}: {hint} one of {', '.join(COMMANDS)}")
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
        # Without the groups of the recipe: tyro would turn them into options, with the types found there.
        command, unknown = _parsed(name, argv, default=kind(**{**required, **recipe, **{name: {} for name in GROUPS}}))
        command, unknown = with_groups(command, recipe, unknown)
    if unknown:
        _check_switch(argv, unknown[0])
        raise ValueError(f"{unknown[0]}: unknown option: {_meant(unknown[0].partition('=')[0], name)}")
    return command


def _check_switch(argv: Sequence[str], word: str) -> None:
    """Raise a ValueError if a word that no option consumed is a value given to a switch."""
    before = argv[argv.index(word) - 1] if word in argv[1:] else ""
    if before.startswith("--") and word.lower() in ("true", "false"):
        opposite = f"--no_{before.removeprefix('--')}"
        expected = f"{before} alone" if word.lower() == "true" else opposite
        raise ValueError(f"{before} {word}: a switch, which takes no value: expected {expected}")


def _meant(option: str, command: str) -> str:
    """Suggest an option for one that a command does not have."""
    kind, word = COMMANDS[command], option.removeprefix("--").replace("-", "_")
    trained = issubclass(kind, TrainSettings)
    if trained and word in GROUPS:
        return f"expected --{word}.NAME VALUE"
    close = difflib.get_close_matches(option, [f"--{field.name}" for field in dataclasses.fields(kind)], n=1)
    if trained and option.startswith("--") and (field := trainer_field(word, close=not close)):
        return f"a field of the trainer: --trainer.{field}"
    return f"did you mean {close[0]}?" if close else f"see tokenweight {command} --help"


def _parsed(name: str, argv: list[str], **default: Any) -> tuple[Any, list[str]]:
    options = {"prog": f"tokenweight {name}", "args": argv, "use_underscores": True, **default}
    return tyro.cli(COMMANDS[name], return_unknown_args=True, **options)


def with_option(message: str, kind: Any) -> str:
    """Replace the parameter that a message of the library begins with, as in `size 12: …`, by its option `--size`.

    Positional parameters have no option, nor do other words, such as the name of a folder.
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
        lines.append(f"  {name:<16}{(command.__doc__ or '').splitlines()[0]}")
    lines += ["", "tokenweight COMMAND --help lists the options of a command."]
    lines += ["tokenweight --version prints versions and the device; tokenweight doctor all that a bug report needs."]
    lines += ["tokenweight --print-completion bash, zsh or fish prints a script that completes commands and options."]
    return "\n".join([*lines, "TOKENWEIGHT_DEBUG=1 in the environment shows the traceback of an error."])


def _completion(shell: str) -> str:
    """The shell script that completes commands and their options, and file names elsewhere."""
    if shell not in ("bash", "zsh", "fish"):
        raise ValueError(f"{shell or 'no shell'}: expected bash, zsh or fish")
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        words = ["--tyro-print-completion", shell]
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="tokenweight", args=words, use_underscores=True)
    lines = script.getvalue().replace("complete -F ", "complete -o default -F ").splitlines()
    # A line break within a description would turn its second line into another completion.
    return "\n".join(line.replace("\\n", " ") if line.startswith("COMPLETION_SPEC = ") else line for line in lines)


def _versions() -> str:
    """Versions for a bug report, one per line, then the device."""
    from tokenweight.records import device_name, versions

    lines = {"tokenweight": "", **versions(), "device": device_name()}
    return "\n".join(f"{name} {value}" for name, value in lines.items())
