"""Standard suites by lm-evaluation-harness: a seed decides the samples, and no prompt is cut silently."""

import contextlib
import copy
import functools
import hashlib
import io
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from statistics import fmean
from typing import Any, NamedTuple

import numpy
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenweight.evaluate.comparison import Measure
from tokenweight.evaluate.settings import EvalPlan
from tokenweight.evaluate.sized_suites import RULER, SIZED, load_sized, one_line, task_folder
from tokenweight.models import check_length, context_length, evaluating

SUITES = ("ruler", "longbench", "babilong", "mmlu", "bbh")
SHORT_SUITES = ("mmlu", "bbh")
"""Suites that need no long context: they show a short-context regression."""
Tasks = dict[str, Any]
"""Tasks of lm_eval by name."""


@dataclass(frozen=True)
class SuiteOptions:
    """Suites to evaluate a model on, and their settings.

    The samples depend only on the tokenizer, `lengths`, `limit` and `seed`, not on the model or the other suites, so
    that two models can be compared sample by sample.
    """

    suites: Sequence[str | dict[str, Any]]
    """Names of `SUITES`, of tasks or groups of lm_eval, or task configurations as dictionaries."""
    max_length: int
    """Tokens the model may read, including those it generates."""
    lengths: Sequence[int] = (4096,)
    """Tokens of RULER and BABILong. RULER does not count the question or the output, so `max_length` must be up to 128
    tokens larger, and more for long prompts."""
    limit: int | None = None
    """Samples of each task; by default all."""
    seed: int = 0
    """Seed of samples and few-shot examples."""


class Fit(NamedTuple):
    """Whether the requests of one task, at one length if it has lengths, fit the model."""

    task: str
    length: int | None
    num_requests: int
    num_truncated: int
    """Requests that the harness would cut at the beginning, or read in pieces (`loglikelihood_rolling`)."""
    longest: int
    """Tokens that the longest request needs, including those that may be generated."""
    budget: int
    """Tokens that may be generated; 0 where continuations are scored."""


class TaskResult(NamedTuple):
    """One metric of one task at one length."""

    task: str
    length: int | None
    metric: str
    """The harness's name for it, with the name of a filter after a comma. RULER's are named by their lengths."""
    value: float
    stderr: float | None
    higher_is_better: bool
    num_samples: int
    version: str
    values: tuple[float, ...] | None
    """One for each sample, in their order; None if the metric is not their mean."""
    fingerprint: str
    """16 hex digits, equal for two results if their samples, prompts and targets are."""


def preflight(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: SuiteOptions) -> list[Fit]:
    """Build and tokenize all requests as the harness would; nothing is evaluated. `run_suites` does this first.

    Raises:
        ValueError: one line, if a suite is not known, cannot be loaded, or a request would be cut.
    """
    with _harness(model, tokenizer, options) as lm:
        return _check_fit(count_requests(lm, load_tasks(tokenizer, options), options), lm.max_length)


def run_suites(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: SuiteOptions) -> list[TaskResult]:
    """Evaluate a model in memory on standard suites. The model stays as it is; it is not written to disk.

    Returns:
        Every metric of every task, at each length that it has.

    Raises:
        ValueError: one line, if a suite is not known, cannot be loaded, or a request would be cut.

    Example:
        >>> options = SuiteOptions(["niah_single_1"], max_length=4096, lengths=[2048], limit=100)
        >>> (result,) = run_suites(model, tokenizer, options)
        >>> result.metric, result.value, result.stderr
        ('2048', 0.93, 0.02564...)
    """
    with _harness(model, tokenizer, options) as lm:
        from lm_eval.evaluator import evaluate

        parts = load_tasks(tokenizer, options)
        _check_fit(count_requests(lm, parts, options), lm.max_length)
        results: list[TaskResult] = []
        for length, tasks in parts:
            _seed(options.seed, tasks)
            output = evaluate(lm=lm, task_dict={"tasks": tasks}, limit=options.limit)
            results += [result for name in tasks for result in _task_results(name, length, output)]
    return results


