"""The data of a run: folders of sequences, mixtures of them, held-out sequences, and their batches."""

import logging
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset, Sampler

from tokenweight.data import (
    TRANSLATED,
    Contents,
    Permutation,
    Source,
    open_held_out,
    open_sources,
    read_provenance,
    row_lengths,
    translated,
    verify,
)
from tokenweight.method import SCORES, ShortContext
from tokenweight.models import TEACHER, Contrast, numbered_from, pack_bits
from tokenweight.train.lengths import Pieces
from tokenweight.train.lengths.pieces import SOURCE
from tokenweight.train.settings import Run

logger = logging.getLogger(__name__)
LISTED = 1 << 20
"""Most sequences that torch may shuffle as a list; for more, `Drawn` avoids the list."""
_COLUMNS = ("input_ids", "labels", "position_ids", *SCORES, *TEACHER)


@dataclass(frozen=True)
class Sequences:
    """All data that a run reads: its folders, and the held-out sequences."""

    sources: list[Source]
    shares: list[float]
    """Share of the tokens of each source."""
    held_out: Source | None
    contrast: str = "trained"
    """Source of the long losses in the weights, from the settings or the scores."""

    @property
    def contents(self) -> Contents:
        """Combined contents of all sources."""
        return sum((source.contents for source in self.sources), Contents())

    @property
    def provenance(self) -> dict[str, Any]:
        """Metadata stored with the data; for a mixture, that common to all of its folders."""
        first, *others = (source.provenance for source in self.sources)
        return {name: value for name, value in first.items() if all(one.get(name) == value for one in others)}

    @property
    def names(self) -> list[str]:
        """Short names of the sources: their folder names, if these differ."""
        folders = [source.folder for source in self.sources]
        names = [Path(folder).resolve().name for folder in folders]
        return names if len(set(names)) == len(names) else folders

    def dataset(self, run: Run) -> "datasets.Dataset | Mixture | Pieces":
        """The training sequences."""
        arguments, rows = run.arguments, [source.rows for source in self.sources]
        seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
        if run.curriculum is not None:
            steps = {"max_steps": arguments.max_steps, "epochs": arguments.num_train_epochs}
            return Pieces(rows[0], run.curriculum, batch=run.sequences_per_step, seed=seed, **steps)
        return rows[0] if len(rows) == 1 else Mixture(rows, self.shares, seed)


def open_sequences(run: Run) -> Sequences:
    """Open the training and held-out data of a run; only one process verifies the contents.

    Raises:
        ValueError: as `open_sources` and `open_held_out` do, or if a folder is damaged.
    """
    settings, contrast, held_out = run.settings, _contrast(run), None
    needed, windows = run.columns(contrast), {"size": settings.size, "stride": settings.stride}
    sources = open_sources([*run.shares], run.weighting, needed, contrast, windows, settings.scorer)
    if settings.eval_data is not None:
        of_weights = needed - {*TEACHER}  # evaluation ignores teachers
        held_out = open_held_out(settings.eval_data, run.weighting, of_weights, contrast, sources[0].context)
    if run.arguments.process_index == 0:  # the others would verify the same files
        for source in (*sources, *filter(None, [held_out])):
            verify(source.folder)
    return Sequences(sources, list(run.shares.values()), held_out, contrast)


def _contrast(run: Run) -> str:
    """The contrast of a run, from the settings or else from its scores."""
    if run.settings.contrast is not None or not run.weighting.uses_short:  # the loss is that of the trained model
        return run.settings.contrast or "trained"
    stored = run.settings.scorer == "stored"
    own = stored and any(read_provenance(folder).get("contrast") == "scorer" for folder in run.shares)
    return "scorer" if own or run.counts is not None else "trained"


