"""Rows split over a context have the weights, the loss and the gradients that they have whole."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import distributed
import parallel as script
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

import models
from models import assert_close
from tokenweight import Dense, Scorer, ShortContext, with_weighted_loss
from tokenweight.method import parse_weighting
from tokenweight.models import context_mesh, context_parallel
from tokenweight.models.context_parallel import attention_within_rank, dealt, sequence_shard
from tokenweight.train.checks import MEASURES


class OneRank(DeviceMesh):
    """A rank among others that are not there: what each of them would send is given."""

    def __init__(self, rank, num):
        self.rank, self.num, self.sent = rank, num, []

    def size(self, mesh_dim=None):
        return self.num

    def get_local_rank(self, mesh_dim=None):
        return self.rank

    def gather(self, values):
        """The number of tokens of each rank, which is the same for all; or what was given."""
        if self.num == 1:
            return values
        return values.repeat(1, self.num) if values.numel() == 1 else self.sent.pop(0)


@pytest.fixture(autouse=True)
def no_processes(monkeypatch):
    monkeypatch.setattr(context_parallel, "_gather", lambda values, mesh: mesh.gather(values))
    monkeypatch.setattr(context_parallel, "_sum", lambda values, mesh: None)


@st.composite
def dealt_rows(draw):
    """The columns of some rows, dealt out to ranks in any order, another for each row; and gaps between positions."""
    num, share, batch = draw(st.integers(2, 4)), draw(st.integers(2, 6)), draw(st.integers(1, 3))
    columns = torch.tensor([draw(st.permutations(range(num * share))) for _ in range(batch)])
    gaps = draw(st.lists(st.integers(1, 9), min_size=num * share, max_size=num * share))
    return num, columns, torch.tensor(gaps).cumsum(0)


@given(dealt_rows())
def test_every_rank_finds_its_columns_and_all_of_them_make_the_rows(dealt):
    num, columns, positions = dealt
    rows = torch.rand(columns.shape, dtype=torch.float64)
    length, width = columns.shape[1], columns.shape[1] // num
    own = []
    for rank in range(num):
        mesh, mine = OneRank(rank, num), columns[:, rank * width : (rank + 1) * width]
        mesh.sent = [positions[columns]]
        share = sequence_shard(positions[mine], mesh)
        assert torch.equal(share.columns, mine)
        mesh.sent = [rows.gather(1, columns)]
        assert torch.equal(share.rows("rows", rows.gather(1, mine)), rows)
        assert share.rows("rows", rows) is rows
        own.append(share.own(rows, fill=-5))
        for row, tokens in enumerate(mine.tolist()):
            expected = [rows[row, token + 1].item() if token + 1 < length else -5 for token in tokens]
            assert own[-1][row].tolist() == expected
    mesh.sent = [torch.cat(own, dim=1)]
    whole = share.whole(own[-1])
    assert torch.equal(whole[:, 1:], rows[:, 1:])
    assert not whole[:, 0].any()


@given(st.integers(1, 9), st.integers(0, 20))
def test_items_are_dealt_out_once_and_evenly(num, count):
    hands = [dealt(range(count), OneRank(rank, num)) for rank in range(num)]
    assert sorted(item for hand in hands for item in hand) == [*range(count)]
    assert max(map(len, hands)) - min(map(len, hands)) <= 1


@pytest.mark.parametrize("long", [False, True])
def test_each_rank_reads_its_windows_and_their_losses_add_up_to_those_of_one_process(long):
    scorer, tokens = Scorer(models.tiny(), ShortContext(8, 5), max_tokens=16), models.some_tokens(2, 24)
    num = 3  # one more than there are rows
    if long:
        parts = [scorer.among(OneRank(rank, num)).long_nll(tokens) for rank in range(num)]
        expected = scorer.long_nll(tokens)
    else:
        found = [scorer.among(OneRank(rank, num)).short_losses(tokens, self_scored=True) for rank in range(num)]
        parts, whole = [one.nll for one in found], scorer.short_losses(tokens, self_scored=True)
        expected = whole.nll
        scored = torch.stack([~one.same_as_long for one in found])
        assert torch.equal(scored.sum(dim=0), (~whole.same_as_long).long())
        assert scored.flatten(1).any(dim=1).all()
    assert sum((part != 0).long() for part in parts).max() == 1
    assert_close({"losses": sum(parts)}, {"losses": expected})


def test_a_scorer_reads_past_the_ring_that_stands_in_place_of_attention(monkeypatch):
    def ring(*args, **kwargs):
        raise AssertionError("attention over all ranks")

    model = models.tiny()
    scorer, tokens = Scorer(model, ShortContext(8, 5)), models.some_tokens(1, 24)
    expected = scorer(tokens)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", ring)
    with attention_within_rank():
        assert torch.equal(scorer(tokens), expected)
    assert functional.scaled_dot_product_attention is ring


def one_rank(tokens, **changes):
    labels = functional.pad(tokens, (0, 1), value=-100)[:, 1:]
    return {"input_ids": tokens, "shift_labels": labels, "position_ids": torch.arange(24).repeat(2, 1), **changes}


def test_a_context_of_one_rank_scores_itself_as_without_a_context():
    tokens, outputs = models.some_tokens(2, 24), []
    mask = torch.arange(24).repeat(2, 1) < torch.tensor([[24], [19]])
    labels = tokens.where(mask, -100)
    for context in (None, OneRank(0, 1)):
        model = models.tiny()
        with_weighted_loss(model, Dense(), Scorer(model, ShortContext(8, 5)), context)
        given = {"input_ids": tokens, "labels": labels} if context is None else one_rank(labels, input_ids=tokens)
        output = model(**given, attention_mask=mask)
        outputs.append({name: output[name].detach() for name in ("loss", "weights", "long_nll", "short_nll")})
    assert_close(outputs[1], outputs[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.arange(24).repeat(2, 1) > 3}, "attention_mask of row 0, position 4 is 1"),
        ({"shift_labels": torch.full((2, 24), 7).index_fill(1, torch.tensor(23), -100)}, "labels of row 0, position"),
    ],
)
def test_padding_in_front_and_labels_of_other_tokens_are_refused(changes, message):
    model = models.tiny()
    with_weighted_loss(model, Dense(), Scorer(model, ShortContext(8, 5)), OneRank(0, 1))
    with pytest.raises(ValueError, match=message):
        model(**one_rank(models.some_tokens(2, 24), **changes))


@pytest.mark.parametrize("name", ["tp_size", "ep_size", "pp_size", "fsdp_size", "dp_replicate_size"])
def test_a_model_that_was_loaded_in_parts_is_refused(name):
    model = models.tiny()
    model.config.distributed_config = SimpleNamespace(**{name: 2})
    for use in (lambda: with_weighted_loss(model, Dense()), lambda: Scorer(model, ShortContext(8, 5))):
        with pytest.raises(ValueError, match=f"model: loaded in parts \\({name} 2\\)"):
            use()


def test_attention_that_torch_does_not_split_is_refused():
    model = models.tiny()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation eager"):
        with_weighted_loss(model, Dense(), context=OneRank(0, 2))


def test_a_divergence_needs_its_column():
    model = models.tiny()
    with pytest.raises(ValueError, match="expected the column divergence"):
        with_weighted_loss(model, parse_weighting("expected(dense)"), Scorer(model, ShortContext(8, 5)), OneRank(0, 2))


def test_without_context_parallelism_there_is_no_mesh():
    class Accelerator:
        parallelism_config = None

    assert context_mesh(Accelerator()) is None
    assert context_mesh(object()) is None


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two processes found, and their folder."""
    folder = tmp_path_factory.mktemp("parallel")
    models.tiny().save_pretrained(folder / "model")
    distributed.some_rows((script.LENGTH,) * 8).save_to_disk(str(folder / "rows"))
    distributed.some_rows((script.LENGTH,) * 8, scored=False).save_to_disk(str(folder / "unscored"))
    return folder, ranks(2, folder)


