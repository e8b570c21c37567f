"""Settings and data of small evaluations, whose models are fixtures of tests/evaluate/conftest.py."""

import datasets

import models
from tokenweight.evaluate import EvalSettings

LENGTH, SIZES, LONG = 24, [6, 10], (9, 4)
TOKENS = models.some_tokens(6, LENGTH, seed=5)
DOCUMENTS = list("aabbbc")
POSITIONS = [[*range(14), *range(10)], [*range(24)], [*range(5), *range(19)]] * 2
LABELS = TOKENS.clone()
OPTIONS = {"sizes": "6,10", "short": 7, "long_size": 9, "long_stride": 4, "probes": "none"}


def save(folder, **columns):
    datasets.Dataset.from_dict({"input_ids": TOKENS.tolist(), **columns}).save_to_disk(str(folder))


def settings(place, out, model="trained", *, data="rows", **options):
    for name in ("baseline", "evaluator"):
        if options.get(name):
            options[name] = str(place / options[name])
    return EvalSettings(str(place / model), place / data, out, **{**OPTIONS, **options})


def values(model):
    return {measure["name"]: measure["value"] for measure in model["measures"]}
