"""Names of suites against those of the harness itself, and every refusal before anything is evaluated."""

import random
import sys
from pathlib import Path

import datasets
import numpy
import pytest
import torch
from suite_tasks import local, local_generation, ruler_tokenizer, tiny

from texts import trained_tokenizer
from tokenweight.evaluate import SuiteOptions, preflight, run_suites
from tokenweight.evaluate.sized_suites import SIZED
from tokenweight.evaluate.suites import SUITES, _index, load_tasks

pytest.importorskip("lm_eval", reason="not installed: lm_eval, of tokenweight[eval]")


@pytest.fixture
def tokenizer():
    return ruler_tokenizer()


@pytest.fixture
def offline(monkeypatch):
    """Data sets of the hub cannot be reached, which takes the real library half a minute of trials to find out."""

    def unreachable(path, *arguments, **settings):
        raise ConnectionError(f"Couldn't reach {path!r} on the Hub\n(LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)


def test_suites_with_lengths_hold_the_tasks_that_the_harness_gives_them():
    from lm_eval import tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    for suite, file in (("ruler", "ruler.yaml"), ("babilong", "babilong_longctx.yaml")):
        path = f"{tasks.__path__[0]}/{suite}/{file}"
        assert sorted(load_yaml(path, resolve_func=False)["task"]) == sorted(SIZED[suite])


def check(tokenizer, *suites, max_length=2048, lengths=(1024,), limit=None):
    return preflight(tiny(), tokenizer, SuiteOptions(suites, max_length, lengths, limit))


@pytest.mark.parametrize(
    ("suite", "task", "data_set"),
    [
        ("mmlu", "mmlu", "cais/mmlu"),
        ("bbh", "bbh", "SaylorTwift/bbh"),
        ("babilong", "babilong_qa1", "RMT-team/babilong-1k-samples"),
        ("niah_single_2", "niah_single_2", "baber/paul_graham_essays"),
    ],
)
def test_a_data_set_that_cannot_be_reached_is_named_in_one_line(suite, task, data_set, offline, tokenizer):
    if task == "niah_single_2":
        from lm_eval.tasks.ruler.prepare_niah import get_haystack

        get_haystack.cache_clear()  # it may hold the essays of an earlier test
    with pytest.raises(ValueError, match=rf"^{task}: .*{data_set}") as caught:
        check(tokenizer, suite)
    assert "\n" not in str(caught.value)
    assert "LocalEntryNotFoundError" in str(caught.value)


@pytest.mark.parametrize("number", [2, 162])  # where a sample is tried out, and where samples are made
def test_a_name_that_the_harness_draws_twice_is_no_error_or_one_line(number, monkeypatch, tokenizer):
    names, choices = [], random.choices

    def drawn(letters, *, k):
        """Letters; of the names of three letters, five to an example, one is that before it."""
        if k != 3:
            return choices(letters, k=k)
        names.append(choices(letters, k=k) if len(names) + 1 != number else names[-1])
        return names[-1]

    monkeypatch.setattr(random, "choices", drawn)
    if number == 2:
        assert check(tokenizer, "ruler_vt")
    else:
        with pytest.raises(ValueError, match=r"^ruler_vt cannot draw its example by seed 0: expected another seed$"):
            check(tokenizer, "ruler_vt")


def test_packages_that_are_missing_are_named(monkeypatch, offline, tokenizer):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "jieba", None)
        with pytest.raises(ValueError, match=r"^longbench: .*'tokenweight\[eval\]' 'lm-eval\[longbench\]'"):
            check(tokenizer, "longbench")
    for module in ("lm_eval.tasks.ruler.fwe_utils", "lm_eval.models.huggingface"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ValueError, match=r"missing: pip install 'tokenweight\[eval\]'"):
                check(tokenizer, "ruler_fwe", lengths=[512])