class Mixture(Dataset):
    """Sequences of several folders, interleaved so that the shares of their tokens hold throughout.

    The next sequence is from the folder that lags most behind its share. Within a folder, no sequence repeats before
    all have been read once, each time in a new order. The sequences are endless: after the first `len(self)`, which
    contain as many tokens as all folders together, those of the next epoch follow.

    Args:
        rows: sequences of each folder.
        shares: of the tokens, one for each folder, which add up to 1.
        seed: of the order.
    """

    def __init__(self, rows: Sequence[datasets.Dataset], shares: Sequence[float], seed: int) -> None:
        self.rows, self.shares, self.seed = list(rows), list(shares), seed
        self._lengths = [row_lengths(part) for part in rows]
        self.tokens = [int(lengths.sum()) for lengths in self._lengths]
        self._passes = [0] * len(rows)
        self._ends = [0] * len(rows)  # tokens of all passes so far
        self._waiting = [(np.zeros(0), np.zeros(0, dtype=np.int64))] * len(rows)  # (tokens per share before a row, row)
        self._places = array("q")  # row number * sources + source
        self._columns = [name for name in _COLUMNS if any(name in part.column_names for part in rows)]
        drawn, total = 0, sum(self.tokens)
        while drawn < total:
            self._length = len(self._places)
            lengths = self._draw().cumsum() + drawn
            drawn = int(lengths[-1])
        self._length += int(np.searchsorted(lengths, total)) + 1

    def __len__(self) -> int:
        """Number of sequences in an epoch."""
        return self._length

    def __getitem__(self, number: int) -> dict[str, Any]:
        """A sequence, and the number of its folder; columns of other folders only are filled in."""
        source, row_number = self.place(number)
        row = self.rows[source][row_number]
        tokens = row["input_ids"]
        filled = {"labels": tokens, "position_ids": np.arange(len(tokens)), **row}
        return {**{name: filled[name] for name in self._columns}, SOURCE: source}

    def place(self, number: int) -> tuple[int, int]:
        """Folder of a sequence, and its row there."""
        while len(self._places) <= number:
            self._draw()
        row, source = divmod(self._places[number], len(self.rows))
        return source, row

    def passes(self, num: int | float) -> list[float]:
        """Number of passes over each folder in `num` epochs."""
        total = sum(self.tokens)
        return [num * total * share / tokens for share, tokens in zip(self.shares, self.tokens)]

    def _draw(self) -> np.ndarray:
        """Append the rows up to the end of the pass that ends first; return their tokens.

        The next row is that with the fewest preceding tokens of its folder, per share: a merge of sorted lists, in
        which the first folder wins ties.
        """
        for source, (_, rows) in enumerate(self._waiting):
            if not len(rows):
                self._waiting[source] = self._pass(source)
        ends = [tokens / share for tokens, share in zip(self._ends, self.shares)]
        end = min(ends)
        first = ends.index(end)
        keys, places, lengths = [], [], []
        for source, (before, rows) in enumerate(self._waiting):
            num = int(np.searchsorted(before, end, side="right" if source < first else "left"))
            num = len(rows) if source == first else num
            keys.append(before[:num])
            places.append(rows[:num] * len(self.rows) + source)
            lengths.append(self._lengths[source][rows[:num]])
            self._waiting[source] = (before[num:], rows[num:])
        order = np.concatenate(keys).argsort(kind="stable")
        self._places.frombytes(np.concatenate(places)[order].tobytes())
        return np.concatenate(lengths)[order]

    def _pass(self, source: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.random.default_rng([self.seed, source, self._passes[source]]).permutation(len(self.rows[source]))
        tokens = self._lengths[source][rows].cumsum()
        before = (self._ends[source] + np.concatenate(([0], tokens[:-1]))) / self.shares[source]
        self._passes[source] += 1
        self._ends[source] += int(tokens[-1])
        return before, rows


class InOrder(Sampler[int]):
    """Samples the sequences of a mixture, or pieces, in order, each epoch continuing after the last. `epoch` is its
    number."""

    def __init__(self, rows: Mixture | Pieces, epoch: Callable[[], int]) -> None:
        self.rows, self.epoch = rows, epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        first = self.epoch() * len(self)
        return iter(range(first, first + len(self)))


class Drawn(Sampler[int]):
    """Shuffles very many sequences without storing their order, anew in each epoch. `epoch` is its number."""

    def __init__(self, length: int, seed: int, epoch: Callable[[], int]) -> None:
        self.length, self.seed, self.epoch = length, seed, epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(Permutation(self.length, [self.seed, self.epoch()]))


class HeldOut(Dataset):
    """Held-out sequences, padded with sequences without labels to a multiple of what all processes read at once.

    Otherwise a distributed sampler would pad with sequences that were already counted.

    Args:
        rows: the sequences.
        longest: tokens of the longest.
        multiple: sequences that all processes read at once.
    """

    def __init__(self, rows: datasets.Dataset, longest: int, multiple: int = 1) -> None:
        self.rows, self.multiple = rows, multiple
        self.half = longest // 2
        """Tokens before the second half of the longest sequence, as in `tokenweight.evaluate`."""
        self.short = min(1024, longest // 4)
        """Tokens of the short range, as in `tokenweight.evaluate`."""

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.multiple) * self.multiple

    def __getitem__(self, number: int) -> dict[str, Any]:
        counts = number < len(self.rows)
        row = self.rows[number if counts else 0]
        labels = row.get("labels", row["input_ids"])
        return {**row, "labels": labels if counts else np.full_like(labels, -100)}


def name_row(data: "datasets.Dataset | Mixture | Pieces", tokens: Tensor, labels: Tensor, position: int) -> str:
    """Name the row of the data with these tokens of a batch, which may be padded, and the text that it is from."""
    tokens, predicted = tokens.cpu(), (labels != -100).cpu()

    def same(row: dict[str, Any]) -> bool:
        found = _tensor(row["input_ids"])
        return torch.equal(found, tokens[: len(found)]) and not predicted[len(found) :].any()

    parts = data.rows if isinstance(data, Mixture) else [data.rows if isinstance(data, Pieces) else data]
    for part, rows in enumerate(parts):
        candidates = enumerate(rows.with_format("numpy", columns=["input_ids"]))
        number = next((number for number, row in candidates if same(row)), None)
        if number is None:
            continue
        row = rows.with_format(None)[number]
        told = {name: row[name] for name in ("document", "offset") if name in row}
        if "documents" in row and "position_ids" in row:  # packed
            which = row["position_ids"][: position + 1].count(0) - 1
            told = {"document": row["documents"][which], "offset": row["offsets"][which]}
        named = ", ".join(f"{name} {value}" for name, value in told.items())
        place = f"folder {part + 1} of the data" if len(parts) > 1 else "the data"
        return f"row {number} of {place}" + (f" ({named})" if named else "")
    return "a row that is not in the data"


@dataclass
class DataCollatorWithScores:
    """Pads sequences on the right into a batch that carries scores (`short_nll`, `long_nll`, …) and packed documents.

    `labels` are the tokens (or the sequences' own labels), with -100 where nothing is predicted: padding, and the first
    token of a sequence or document. So every Trainer counts the same tokens as the loss. Scores, whose float32 bits are
    sent as int32 (`tokenweight.models.pack_bits`), are padded with NaN, for which the loss raises wherever a token
    counts. Padding of packed sequences is a separate document, since an attention mask would disable the separation of
    documents. Where no sequence is packed, padding repeats the last position, since with skipped positions a new
    document would raise.

    Args:
        scorer: computes both losses of each sequence as it is read, so that none need be stored: `CountScorer()`, whose
            losses are those that `tokenweight score --model count` would store, or any function with the same
            signature.
        context: the short context of the scorer.

    Example:
        >>> collator = DataCollatorWithScores()
        >>> batch = collator([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
        >>> batch["labels"].tolist()
        [[-100, 6, 7], [-100, 9, -100]]
        >>> trainer = transformers.Trainer(model, args, data_collator=collator, train_dataset=rows)  # doctest: +SKIP
    """

    scorer: Callable[..., Contrast] | None = None
    context: ShortContext | None = None

    def __post_init__(self) -> None:
        if (self.scorer is None) != (self.context is None):
            raise ValueError(f"scorer {self.scorer}, context {self.context}: expected both or none")

    def __call__(self, features: Sequence[Mapping[str, Any] | list[Mapping[str, Any]]]) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            features: sequences with `input_ids` and, in all or none of them, `labels`, `position_ids`, any of
                `tokenweight.method.SCORES`, and the columns of a teacher; or lists of such, as from `Pieces`.
                Masks of other tools are handled as by `tokenweight.data.load_rows`.

        Raises:
            ValueError: if some have a column that others lack, or columns of one sequence differ in length or
                contradict each other.
        """
        rows = [row for item in features for row in (item if isinstance(item, list) else [item])]
        rows = [translated(row) if any(name in row for name in TRANSLATED) else row for row in rows]
        if self.scorer is not None:
            rows = [self._scored(number, row) for number, row in enumerate(rows)]
        columns = [name for name in _COLUMNS[1:] if any(name in row for row in rows)]
        length = max(len(row["input_ids"]) for row in rows)
        padded = any(len(row["input_ids"]) < length for row in rows)
        packed = any((_tensor(row["position_ids"][1:]) == 0).any() for row in rows if "position_ids" in row)
        batch: dict[str, list[Tensor]] = {name: [] for name in ("input_ids", "labels", *columns)}
        for number, row in enumerate(rows):
            _check_columns(number, row, columns)
            tokens = _tensor(row["input_ids"], torch.long)
            fill = length - len(tokens)
            labels = _tensor(row.get("labels", tokens), torch.long).clone()
            labels[:1] = -100
            if "position_ids" in columns:
                positions = _tensor(row["position_ids"], torch.long)
                labels[positions == 0] = -100
                padding = torch.arange(fill) if packed else positions[-1:].clamp(min=1).expand(fill)
                batch["position_ids"].append(torch.cat([positions, padding]))
            for name in set(columns) & {*SCORES}:
                values = _tensor(row[name], torch.float32)
                batch[name].append(pack_bits(pad(values, (0, fill), value=torch.nan)))
            for name in [name for name in TEACHER if name in columns]:
                top = torch.as_tensor(np.array(list(row[name])))
                top = pack_bits(top) if name == "teacher_logprobs" else top.int()
                batch[name].append(pad(top, (0, 0, 0, fill)))
            batch["input_ids"].append(pad(tokens, (0, fill)))
            batch["labels"].append(pad(labels, (0, fill), value=-100))
        if all(SOURCE in row for row in rows):
            batch[SOURCE] = [torch.as_tensor(row[SOURCE]) for row in rows]
        if padded and "position_ids" not in columns:
            batch["attention_mask"] = [torch.arange(length) < len(row["input_ids"]) for row in rows]
        return {name: torch.stack(values) for name, values in batch.items()}

    def _scored(self, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
        """A sequence with the columns from the scorer."""
        assert self.scorer is not None
        assert self.context is not None
        if there := [name for name in Contrast._fields if name in row]:
            raise ValueError(f"row {number} of the batch has a column {there[0]}: expected none beside a scorer")
        tokens = _tensor(row["input_ids"], torch.long)[None]
        positions = _tensor(row["position_ids"], torch.long)[None] if "position_ids" in row else None
        with numbered_from(number):
            found = self.scorer(tokens, self.context, position_ids=positions)._asdict()
        return {**row, **{name: values[0] for name, values in found.items() if values is not None}}


def _tensor(values: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Values of a row as a tensor. Memory-mapped ones are copied, as torch would warn that they are not writable."""
    if isinstance(values, np.ndarray) and not values.flags.writeable:
        values = values.copy()
    return torch.as_tensor(values, dtype=dtype)


def _check_columns(number: int, row: Mapping[str, Any], columns: list[str]) -> None:
    for name in columns:
        if name not in row or len(row[name]) != len(row["input_ids"]):
            found = f"{len(row[name])} values" if name in row else "no column"
            raise ValueError(f"row {number} of the batch has {len(row['input_ids'])} tokens and {found} {name}")
