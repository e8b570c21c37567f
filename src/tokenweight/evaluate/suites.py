"""Tasks of lm-evaluation-harness by the names of suites, with samples that a seed decides, and what they need."""

import contextlib
import copy
import hashlib
import importlib
import io
import logging
import math
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple
from unittest import mock

import numpy
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenweight.evaluate.compare import Measure
from tokenweight.evaluate.intervals import Difference, Sums, paired_difference
from tokenweight.evaluate.settings import Plan
from tokenweight.models import check_length, context_length, evaluating

SUITES = ("ruler", "longbench", "babilong", "mmlu", "bbh")
SHORT_SUITES = ("mmlu", "bbh")
"""Those that need no long context: what training at long range may have cost."""
OFFLINE_RULER = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
"""The tasks of RULER whose samples are made of nothing but words: they need no network."""
_ESSAYS = "baber/paul_graham_essays"
_DATA_SETS = {
    **dict.fromkeys(OFFLINE_RULER, ""),
    "niah_single_2": _ESSAYS,
    "niah_single_3": _ESSAYS,
    "niah_multikey_1": _ESSAYS,
    "niah_multiquery": _ESSAYS,
    "niah_multivalue": _ESSAYS,
    "ruler_qa_squad": "dev-v2.0.json of SQuAD-explorer",
    "ruler_qa_hotpot": "namlh2004/hotpotqa",
}
"""What each task of RULER downloads: its configuration does not say it."""
# Of BABILong, the five questions that exist at every length (its group babilong_longctx).
_WITH_LENGTH = {"ruler": tuple(_DATA_SETS), "babilong": tuple(f"babilong_qa{number}" for number in range(1, 6))}
# What the harness warns of in every run like ours.
_USUAL = (
    "`pretrained` model kwarg",
    "already-initialized model",
    "Custom kwargs can",
    "No aggregation function defined",
)


class Part(NamedTuple):
    """Tasks that the harness can run together: a name is in it once."""

    length: int | None
    tasks: dict[str, Any]
    groups: dict[str, Any]
    suites: dict[str, tuple[str, ...]]
    """Suites with lengths that were asked for, and their tasks; the harness would report them at 4096 tokens only."""


def is_ruler(task: str) -> bool:
    """Whether it is a task of RULER: its metrics are named by lengths."""
    return task in _DATA_SETS


def load_tasks(
    tokenizer: PreTrainedTokenizerBase,
    suites: Sequence[str | dict[str, Any]],
    lengths: Sequence[int],
    num_fewshot: int | None,
    seed: int,
) -> list[Part]:
    """Load the tasks of suites: those with lengths once for each, all others in a part of their own.

    RULER sizes its samples with a tokenizer that it loads by name, and lets that run code of the hub. It gets a folder
    into which the tokenizer is saved, so that one in memory will do, and nothing is fetched.

    Raises:
        ValueError: one line that says what is not known, missing or not reachable.
    """
    named = {suite: _WITH_LENGTH[suite] for suite in suites if isinstance(suite, str) and suite in _WITH_LENGTH}
    spread = [name for suite in suites for name in (named.get(suite, (suite,)) if isinstance(suite, str) else (suite,))]
    sized = [name for name in spread if isinstance(name, str) and any(name in of for of in _WITH_LENGTH.values())]
    others = [name for name in spread if name not in sized]
    if not spread or (sized and not lengths):
        raise ValueError(f"suites={list(suites)}, lengths={list(lengths)}: expected at least one of each")
    parts = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        if sized:
            tokenizer.save_pretrained(folder)
        for length in lengths if sized else ():
            tasks = {name: _sized_task(name, length, tokenizer, folder, seed) for name in dict.fromkeys(sized)}
            parts.append(Part(length, tasks, {}, named))
        if others:
            manager = _manager([name for name in others if isinstance(name, str)], {})
            with _one_line(manager, others):
                loaded = manager.load(others)
            parts.append(Part(None, loaded["tasks"], loaded.get("groups", {}), {}))
    for name, task in ((name, task) for part in parts for name, task in part.tasks.items()):
        own = 0 if is_ruler(name) else task.get_config("num_fewshot")
        task.set_config(key="num_fewshot", value=own or 0 if own == 0 or num_fewshot is None else num_fewshot)
    return parts


def _manager(names: Sequence[str], metadata: dict[str, Any]) -> Any:
    """An index of the suites' own folders, or, if that lacks a name, of all tasks: to read these takes 20 s."""
    from lm_eval import tasks

    folder = Path(tasks.__file__).parent
    families = {"ruler" if is_ruler(name) else name.partition("_")[0] for name in names} & set(SUITES)
    own = [folder / family for family in sorted(families)]
    manager = tasks.TaskManager(include_defaults=False, include_path=own, metadata=metadata)
    if not set(names) <= set(manager.all_tasks):
        manager = tasks.TaskManager(metadata=metadata)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"suite {unknown[0]!r} is not known: expected one of {', '.join(SUITES)}, or a task or group of lm_eval "
            "(lm-eval ls tasks)"
        )
    return manager


def _sized_task(name: str, length: int, tokenizer: PreTrainedTokenizerBase, folder: str, seed: int) -> Any:
    """A task of one length. Its samples do not depend on what was made before it."""
    if is_ruler(name):
        _check_endless(name, length, tokenizer)
        size: Any = [length]
    elif length % 1024 == 0:
        size = f"{length // 1024}k"
    else:
        raise ValueError(f"length {length} of {name}: expected a multiple of 1024")
    manager = _manager([name], {"tokenizer": folder, "max_seq_lengths": size})
    # This module has a generator of its own, which would go on where the last sample left it.
    sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)
    random.seed(seed)
    numpy.random.seed(seed)
    with _one_line(manager, [name]):
        task = manager.load([name])["tasks"][name]
    if is_ruler(name) and not name.startswith("ruler_qa"):
        for number, sample in enumerate(task.eval_docs):
            if not sample["outputs"] or not all(answer in sample["input"] for answer in sample["outputs"]):
                raise ValueError(f"length {length} is too short for {name}: sample {number} does not hold its answers")
    return task


