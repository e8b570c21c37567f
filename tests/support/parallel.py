"""Rows split over two or four processes that torchrun starts; four also as two groups with rows of their own.

The batch is split by torch's own context parallelism, under transformers' own Trainer where there is one. Three things
stand in for a GPU: accelerate would refuse to split rows on a CPU, and would use FSDP2 where DDP is used here, but for
one run; and the attention gathers the keys of all ranks, since torch has no ring of the attention of CPUs.
"""

import functools
import os
import sys
from pathlib import Path

import accelerate
import torch
import torch.distributed as dist
from accelerate.big_modeling import _attach_context_parallel_hooks
from engines import choose_engine
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._context_parallel import _attention, _load_balancer
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import models
from tokenweight import PPMI, Dense, LongCE, Scorer, ShortContext, Sparse, Uniform, with_weighted_loss
from tokenweight.method import SCORES, weighted_linear_cross_entropy
from tokenweight.models.context_parallel import attention_within_rank, sequence_shard
from tokenweight.train import TrainSettings, train

LENGTH, ORDERS = 24, ("contiguous", "balanced")
WEIGHTINGS = {str(w): w for w in (Uniform(), Dense(), Sparse(), LongCE(cap=2.0), PPMI(keep=0.8))}
PAIRS = {"dense, of the scorer": Dense(), "columns": models.ByColumns()}
"""Weightings that read other columns."""
SCORED = {
    "dense, self": (Dense(), {"scorer": "self"}),
    "sparse, self": (Sparse(), {"scorer": "self"}),
    "longce, frozen": (LongCE(cap=2.0), {"scorer": "frozen"}),
    "dense, both frozen": (Dense(), {"scorer": "frozen", "contrast": "scorer"}),
}
"""Weightings whose short losses a scorer finds, and the arguments of `with_weighted_loss`."""
LAUNCHED = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"}
"""What `accelerate launch --use_parallelism_config --parallelism_config_cp_size 2` sets."""


def micro_batches() -> list[dict[str, Tensor]]:
    """Two, with unequal numbers of labels; one skips positions."""
    numbers, batches = torch.Generator().manual_seed(5), []
    for seed in range(2):
        tokens = models.some_tokens(2, LENGTH, seed=seed)
        labels = tokens.where(torch.rand(tokens.shape, generator=numbers) > 0.2 * (seed + 1), -100)
        labels[:, LENGTH // 2] = tokens[:, LENGTH // 2]  # the first token of the second rank, if contiguous
        scores = {name: 6 * torch.rand(tokens.shape, generator=numbers, dtype=torch.float64) for name in SCORES}
        positions = torch.arange(LENGTH) + 9 * seed * (torch.arange(LENGTH) >= 7)
        batches.append({"input_ids": tokens, "labels": labels, "position_ids": positions.repeat(2, 1), **scores})
    return batches


def given_losses() -> tuple[Tensor, Tensor, Tensor]:
    """Losses with many equal differences, the first of them 0, and a mask of packed documents that cross any border."""
    numbers = torch.Generator().manual_seed(7)
    short = torch.randint(0, 4, (3, LENGTH), generator=numbers).double()
    long = short - torch.randint(-2, 3, (3, LENGTH), generator=numbers)
    short[2] += torch.rand(LENGTH, generator=numbers, dtype=torch.float64)
    long[:, 1] = short[:, 1]
    mask = torch.rand((3, LENGTH), generator=numbers) > 0.1
    mask[:, 1] = True
    mask[:, [0, 5, 19]] = False  # documents begin
    return long, short, mask


def states_and_head() -> tuple[Tensor, Tensor, Tensor]:
    """A state for each predicted token, aligned with tokens, a head, and targets."""
    numbers = torch.Generator().manual_seed(8)
    states, head = torch.randn(3, LENGTH, 8, generator=numbers).double(), torch.randn(11, 8, generator=numbers).double()
    return states, head, torch.randint(0, 11, (3, LENGTH), generator=numbers)


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keys, mesh):
        ctx.mesh = mesh
        parts = [torch.empty_like(keys) for _ in range(mesh.size())]
        dist.all_gather(parts, keys, group=mesh.get_group())
        return torch.cat(parts, dim=2)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.mesh.get_group())
        return grad.chunk(ctx.mesh.size(), dim=2)[ctx.mesh.get_local_rank()], None


