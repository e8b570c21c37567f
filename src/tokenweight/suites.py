"""Tasks of lm-evaluation-harness by the names of suites, with samples that a seed decides, and what they need."""

import contextlib
import importlib
import io
import logging
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from transformers import PreTrainedTokenizerBase

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
        _refuse_endless(name, length, tokenizer)
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


def _refuse_endless(name: str, length: int, tokenizer: PreTrainedTokenizerBase) -> None:
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