@pytest.mark.parametrize(
    ("suites", "settings", "message"),
    [
        ([], {}, r"^suites=\[\], lengths=\[1024\]: "),
        (["ruler_vt"], {"lengths": []}, r"^suites=\['ruler_vt'\], lengths=\[\]: "),
        (["ruler_fwe"], {"limit": 0}, "^limit 0: expected at least 1"),
        (
            ["ruler_fwe"],
            {"max_length": 4096},
            "^max_length=4096: requests of 4096 tokens: the model has 2048 pos",
        ),
        (["ruler_vt"], {"lengths": [512]}, r"^length 512 is too short for ruler_vt: it needs \d+ tokens with this tok"),
        (["ruler_cwe"], {"lengths": [512]}, r"^length 512 is too short for ruler_cwe: it needs \d+ tokens with this"),
        (["ruler_fwe"], {"lengths": [128]}, "^length 128 is too short for ruler_fwe: it needs 200 tokens"),
        (["niah_single_1"], {"lengths": [140]}, "^Could not generate any sample for haystack 'repeat' at max_seq_len"),
        (["babilong"], {"lengths": [1000]}, "^length 1000 of babilong_qa1: expected a multiple of 1024$"),
    ],
)
def test_what_makes_no_sense_is_refused(suites, settings, message, tokenizer, unchecked):
    with pytest.raises(ValueError, match=message):
        check(tokenizer, *suites, **settings)


def test_a_tokenizer_with_which_ruler_would_never_end_is_refused():
    with pytest.raises(ValueError, match=r"^ruler_vt needs a tokenizer that makes its example of at most 500 tokens$"):
        check(trained_tokenizer(), "ruler_vt", lengths=[2048])


def test_ruler_samples_longer_than_their_length_are_seen(tokenizer):
    # Its generator leaves no room for the output.
    with pytest.raises(ValueError, match=r"^ruler_fwe at length 512: 2 of 2 requests would be cut, the longest needs "):
        check(tokenizer, "ruler_fwe", max_length=512, lengths=[512], limit=2)


@pytest.mark.slow
def test_babilong_is_loaded_and_reported_at_every_length(monkeypatch, tokenizer):
    asked = []

    def load(path, name, split):
        asked.append((path, name, split))
        rows = {"input": [f"Mary went to the {name}."] * 2, "question": ["Where is Mary?"] * 2, "target": ["a", "xyz"]}
        return datasets.Dataset.from_dict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    results = run_suites(tiny(), tokenizer, SuiteOptions(["babilong"], 2048, [1024, 8192], limit=1))
    questions = range(1, 6)
    assert asked == [("RMT-team/babilong-1k-samples", size, f"qa{n}") for size in ("1k", "8k") for n in questions]
    assert [(result.length, result.task) for result in results] == [
        (length, f"babilong_qa{n}") for length in (1024, 8192) for n in questions
    ]


def test_examples_are_as_many_as_a_task_says(tokenizer, tmp_path):
    suites = [local_generation(tmp_path), local(tmp_path, "two", num_fewshot=2), "ruler_fwe"]
    parts = load_tasks(tokenizer, SuiteOptions(suites, 512, [512]))
    assert [task.get_config("num_fewshot") for _, tasks in parts for task in tasks.values()] == [0, 0, 2]


@pytest.mark.slow
def test_a_task_of_any_name_is_found_among_all_tasks_and_a_task_of_no_file_at_once(monkeypatch, offline, tokenizer):
    from lm_eval import tasks

    folder, asked = Path(tasks.__file__).parent, []

    class Manager(tasks.TaskManager):
        def __init__(self, include_defaults=True, include_path=()):
            asked.append(include_defaults)
            super().__init__(include_defaults=False, include_path=[*include_path, folder / "hellaswag"])

    monkeypatch.setattr(tasks, "TaskManager", Manager)
    _index.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"^suite 'mmul' is not known"):
            check(tokenizer, "mmul")
        assert True not in asked
        for _ in range(2):
            with pytest.raises(ValueError, match=r"^hellaswag: .*Rowan/hellaswag"):
                check(tokenizer, "hellaswag")
    finally:
        _index.cache_clear()


def random_states():
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_model_tokenizer_and_random_numbers_stay_as_they_were(tokenizer, tmp_path, unchecked):
    # Unchecked, since beartype draws the items that it checks.
    model = tiny(dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    attributes, config, vocabulary = set(vars(model)), model.config.to_dict(), len(tokenizer)
    states = random_states()
    options = SuiteOptions([local(tmp_path), local_generation(tmp_path)], max_length=512)
    first, again = (run_suites(model, tokenizer, options) for _ in range(2))
    assert first == again  # no dropout
    assert random_states() == states
    assert [module.training for module in model.modules()] == modes
    assert (set(vars(model)), model.config.to_dict()) == (attributes, config)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert (tokenizer.pad_token, len(tokenizer)) == (None, vocabulary)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_every_suite_is_known(offline, tokenizer):
    for suite in SUITES[1:]:
        with pytest.raises(ValueError, match=rf"^{suite}.*: a (data set|package)"):
            check(tokenizer, suite)
