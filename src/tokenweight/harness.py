"""Standard suites, by lm-evaluation-harness, on a model in memory, after a check of what the harness hides."""

import contextlib
import copy
import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from statistics import fmean
from typing import Any, NamedTuple
from unittest import mock

import numpy
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenweight.causal import evaluating
from tokenweight.intervals import Difference, Sums, paired_difference
from tokenweight.model import refuse_length
from tokenweight.suites import Part, collected_warnings, is_ruler, load_tasks


class Fit(NamedTuple):
    """Whether the requests of one task, at one length if it has lengths, fit the model."""

    task: str
    length: int | None
    num_requests: int
    num_truncated: int
    """Requests of which the harness would cut the beginning off, or which it would read in pieces (`rolling`)."""
    longest: int
    """Tokens that the longest request needs, what may be generated included."""
    budget: int
    """Tokens that may be generated; 0 where continuations are scored."""


class TaskResult(NamedTuple):
    """One metric of one task at one length."""

    task: str
    length: int | None
    metric: str
    """As the harness names it, with the name of a filter after a comma. RULER's are named by their lengths."""
    value: float
    stderr: float | None
    higher_is_better: bool
    num_samples: int
    num_truncated: int
    version: str
    values: tuple[float, ...] | None
    """Of each sample, in their order; None if the metric is not the mean of one number of each."""
    fingerprint: str
    """16 hex digits that two results share if their samples, prompts and targets are the same."""


class GroupResult(NamedTuple):
    """One metric of a group: for RULER the plain mean over its tasks at one length, else as the harness defines it."""

    group: str
    length: int | None
    metric: str
    value: float
    stderr: float | None


class SuiteResults(NamedTuple):
    """What the harness measured, and what it warned of."""

    tasks: tuple[TaskResult, ...]
    groups: tuple[GroupResult, ...]
    warnings: tuple[str, ...]
    lm_eval_version: str


def preflight(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suites: Sequence[str | dict[str, Any]],
    *,
    max_length: int,
    lengths: Sequence[int] = (4096,),
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    allow_truncated: int | float = 0,
) -> list[Fit]:
    """Build and tokenize all requests as the harness would, and count those that it would cut; nothing is evaluated.

    The arguments are those of `run_suites`, which does this first.

    Raises:
        ValueError: one line, if a suite is not known, cannot be loaded, or does not fit.
    """
    with _harness(model, tokenizer, max_length, 1, limit) as lm:
        return _fits(lm, load_tasks(tokenizer, suites, lengths, num_fewshot, seed), limit, seed, allow_truncated)


def run_suites(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suites: Sequence[str | dict[str, Any]],
    *,
    max_length: int,
    lengths: Sequence[int] = (4096,),
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    allow_truncated: int | float = 0,
    batch_size: int = 1,
) -> SuiteResults:
    """Evaluate a model in memory on standard suites. The model stays as it is; it is not written to disk.

    The samples depend on the tokenizer, `lengths`, `limit` and `seed` only, not on the model nor on what else is asked
    for, so that the results of two models can be compared sample by sample (`difference`).

    Args:
        suites: names of `SUITES`, of tasks or groups of lm_eval, or task configurations as dictionaries.
        max_length: tokens the model may read, what it generates included.
        lengths: of RULER and BABILong, in tokens; each is reported by itself. The harness leaves the question or the
            output out of RULER's lengths, so `max_length` must be up to 128 tokens larger, and more for long prompts.
        num_fewshot: examples in each prompt; by default as the task says. Tasks that say 0, and RULER's, keep it.
        limit: samples of each task.
        seed: of samples and examples.
        allow_truncated: requests of a task that may be cut at the beginning; `math.inf` for any number.
        batch_size: requests read at once.

    Raises:
        ValueError: one line, if a suite is not known, cannot be loaded, or does not fit (`preflight`).
    """
    with collected_warnings() as warnings, _harness(model, tokenizer, max_length, batch_size, limit) as lm:
        from lm_eval.evaluator import evaluate

        parts = load_tasks(tokenizer, suites, lengths, num_fewshot, seed)
        fits = iter(_fits(lm, parts, limit, seed, allow_truncated))
        tasks: list[TaskResult] = []
        groups: list[GroupResult] = []
        for part in parts:
            _seed(seed, part.tasks)
            output = evaluate(lm=lm, task_dict={"tasks": part.tasks, "groups": part.groups}, limit=limit)
            for name in part.tasks:
                tasks += _task_results(name, output, next(fits))
            groups += _group_results(part, output, tasks)
    return SuiteResults(tuple(tasks), tuple(groups), tuple(dict.fromkeys(warnings)), version("lm_eval"))


def difference(model: TaskResult, baseline: TaskResult, **settings: Any) -> Difference:
    """Difference of two models in one metric, over the same samples (`intervals.paired_difference`).

    Raises:
        ValueError: if the results are not of the same task, metric and samples, or have no value for each sample.
    """
    for result in (model, baseline):
        if result.values is None:
            raise ValueError(f"{result.task}: {result.metric} has no value for each sample to compare")
    ours, theirs = ((one.task, one.length, one.metric, one.fingerprint) for one in (model, baseline))
    if ours != theirs:
        raise ValueError(f"the model's result is of {ours}, the baseline's of {theirs}: expected the same samples")
    values = [torch.tensor(result.values, dtype=torch.float64) for result in (model, baseline)]
    return paired_difference(*(Sums(value, torch.ones_like(value)) for value in values), **settings)


