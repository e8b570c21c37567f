"""The benchmark of a GPU, as far as a CPU can tell: its losses, its search, and what it says when it cannot run."""

from types import SimpleNamespace

import pytest
import torch
from benchmark import load

gpu = load("gpu")


def test_uniform_losses_of_others_have_the_gradients_of_ours():
    bench = gpu.Bench("tiny", 64, torch.device("cpu"))
    bench.model.double()
    gradients = {}
    for name in (gpu.UNIFORM, "uniform, transformers", "uniform, trl", gpu.UNIFORM):
        bench.prepare(name)
        bench.run(name)
        found = [parameter.grad.clone() for parameter in bench.model.parameters()]
        # TRL computes losses of about 6 nats in float32, and transformers rounds its logits to that.
        torch.testing.assert_close(found, gradients.setdefault(gpu.UNIFORM, found), rtol=1e-5, atol=1e-6)
        gradients[name] = found
    assert all(gradient.count_nonzero() for gradient in gradients["uniform, trl"])


@pytest.mark.parametrize("limit", [2**18, 100_000, 4096])
@pytest.mark.parametrize("fitting", [0, 5000, 8192, 10_000, 70_000, 262_143, 2**18, 2**20])
def test_the_longest_row_is_found_to_a_sixteenth_below_the_limit(fitting, limit):
    tried = []
    bench = SimpleNamespace(set_length=tried.append, peak_bytes=lambda name: 0 if tried[-1] <= fitting else None)
    found, expected = gpu.longest_that_fits(bench, "uniform", limit), min(fitting, limit)
    assert found <= expected
    if expected >= min(8192, limit):
        assert found >= expected * 15 / 16 - 16
    assert max(tried) <= limit
    assert len(tried) <= 11


def test_a_step_that_does_not_run_is_named_and_left_out(capsys, monkeypatch):
    bench = gpu.Bench("tiny", 64, torch.device("cpu"))
    assert bench.peak_bytes("uniform") == 0

    def run(name):
        raise torch.OutOfMemoryError("out of memory: tried to allocate 1 GiB\nmore")

    monkeypatch.setattr(bench, "run", run)
    assert bench.peak_bytes("uniform") is None
    assert capsys.readouterr().err.splitlines()[-1] == "64 tokens, uniform: out of memory: tried to allocate 1 GiB"


@pytest.mark.parametrize(
    ("option", "message"),
    [("steps", "--steps unifrom: expected one of 'uniform', 'frozen dense'"), ("shapes", "--shapes unifrom: expected")],
)
def test_unknown_names_are_refused(option, message):
    with pytest.raises(SystemExit, match=message):
        gpu.main(**{option: ("unifrom",)}, quick=True)


def test_without_a_gpu_nothing_is_measured_and_it_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    gpu.main(csv=tmp_path / "rows.csv")
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "rows.csv").exists()
