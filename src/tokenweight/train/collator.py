"""A stock `transformers.Trainer` around a model with a weighted loss."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Make a batch of rows, padded on the right, that carries `short_nll` and packed documents.

    `labels` are the tokens (or the rows' own labels), with -100 where nothing is predicted: padding, and the first
    token of a row or document. So every Trainer counts the same tokens as the loss. `short_nll`, whose float32 bits
    travel as int32, is padded with NaN, which the loss refuses wherever a token counts. Padding of packed rows is a
    document of its own: an attention mask would switch off the separation of documents. Where no row is packed, padding
    stays at the last position: beside skipped positions, a new document would be refused.

    Raises:
        ValueError: if some rows have a column that others lack, or columns of one row differ in length.
    """
    columns = [name for name in ("labels", "position_ids", "short_nll") if any(name in row for row in rows)]
    length = max(len(row["input_ids"]) for row in rows)
    padded = any(len(row["input_ids"]) < length for row in rows)
    packed = any((torch.as_tensor(row["position_ids"][1:]) == 0).any() for row in rows if "position_ids" in row)
    batch: dict[str, list[Tensor]] = {name: [] for name in ("input_ids", "labels", *columns)}
    for number, row in enumerate(rows):
        tokens = torch.as_tensor(row["input_ids"], dtype=torch.long)
        for name in columns:
            if name not in row or len(row[name]) != len(tokens):
                found = f"{len(row[name])} values" if name in row else "no column"
                raise ValueError(f"row {number} of the batch has {len(tokens)} tokens and {found} {name}")
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
            short_nll = torch.nn.functional.pad(short_nll, (0, fill), value=torch.nan)
            # The bits as integers: DeepSpeed and FSDP2 cast columns of floats to the dtype of training, 16 bits.
            batch["short_nll"].append(short_nll.view(torch.int32))
        batch["input_ids"].append(torch.nn.functional.pad(tokens, (0, fill)))
        batch["labels"].append(torch.nn.functional.pad(labels, (0, fill), value=-100))
    if padded and "position_ids" not in columns:
        batch["attention_mask"] = [torch.arange(length) < len(row["input_ids"]) for row in rows]
    return {name: torch.stack(values) for name, values in batch.items()}
