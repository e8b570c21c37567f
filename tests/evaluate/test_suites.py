"""Names of suites against those of the harness itself, and every refusal before anything is evaluated."""

import random
import sys

import datasets
import numpy
import pytest
import torch
from suite_tasks import local, local_generation, ruler_tokenizer, tiny

from texts import trained_tokenizer
from tokenweight.evaluate import run_suites
from tokenweight.evaluate.suites import _WITH_LENGTH, SUITES, load_tasks, preflight

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
        assert sorted(load_yaml(path, resolve_func=False)["task"]) == sorted(_WITH_LENGTH[suite])


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ("mmlu", "^mmlu: the data set cais/mmlu is not on this machine and cannot be reached "),
        ("bbh", "^bbh: the data set SaylorTwift/bbh is not on this machine and cannot be reached "),
        ("babilong", "^babilong_qa1: the data set RMT-team/babilong-1k-samples is not on this machine and cannot be"),
        ("niah_single_2", "^niah_single_2: the data set baber/paul_graham_essays is not on this machine and cannot"),
    ],
)
def test_a_data_set_that_cannot_be_reached_is_named_in_one_line(suite, message, offline, tokenizer):
    sys.modules.pop("lm_eval.tasks.ruler.prepare_niah", None)  # it may hold the essays of an earlier test
    with pytest.raises(ValueError, match=message) as caught:
        preflight(tiny(), tokenizer, [suite], max_length=2048, lengths=[1024])
    assert "\n" not in str(caught.value)
    assert "LocalEntryNotFoundError" in str(caught.value)


def test_packages_that_are_missing_are_named(monkeypatch, offline, tokenizer):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "jieba", None)
        with pytest.raises(
            ValueError, match=r"^longbench: a package is missing: pip install 'tokenweight\[eval\]' 'lm-"
        ):
            preflight(tiny(), tokenizer, ["longbench"], max_length=2048)
    for module in ("lm_eval.tasks.ruler.fwe_utils", "lm_eval.models.huggingface"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ValueError, match=r"missing: pip install 'tokenweight\[eval\]'"):
                preflight(tiny(), tokenizer, ["ruler_fwe"], max_length=2048, lengths=[512])


@pytest.mark.parametrize(
    ("suites", "settings", "message"),
    [
        (
            ["mmul"],
            {},
            "^suite 'mmul' is not known: expected one of ruler, longbench, babilong, mmlu, bbh, or a task or",
        ),
        ([], {}, r"^suites=\[\], lengths=\[1024\]: expected at least one of each$"),
        (["ruler_vt"], {"lengths": []}, r"^suites=\['ruler_vt'\], lengths=\[\]: expected at least one of each$"),
        (["ruler_fwe"], {"limit": 0}, "^limit=0: expected at least 1 sample of each task$"),
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
        preflight(tiny(), tokenizer, suites, **{"max_length": 2048, "lengths": [1024], **settings})


def test_a_tokenizer_with_which_ruler_would_never_end_is_refused():
    with pytest.raises(ValueError, match=r"^ruler_vt needs a tokenizer that makes its example of at most 500 tokens$"):
        preflight(tiny(), trained_tokenizer(), ["ruler_vt"], max_length=2048, lengths=[2048])


def test_ruler_samples_longer_than_their_length_are_seen(tokenizer):
    # Its generator leaves no room for the output.
    with pytest.raises(ValueError, match=r"^ruler_fwe at length 512: 2 of 2 requests would be cut, the longest needs "):
        preflight(tiny(), tokenizer, ["ruler_fwe"], max_length=512, lengths=[512], limit=2)


def test_babilong_is_loaded_and_reported_at_every_length(monkeypatch, tokenizer):
    asked = []

    def load(path, name, split):
        asked.append((path, name, split))
        rows = {"input": [f"Mary went to the {name}."] * 2, "question": ["Where is Mary?"] * 2, "target": ["a", "xyz"]}
        return datasets.Dataset.from_dict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    results = run_suites(tiny(), tokenizer, ["babilong"], max_length=2048, lengths=[1024, 8192], limit=2)
    questions = range(1, 6)
    assert asked == [("RMT-team/babilong-1k-samples", size, f"qa{n}") for size in ("1k", "8k") for n in questions]
    assert [(result.length, result.task) for result in results.tasks] == [
        (length, f"babilong_qa{n}") for length in (1024, 8192) for n in questions
    ]
    for group in results.groups:
        values = [result.value for result in results.tasks if result.length == group.length]
        assert (group.group, group.metric, group.value) == ("babilong", "mean", sum(values) / 5)
    assert [group.length for group in results.groups] == [1024, 8192]


def test_examples_are_as_many_as_asked_for_and_none_where_a_task_says_so(tokenizer, tmp_path):
    suites = [local(tmp_path), local_generation(tmp_path), local(tmp_path, "none", num_fewshot=0), "ruler_fwe"]
    for asked, expected in ((None, [0, 0, 0, 0]), (2, [0, 2, 2, 0])):
        parts = load_tasks(tokenizer, suites, [512], asked, 0)
        assert [task.get_config("num_fewshot") for part in parts for task in part.tasks.values()] == expected


def random_states():
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_model_tokenizer_and_random_numbers_stay_as_they_were(tokenizer, tmp_path, unchecked):
    # Unchecked, since beartype draws the items that it checks.
    model = tiny(dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    attributes, config = set(vars(model)), model.config.to_dict()
    states = random_states()
    first, again = (
        run_suites(model, tokenizer, [local(tmp_path), local_generation(tmp_path)], max_length=512) for _ in range(2)
    )
    assert first == again  # no dropout
    assert random_states() == states
    assert [module.training for module in model.modules()] == modes
    assert (set(vars(model)), model.config.to_dict()) == (attributes, config)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert (tokenizer.pad_token, len(tokenizer)) == (None, 8000)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_every_suite_is_known(offline, tokenizer):
    for suite in SUITES[1:]:
        with pytest.raises(ValueError, match=rf"^{suite}.*: (the data set|a package is missing)"):
            preflight(tiny(), tokenizer, [suite], max_length=2048, lengths=[1024])
