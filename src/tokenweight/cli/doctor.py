"""The command `doctor`: what this machine can run, as plain text for a bug report."""

import contextlib
import dataclasses
import io
import os
import platform
import re
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenweight import models, records
from tokenweight.cli.demo import packaged_model

_KERNELS = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_VARIABLES = (
    "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "NCCL_DEBUG", "WORLD_SIZE",
)  # fmt: skip
_PATH = re.compile(r"(?<![\w/.])(~|[A-Za-z]:)?([/\\][\w.+@ -]*[\w.+@-])+[/\\]")
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Check what this machine can run, and print it as text for a bug report.

    Versions, devices and their memory, attention kernels (each runs a tiny model), bfloat16, torch.compile, backends of
    torch.distributed, optional packages, and the cache of the Hub. Takes up to a minute, and prints neither the name of
    the machine nor any path.
    """

    def run(self) -> None:
        """Run every check, and print each as it is done."""
        for name, text in examine():
            print(f"{name}: {text}", flush=True)


def examine() -> Iterator[tuple[str, str]]:
    """Run each check, and yield its name and findings, without paths or the name of the machine.

    No check stops the others: an error in one is its finding.
    """
    for name, version in {**records.versions(), "system": f"{platform.system()} {platform.machine()}"}.items():
        yield name, version
    checks: dict[str, Callable[[], str]] = {
        "commit": lambda: str(records.environment()["commit"] or "no checkout"),
        "device": _device,
        "bfloat16": _bfloat16,
        **{f"attention {kernel}": lambda kernel=kernel: _attention(kernel) for kernel in _KERNELS},  # type: ignore[misc]
        "torch.compile": _compile,
        "torch.distributed": _backends,
        **{f"extra {extra}": lambda extra=extra: _extra(extra) for extra in _extras()},  # type: ignore[misc]
        "demo": lambda: "packages are installed" if packaged_model() else "",
        "cache of the Hub": _cache,
        "offline": lambda: "yes: nothing is fetched from the Hub" if _offline() else "no",
        "variables": lambda: (
            ", ".join(f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ) or "none set"
        ),
    }
    for name, check in checks.items():
        yield name, without_names(_outcome(check))


def without_names(text: str) -> str:
    """A text in one line, with `…/` for the folders of every path and `HOST` for the name of the machine."""
    text = _PATH.sub("…/", " ".join(text.split()))
    for host in {socket.gethostname(), platform.node()} - {"", "localhost"}:
        text = re.sub(rf"\b{re.escape(host)}\b", "HOST", text)
    return text


def _outcome(check: Callable[[], str]) -> str:
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(action="ignore"),
        ):
            return check()
    except Exception as error:
        reason = " ".join(str(error).split())
        return f"no: {reason[:300] or type(error).__name__}"


def _accelerator() -> Any:
    import torch

    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _device() -> str:
    import torch

    name = records.device_name()
    kind = _accelerator().type
    if kind == "cpu":
        return f"{name}, {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / _GIB:.1f} GiB, no accelerator"
    if kind != "cuda":
        return f"{name}, {kind}"
    found = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        major, minor = torch.cuda.get_device_capability(number)
        found.append(
            f"{torch.cuda.get_device_name(number)}, {total / _GIB:.1f} GiB ({free / _GIB:.1f} free), "
            f"capability {major}.{minor}"
        )
    runtime = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{'; '.join(found)}; {runtime}"


def _bfloat16() -> str:
    import torch

    device = _accelerator()
    product = torch.ones(8, 8, dtype=torch.bfloat16, device=device) @ torch.ones(
        8, 8, dtype=torch.bfloat16, device=device
    )
    if product.float().ne(8).any():
        return "no: a product of ones is wrong"
    if models.is_emulated(torch.bfloat16):
        return "emulated on this CPU, tens of times slower than float32: set dtype to float32"
    emulated = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "emulated only, slow: set trainer.fp16 in its place" if emulated else "yes"


def _attention(kernel: str) -> str:
    """Check that a tiny model trains with a kernel as it does with "eager" attention."""
    import torch

    device = _accelerator()
    dtype = torch.float32 if device.type == "cpu" else torch.float16 if _bfloat16() != "yes" else torch.bfloat16
    results = [_step(kind, dtype, device) for kind in ("eager", kernel)]
    error = max(((one - two).abs().max() / one.abs().max()).item() for one, two in zip(*results))
    # Rounding to 16 bits: a few hundredths of the largest number.
    return "works" if error < (1e-3 if dtype == torch.float32 else 0.1) else f"no: differs from eager by {error:.2g}"


def _step(kernel: str, dtype: Any, device: Any) -> tuple[Any, Any]:
    """Logits of a tiny model, and the gradient of its embeddings."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=1, max_position_embeddings=256, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kernel).to(device).train()
    tokens = torch.arange(128, device=device)[None] % 64
    logits = model(input_ids=tokens, use_cache=False).logits.float()
    logits.square().mean().backward()
    return logits.detach(), model.get_input_embeddings().weight.grad.float()


def _compile() -> str:
    import torch

    number = torch.compile(lambda number: number * 2 + 1)(torch.ones(4, device=_accelerator()))
    return "works" if number.eq(3).all() else "no: a sum is wrong"


def _backends() -> str:
    from torch import distributed

    if not distributed.is_available():
        return "no"
    return ", ".join(name for name in ("nccl", "gloo", "mpi", "ucc", "xccl") if distributed.is_backend_available(name))


def _extras() -> list[str]:
    from importlib import metadata  # 30 ms that other commands need not spend

    return metadata.metadata("tokenweight").get_all("Provides-Extra") or []


def _extra(extra: str) -> str:
    from importlib import metadata

    from packaging.requirements import Requirement

    needed = [Requirement(line) for line in metadata.requires("tokenweight") or ()]
    needed = [one for one in needed if one.marker and not one.marker.evaluate({"extra": ""})]
    found, missing = [], []
    for one in needed:
        if one.marker is None or not one.marker.evaluate({"extra": extra}):
            continue
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            missing.append(one.name)
            continue
        found.append(f"{one.name} {version}")
        if not one.specifier.contains(version, prereleases=True):
            missing.append(f"{one.name}{one.specifier} (found {version})")
    if missing:
        return f"no: {', '.join(missing)}: pip install 'tokenweight[{extra}]'"
    return ", ".join(found)


def _cache() -> str:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        return "no: cannot be written to: set HF_HOME to a folder that can"
    return f"writable, {shutil.disk_usage(there).free / _GIB:.1f} GiB free"


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
