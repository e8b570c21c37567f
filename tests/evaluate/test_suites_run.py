"""What the harness makes of a tiny model against counts and losses computed one by one, and the measures of suites."""

import re
from dataclasses import replace
from statistics import fmean, stdev
from types import SimpleNamespace

import datasets
import pytest
import torch
from suite_tasks import LENGTHS, QUESTIONS, local, local_generation, ruler_tokenizer, tiny

import models
from tokenweight.evaluate import EvalSettings, SuiteOptions, evaluate, preflight, read_table, run_suites
from tokenweight.evaluate.run import _check_samples
from tokenweight.evaluate.settings import make_plan
from tokenweight.evaluate.sized_suites import OFFLINE_RULER
from tokenweight.evaluate.suites import _harness, _needed, count_requests, load_tasks, suite_measures
from tokenweight.models import token_nll

pytest.importorskip("lm_eval", reason="not installed: lm_eval, of tokenweight[eval]")


@pytest.fixture
def tokenizer():
    return ruler_tokenizer()


def slow_choice(model, tokenizer, question, by_length):
    """The choice of least loss in the whole text (by letter, if asked), each by a forward pass of its own."""
    losses = []
    for choice in question["choices"]:
        prompt = tokenizer(question["text"].rstrip()).input_ids  # a space at its end belongs to the choices
        tokens = tokenizer(f"{question['text']} {choice}").input_ids
        loss = token_nll(model, torch.tensor([tokens]))[0, len(prompt) :].double().sum().item()
        losses.append(loss / len(choice) if by_length else loss)
    return losses.index(min(losses))


def test_multiple_choice_equals_the_least_loss_of_each_choice(tokenizer, tmp_path):
    correct = []
    for seed in (1, 2):
        model = tiny(seed)
        results = run_suites(model, tokenizer, SuiteOptions([local(tmp_path)], max_length=512))
        assert [result.metric for result in results] == ["acc", "acc_norm"]
        for result in results:
            by_length = result.metric == "acc_norm"
            right = [slow_choice(model, tokenizer, q, by_length) == q["answer"] for q in QUESTIONS]
            assert result.values == tuple(map(float, right))
            assert result.value == pytest.approx(fmean(right))
            assert result.stderr == pytest.approx(stdev(map(float, right)) / len(right) ** 0.5)
            assert (result.task, result.length, result.version) == ("local_choice", None, "3")
            assert result.num_samples == 5
            correct.append(right)
    assert len(set(map(tuple, correct))) > 1  # the models differ
    assert {True, False} == {right for of_model in correct for right in of_model}


def test_what_would_be_cut_is_counted_as_the_harness_cuts_it(tokenizer, tmp_path, caplog):
    from lm_eval.evaluator import evaluate as harness_evaluate

    budget = 4
    options = SuiteOptions([local(tmp_path), local_generation(tmp_path, max_gen_toks=budget)], max_length=512)
    ((_, tasks),) = load_tasks(tokenizer, options)
    prompts = [len(tokenizer(question["text"]).input_ids) for question in QUESTIONS]
    pairs = [len(tokenizer(f"{q['text']} {choice}").input_ids) for q in QUESTIONS for choice in q["choices"]]
    for max_length in (pairs[5], max(pairs) - 1, max(pairs) - 2, prompts[3] + budget, prompts[3] + budget - 1):
        with _harness(tiny(), tokenizer, replace(options, max_length=max_length)) as lm:
            fits = count_requests(lm, [(None, tasks)], options)
            caplog.clear()
            harness_evaluate(lm=lm, task_dict={"tasks": tasks})
        warned = [record.getMessage() for record in caplog.records]
        assert [(fit.task, fit.num_requests, fit.longest, fit.budget) for fit in fits] == [
            ("local_choice", 12, max(pairs) - 1, 0),
            ("local_generation", 5, max(prompts) + budget, budget),
        ]
        cut = [sum(pair - 1 > max_length for pair in pairs), sum(prompt + budget > max_length for prompt in prompts)]
        assert [fit.num_truncated for fit in fits] == cut
        assert sum("Combined length of context" in message for message in warned) == cut[0]
        assert sum("Left truncation" in message for message in warned) == cut[1]