def _check_endless(name: str, length: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse lengths at which RULER would look for a sample that fits for ever, deaf to interrupts."""
    if name not in ("ruler_vt", "ruler_cwe", "ruler_fwe"):
        return
    with _one_line(None, [name]):
        module = importlib.import_module(f"lm_eval.tasks.ruler.{name.removeprefix('ruler_')}_utils")

    def tokens(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    # The smallest samples that it tries differ by a few tokens: the longest of 32, and 8 tokens for a longer one.
    needed = 0
    if name == "ruler_fwe":
        needed = max(200, tokens(module.TEMPLATE.format(context="", query="")))  # four words, one for each 50 tokens
    for _ in range(32):
        if name == "ruler_vt":
            example, variables = module.generate_input_output(5, 1, 4, is_icl=True)
            if tokens(f"{example} {variables}") + 38 > 500:
                raise ValueError(f"{name} needs a tokenizer that makes its example of at most 500 tokens")
            text, variables = module.generate_input_output(10, 1, 4)
            needed = max(needed, tokens(f"{text} {variables}") + 38 + 500)
        elif name == "ruler_cwe":
            example, text, words = module.generate_input_output(10, length)
            numbered = " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
            needed = max(needed, tokens(f"{example}\n{text} {numbered}") + 128)
    if length < needed:
        raise ValueError(f"length {length} is too short for {name}: it needs {needed} tokens with this tokenizer")


@contextlib.contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """What the harness warns of, but for what it says of every run like ours."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lm_eval").addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger("lm_eval").removeHandler(handler)
        messages[:] = [message for message in messages if not any(usual in message for usual in _USUAL)]


@contextlib.contextmanager
def _one_line(manager: Any, names: Sequence[Any]) -> Iterator[None]:
    """Turn what a missing package or an unreachable data set raises into one line that names it."""
    asked = ", ".join(name if isinstance(name, str) else str(name.get("task")) for name in names)
    try:
        yield
    except ImportError as error:
        extra = "longbench" if "longbench" in asked else "ruler"
        raise ValueError(
            f"{asked}: a package is missing: pip install 'tokenweight[eval]' 'lm-eval[{extra}]' ({_short(error)})"
        ) from error
    except OSError as error:
        data_sets = dict.fromkeys(data_set for name in names for data_set in _data_sets(manager, name))
        raise ValueError(
            f"{asked}: the data set {', '.join(data_sets)} is not on this machine and cannot be reached "
            f"({_short(error)})"
        ) from error
    except LookupError as error:
        if "nltk" not in str(error).lower():
            raise
        raise ValueError(f"{asked}: nltk's sentences are missing: python -m nltk.downloader punkt_tab") from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _data_sets(manager: Any, name: Any) -> list[str]:
    """The data sets of a task, or of all tasks of a group, by their configurations."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = name
    if isinstance(name, str):
        if is_ruler(name):
            return [_DATA_SETS[name]]
        entry = manager.task_index[name]
        config = load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else {"task": sorted(entry.tags)}
    children = config.get("task")
    if isinstance(children, list):
        return [data_set for child in children for data_set in _data_sets(manager, child)]
    return [str(config.get("dataset_path"))]


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
    check_length(model.config, max_length, f"max_length={max_length}: requests")
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


def suite_measures(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, plan: Plan
) -> tuple[list[Measure], dict[str, str]]:
    """The first metric of each task of the suites, and over all samples of each suite; the unit is the sample.

    Returns:
        The measures; and a fingerprint of the samples of each task, with the version of the harness.

    Raises:
        ValueError: in one line, before any sample is read, if a suite cannot be loaded or would be cut.
    """
    measures, samples = [], {}
    for suite in plan.suites:
        assert tokenizer is not None
        room = context_length(model.config) or max(plan.suite_lengths) + 128
        lengths, limit = plan.suite_lengths, plan.suite_limit
        try:
            results = run_suites(
                model, tokenizer, [suite], max_length=room, lengths=lengths, limit=limit, seed=plan.seed
            )
        except ValueError as error:
            raise ValueError(f"--suites {suite}: {error}") from error
        first = list({(result.task, result.length): result for result in reversed(results.tasks)}.values())[::-1]
        group = "short" if suite in SHORT_SUITES else "long"
        if all((result.values and result.metric == first[0].metric) or is_ruler(result.task) for result in first):
            measures.append(_measure(suite, group, first, summary=True))
        for result in first:
            name = result.task if result.length is None else f"{result.task}_{result.length}"
            samples[name] = f"{result.fingerprint} by lm_eval {results.lm_eval_version}"
            if name not in {measure.name for measure in measures}:
                measures.append(_measure(name, group, [result], summary=len(first) == 1 and name == suite))
    return measures, samples


def _measure(name: str, group: str, results: Sequence[TaskResult], *, summary: bool = False) -> Measure:
    """Of all samples of the results; of one that has no value for each sample, its own value, without an interval."""
    total = [value for result in results for value in result.values or (result.value,)]
    is_share = is_ruler(results[0].task) or results[0].metric.partition(",")[0] in ("acc", "acc_norm", "exact_match")
    better = "higher" if results[0].higher_is_better else "lower"
    return Measure(name, group, "share" if is_share else "score", better, total, [1.0] * len(total), summary)
