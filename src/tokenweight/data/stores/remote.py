"""Folders of rows on the Hub and in object storage, through fsspec: copied to the cache, read as a stream, uploaded."""

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from tokenweight.data.stores.blocks import BLOCKS, fingerprint, mark_shards
from tokenweight.records import leased, make_folder, read_json, replaced

logger = logging.getLogger(__name__)
_LAST = ("contents.json", "dataset_info.json", "state.json")
"""Files that mark a folder as finished: they are copied after all else."""
_SHARDS = (".arrow", ".parquet")


def remote_url(folder: str | os.PathLike[str]) -> str | None:
    """The URL of a folder elsewhere, such as s3://bucket/rows; None for one on this file system."""
    found = re.fullmatch(r"([a-z][a-z0-9+]+):/+(.+?)/*", os.fspath(folder))  # `Path` makes one slash of two
    if found is None or Path(folder).exists():
        return None
    return f"{found[1]}://{'/' if found[1] in ('file', 'local') else ''}{found[2]}"


def local_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder itself; for a URL that fsspec knows, its copy in the cache of `datasets`, which is made or completed.

    Each shard is compared with the checksum in its note when it arrives. Files that are there already, from an earlier
    call or an earlier version of the folder, are not read again.

    Raises:
        ValueError: if there is nothing, it cannot be read, or a shard is not what was written; naming it.
    """
    url = remote_url(folder)
    return Path(folder) if url is None else _copied(url, Path(datasets.config.HF_DATASETS_CACHE))


@cache
def _copied(url: str, cached: Path) -> Path:
    """The copy of a folder, looked up once per process."""
    copy = cached / "tokenweight" / "remote" / hashlib.sha256(url.encode()).hexdigest()[:32]
    files, root, names = _listed(url)
    make_folder(copy)
    with leased(copy, wait=True), _told(url):
        remote = {name: files.cat_file(f"{root}/{name}") for name in names if not name.endswith(_SHARDS)}
        for name in (name for name in names if name.endswith(_SHARDS)):
            note = remote.get(f"{name.rpartition('.')[0]}.json")
            written = None if note is None else json.loads(note).get("sha256")
            _copy_shard(files, f"{root}/{name}", copy / name, written, url)
        for name in sorted(remote, key=lambda name: name in _LAST):
            with replaced(copy / name) as part:
                part.write_bytes(remote[name])
        for path in copy.iterdir():  # left by an earlier version
            if path.name not in names:
                path.unlink()
        if {BLOCKS, "state.json"} <= {*remote}:
            _mark(copy)
    return copy


def _mark(copy: Path) -> None:
    """Have shards opened by the heads of their blocks, unless they were replaced since, or lack their notes."""
    state = read_json(copy / "state.json")
    shards = [file["filename"] for file in state["_data_files"]]
    notes = [(copy / shard).with_suffix(".json") for shard in shards]
    if fingerprint(read_json(note) if note.is_file() else {} for note in notes) == state["_fingerprint"]:
        mark_shards(copy, shards)


def _copy_shard(files: Any, source: str, path: Path, written: str | None, url: str) -> None:
    """Copy one shard, unless it is there."""
    note = path.with_suffix(".json")
    if path.is_file() and written is not None and note.is_file() and read_json(note).get("sha256") == written:
        return
    if path.is_file() and written is None and path.stat().st_size == files.size(source):
        return
    with replaced(path) as part:
        files.get_file(source, str(part))
        with part.open("rb") as copied:
            found = hashlib.file_digest(copied, "sha256").hexdigest()
        if written not in (None, found):
            raise ValueError(
                f"{url}/{path.name} is damaged: its sha256 is {found[:16]}…, {written[:16]}… was written: expected an "
                "upload that ended"
            )
    if written is not None:  # so that an interrupted copy resumes
        with replaced(note) as part:
            part.write_bytes(files.cat_file(f"{source.rpartition('.')[0]}.json"))


def folder_exists(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is there, on this file system or at a URL.

    Raises:
        ValueError: if the URL cannot be read.
    """
    url = remote_url(folder)
    return Path(folder).exists() if url is None else bool(_files(url)[2])


def read_note_of(folder: str | os.PathLike[str], name: str) -> dict[str, Any] | None:
    """A JSON file of a folder here or at a URL, without reading anything else of it; None if there is none.

    Raises:
        ValueError: if it cannot be read, or holds no JSON object; naming it.
    """
    url = remote_url(folder)
    if url is None:
        return read_json(Path(folder) / name) if (Path(folder) / name).is_file() else None
    with _told(url):
        files, root = fsspec.url_to_fs(url)
        try:
            note = json.loads(files.cat_file(f"{root}/{name}"))
        except FileNotFoundError:
            return None
    if not isinstance(note, dict):
        raise ValueError(f"{url}/{name} holds a {type(note).__name__}: expected a JSON object")
    return note