def test_a_continuation_without_a_context_is_counted_with_the_token_that_the_harness_puts_before_it(tokenizer):
    with _harness(tiny(), tokenizer, SuiteOptions(["local"], max_length=512)) as lm:
        for context, continuation in (("", "Call me"), ("", "<s>Call me"), ("Call ", "me"), ("Call", " me")):
            requests, read = [SimpleNamespace(args=(context, continuation), request_type="loglikelihood")], []
            lm._loglikelihood_tokens = lambda pairs, read=read, **settings: read.extend(pairs) or [(0.0, False)]
            lm.loglikelihood(requests, disable_tqdm=True)
            ((_, before, after),) = read
            assert _needed(lm, requests[0]) == (0, len(before) + len(after) - 1)


def test_requests_that_do_not_fit_are_refused_before_the_model_runs(tokenizer, tmp_path, unchecked):
    model = tiny()
    model.forward = None
    longest = max(len(tokenizer(question["text"]).input_ids) for question in QUESTIONS) + 24
    options = SuiteOptions([local_generation(tmp_path)], max_length=longest)
    message = rf"^local_generation: 1 of 5 requests would be cut, .*{longest} tokens .* max_length={longest - 1}$"
    for run in (preflight, run_suites):
        with pytest.raises(ValueError, match=message):
            run(model, tokenizer, replace(options, max_length=longest - 1))
    preflight(model, tokenizer, options)
    for settings in ({"max_gen_toks": 100}, {"max_gen_toks": None, "max_new_tokens": 100}):
        task = local_generation(tmp_path, **settings)
        with pytest.raises(ValueError, match=r"^local_generation: 5 of 5 .* \(100 of them .* max_length=100$"):
            preflight(model, tokenizer, SuiteOptions([task], max_length=100))