@contextlib.contextmanager
def _harness(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: SuiteOptions) -> Iterator[Any]:
    """Wrap the model for the harness; afterwards, model, tokenizer and random states are restored."""
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"limit {options.limit}: expected at least 1 sample of each task")
    check_length(model.config, options.max_length, f"max_length={options.max_length}: requests")
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ValueError(f"suites need a package that is missing: pip install 'tokenweight[eval]' ({error})") from error
    devices = [model.device] if model.device.type == "cuda" else []
    states = random.getstate(), numpy.random.get_state()
    try:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices):
            own = copy.deepcopy(tokenizer)  # it may add a token for padding
            yield HFLM(pretrained=model, tokenizer=own, max_length=options.max_length, batch_size=1)
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def load_tasks(tokenizer: PreTrainedTokenizerBase, options: SuiteOptions) -> list[tuple[int | None, Tasks]]:
    """Load the tasks: those with lengths once for each length, and all others together, without one.

    Raises:
        ValueError: one line that says what is unknown, missing or unreachable.
    """
    suites, lengths = list(options.suites), list(options.lengths)
    names = [name for suite in suites if isinstance(suite, str) for name in SIZED.get(suite, [suite])]
    sized = list(dict.fromkeys(name for name in names if any(name in tasks for tasks in SIZED.values())))
    others = [suite for suite in suites if not isinstance(suite, str) or not (suite in SIZED or suite in sized)]
    if not suites or (sized and not lengths):
        raise ValueError(f"suites={suites}, lengths={lengths}: expected at least one of each")
    parts: list[tuple[int | None, Tasks]] = []
    parts += load_sized(sized, lengths, tokenizer, options.seed) if sized else []
    if others:
        with one_line(others), contextlib.redirect_stdout(io.StringIO()):
            manager = _manager([name for name in others if isinstance(name, str)])
            parts.append((None, manager.load(others)["tasks"]))
    for task in (task for _, tasks in parts for task in tasks.values()):
        task.set_config(key="num_fewshot", value=task.get_config("num_fewshot") or 0)
    return parts


def _manager(names: Sequence[str]) -> Any:
    """Find the tasks in the folders of the named suites, or else among all tasks."""
    named = [suite for suite in SUITES if any(name.startswith(suite) for name in names)]
    manager = _index(*(named or SUITES[:1]))  # for configurations alone, any index will do
    if set(names) <= set(manager.all_tasks):
        return manager
    texts = [path.read_bytes() for path in task_folder().rglob("*.yaml")]  # a name in no file is not a task: 1 s
    unknown = [name for name in names if not any(name.encode() in text for text in texts)]
    if not unknown:
        manager = _index()
        unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"suite {unknown[0]!r} is not known: expected one of {', '.join(SUITES)}, or a task or group of lm_eval "
            "(lm-eval ls tasks)"
        )
    return manager


@functools.cache
def _index(*suites: str) -> Any:
    """Index the folders of suites; or, without any, all tasks, which takes 20 s."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=not suites, include_path=[task_folder() / suite for suite in suites])


def _seed(seed: int, tasks: Tasks) -> None:
    """Seed the construction of requests, so that both times they contain the same examples."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    for task in tasks.values():
        task.set_fewshot_seed(seed)


def count_requests(lm: Any, parts: list[tuple[int | None, Tasks]], options: SuiteOptions) -> list[Fit]:
    """Build the requests of all tasks, in order, and count those that would be cut."""
    fits = []
    for length, tasks in parts:
        _seed(options.seed, tasks)
        for name, task in tasks.items():
            task.build_all_requests(limit=options.limit)
            budgets, needs = zip(*(_needed(lm, request) for request in task.instances))
            cut = sum(max(need, budget + 1) > lm.max_length for need, budget in zip(needs, budgets))
            fits.append(Fit(name, length, len(needs), cut, max(needs), max(budgets)))
    return fits


def _check_fit(fits: list[Fit], max_length: int) -> list[Fit]:
    """Raise a ValueError if a request of a task would be cut."""
    for fit in fits:
        name = fit.task if fit.length is None else f"{fit.task} at length {fit.length}"
        if fit.num_truncated:
            raise ValueError(
                f"{name}: {fit.num_truncated} of {fit.num_requests} requests would be cut, the longest needs "
                f"{fit.longest} tokens ({fit.budget} of them to generate): max_length={max_length}"
            )
    return fits