def stream_rows(folder: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The rows of a folder here or elsewhere, in order, as lists, without a copy: about a million tokens are held.

    Raises:
        ValueError: if it is no finished folder, or cannot be read.
    """
    url = remote_url(folder) or Path(folder).absolute().as_uri()
    files, root, names = _listed(url)
    with _told(url):
        if "state.json" in names:
            state = json.loads(files.cat_file(f"{root}/state.json"))
            shards = [file["filename"] for file in state["_data_files"]]
        else:
            shards = [name for name in names if name.endswith(".parquet")]
        for name in shards:
            with files.open(f"{root}/{name}", "rb") as file:
                batches = pq.ParquetFile(file).iter_batches() if name.endswith(".parquet") else pa.ipc.open_stream(file)
                for batch in batches:
                    yield from batch.to_pylist()


def upload(folder: str | os.PathLike[str], url: str) -> int:
    """Copy a finished folder of rows or scores, with its notes and provenance, to a URL such as s3://bucket/scored or
    hf://datasets/org/name. The files that mark it as finished come last.

    Returns:
        The number of files that were sent. Called again after an interruption, it sends the shards that are missing,
        or differ by their notes; notes are always sent.

    Raises:
        ValueError: if the folder is not finished, or the URL cannot be written to.
    """
    folder = Path(folder)
    files_here = folder.iterdir() if folder.is_dir() else ()
    names = [path.name for path in files_here if path.is_file() and not path.name.startswith(".")]
    if not {"state.json", "contents.json"} & {*names}:
        raise ValueError(f"{folder} is not a finished folder of rows: expected one that prepare or score has completed")
    if remote_url(url) is None:
        raise ValueError(f"url {url}: expected one such as s3://bucket/scored or hf://datasets/org/name")
    with _told(url):
        if url.startswith("hf://"):
            _upload_to_hub(folder, url)
            return len(names)
        files, root = fsspec.url_to_fs(remote_url(url))
        files.makedirs(root, exist_ok=True)
        there = {entry["name"].rpartition("/")[2]: entry["size"] for entry in files.ls(root, detail=True)}
        shards = [name for name in names if name.endswith(_SHARDS)]
        known = {name for name in shards if _is_there(files, root, there, folder / name)}
        for name in _LAST if len(known) < len(shards) else ():  # of another upload, which is no longer finished
            if name in there:
                files.rm(f"{root}/{name}")
        # A shard before its note, by which it is known after an interruption.
        order = sorted(names, key=lambda name: (name in _LAST, name.rpartition(".")[0], name not in shards))
        for name in (sent := [name for name in order if name not in known]):
            files.put_file(str(folder / name), f"{root}/{name}")
    return len(sent)


def _is_there(files: Any, root: str, there: dict[str, int], shard: Path) -> bool:
    """Whether a shard was sent already, by its size and the checksum in its note: other scores have the same
    size."""
    note = shard.with_suffix(".json")
    if there.get(shard.name) != shard.stat().st_size or note.name not in there or not note.is_file():
        return False
    written = read_json(note).get("sha256")
    return written is not None and json.loads(files.cat_file(f"{root}/{note.name}")).get("sha256") == written


def _upload_to_hub(folder: Path, url: str) -> None:
    """Upload in one commit, or a few: the Hub's file system would make one per file."""
    from huggingface_hub import HfApi

    found = re.fullmatch(r"hf://datasets/([^/]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?", url.rstrip("/"))
    if found is None:
        raise ValueError("expected hf://datasets/ORG/NAME, or a folder within it")
    api = HfApi()
    api.create_repo(found[1], repo_type="dataset", private=True, exist_ok=True)
    where = {"repo_id": found[1], "repo_type": "dataset", "revision": found[2], "path_in_repo": found[3]}
    api.upload_folder(folder_path=folder, ignore_patterns=[".*"], **where)


def _listed(url: str) -> tuple[Any, str, list[str]]:
    """`_files`, for a folder that has some."""
    found = _files(url)
    if not found[2]:
        raise ValueError(f"{url}: no such folder of rows")
    return found


def _files(url: str) -> tuple[Any, str, list[str]]:
    """The file system of a URL, the folder in it, and the names of its files: none, if there is no such folder."""
    with _told(url):
        files, root = fsspec.url_to_fs(url)
        try:
            entries = files.ls(root, detail=True)
        except FileNotFoundError:  # not `exists`, for which whatever cannot be reached is not there
            entries = []
    names = [entry["name"].rpartition("/")[2] for entry in entries if entry["type"] == "file"]
    return files, root, [name for name in names if not name.startswith(".")]


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    """Name the URL in any error: a missing package, permissions, the network."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and url in str(error):
            raise
        raise ValueError(f"{url}: {' '.join(str(error).split()) or type(error).__name__}") from error
