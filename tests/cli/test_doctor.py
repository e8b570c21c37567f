"""`tokenweight doctor` says what runs here and why not, and nothing private."""

import os
import socket
from importlib import metadata
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tokenweight import cli
from tokenweight.cli import doctor
from tokenweight.models import is_emulated


@pytest.fixture
def quick(monkeypatch):
    """Without what compiles."""
    monkeypatch.setattr(doctor, "_KERNELS", ("sdpa", "flash_attention_9"))
    monkeypatch.setattr(torch, "compile", lambda function: function)


def printed(capsys):
    return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())


def test_it_prints_a_line_for_each_check(quick, capsys):
    assert cli.main(["doctor"]) == 0
    found = printed(capsys)
    assert found["transformers"] == version("transformers")
    emulated = is_emulated(torch.bfloat16)
    assert found["bfloat16"].split()[0] == ("emulated" if emulated else "yes")
    assert (found["attention sdpa"], found["torch.compile"]) == ("works", "works")
    assert found["attention flash_attention_9"].startswith("no: ")
    assert "gloo" in found["torch.distributed"]
    assert {"extra lora", "extra eval", "demo", "cache of the Hub", "offline", "device"} <= found.keys()


def test_a_kernel_that_computes_something_else_does_not_work(monkeypatch):
    right = doctor._step
    monkeypatch.setattr(
        doctor, "_step", lambda kernel, *rest: tuple(x + (kernel == "sdpa") for x in right(kernel, *rest))
    )
    assert doctor._attention("eager") == "works"
    assert doctor._attention("sdpa").startswith("no: differs from eager by ")


def test_what_is_missing_is_said_with_the_command_that_installs_it(monkeypatch):
    needs = ["torch>=2.9", 'peft>=99; extra == "lora"', 'nowhere-at-all; extra == "lora"', 'rich; extra == "plots"']
    monkeypatch.setattr(metadata, "requires", lambda name: needs)
    said = doctor._extra("lora")
    assert said == f"no: peft>=99 (found {version('peft')}), nowhere-at-all: pip install 'tokenweight[lora]'"
    assert doctor._extra("plots") == f"rich {version('rich')}"


def test_a_check_that_fails_is_a_finding_and_ends_nothing(quick, monkeypatch, capsys):
    def fail():
        raise RuntimeError("no driver\nin /home/somebody/lib/x.so")

    monkeypatch.setattr(doctor, "_device", fail)
    assert cli.main(["doctor"]) == 0
    found = printed(capsys)
    assert found["device"] == "no: no driver in …/x.so"
    assert found["attention sdpa"] == "works"


def test_neither_paths_nor_the_name_of_the_machine_are_printed(quick, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(socket, "gethostname", lambda: "node-17")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", f"file:{tmp_path}/x,on node-17")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "gone" / "hub"))
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "on HOST" in out
    for private in ("node-17", str(tmp_path), str(Path.home()) + os.sep, os.getcwd()):
        assert private not in out
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot open /home/me/.cache/hub/x.json: denied", "cannot open …/x.json: denied"),
        ("in '/scratch/u 1/lib.so'", "in '…/lib.so'"),
        ("see ~/x/y", "see …/y"),
        ("see https://github.com/a/b, 3/4, a-b/flash-attn", "see https://github.com/a/b, 3/4, a-b/flash-attn"),
    ],
)  # fmt: skip
def test_folders_are_taken_out_of_a_text(text, shown):
    assert doctor.without_names(text) == shown


def test_a_cache_that_cannot_be_written_to_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert doctor._cache().startswith("writable, ")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert doctor._cache().startswith("no: ")
