"""The Python on scoring of docs/data.md as it stands there, with tiny windows, two workers and no GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import faulty
import numpy as np
import pytest

from tokenweight import ShortContext
from tokenweight.data import load_scores, score_folder

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
FILTER, SHARES, PIPELINE = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[:3]
(TRAIN,) = (line for line in PAGE.splitlines() if "--data scored-by-ray" in line)
# Not imported here: that would teach this process to read Parquet files of Ray as tensors.
without_ray = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("ray", "aiohttp")), reason='pip install "ray[data]" aiohttp'
)
WORKERS = "import ray\nray.init(num_cpus=2, include_dashboard=False)\n"


def run(block, folder):
    block = (
        block.replace("num_gpus=1", "num_cpus=1")
        .replace("cuda", "cpu")
        .replace("ShortContext(8192, 6144)", "ShortContext(8, 5)")
    )
    places = [str(Path(__file__).parents[2] / "src"), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places)), "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run([sys.executable, "-c", WORKERS + block], cwd=folder, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


@pytest.fixture
def scored(folders):
    score_folder(folders / "rows", str(folders / "model"), [ShortContext(8, 5)], folders / "alone", with_long=True)
    return load_scores(folders / "alone")[0]


def assert_same(found, expected, name):
    # Other rows in the same forward pass: some dozen float32 roundings of losses up to 16.
    np.testing.assert_allclose(np.stack(found[name]), np.stack(expected[name]), rtol=0, atol=4e-5)


@pytest.mark.slow
@without_ray
def test_two_ray_tasks_share_the_shards(scored, folders):
    run(SHARES, folders)
    rows, provenance = load_scores(folders / "scored")
    assert_same(rows, scored, "short_nll")
    assert provenance["contexts"] == [{"size": 8, "stride": 5}]


@pytest.mark.slow
@without_ray
def test_ray_data_adds_the_columns_to_its_batches_and_train_reads_them(scored, folders, own_cache):
    run(PIPELINE, folders)
    rows = load_scores(folders / "scored-by-ray", size=8)[0].sort("offset")
    assert list(rows["document"]) == list(scored["document"])
    for name in ("long_nll", "gain_mean_8", "key_token_ratio_8", "short_nll"):
        assert_same(rows, scored, name)
    status, _, errors = faulty.run(folders, *TRAIN.split()[2:], "--trainer.max_steps", "2", small=False)
    assert (status, "does not say who scored it" in errors) == (0, True)
    assert (folders / "trained" / "run.json").is_file()


def test_rows_are_chosen_by_what_the_context_gives_them(folders, monkeypatch):
    contexts = [ShortContext(4, 2), ShortContext(8, 5)]
    score_folder(folders / "rows", str(folders / "model"), contexts, folders / "ladder", with_long=True)
    monkeypatch.chdir(folders)
    found = {}  # a random model has no key tokens
    block = FILTER.replace("key_token_ratio_1024", "gain_positive_8").replace("0.01", "0.5")
    exec(block.replace("longfilter_1024", "longfilter_8"), found)
    shares = np.array(found["rows"]["gain_positive_8"])
    assert np.array_equal(found["useful"]["gain_positive_8"], shares[shares > 0.5])
    assert 0 < len(found["useful"]) < len(shares)
    scores = np.array(found["rows"]["longfilter_8"])
    assert sorted(found["most"]["longfilter_8"]) == sorted(scores)[-len(found["most"]) :]
    assert 0 < len(found["most"]) < len(scores)
