"""Whether a model is sharded over processes (FSDP2, DeepSpeed ZeRO-3), and reductions over processes."""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of the weights, so that all have to run the same forward passes."""
    zero3 = any(hasattr(parameter, "ds_id") for parameter in model.parameters())  # DeepSpeed's mark
    return zero3 or any(isinstance(module, FSDPModule) for module in model.modules())


def any_process(here: bool, device: torch.device) -> bool:
    """Whether `here` is true in any process of the run; all of them must call this."""
    anywhere = torch.tensor(here, dtype=torch.int, device=device)
    torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX)
    return bool(anywhere)


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum values over the processes of the run; a lone process keeps its own. The argument may be changed."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values
