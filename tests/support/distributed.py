"""Train a tiny model with a stock Trainer, in this process; or, where torchrun starts this file, in several."""

import sys
import tempfile
from pathlib import Path

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

import models
from tokenweight import Dense, LongCE, Scorer, ShortContext, Sparse, with_weighted_loss
from tokenweight.method import Uniform, as_weighting, parse_weighting
from tokenweight.train import DataCollatorWithScores, training_arguments

LENGTHS = (40, 9, 25, 33, 40, 17, 5, 28)
WEIGHTINGS = {"dense": Dense(), "sparse": Sparse(), "longce": LongCE(), "columns": models.ByColumns()}
WEIGHTINGS |= {"uniform": Uniform(), "a 64th": as_weighting(models.a_64th)}
WEIGHTINGS["history"] = parse_weighting("mix(warmup(eslm(keep=0.5), tokens=200), exact(threshold=8), share=0.5)")


def some_rows(lengths: tuple[int, ...] = LENGTHS, *, scored: bool = True) -> datasets.Dataset:
    """Random tokens and, with `scored`, random short losses around those of a model that knows nothing."""
    numbers = torch.Generator().manual_seed(1)
    rows = {"input_ids": [models.some_tokens(1, length, seed=length)[0].tolist() for length in lengths]}
    if scored:
        rows["short_nll"] = [(8 * torch.rand(length, generator=numbers)).tolist() for length in lengths]
    return datasets.Dataset.from_dict(rows)


def with_scores(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with the other columns that weights can be made of."""
    draw = torch.Generator().manual_seed(2)
    for name in ("long_nll", "ref_nll", "divergence"):
        values = [(5 * torch.rand(len(tokens), generator=draw)).tolist() for tokens in rows["input_ids"]]
        rows = rows.add_column(name, values)
    return rows


def fit(
    model: PreTrainedModel, rows: datasets.Dataset, collator=None, **given
) -> tuple[list[float], dict[str, Tensor]]:
    """The logged losses of some steps of AdamW, and the weights after them."""
    settings = {"max_steps": 3, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": "no"}
    with tempfile.TemporaryDirectory() as out:
        arguments = training_arguments({**settings, "disable_tqdm": True, **given}, out)
        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows, data_collator=collator or DataCollatorWithScores()
        )
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, {name: value.detach().clone() for name, value in model.state_dict().items()}


def fit_weighted(weighting: str, *, scorer: str = "stored", kind: str = "gpt2", **given):
    """`fit` with float64 weights, so that nothing but the order of sums is left to differ between two ways."""
    model = models.tiny(kind)
    scoring = Scorer(model, ShortContext(8, 5)) if scorer == "self" else None
    bound = with_weighted_loss(model, WEIGHTINGS[weighting], scoring)
    return fit(bound, some_rows(scored=scorer == "stored"), **given)


if __name__ == "__main__":
    results = {scorer: fit_weighted("dense", scorer=scorer, per_device_train_batch_size=1) for scorer in sys.argv[2:]}
    if torch.distributed.get_rank() == 0:
        torch.save((torch.distributed.get_world_size(), results), Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
