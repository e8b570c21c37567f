"""Measures of what a model answers: to retrieval probes, and in standard suites."""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenweight.comparison import Measure
from tokenweight.evalplan import Plan
from tokenweight.harness import TaskResult, run_suites
from tokenweight.positions import context_length
from tokenweight.probing import ProbeRecord, probe_grid
from tokenweight.suites import SHORT_SUITES, is_ruler


def ask_probes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, haystack: str | None, plan: Plan
) -> list[ProbeRecord]:
    """What the model answers, at each length and depth of each family."""
    if not plan.families:
        return []
    assert tokenizer is not None
    lengths, depths = plan.probe_lengths, plan.depths
    return probe_grid(
        model, tokenizer, plan.families, lengths, depths, plan.num_probes, plan.seed, haystack, plan.probe_by
    )


def probe_measures(grid: Sequence[ProbeRecord], plan: Plan) -> list[Measure]:
    """Accuracy and margin of each family, and of each family and length.

    The unit is the fact asked for, which is the same at every depth and length: answers to it are alike.
    """
    measures: list[Measure] = []
    for family in plan.families:
        for length in [None, *plan.probe_lengths]:
            records = [record for record in grid if record.family == family and length in (None, record.length)]
            name = f"probe_{family}" if length is None else f"probe_{family}_{length}"
            total = [sum(values) for values in zip(*(record.accuracies for record in records))]
            num = [float(len(records))] * plan.num_probes
            measures.append(Measure(name, "long", "share", "higher", total, num, length is None))
            margins = [record.margins for record in records if record.margins is not None]
            if margins:
                total = [sum(values) for values in zip(*margins)]
                measures.append(Measure(f"{name}_margin", "long", "nats", "higher", total, num))
    return measures


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
