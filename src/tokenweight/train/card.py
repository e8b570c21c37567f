"""The training section of the model card (README.md), made only from the records of the run."""

import logging
import os
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from tokenweight.method import TOP_K, WEIGHTINGS, weighting_names
from tokenweight.records import edit_card, read_json, read_metrics, table_cell, with_section

logger = logging.getLogger(__name__)
TAGS = ("tokenweight", "long-context")
TRAINER_FIELDS = {
    "optim": "optimizer",
    "learning_rate": "learning rate",
    "adam_beta1": "beta 1",
    "adam_beta2": "beta 2",
    "adam_epsilon": "epsilon",
    "weight_decay": "weight decay",
    "max_grad_norm": "gradients clipped to norm",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup steps",
    "per_device_train_batch_size": "rows per process and pass",
    "gradient_accumulation_steps": "passes per step",
    "world_size": "processes",
    "bf16": "bf16 autocast",
    "fp16": "fp16 autocast",
    "seed": "seed",
    "data_seed": "seed of the order of rows",
}
"""Fields of TrainingArguments that `run.json` keeps and the card shows, with their names in the card."""

_WEIGHTS = {"revision": "revision", "weights_fingerprint": "fingerprint of its weights"}
"""Fields that identify the weights of a model, as in `tokenweight.models.identity`, with their names in the card."""


def write_card(folder: str | os.PathLike[str]) -> bool:
    """Write the card of a trained folder, from `run.json` and `metrics.jsonl`; in an existing card, only our section.

    A failure is logged, not raised, since the model is trained.

    Returns:
        Whether it was written.
    """

    def edit(card: ModelCard) -> None:
        run = read_json(Path(folder) / "run.json")
        name = run["settings"]["model"]
        if not Path(name).exists():  # then it is from the hub
            card.data.base_model = name
        card.data.library_name = "peft" if run["settings"].get("lora") else "transformers"
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *TAGS]))
        parts = [run, *run.get("mixture", {}).values()]
        if hub := list(dict.fromkeys(name for part in parts for name in part.get("texts", {}).get("hub", ()))):
            card.data.datasets = hub
        if not card.text.strip():
            card.text = f"\n# {Path(folder).resolve().name}\n"
        card.text = with_section(card.text, "training", _training(run, _last_metrics(Path(folder))))

    return edit_card(Path(folder), edit)


def _last_metrics(folder: Path) -> dict[str, Any]:
    """The last value of each logged metric; empty if there is no such file."""
    found: dict[str, Any] = {}
    for line in read_metrics(folder):
        found |= line
    return found


def _training(run: dict[str, Any], metrics: dict[str, Any]) -> str:
    settings, rows, rope = run["settings"], run.get("rows", {}), run.get("rope", {})
    arguments = run.get("arguments", {})
    given = [
        f"{label} {arguments[key]}" for key, label in TRAINER_FIELDS.items() if arguments.get(key) not in (None, False)
    ]
    lines = {
        "Base model": _base_model(run),
        "Context": _context(rope),
        "Weighting": f"`{settings['weighting']}`{_formula(settings['weighting'])}",
        "Short losses": _scorer(run),
        "Reference": None if run.get("reference") is None else _frozen(run["reference"]),
        "Teacher": _teacher(run),
        "Texts": _texts(run.get("texts", {})),
        "Rows": _rows(rows, run.get("data", {})),
        "Mixture": "; ".join(_part(name, part) for name, part in run.get("mixture", {}).items()),
        "Order of lengths": f"`{settings['curriculum']}`" if settings.get("curriculum") else "",
        "Trained": _trained(rows, metrics),
        "Held out": _held_out(run.get("held_out", {}), metrics),
        "Adapter": ", ".join(f"{name} {value}" for name, value in settings.get("lora", {}).items()),
        "Trainer": ", ".join(given),
        "Weights": settings["dtype"],
        "Attention": run.get("attn_implementation"),
        "Versions": ", ".join(f"{name} {number}" for name, number in run.get("versions", {}).items()),
        "Resumed": "; ".join(f"{Path(part['checkpoint']).name}, {part.get('date')}" for part in run.get("resumed", [])),
        "Device": run.get("device"),
        "Commit of tokenweight": run.get("commit"),
        "Date": run.get("date"),
        "Command": run.get("command") and f"`{shlex.join(run['command'])}`",
        "Again": _again(settings),
    }
    table = "\n".join(f"| {name} | {table_cell(text)} |" for name, text in lines.items() if text)
    intro = (
        "Trained with token weights by tokenweight: a token counts more or less in the loss by how much a long context "
        "changes its prediction compared with a short one ([Helm et al. 2025](https://arxiv.org/abs/2503.09202))."
    )
    return f"## Training\n\n{intro}\n\n| | |\n|---|---|\n{table}"


def _base_model(run: dict[str, Any]) -> str:
    began = run.get("model", {})
    given = [f"{label} {began[key]}" for key, label in _WEIGHTS.items() if began.get(key)]
    return ", ".join([f"`{run['settings']['model']}`", *given])


def _again(settings: dict[str, Any]) -> str:
    own = any("." in name for name in weighting_names(settings["weighting"]))  # a user's function
    options = " --allow_code" if own else ""
    return f"`tokenweight train --config run.json --out again{options}`, with the `run.json` of this folder"


