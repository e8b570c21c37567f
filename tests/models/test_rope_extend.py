"""A longer context, from a recipe or the command line to the trained folder; and scoring where it matters how long."""

import datasets
import pytest
import torch
from transformers import AutoConfig

import models
from tokenweight import Scorer, ShortContext, load_model, token_nll
from tokenweight.cli import main
from tokenweight.models import check_stale_rows, extend_context
from tokenweight.models.rope_check import verify_rope
from tokenweight.records import read_json
from tokenweight.train import TrainSettings, train

QUICK = {"max_steps": 1, "save_strategy": "no", "disable_tqdm": True}


@pytest.fixture
def longer(folders):
    rows = {"input_ids": models.some_tokens(2, 150).tolist()}
    datasets.Dataset.from_dict(rows).save_to_disk(str(folders / "longer"))
    return folders


def assert_extended(folder):
    """To 160 tokens by YaRN, as far as the trained folder itself says."""
    asked = extend_context(models.tiny().config, 160, "yarn", beta_fast=16.0)
    config = AutoConfig.from_pretrained(folder)
    assert (config.max_position_embeddings, config.rope_parameters) == (160, asked.rope_parameters)
    verify_rope(load_model(folder), asked)


@pytest.mark.parametrize("number", [int, str])
def test_a_recipe_extends_the_context_before_it_trains(number, longer):
    extend = {"length": number(160), "method": "yarn", "beta_fast": number(16)}
    settings = TrainSettings(
        str(longer / "model"),
        str(longer / "longer"),
        str(longer / "out"),
        "dense",
        "self",
        extend=extend,
        trainer=QUICK,
    )
    train(settings)
    assert_extended(longer / "out")
    run = read_json(longer / "out" / "run.json")
    assert run["rope_parameters"]["rope_type"] == "yarn"
    assert run["settings"]["extend"] == extend


def test_the_command_line_extends_the_context(longer, unchecked):
    words = ["train", "--model", "model", "--data", "longer", "--out", "out", "--weighting", "uniform"]
    words = [str(longer / word) if word in ("model", "longer", "out") else word for word in words]
    extend = ["--extend.length", "160", "--extend.method=yarn", "--extend.beta_fast", "16.0"]
    trainer = [f"--trainer.{name}={str(value).lower()}" for name, value in QUICK.items()]
    assert main([*words, *extend, *trainer]) == 0
    assert_extended(longer / "out")


@pytest.mark.parametrize("method", ["linear", "yarn", "dynamic"])
def test_the_first_window_is_read_again_where_angles_depend_on_the_length(method, tmp_path):
    models.tiny(dtype=torch.float64, max_position_embeddings=32).save_pretrained(tmp_path)
    model = load_model(tmp_path, extend={"length": 128, "method": method})
    tokens = models.some_tokens(1, 60)
    long_nll = token_nll(model, tokens)
    short_nll = Scorer(model, ShortContext(16, 8))(tokens, long_nll=long_nll)
    expected = token_nll(model, tokens[:, :16])
    # Two lengths of the same float64 sums.
    torch.testing.assert_close(short_nll[:, :16], expected, rtol=0, atol=1e-12)
    assert torch.equal(short_nll[:, :16], long_nll[:, :16]) == (method != "dynamic")


def test_windows_that_would_keep_the_angles_of_longer_rows_are_refused(tmp_path):
    models.tiny(max_position_embeddings=32).save_pretrained(tmp_path)
    model = load_model(tmp_path, extend={"length": 128, "method": "dynamic"})
    Scorer(model, ShortContext(31, 8))
    with pytest.raises(ValueError, match="windows of 32 tokens would keep the dynamic rotary frequencies"):
        Scorer(model, ShortContext(32, 8))


def test_rows_that_would_keep_the_angles_of_longer_rows_are_refused(tmp_path):
    models.tiny(max_position_embeddings=32).save_pretrained(tmp_path)
    dynamic, linear = (
        load_model(tmp_path, extend={"length": 128, "method": method}).config for method in ("dynamic", "linear")
    )
    check_stale_rows(dynamic, [8, 31, 60, 60])
    check_stale_rows(linear, [60, 100])
    with pytest.raises(ValueError, match="rows of 60 tokens would keep the dynamic rotary frequencies of rows of 100"):
        check_stale_rows(dynamic, [100, 8, 60])


@pytest.mark.parametrize("extend", [{"length": 160.5}, {"length": 160, "original": "all"}])
def test_a_length_that_is_no_whole_number_is_refused(extend, longer, unchecked):
    settings = TrainSettings(
        str(longer / "model"), str(longer / "longer"), str(longer / "out"), "uniform", extend=extend
    )
    with pytest.raises(ValueError, match="expected whole numbers of tokens"):
        train(settings)