@pytest.fixture(scope="module")
def four_ranks(two_ranks):
    """What four processes found, which leave what they trained beside it."""
    return two_ranks[0], ranks(4, two_ranks[0])


def ranks(num, folder):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, script.__file__, str(folder)], env=environ, check=True, timeout=900)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(num)]


@pytest.mark.slow
@pytest.mark.parametrize("order", script.ORDERS)
@pytest.mark.parametrize("name", script.WEIGHTINGS)
def test_given_losses_have_the_weights_of_whole_rows_to_the_bit(two_ranks, name, order):
    (long, short, mask), (states, head, targets) = script.given_losses(), script.states_and_head()
    weights = script.WEIGHTINGS[name](long, short, mask)
    found = [rank[f"losses, {order}"][name] for rank in two_ranks[1]]
    for rank in found:
        for row in range(3):
            for column, weight in zip(rank["columns"][row].tolist(), rank["weights"][row].tolist()):
                assert weight == (weights[row, column + 1].item() if column + 1 < script.LENGTH else 0)
    states.requires_grad_(), head.requires_grad_()
    nll = torch.nn.functional.cross_entropy((states @ head.t()).flatten(0, 1), targets.flatten(), reduction="none")
    loss = (nll * weights.flatten()).sum()
    expected = torch.autograd.grad(loss, (states, head))
    # Sums in another order, in float64.
    torch.testing.assert_close(found[0]["loss"] + found[1]["loss"], loss.detach(), rtol=1e-13, atol=0)
    for number, grad in enumerate(expected):
        torch.testing.assert_close(found[0]["grads"][number] + found[1]["grads"][number], grad, rtol=1e-12, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("order", script.ORDERS)
@pytest.mark.parametrize("name", [*script.WEIGHTINGS, *script.PAIRS])
def test_a_model_has_the_loss_and_the_gradients_of_one_process(two_ranks, name, order):
    weighting = {**script.WEIGHTINGS, **script.PAIRS}[name]
    model = with_weighted_loss(models.tiny(), weighting, contrast="scorer" if "scorer" in name else "trained")
    batches = script.micro_batches()
    num_items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    outputs = [model(**batch, num_items_in_batch=num_items) for batch in batches]
    loss = sum(output.loss for output in outputs)
    loss.backward()
    expected = {"loss": loss.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        output = model(**batches[0])
    expected |= {"mean": output.weighted_loss, "unweighted": output.loss}
    for key in ("weights", "long_nll", "short_nll"):
        expected |= {f"{key} {number}": output[key] for number, output in enumerate(outputs)}
    for found in two_ranks[1]:
        found = dict(found[f"{name}, {order}"])
        if not weighting.uses_short:  # and says nothing of short losses
            found = {key: value for key, value in found.items() if not key.startswith("short")}
            expected = {key: value for key, value in expected.items() if not key.startswith("short")}
        assert_close(found, expected)


@pytest.fixture(scope="module")
def scored():
    """What one process finds in each case with a scorer."""
    results = {}
    for name, (weighting, arguments) in script.SCORED.items():
        model, batches = script.with_scorer(weighting, **arguments), script.micro_batches()
        num_items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        outputs = [model(**script.without_scores(batch), num_items_in_batch=num_items) for batch in batches]
        loss = sum(output.loss for output in outputs)
        loss.backward()
        found = {"loss": loss.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}
        for key in ("weights", "long_nll", "short_nll"):
            found |= {f"{key} {number}": output[key] for number, output in enumerate(outputs)}
        assert found["weights 0"].unique().numel() > 2
        results[name] = found
    return results


@pytest.mark.slow
@pytest.mark.parametrize("order", script.ORDERS)
@pytest.mark.parametrize("name", script.SCORED)
def test_a_scorer_of_two_ranks_makes_the_weights_and_the_gradients_of_one_process(two_ranks, scored, name, order):
    for found in two_ranks[1]:
        assert_close(found[f"{name}, {order}"], scored[name])


@pytest.mark.slow
def test_a_scorer_reads_past_the_ring_of_torch(two_ranks):
    assert [found["past the ring"] for found in two_ranks[1]] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["4", "2 x 2"])
@pytest.mark.parametrize("name", script.SCORED)
def test_a_scorer_of_four_ranks_makes_the_weights_and_the_gradients_of_one_process(four_ranks, scored, name, shape):
    for rank, found in enumerate(four_ranks[1]):
        expected = dict(scored[name])
        if shape == "2 x 2":  # each pair of ranks has a row of its own
            of_rows = [key for key in expected if key.startswith(("weights ", "long_nll ", "short_nll "))]
            expected |= {key: expected[key][rank // 2 :][:1] for key in of_rows}
        assert_close(found[f"{name}, {shape}"], expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("dense", "split"),
        ("longce", "split"),
        ("self", "split"),
        ("self", "split in four"),
        ("self", "split in four, fsdp2"),
    ],
)
def test_the_train_command_makes_the_steps_of_one_process(request, name, split):
    folder = request.getfixturevalue("four_ranks" if split.startswith("split in four") else "two_ranks")[0]
    if not (folder / "whole").exists():
        script.train_folders(folder, "whole")

    def steps(kind):
        lines = [json.loads(line) for line in (folder / kind / name / "metrics.jsonl").read_text().splitlines()]
        keys = ("loss", "grad_norm", "effective_tokens", "weight_std", "unweighted_loss")
        trained = [line[key] for line in lines if "loss" in line for key in keys]
        return trained + [line[key] for line in lines for key in sorted(line) if key in held_out]

    held_out = [f"eval_{key}" for key in MEASURES] if name == "self" else []
    assert len(steps("whole")) == 10 + 2 * len(held_out)
    assert steps(split) == pytest.approx(steps("whole"), rel=1e-5)  # as CLOSE: norms in float32
    whole, trained = (
        dict(models.tiny().from_pretrained(folder / kind / name).named_parameters()) for kind in ("whole", split)
    )
    start = dict(models.tiny().named_parameters())
    assert any((whole[key] - start[key]).abs().max() > 1e-3 for key in start)
    assert_close(trained, whole, rtol=1e-6, atol=1e-7)  # a step is 0.01 of a gradient, which has the error of CLOSE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    {
        "packed": "position_ids of row 0 repeat: packed documents",
        "uneven": "sequences of 9 tokens do not split evenly over 2 ranks of a context: expected a multiple of 4",
        "beyond": "shift_labels end in 3: expected -100",
        "no positions": "position_ids are missing",
        "no scores": "needs the short loss of every token",
        "not finite": "short_nll of row 0, position 19 is nan",
        "in parts": "loaded in parts (tp_size 2)",
    }.items(),
)
def test_what_does_not_make_whole_rows_is_refused_by_all_ranks(two_ranks, name, message):
    for found in two_ranks[1]:
        assert message in found["refusals"][name]
