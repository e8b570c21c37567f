"""The commands `export`, `upload` and `verify`."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from tokenweight import data, method
from tokenweight.cli.common import OptionalTokens


@dataclasses.dataclass(frozen=True)
class Export:
    """Write sequences with their loss weights, in the columns and alignment that another trainer reads.

    With --format parquet or jsonl, it writes the stored losses and all other columns as they are.
    """

    scored: tyro.conf.Positional[Path]
    """Folder of sequences that were scored; for weights, with --long."""
    out: Path
    """New folder for the weights, or for the files."""
    format: Literal["hf", "trl", "llamafactory", "ms-swift", "tinker", "parquet", "jsonl"] = "hf"
    """Trainer to write weights for, or format of files; see docs/data.md."""
    weighting: str | None = None
    """Weighting, as in `train`; by default dense."""
    size: OptionalTokens = None
    """Tokens of the short context, where scores of several are stored."""

    def run(self) -> None:
        """Write the weights, or the files, and print a summary."""
        if self.format in data.COPIES:
            for option, value in (("weighting", self.weighting), ("size", self.size)):
                if value is not None:
                    raise ValueError(f"--{option} {value}: --format {self.format} holds the scores, not weights")
            contents = data.export_rows(self.scored, self.out, format=self.format)
            print(f"{self.out}: {contents.rows:,} rows, {contents.tokens:,} tokens")
            return
        weighting = method.parse_weighting(self.weighting or "dense")
        summary = data.export_weights(self.scored, weighting, self.out, format=self.format, size=self.size)
        print(f"{self.out}: {summary}")


@dataclasses.dataclass(frozen=True)
class Upload:
    """Send a complete folder of sequences or scores, with its provenance, to the Hub or to object storage.

    Commands read it there by its URL. Rerun after an interruption, it sends what is missing.
    """

    folder: tyro.conf.Positional[Path]
    """Folder that `prepare` or `score` has completed."""
    to: str
    """Destination: hf://datasets/org/name, s3://bucket/scored, or another URL that fsspec supports."""

    def run(self) -> None:
        """Send the files."""
        print(f"{self.to}: {data.upload(self.folder, self.to):,} files sent")


@dataclasses.dataclass(frozen=True)
class Verify:
    """Read folders of sequences or scores, and compare each shard with the checksum noted when it was written."""

    folders: tyro.conf.Positional[list[Path]]
    """Folders, or URLs."""

    def run(self) -> None:
        """Compare them, one after the other."""
        if not self.folders:
            raise ValueError("name at least one folder")
        for folder in self.folders:
            num_shards = data.verify(folder)
            if not num_shards:
                raise ValueError(f"{folder} has no checksums: expected a complete folder of `prepare` or `score`")
            print(f"{folder}: {num_shards:,} shards are what was written")