def _context(rope: dict[str, str]) -> str | None:
    before, after = rope.get("before"), rope.get("after")
    return after if before in (None, after) else f"{after}; before training: {before}"


def _formula(weighting: str) -> str:
    """Formulas of all built-in weightings in a text; `long` and `short` are a token's losses with either context."""
    known = {kind.__name__.lower(): kind.formula for kind in WEIGHTINGS}
    names = list(dict.fromkeys(name.lower() for name in weighting_names(weighting)))
    formulas = [f"{name}: {known[name]}" if names[1:] else known[name] for name in names if name in known]
    return f": {'; '.join(formulas)}" if formulas else ""


def _teacher(run: dict[str, Any]) -> str | None:
    """The teacher of a distillation, stored or live, and its weight; None if there is none."""
    distill = run["settings"].get("distill") or {}
    if not distill:
        return None
    name = distill.get("teacher", "stored")
    made = run.get("data", {}).get("teacher", {})
    if name != "stored":
        made = {"top_k": distill.get("top_k", TOP_K), "model": name, **run.get("teacher", {})}
    given = [f"its {made['top_k']} likeliest tokens"] if made.get("top_k") else []
    given += [f"weight {distill['weight']}", *([f"for {distill['steps']} steps"] if distill.get("steps") else [])]
    return ", ".join([_frozen(made), *given])


def _frozen(made: dict[str, Any]) -> str:
    """Describe a model whose losses or predictions are used; that of stored ones may be unknown."""
    given = [f"{label} {made[key]}" for key, label in _WEIGHTS.items() if made.get(key)]
    return ", ".join([f"`{made['model']}`, frozen" if made.get("model") else "stored", *given])


def _scorer(run: dict[str, Any]) -> str | None:
    """Describe the scorer, its windows, and whether weights compare losses of the scorer alone."""
    settings, data, scorer = run["settings"], run.get("data", {}), run.get("scorer", {})
    if settings["weighting"] == "uniform" or run.get("scores", "") is None:
        return None
    stored, name = settings["scorer"] == "stored", settings["scorer"]
    context = data.get("context", {}) if stored else settings
    size, stride = context.get("size"), context.get("stride")
    who = f"`{data.get('model') if stored else run.get('scores', name)}`, frozen"
    if name == "base":
        who = "the model itself without the adapter, frozen"
    elif name == "self" or (stored and not data.get("model")):
        who = "the model itself, as it is trained" if name == "self" else "stored"
    given = [f"windows of {size} tokens" if size else "", f"stride {stride}" if stride else ""]
    weights = data if stored else scorer
    given += [f"{label} {weights[key]}" for key, label in _WEIGHTS.items() if weights.get(key)]
    given += ["contrast scorer"] if settings.get("contrast") == "scorer" else []
    return ", ".join([who, *filter(None, given)])


def _texts(texts: dict[str, Any]) -> str | None:
    if "texts" not in texts:
        return None
    given = [", ".join(f"`{name}`" for name in texts["texts"])]
    given += [f"{key} {texts[key]}" for key in ("subset", "split") if "hub" in texts and key in texts]
    labels = {"documents": "documents", "seed": "seed of their order"}
    return ", ".join([*given, *(f"{label}: {texts[key]}" for key, label in labels.items() if key in texts)])


def _rows(rows: dict[str, int], data: dict[str, Any]) -> str:
    given = []
    if rows:
        lengths = dict.fromkeys([rows["shortest"], rows["longest"]])
        given.append(f"{rows['num']:,} of {' to '.join(map(str, lengths))} tokens, {rows['tokens']:,} in all")
    given += [f"tokenizer of `{data['tokenizer']}`"] if data.get("tokenizer") else []
    labels = {"tokenizer_fingerprint": "fingerprint of the tokenizer", "rows_fingerprint": "of the rows"}
    return ", ".join([*given, *(f"{label} {data[key]}" for key, label in labels.items() if data.get(key))])


def _part(name: str, part: dict[str, Any]) -> str:
    """Describe one folder of a mixture: its share of the tokens, and its contents."""
    texts = _texts(part.get("texts", {}))
    return f"{part['share']:.1%} of the tokens from {name}: " + ", ".join(filter(None, [_held(part), texts]))


def _held_out(part: dict[str, Any], metrics: dict[str, Any]) -> str:
    if not part:
        return ""
    losses = [f"{name} {value:.4f}" for name, value in metrics.items() if name.startswith("eval_") and "loss" in name]
    return ", ".join([f"`{part['path']}`", _held(part), *(["last measured: " + ", ".join(losses)] if losses else [])])


def _held(part: dict[str, Any]) -> str:
    return _rows(part.get("rows", {}), part.get("data", {}))


def _trained(rows: dict[str, int], metrics: dict[str, Any]) -> str:
    given = [f"{metrics['step']:,} steps"] if "step" in metrics else []
    if epochs := metrics.get("epoch"):
        given.append(f"{epochs:.4g} epoch{'s' * (epochs != 1)}")
        num = rows.get("epoch", rows.get("num", 0))
        given += [f"{num * epochs:,.0f} rows", f"{rows['tokens'] * epochs:,.0f} tokens"] if rows else []
    given += [f"last weighted loss logged {metrics['loss']:.4f} nats"] if "loss" in metrics else []
    return ", ".join(given)
