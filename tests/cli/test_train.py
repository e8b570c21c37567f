"""Options of the trainer, and recipes from elsewhere, whose code is not run unless somebody asks for it."""

import json
import sys

import pytest

from tokenweight import cli
from tokenweight.train import TrainSettings, read_recipe

GIVEN = ["train", "--model", "m", "--data", "d", "--out", "o"]


def trainer(*words):
    return cli.parse([*GIVEN, *words]).trainer


pytestmark = pytest.mark.usefixtures("unchecked")  # tyro has a value of its own for settings that are missing


def test_flags_may_stand_alone_wherever_they_stand():
    assert trainer("--trainer.bf16") == {"bf16": True}
    assert trainer("--trainer.bf16", "--trainer.seed", "3") == {"bf16": True, "seed": "3"}
    assert cli.parse(["train", "--trainer.fsdp", *GIVEN[1:]]) == cli.COMMANDS["train"](
        "m", "d", "o", trainer={"fsdp": True}
    )
    assert trainer("--trainer.resume_from_checkpoint", "--trainer.tf32") == {
        "resume_from_checkpoint": True,
        "tf32": True,
    }
    assert trainer("--trainer.gradient-checkpointing", "--trainer.max-steps=-1") == {
        "gradient_checkpointing": True,
        "max_steps": "-1",
    }


@pytest.mark.parametrize("field", ["run_name", "seed", "learning_rate", "report_to", "optim", "fsdp_config"])
def test_a_forgotten_value_takes_no_other_option(field):
    for words in ([f"--trainer.{field}"], [f"--trainer.{field}", "--trainer.bf16", "true"]):
        with pytest.raises(ValueError, match=rf"^--trainer.{field}: expected a value"):
            trainer(*words)
    assert trainer(f"--trainer.{field}=--weird") == {field: "--weird"}


CODE = """
import pathlib
pathlib.Path("ran").touch()
def weights(long, short, mask): return mask.float()
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory as somebody may have downloaded it: recipes, and code in a module and in a package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as of `python -m tokenweight`
    (tmp_path / "theirs.py").write_text(CODE)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text(CODE)
    (tmp_path / "namespace").mkdir()
    (tmp_path / "namespace" / "inner.py").write_text(CODE)
    for name in ("theirs", "package", "namespace.inner"):
        settings = f"model: m\ndata: d\nout: o\nweighting: {name}.weights\n"
        (tmp_path / f"{name}.yaml").write_text(settings)
        (tmp_path / f"{name}.json").write_text(f'{{"settings": {{"weighting": "{name}.weights"}}}}')
    yield tmp_path
    for name in ("theirs", "package", "namespace.inner", "namespace"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
@pytest.mark.parametrize("name", ["theirs", "package", "namespace.inner"])
def test_code_beside_a_recipe_is_not_run_unless_it_is_allowed(name, suffix, place, capfd):
    for command in ("train", "plan"):
        words = [command, "--config", f"{name}.{suffix}", "--model", "m", "--data", "d", "--out", "o"]
        assert cli.main(words) == 2
        told = capfd.readouterr().err
        assert f"{name}.weights is code that is not installed" in told
        assert "--allow_code" in told
    assert not (place / "ran").exists()
    with pytest.raises(ValueError, match="is code that is not installed"):
        read_recipe(f"{name}.{suffix}")
    assert read_recipe(f"{name}.{suffix}", allow_code=True)["weighting"] == f"{name}.weights"
    assert not (place / "ran").exists()
    assert cli.main(["train", "--allow_code", *words[1:]]) == 2  # the model is not there
    assert "weighting" not in capfd.readouterr().err
    assert (place / "ran").exists()


def test_a_recipe_cannot_allow_its_own_code(place):
    (place / "theirs.yaml").write_text("weighting: theirs.weights\nallow_code: true\n")
    with pytest.raises(ValueError, match="unknown setting 'allow_code'"):
        read_recipe("theirs.yaml")


def test_a_weighting_on_the_command_line_is_the_word_of_its_user(place):
    given = ["train", "--config", "theirs.yaml", "--weighting"]
    assert cli.parse([*given, "dense"]).weighting == "dense"
    assert cli.parse([*given, "package.weights"]).weighting == "package.weights"
    assert cli.parse([*GIVEN, "--weighting=theirs.weights"]).weighting == "theirs.weights"


@pytest.mark.parametrize(
    "weighting",
    [
        "floor(theirs.weights, minimum=0.5)",
        "mix(dense, first = theirs . weights)",
        "floor('theirs.weights', minimum=0.5)",
        "mix(uniform, floor(theirs.Weights(above=2), minimum=0))",
        "floor:weighting=theirs.weights,minimum=0",
        "mix(dense, theirs. # a comment\n weights)",
    ],
)
def test_code_within_a_combination_is_not_run_unless_it_is_allowed(weighting, place):
    (place / "nested.json").write_text(json.dumps({"settings": {"weighting": weighting}}))
    with pytest.raises(ValueError, match="is code that is not installed"):
        read_recipe("nested.json")
    assert not (place / "ran").exists()


@pytest.mark.parametrize(
    "weighting",
    [
        "mix(dense(interpolation=0.5), torch.nn.functional.relu, share=0.25)",
        "dense",
        "sparse:keep=0.1",
        "tokenweight.method.Dense",
        "torch.nn.functional.relu",
        "statistics.mean",
    ],
)
def test_weightings_of_installed_packages_need_no_permission(weighting, place):
    (place / "recipe.yaml").write_text(f"weighting: {weighting}\n")
    assert read_recipe("recipe.yaml") == {"weighting": weighting}


def test_settings_of_train_have_no_option_that_allows_code():
    assert "allow_code" not in TrainSettings.__dataclass_fields__