def _attend(mesh, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    assert is_causal
    assert attn_mask is None
    assert not dropout_p
    num = mesh.size()
    length = num * query.shape[2]
    columns = torch.arange(length)
    if _attention._cp_options.enable_load_balance:
        columns = _load_balancer._HeadTailLoadBalancer(length, num, "cpu")._generate_indices()[0]
    mask = columns[None] <= columns.chunk(num)[mesh.get_local_rank()][:, None]
    keys, values = (_GatherKeys.apply(tensor.contiguous(), mesh) for tensor in (key, value))
    return _PLAIN(query, keys, values, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)


_PLAIN = functional.scaled_dot_product_attention


def stand_in_for_a_gpu() -> None:
    def replace(attention):
        functional.scaled_dot_product_attention = attention

    accelerate.ParallelismConfig._validate_accelerator = lambda self, accelerator: None
    _attention._enable_context_parallel_dispatcher_impl = lambda seq_dim, mesh: replace(
        functools.partial(_attend, mesh)
    )
    _attention._disable_context_parallel_dispatcher_impl = lambda: replace(_PLAIN)


def split(mesh, batch: dict[str, Tensor]):
    """This rank's share of the batch, in place, as the Trainer makes it; and attention over all ranks."""
    buffers = list(batch.values())
    return context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1] * len(buffers), no_restore_buffers=set(buffers))


def weigh_given_losses(mesh) -> dict:
    """Weights, and the gradients of states and head, from this rank's losses of tokens it predicts."""
    (long, short, mask), (states, head, targets) = given_losses(), states_and_head()
    columns = torch.arange(LENGTH).repeat(3, 1)
    with split(mesh, {"columns": columns}):
        share = sequence_shard(columns, mesh)
    results = {}
    states.requires_grad_(), head.requires_grad_()
    own = states[:, 1:][torch.arange(3)[:, None], columns.clamp(max=LENGTH - 2)]
    own_targets = share.own(targets.where(mask, -100), -100)
    for name, weighting in WEIGHTINGS.items():
        weights = share.own(weighting(*(share.whole(share.own(values)) for values in (long, short, mask))))
        loss = weighted_linear_cross_entropy(own.flatten(0, 1), head, own_targets.flatten(), weights.flatten())
        grads = torch.autograd.grad(loss, (states, head), retain_graph=True)
        results[name] = {"columns": columns, "weights": weights, "loss": loss.detach(), "grads": grads}
    return results