def _needed(lm: Any, request: Any) -> tuple[int, int]:
    """The tokens that may be generated for a request, and its total, as the harness tokenizes it."""
    from lm_eval.models.utils import normalize_gen_kwargs

    if request.request_type == "generate_until":
        prompt, settings = request.args
        budget = normalize_gen_kwargs(settings, lm.max_gen_toks)["max_gen_toks"]
        return budget, lm.tok_batch_encode([prompt])[0].shape[1] + budget
    if request.request_type == "loglikelihood_rolling":
        return 0, len(lm.tok_encode(request.args[0]))
    # Both are tokenized as one text; the last token of a continuation is predicted, not read. Without a context, the
    # harness puts a token before a continuation that does not begin with it.
    context, continuation = request.args
    tokens = lm.tok_encode(context + continuation, **({} if context else {"add_special_tokens": False}))
    return 0, len(tokens) - 1 + (not context and tokens[0] != lm.prefix_token_id)


def _task_results(name: str, length: int | None, output: dict[str, Any]) -> Iterator[TaskResult]:
    """All metrics of a task; for RULER, whose metrics are named by lengths, only that of the length of its samples."""
    scores = output["results"][name]
    for key, value in scores.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or (name in RULER and metric != str(length)):
            continue
        samples = [sample for sample in output["samples"][name] if sample["filter"] == chosen]
        samples.sort(key=lambda sample: sample["doc_id"])
        hashes = "".join(sample[f"{part}_hash"] for sample in samples for part in ("doc", "prompt", "target"))
        values = [sample.get(metric) for sample in samples]
        is_mean = all(isinstance(v, int | float) for v in values) and math.isclose(fmean(values), value, abs_tol=1e-9)
        stderr = scores.get(f"{metric}_stderr,{chosen}")
        yield TaskResult(
            task=name,
            length=length,
            metric=key.removesuffix(",none"),
            value=value,
            stderr=stderr if isinstance(stderr, float) else None,
            higher_is_better=output["higher_is_better"].get(name, {}).get(metric, True),
            num_samples=len(samples),
            version=str(output["versions"][name]),
            values=tuple(map(float, values)) if is_mean else None,
            fingerprint=hashlib.sha256(hashes.encode()).hexdigest()[:16],
        )


def suite_measures(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, plan: EvalPlan
) -> tuple[list[Measure], dict[str, str]]:
    """Compute the first metric of each task, and of each suite whose tasks share it; samples are resampled.

    Returns:
        The metrics; and a fingerprint of the samples of each task, with the version of the harness.

    Raises:
        ValueError: in one line, before any sample is read, if a suite cannot be loaded or would be cut.
    """
    measures: dict[str, Measure] = {}
    samples = {}
    for suite in plan.suites:
        assert tokenizer is not None
        room = context_length(model.config) or max(plan.suite_lengths) + 128
        options = SuiteOptions([suite], room, plan.suite_lengths, plan.suite_limit, plan.seed)
        try:
            results = run_suites(model, tokenizer, options)
        except ValueError as error:
            raise ValueError(f"suites {suite}: {error}") from error
        first = list({(result.task, result.length): result for result in reversed(results)}.values())[::-1]
        group = "short" if suite in SHORT_SUITES else "long"
        if all((result.values and result.metric == first[0].metric) or result.task in RULER for result in first):
            measures[suite] = _measure(suite, group, first, summary=True)
        for result in first:
            name = result.task if result.length is None else f"{result.task}_{result.length}"
            samples[name] = f"{result.fingerprint} by lm_eval {version('lm_eval')}"
            if name not in measures:
                measures[name] = _measure(name, group, [result], summary=len(first) == 1 and name == suite)
    return list(measures.values()), samples


def _measure(name: str, group: str, results: Sequence[TaskResult], *, summary: bool = False) -> Measure:
    """Join the samples of the results. A result without a value for each sample counts as one, without an interval."""
    total = [value for result in results for value in result.values or (result.value,)]
    is_share = results[0].task in RULER or results[0].metric.partition(",")[0] in ("acc", "acc_norm", "exact_match")
    better = "higher" if results[0].higher_is_better else "lower"
    return Measure(name, group, "share" if is_share else "score", better, total, [1.0] * len(total), summary)
