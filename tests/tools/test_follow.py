"""A parameter is followed through the calls that receive it, between files and between packages."""

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("follow", ROOT / "tools/follow.py")
follow = importlib.util.module_from_spec(SPEC)
sys.modules["follow"] = follow  # where its dataclasses look for their module
SPEC.loader.exec_module(follow)

TOY = {
    "low/words.py": "def count(text):\n    return len(text)\n",
    "low/names.py": "def name(text):\n    return text\n",
    "mid/lines.py": (
        "from toy.low.names import name\nfrom toy.low.words import count\n\n\n"
        "def lines(text):\n    count(text)\n    return long(name(text))\n\n\n"
        "def long(number):\n    return number > 3\n"
    ),
    "top.py": (
        "from toy.low.words import count\nfrom toy.mid.lines import lines\n\n\n"
        "def read(text):\n    lines(text)\n    begin(text)\n    return count(text)\n\n\n"
        "def begin(text):\n    return text[0]\n"
    ),
}
CONTRACT = """
[[tool.importlinter.contracts]]
type = "layers"
containers = ["toy"]
layers = ["top", "mid | other", "low"]
"""


def walked(tmp_path, contract):
    for path, text in {"pyproject.toml": contract, **{f"toy/{path}": text for path, text in TOY.items()}}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    command = [sys.executable, ROOT / "tools/follow.py", tmp_path / "toy", "top:read:text"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_moves_are_counted_between_files_and_between_packages_by_their_layers(tmp_path):
    # top: read | mid.lines: lines | low.words: count | low.names: name | top: begin | low.words: count
    assert walked(tmp_path, CONTRACT) == [
        "top:read:text: 6 stays, 4 rooms in 3 packages, 5 moves, 1 climbs, 2 returns",
        "between packages: 5 stays, 4 moves, 1 climbs, 2 returns",
    ]
    assert len(walked(tmp_path, "")) == 1


def test_the_settings_of_a_run_go_through_the_packages_once():
    _, walk = follow.follow(ROOT / "src/tokenweight", "train.run:train:settings")
    packages = [room.split(".")[1] for room, _ in walk.visits]
    found = follow.Count.of(packages, follow.layers(ROOT / "src/tokenweight"))
    assert (found.moves <= 15, found.climbs <= 6) == (True, True), found
    # The walk is short, and not lost on the way.
    steps = ["resolve", "parse_weighting", "open_sources", "open_held_out", "verify", "load_model", "check_fit"]
    assert {*steps, "with_weighted_loss", "WeightedTrainer.__init__"} <= {name for _, name in walk.visits}
