"""A run with `trainer.torch_compile`."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tokenweight.train import train


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_run_logs_the_same_losses_and_saves_the_same_model(backend, corpus, short_run, monkeypatch):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("there is no C++ compiler, which this backend needs on a CPU")
    losses = []
    for compiled in (False, True):
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # transformers sets it for the rest of the process
        out = f"{short_run.out}-{compiled}"
        given = {**short_run.trainer, "logging_steps": 1, "save_strategy": "no"}
        given |= {"torch_compile": True, "torch_compile_backend": backend} if compiled else {}
        counters.clear()
        scored = {"data": str(corpus / "long"), "scorer": "self", "size": 8, "weighting": "dense"}
        train(dataclasses.replace(short_run, out=out, trainer=given, **scored))
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
        assert counters["stats"]["unique_graphs"] == (2 if compiled else 0)
        assert not counters["graph_break"]
        assert (Path(out) / "model.safetensors").is_file()
    torch._dynamo.reset()
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len(losses[0]) == 4
