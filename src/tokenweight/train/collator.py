"""Batches of sequences of unequal length, with their short losses and packed documents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenweight.data import TRANSLATED, translated
from tokenweight.models import pack_bits


@dataclass
class DataCollatorWithScores:
    """Pads sequences on the right into a batch that carries `short_nll` and packed documents.

    `labels` are the tokens (or the sequences' own labels), with -100 where nothing is predicted: padding, and the first
    token of a sequence or document. So every Trainer counts the same tokens as the loss. `short_nll`, whose float32
    bits travel as int32 (`tokenweight.models.pack_bits`), is padded with NaN, at which the loss raises wherever a token
    counts. Padding of packed sequences is a document of its own: an attention mask would switch off the separation of
    documents. Where no sequence is packed, padding stays at the last position: beside skipped positions, a new document
    would raise.

    Example:
        >>> collator = DataCollatorWithScores()
        >>> batch = collator([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
        >>> batch["labels"].tolist()
        [[-100, 6, 7], [-100, 9, -100]]
        >>> trainer = transformers.Trainer(model, args, data_collator=collator, train_dataset=rows)  # doctest: +SKIP
    """

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            features: sequences with `input_ids` and, all or none of them, `labels`, `position_ids` and `short_nll`.
                Masks of other tools are heard as by `tokenweight.data.load_rows`.

        Raises:
            ValueError: if some have a column that others lack, or columns of one sequence differ in length or
                contradict each other.
        """
        features = [translated(row) if any(name in row for name in TRANSLATED) else row for row in features]
        columns = [name for name in ("labels", "position_ids", "short_nll") if any(name in row for row in features)]
        length = max(len(row["input_ids"]) for row in features)
        padded = any(len(row["input_ids"]) < length for row in features)
        packed = any((torch.as_tensor(row["position_ids"][1:]) == 0).any() for row in features if "position_ids" in row)
        batch: dict[str, list[Tensor]] = {name: [] for name in ("input_ids", "labels", *columns)}
        for number, row in enumerate(features):
            _check_columns(number, row, columns)
            tokens = torch.as_tensor(row["input_ids"], dtype=torch.long)
            fill = length - len(tokens)
            labels = torch.as_tensor(row.get("labels", tokens), dtype=torch.long).clone()
            labels[:1] = -100
            if "position_ids" in columns:
                positions = torch.as_tensor(row["position_ids"], dtype=torch.long)
                labels[positions == 0] = -100
                padding = torch.arange(fill) if packed else positions[-1:].clamp(min=1).expand(fill)
                batch["position_ids"].append(torch.cat([positions, padding]))
            if "short_nll" in columns:
                short_nll = torch.as_tensor(row["short_nll"], dtype=torch.float32)
                batch["short_nll"].append(pack_bits(pad(short_nll, (0, fill), value=torch.nan)))
            batch["input_ids"].append(pad(tokens, (0, fill)))
            batch["labels"].append(pad(labels, (0, fill), value=-100))
        if padded and "position_ids" not in columns:
            batch["attention_mask"] = [torch.arange(length) < len(row["input_ids"]) for row in features]
        return {name: torch.stack(values) for name, values in batch.items()}


def _check_columns(number: int, row: Mapping[str, Any], columns: list[str]) -> None:
    for name in columns:
        if name not in row or len(row[name]) != len(row["input_ids"]):
            found = f"{len(row[name])} values" if name in row else "no column"
            raise ValueError(f"row {number} of the batch has {len(row['input_ids'])} tokens and {found} {name}")
