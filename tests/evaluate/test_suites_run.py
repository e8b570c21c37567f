"""What the harness makes of a tiny model against counts and losses computed one by one, and what is refused first."""

import logging
import re
from statistics import fmean, stdev

import pytest
import torch
from suite_tasks import LENGTHS, QUESTIONS, local, local_generation, ruler_tokenizer, tiny

from tokenweight.evaluate import run_suites
from tokenweight.evaluate.suites import OFFLINE_RULER, difference, preflight
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
        results = run_suites(model, tokenizer, [local(tmp_path)], max_length=512)
        assert results.lm_eval_version.startswith("0.4.")
        assert [result.metric for result in results.tasks] == ["acc", "acc_norm"]
        assert results.warnings == ()
        for result in results.tasks:
            by_length = result.metric == "acc_norm"
            right = [slow_choice(model, tokenizer, q, by_length) == q["answer"] for q in QUESTIONS]
            assert result.values == tuple(map(float, right))
            assert result.value == pytest.approx(fmean(right))
            assert result.stderr == pytest.approx(stdev(map(float, right)) / len(right) ** 0.5)
            assert (result.task, result.length, result.version) == ("local_choice", None, "3")
            assert (result.num_samples, result.num_truncated) == (5, 0)
            correct.append(right)
    assert len(set(map(tuple, correct))) > 1  # the models differ
    assert {True, False} == {right for of_model in correct for right in of_model}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_what_would_be_cut_is_counted_as_the_harness_cuts_it(batch_size, tokenizer, tmp_path, caplog):
    tasks, budget = [local(tmp_path), local_generation(tmp_path)], 24
    prompts = [len(tokenizer(question["text"]).input_ids) for question in QUESTIONS]
    pairs = [len(tokenizer(f"{q['text']} {choice}").input_ids) for q in QUESTIONS for choice in q["choices"]]
    for max_length in (pairs[5], max(pairs) - 1, max(pairs) - 2, prompts[3] + budget, prompts[3] + budget - 1):
        fits = preflight(tiny(), tokenizer, tasks, max_length=max_length, allow_truncated=100)
        assert [(fit.task, fit.num_requests, fit.longest, fit.budget) for fit in fits] == [
            ("local_choice", 12, max(pairs) - 1, 0),
            ("local_generation", 5, max(prompts) + budget, budget),
        ]
        cut = [sum(pair - 1 > max_length for pair in pairs), sum(prompt + budget > max_length for prompt in prompts)]
        assert [fit.num_truncated for fit in fits] == cut
        caplog.clear()
        settings = {"max_length": max_length, "allow_truncated": 100, "batch_size": batch_size}
        results = run_suites(tiny(), tokenizer, tasks, **settings)
        assert [result.num_truncated for result in results.tasks] == [cut[0], cut[0], cut[1]]
        warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert sum("Combined length of context" in message for message in warned) == cut[0]
        if batch_size == 1:  # of a batch, the harness warns once
            assert sum("Left truncation" in message for message in warned) == cut[1]
        assert any("Truncating" in message for message in results.warnings) == (cut[0] > 0)


def test_requests_that_do_not_fit_are_refused_before_the_model_runs(tokenizer, tmp_path, unchecked):
    model = tiny()
    model.forward = None
    longest = max(len(tokenizer(question["text"]).input_ids) for question in QUESTIONS) + 24
    message = (
        rf"^local_generation: 1 of 5 requests would be cut, the longest needs {longest} tokens \(24 of them to generate"
        rf"\), max_length={longest - 1}: expected at most allow_truncated=0$"
    )
    for run in (preflight, run_suites):
        with pytest.raises(ValueError, match=message):
            run(model, tokenizer, [local_generation(tmp_path)], max_length=longest - 1)
    preflight(model, tokenizer, [local_generation(tmp_path)], max_length=longest)
    preflight(model, tokenizer, [local_generation(tmp_path)], max_length=longest - 1, allow_truncated=1)
    for settings in ({"max_gen_toks": 100}, {"max_gen_toks": None, "max_new_tokens": 100}):
        with pytest.raises(ValueError, match=r"^local_generation generates up to 100 tokens: max_length=100 leaves no"):
            preflight(model, tokenizer, [local_generation(tmp_path, **settings)], max_length=100, allow_truncated=9)


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


def test_ruler_is_scored_by_its_answers_at_every_length(tokenizer):
    model, oracle = tiny(), Oracle(tokenizer)
    model.generate = oracle.forward
    tasks = ["niah_single_1", "niah_multikey_2"]
    results = run_suites(model, tokenizer, tasks, max_length=800, lengths=[256, 512], limit=8)
    assert [(result.length, result.task, result.metric) for result in results.tasks] == [
        (length, task, str(length)) for length in (256, 512) for task in tasks
    ]
    assert {budget for _, budget in oracle.asked} == {128}
    # The harness asks the longest prompts first, so that only the numbers can be compared.
    assert sum(sum(result.values) for result in results.tasks) == sum(right for right, _ in oracle.asked)
    for result in results.tasks:
        assert (result.num_samples, result.num_truncated) == (8, 0)
        assert result.value == fmean(result.values)
        assert result.stderr == pytest.approx(stdev(result.values) / 8**0.5)
    assert len({result.value for result in results.tasks} | {0.0, 1.0}) > 2


@pytest.mark.parametrize("task", [pytest.param(task, marks=pytest.mark.slow) for task in OFFLINE_RULER])
def test_samples_depend_on_the_seed_only(task, tokenizer):
    length = LENGTHS.get(task, 256)
    settings = {"max_length": length + 264, "limit": 3}
    first, again, other = (
        run_suites(tiny(model), tokenizer, suites, lengths=lengths, seed=seed, **settings).tasks[-1]
        for model, suites, lengths, seed in [
            (0, [task], [length], 5),
            (1, ["niah_single_1", task], [length + 64, length], 5),
            (0, [task], [length], 6),
        ]
    )
    assert (first.task, first.length, first.num_samples, first.metric) == (task, length, 3, str(length))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert difference(first, again).value == first.value - again.value
    with pytest.raises(ValueError, match=r"^the model's result is of .*: expected the same samples$"):
        difference(first, other)