def shifted(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with labels of what each state predicts in place of labels of the tokens."""
    labels = functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    return {**{name: value for name, value in batch.items() if name != "labels"}, "shift_labels": labels}


def with_scorer(weighting, scorer: str, **arguments):
    """A bound model which finds the short losses itself, or with a frozen model of other weights."""
    model = models.tiny()
    reads = model if scorer == "self" else models.tiny(seed=3)
    # Two windows at a time, so that a rank has several passes.
    return with_weighted_loss(model, weighting, Scorer(reads, ShortContext(8, 5), max_tokens=16), **arguments)


def without_scores(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name not in SCORES}


def weigh_with_scorer(mesh, weighting, rows=slice(None), **arguments) -> dict:
    """Two micro-batches of one step without columns of scores, or some rows of each."""
    model, batches = with_scorer(weighting, context=mesh, **arguments), [*map(without_scores, micro_batches())]
    num_items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    own = [{name: value[rows].contiguous() for name, value in batch.items()} for batch in batches]
    return step_of(mesh, model, own, num_items)


def weigh_a_model(mesh, weighting, *, whole_scores: bool, contrast: str = "trained") -> dict:
    """Two micro-batches of one step, with loss and gradients summed over the ranks; and one without `num_items`."""
    model, batches = with_weighted_loss(models.tiny(), weighting, context=mesh, contrast=contrast), micro_batches()
    num_items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    results = step_of(mesh, model, batches, num_items, whole_scores=whole_scores)
    batch = shifted(micro_batches()[0])
    with torch.no_grad(), split(mesh, batch):
        output = model(**batch)
        results |= {"mean": output.weighted_loss / 2, "unweighted": output.loss / 2}
        for name in ("mean", "unweighted"):
            dist.all_reduce(results[name])
    return results


def step_of(mesh, model, batches, num_items, *, whole_scores: bool = False) -> dict:
    """Loss and gradients of one step, summed over all processes, and what its micro-batches answered."""
    _attach_context_parallel_hooks(model)
    loss, outputs = torch.zeros((), dtype=torch.float64), []
    for batch in map(shifted, batches):
        kept = {name: batch.pop(name) for name in SCORES} if whole_scores else {}
        with split(mesh, batch):
            outputs.append(model(**batch, **kept, num_items_in_batch=num_items))
            outputs[-1].loss.backward()
        loss += outputs[-1].loss.detach()
    results = {"loss": loss} | {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for tensor in results.values():
        dist.all_reduce(tensor)
    for name in ("weights", "long_nll", "short_nll"):
        results |= {f"{name} {number}": output[name] for number, output in enumerate(outputs)}
    return results


def refusals(mesh) -> dict[str, str]:
    """What is said where the shares of rows do not make whole rows, or the scores do not fit them."""
    model, whole = with_weighted_loss(models.tiny(), Dense(), context=mesh), shifted(micro_batches()[0])
    positions, labels, short = (whole[name] for name in ("position_ids", "shift_labels", "short_nll"))
    bad = {
        "packed": {"position_ids": positions.remainder(17)},
        "uneven": {name: value[:, :9].contiguous() for name, value in whole.items()},
        "beyond": {"shift_labels": labels.clone().fill_(3)},
        "no positions": {"position_ids": None},
        "no scores": {"short_nll": None},
        "not finite": {"short_nll": short.clone().index_fill_(1, torch.tensor([19]), torch.nan)},
    }
    messages = {}
    for name, change in bad.items():
        batch = {key: value.clone() for key, value in {**whole, **change}.items() if value is not None}
        with split(mesh, batch):
            try:
                model(**batch)
            except ValueError as error:
                messages[name] = str(error)
    return messages


def train_folders(folder: Path, out: str, names=("dense", "longce", "self"), batch: int = 2, **engine) -> None:
    """`tokenweight train` on what `two_ranks` put into the folder: 2 steps, of 2 micro-batches of 2 rows each."""
    for name in names:
        settings = {"max_steps": 2, "gradient_accumulation_steps": 2, "optim": "sgd"}
        settings |= {"per_device_train_batch_size": batch, **engine}
        settings |= {"learning_rate": 0.01, "lr_scheduler_type": "constant", "save_strategy": "no", "use_cpu": True}
        where = {"model": str(folder / "model"), "data": str(folder / "rows"), "out": str(folder / out / name)}
        scorer = {"weighting": name}
        if name == "self":
            where["data"] = str(folder / "unscored")
            scorer = {"weighting": "dense", "scorer": "self", "size": 8, "stride": 5, "eval_data": where["data"]}
            settings |= {"eval_steps": 1, "per_device_eval_batch_size": batch}
        trainer = {**settings, "disable_tqdm": True}
        model = train(TrainSettings(**where, **scorer, dtype="float64", trainer=trainer))
        assert isinstance(model, FSDPModule) == bool(engine)


def of_parts(folder: Path) -> str:
    """What is said of a model whose layers transformers splits over the processes as it loads it."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=DistributedConfig(tp_size=2))
    try:
        with_weighted_loss(model, Uniform())
    except ValueError as error:
        return str(error)
    return "bound"


def read_past_the_ring_of_torch(mesh) -> bool:
    """Whether a scorer within torch's own `context_parallel`, whose ring no CPU has, finds what it finds outside."""
    scorer, tokens = Scorer(models.tiny(), ShortContext(8, 5)), models.some_tokens(1, LENGTH)
    expected = scorer(tokens)
    with split(mesh, {"columns": torch.arange(LENGTH)[None]}):
        try:
            scorer(tokens)
        except NotImplementedError:
            with attention_within_rank():
                return torch.equal(scorer(tokens), expected)
    return False


def in_two(folder: Path) -> dict:
    mesh, results = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",)), {}
    for order in ORDERS:
        _attention._cp_options.enable_load_balance = order == "balanced"
        results[f"losses, {order}"] = weigh_given_losses(mesh)
        for number, (name, weighting) in enumerate(WEIGHTINGS.items()):
            whole_scores = bool(number % 2) == (order == "balanced")  # of each weighting once whole, once split
            results[f"{name}, {order}"] = weigh_a_model(mesh, weighting, whole_scores=whole_scores)
        for name, weighting in PAIRS.items():
            contrast = "scorer" if "scorer" in name else "trained"
            found = weigh_a_model(mesh, weighting, whole_scores=order == "balanced", contrast=contrast)
            results[f"{name}, {order}"] = found
        for name, (weighting, arguments) in SCORED.items():
            results[f"{name}, {order}"] = weigh_with_scorer(mesh, weighting, **arguments)
    return results | {"refusals": {**refusals(mesh), "in parts": of_parts(folder)}}


def in_four() -> dict:
    """What all four find together, and two groups of two, each with one of the two rows."""
    results, meshes = {}, {"4": init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))}
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    meshes["2 x 2"], row = grid["cp"], grid["dp"].get_local_rank()
    for name, (weighting, arguments) in SCORED.items():
        for shape, mesh in meshes.items():
            rows = slice(row, row + 1) if shape == "2 x 2" else slice(None)
            results[f"{name}, {shape}"] = weigh_with_scorer(mesh, weighting, rows, **arguments)
    return results


if __name__ == "__main__":
    os.environ.update(LAUNCHED)
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    everybody = init_device_mesh("cpu", (dist.get_world_size(),))
    past_the_ring = {"past the ring": read_past_the_ring_of_torch(everybody)}
    stand_in_for_a_gpu()
    if dist.get_world_size() == 2:
        results, training = in_two(folder), {"out": "split"}
    else:
        os.environ["PARALLELISM_CONFIG_DP_SHARD_SIZE"] = "2"
        results, training = in_four(), {"out": "split in four", "names": ("self",), "batch": 1}
    torch.save(results | past_the_ring, folder / f"rank{dist.get_rank()}.pt")
    train_folders(folder, **training)
    if dist.get_world_size() == 4:
        choose_engine("fsdp2")
        train_folders(folder, **{**training, "out": "split in four, fsdp2"}, fsdp=True)
    dist.destroy_process_group()
