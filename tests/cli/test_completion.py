"""The script of `--print-completion` completes in a real shell."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tokenweight import cli

ASK = """
source ./script
COMP_WORDS=(%s)
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
$(complete -p tokenweight | sed 's/.*-F \\([^ ]*\\) .*/\\1/') tokenweight "${COMP_WORDS[COMP_CWORD]}" ""
printf '%%s\\n' "${COMPREPLY[@]}"
complete -p tokenweight
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    with (folder / "script").open("w") as file:
        subprocess.run([sys.executable, "-m", "tokenweight", "--print-completion", "bash"], stdout=file, check=True)
    return folder


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("tokenweight p", {"prepare", "plan"}),
        ("tokenweight plan --num", {"--num_gpus"}),
        ("tokenweight train --wei", {"--weighting"}),
        ("tokenweight export scored --format t", {"trl", "tinker"}),
        ("tokenweight prepare bo", set()),  # names of files, by bash itself
    ],
)
def test_bash_completes_commands_options_and_choices(words, expected, script):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", ASK % words], cwd=script, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    *found, registered = done.stdout.splitlines()
    assert (set(filter(None, found)), done.stderr) == (expected, "")
    assert "-o default" in registered


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_there_is_a_script_for_other_shells(shell, capsys):
    assert cli.main(["--print-completion", shell]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


@pytest.mark.parametrize("shell", [["tcsh"], []])
def test_another_shell_is_refused_in_one_line(shell, capsys):
    assert cli.main(["--print-completion", *shell]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "expected bash, zsh or fish" in said.err