class Oracle(torch.nn.Module):
    """Looks up the number that is asked for, and gives it if its digits have an even sum."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer, self.asked = tokenizer, []

    def forward(self, input_ids, max_length, **kwargs):
        prompt = self.tokenizer.decode(input_ids[0])
        key = re.findall(r"special magic number for (\S+) mentioned", prompt)[-1]
        number = re.search(rf"special magic numbers for {key} is: (\d+)\.", prompt).group(1)
        self.asked.append((sum(map(int, number)) % 2 == 0, max_length - input_ids.shape[1]))
        said = number if self.asked[-1][0] else "no idea"
        return torch.cat([input_ids, torch.tensor([self.tokenizer(f" {said}").input_ids])], dim=1)


@pytest.mark.slow
def test_ruler_is_scored_by_its_answers_at_every_length(tokenizer):
    model, oracle = tiny(), Oracle(tokenizer)
    model.generate = oracle.forward
    tasks = ["niah_single_1", "niah_multikey_2"]
    results = run_suites(model, tokenizer, SuiteOptions(tasks, max_length=800, lengths=[256, 512], limit=8))
    assert [(result.length, result.task, result.metric) for result in results] == [
        (length, task, str(length)) for length in (256, 512) for task in tasks
    ]
    assert {budget for _, budget in oracle.asked} == {128}
    # The harness asks the longest prompts first, so that only the numbers can be compared.
    assert sum(sum(result.values) for result in results) == sum(right for right, _ in oracle.asked)
    for result in results:
        assert result.num_samples == 8
        assert result.value == fmean(result.values)
        assert result.stderr == pytest.approx(stdev(result.values) / 8**0.5)
    assert len({result.value for result in results} | {0.0, 1.0}) > 2


@pytest.mark.parametrize("task", [pytest.param(task, marks=pytest.mark.slow) for task in OFFLINE_RULER])
def test_samples_depend_on_the_seed_only(task, tokenizer):
    length = LENGTHS.get(task, 256)
    first, again, other = (
        run_suites(tiny(model), tokenizer, SuiteOptions(suites, length + 264, lengths, 3, seed))[-1]
        for model, suites, lengths, seed in [
            (0, [task], [length], 5),
            (1, ["niah_single_1", task], [length + 64, length], 5),
            (0, [task], [length], 6),
        ]
    )
    assert (first.task, first.length, first.num_samples, first.metric) == (task, length, 3, str(length))
    assert first.fingerprint == again.fingerprint != other.fingerprint


SUITES = ["niah_single_1", "niah_multikey_3"]


def plan(suites=SUITES, lengths="512", limit=2):
    settings = EvalSettings("m", "d", "o", suites=",".join(suites), suite_lengths=lengths, suite_limit=limit)
    return make_plan(settings, 1024)


@pytest.mark.slow
def test_measures_hold_the_value_of_every_sample_of_a_suite(unchecked):
    assert max(LENGTHS[suite] for suite in SUITES[1:]) == 512
    model, tokenizer = tiny(), ruler_tokenizer()
    measures = {measure.name: measure for measure in suite_measures(model, tokenizer, plan())[0]}
    assert list(measures) == ["niah_single_1", "niah_single_1_512", "niah_multikey_3", "niah_multikey_3_512"]
    for suite in SUITES:
        (result,) = run_suites(model, tokenizer, SuiteOptions([suite], 2048, [512], limit=2))
        for measure in (measures[suite], measures[f"{suite}_512"]):
            assert (measure.group, measure.unit, measure.better) == ("long", "share", "higher")
            assert (tuple(measure.total), measure.num_tokens) == (result.values, [1.0, 1.0])
            assert measure.summary == (measure.name == suite)


@pytest.mark.slow
def test_a_suite_that_would_be_cut_is_refused_before_any_row_is_read(unchecked, tmp_path):
    tiny(max_position_embeddings=600).save_pretrained(tmp_path / "model")
    ruler_tokenizer().save_pretrained(tmp_path / "model")
    rows = {"input_ids": models.some_tokens(2, 128).tolist()}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "rows"))
    model, out = str(tmp_path / "model"), tmp_path / "out"
    settings = {"probes": "none", "sizes": "32", "suites": "niah_single_1", "suite_limit": 2}
    read = []
    too_long = EvalSettings(model, tmp_path / "rows", out, **settings, suite_lengths="1024")
    with pytest.raises(ValueError, match="niah_single_1 at length 1024: 2 of 2 requests would be cut"):
        evaluate(too_long, progress=lambda *done: read.append(done))
    assert (read, out.exists()) == ([], False)
    record = evaluate(EvalSettings(model, tmp_path / "rows", out, **settings, suite_lengths="256"))
    (row,) = read_table(record)
    (entry,) = [entry for entry in row if entry.measure == "niah_single_1"]
    assert (entry.summary, entry.num_documents) == (True, 2)
    assert record["settings"]["suites"] == ["niah_single_1"]


def test_models_that_saw_other_samples_are_not_compared():
    entries = [{"model": "a", "suites": {"mmlu": "1 by lm_eval 0.4.13"}}, {"model": "b", "suites": {"mmlu": "2"}}]
    with pytest.raises(
        ValueError, match=r"^suites: a and b saw different samples .mmlu is '1 by lm_eval 0.4.13' there"
    ):
        _check_samples(entries)
    _check_samples([entries[0], {**entries[0], "model": "b"}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"suite_limit": 2}, "^suites None: expected suites, with suite_lengths or suite_limit"),
        ({"suite_lengths": "64"}, "^suites None: expected suites"),
        ({"suites": "mmlu", "suite_limit": 0}, "^suite_limit 0: expected at least 1"),
        ({"suites": "ruler", "suite_lengths": "4x"}, "^suite_lengths 4x: expected"),
    ],
)
def test_options_of_suites_that_make_no_sense_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_plan(EvalSettings("m", tmp_path, tmp_path, **settings), 64)