@contextlib.contextmanager
def _harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int, batch_size: int, limit: int | None
) -> Iterator[Any]:
    """The model as the harness wants it; model, tokenizer and random states are afterwards as before."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ValueError(f"suites need a package that is missing: pip install 'tokenweight[eval]' ({error})") from error
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: expected at least 1 sample of each task")
    refuse_length(model.config, max_length, f"max_length={max_length}: requests")
    devices = [model.device] if model.device.type == "cuda" else []
    states = random.getstate(), numpy.random.get_state()
    try:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices):
            own = copy.deepcopy(tokenizer)  # it may add a token for padding
            yield HFLM(pretrained=model, tokenizer=own, max_length=max_length, batch_size=batch_size)
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def _seed(seed: int, tasks: dict[str, Any]) -> None:
    """Before requests are built, so that both times they hold the same examples."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    for task in tasks.values():
        task.set_fewshot_seed(seed)


def _fits(lm: Any, parts: list[Part], limit: int | None, seed: int, allow_truncated: int | float) -> list[Fit]:
    """Build the requests of all tasks, in order, and refuse those that would be cut."""
    fits = []
    for part in parts:
        _seed(seed, part.tasks)
        for name, task in part.tasks.items():
            task.build_all_requests(limit=limit)
            budget, needs = _needed(lm, task.instances)
            if budget >= lm.max_length:
                raise ValueError(
                    f"{_named(name, part.length)} generates up to {budget} tokens: max_length={lm.max_length} leaves "
                    "no room for a prompt"
                )
            cut = sum(need > lm.max_length for need in needs)
            fits.append(Fit(name, part.length, len(needs), cut, max(needs), budget))
    for fit in fits:
        if fit.num_truncated > allow_truncated:
            raise ValueError(
                f"{_named(fit.task, fit.length)}: {fit.num_truncated} of {fit.num_requests} requests would be cut, the "
                f"longest needs {fit.longest} tokens ({fit.budget} of them to generate), max_length={lm.max_length}: "
                f"expected at most allow_truncated={allow_truncated}"
            )
    return fits


def _named(task: str, length: int | None) -> str:
    return task if length is None else f"{task} at length {length}"


def _needed(lm: Any, instances: list[Any]) -> tuple[int, list[int]]:
    """The largest generation budget, and the tokens that each request needs, by the harness's own tokenization."""
    from lm_eval.models.utils import normalize_gen_kwargs

    needs: list[int] = []
    budgets = [0]

    def count_pairs(requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        # The last token of a continuation is predicted, not read.
        needs.extend(len(context) + len(continuation) - 1 for _, context, continuation in requests)
        return [(0.0, False)] * len(requests)

    pairs = [instance for instance in instances if instance.request_type == "loglikelihood"]
    with mock.patch.object(lm, "_loglikelihood_tokens", count_pairs):
        lm.loglikelihood(pairs, disable_tqdm=True)
    for instance in instances:
        if instance.request_type == "generate_until":
            prompt, settings = instance.args
            budgets.append(normalize_gen_kwargs(settings, lm.max_gen_toks)["max_gen_toks"])
            needs.append(lm.tok_batch_encode([prompt])[0].shape[1] + budgets[-1])
        elif instance.request_type == "loglikelihood_rolling":
            needs.append(len(lm.tok_encode(instance.args[0])))
    return max(budgets), needs


def _task_results(name: str, output: dict[str, Any], fit: Fit) -> Iterator[TaskResult]:
    """Every metric of a task; of RULER's, which are named by lengths, that of the length of its samples."""
    for key, value, stderr in _scores(output["results"][name]):
        metric, _, chosen = key.partition(",")
        if is_ruler(name) and metric != str(fit.length):
            continue
        samples = [sample for sample in output["samples"][name] if sample["filter"] == chosen]
        samples.sort(key=lambda sample: sample["doc_id"])
        hashes = "".join(sample[f"{part}_hash"] for sample in samples for part in ("doc", "prompt", "target"))
        values = [sample.get(metric) for sample in samples]
        is_mean = all(isinstance(v, int | float) for v in values) and math.isclose(fmean(values), value, abs_tol=1e-9)
        yield TaskResult(
            task=name,
            length=fit.length,
            metric=key.removesuffix(",none"),
            value=value,
            stderr=stderr,
            higher_is_better=output["higher_is_better"].get(name, {}).get(metric, True),
            num_samples=len(samples),
            num_truncated=fit.num_truncated,
            version=str(output["versions"][name]),
            values=tuple(map(float, values)) if is_mean else None,
            fingerprint=hashlib.sha256(hashes.encode()).hexdigest()[:16],
        )


def _group_results(part: Part, output: dict[str, Any], tasks: list[TaskResult]) -> Iterator[GroupResult]:
    for group, scores in output.get("groups", {}).items():
        for key, value, stderr in _scores(scores):
            yield GroupResult(group, part.length, key.removesuffix(",none"), value, stderr)
    for suite, names in part.suites.items():
        values = [result.value for result in tasks if result.length == part.length and result.task in names]
        yield GroupResult(suite, part.length, "mean", sum(values) / len(values), None)


def _scores(scores: dict[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """Metric with its filter, value and standard error of each entry of the harness's results."""
    for key, value in scores.items():
        metric, _, chosen = key.partition(",")
        if chosen and not metric.endswith("_stderr"):
            stderr = scores.get(f"{metric}_stderr,{chosen}")
            yield key, value, stderr if isinstance(stderr, float) else None
