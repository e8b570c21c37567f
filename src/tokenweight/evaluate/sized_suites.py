"""Suites whose samples have a length: RULER and BABILong, as lm-evaluation-harness makes them."""

import contextlib
import importlib
import io
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
from transformers import PreTrainedTokenizerBase

OFFLINE_RULER = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
"""The tasks of RULER that need no network: their samples are made from lists of words."""
RULER = (
    *OFFLINE_RULER,
    *("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multiquery", "niah_multivalue"),
    *("ruler_qa_squad", "ruler_qa_hotpot"),
)
SIZED = {"ruler": RULER, "babilong": tuple(f"babilong_qa{number}" for number in range(1, 6))}
"""Suites whose samples have a length; from BABILong, the five questions that exist at every length."""


def load_sized(
    names: Sequence[str], lengths: Sequence[int], tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[tuple[int, dict[str, Any]]]:
    """Load the tasks at each length.

    RULER loads the tokenizer that sizes its samples by name, and lets it run code from the Hub. It gets a folder with
    the saved tokenizer instead, so that a tokenizer in memory suffices, and nothing is fetched.

    Raises:
        ValueError: one line, if a length does not suit a task, or something is missing or unreachable.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        tokenizer.save_pretrained(folder)
        return [
            (length, {name: _sized_task(name, length, tokenizer, folder, seed) for name in names}) for length in lengths
        ]


def _sized_task(name: str, length: int, tokenizer: PreTrainedTokenizerBase, folder: str, seed: int) -> Any:
    """Load a task at one length. Its samples do not depend on those made before."""
    suite = "ruler" if name in RULER else "babilong"
    with one_line([name]):
        from lm_eval.tasks import TaskManager

        if suite == "ruler":
            _check_endless(name, length, tokenizer)
        elif length % 1024:
            raise ValueError(f"length {length} of {name}: expected a multiple of 1024")
        size = [length] if suite == "ruler" else f"{length // 1024}k"
        metadata = {"tokenizer": folder, "max_seq_lengths": size}
        manager = TaskManager(include_defaults=False, include_path=task_folder() / suite, metadata=metadata)
        # Breaks when this module is renamed, or no longer has its own generator at module level: samples of ruler_cwe
        # would then depend on those made before.
        sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)
        random.seed(seed)
        numpy.random.seed(seed)
        try:
            task = manager.load([name])["tasks"][name]
        except IndexError as error:  # as in `_example`; but samples may not depend on how often one tries
            if name != "ruler_vt":
                raise
            raise ValueError(f"{name} cannot draw its example by seed {seed}: expected another seed") from error
    if suite == "ruler" and not name.startswith("ruler_qa"):
        for number, sample in enumerate(task.eval_docs):
            if not sample["outputs"] or not all(answer in sample["input"] for answer in sample["outputs"]):
                raise ValueError(f"length {length} is too short for {name}: sample {number} does not hold its answers")
    return task


def _check_endless(name: str, length: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Reject lengths at which RULER would search forever for a sample that fits, ignoring interrupts."""
    if name not in ("ruler_vt", "ruler_cwe", "ruler_fwe"):
        return
    # Breaks when these modules, or their functions called below, are renamed.
    module = importlib.import_module(f"lm_eval.tasks.ruler.{name.removeprefix('ruler_')}_utils")

    def tokens(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    # The smallest samples that it tries differ by a few tokens: the longest of 32, and 8 tokens for a longer one.
    needed = 0
    if name == "ruler_fwe":
        needed = max(200, tokens(module.TEMPLATE.format(context="", query="")))  # four words, one per 50 tokens
    for _ in range(32):
        if name == "ruler_vt":
            example, variables = _example(module)
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


def _example(module: Any) -> tuple[str, Any]:
    """An example of ruler_vt. Its generator fails where two of five names of three letters are the same."""
    while True:
        with contextlib.suppress(IndexError):
            return module.generate_input_output(5, 1, 4, is_icl=True)


def task_folder() -> Path:
    """The folder of the tasks included in lm_eval."""
    from lm_eval import tasks

    return Path(tasks.__file__).parent


@contextlib.contextmanager
def one_line(names: Sequence[Any]) -> Iterator[None]:
    """Turn the error of a missing package or unreachable data set into one line that names the tasks."""
    asked = ", ".join(name if isinstance(name, str) else str(name.get("task")) for name in names)
    try:
        yield
    except ImportError as error:
        extra = "longbench" if "longbench" in asked else "ruler"
        install = f"pip install 'tokenweight[eval]' 'lm-eval[{extra}]'"
        raise ValueError(f"{asked}: a package is missing: {install} ({_short(error)})") from error
    except OSError as error:
        raise ValueError(
            f"{asked}: a data set is not on this machine and cannot be reached ({_short(error)})"
        ) from error
    except LookupError as error:
        if "nltk" not in str(error).lower():
            raise
        raise ValueError(f"{asked}: nltk's sentences are missing: python -m nltk.downloader punkt_tab") from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
