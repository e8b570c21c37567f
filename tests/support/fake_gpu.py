"""Whole training steps on a GPU that is not there: tensors without values on a device of their own. A process runs it.

Each step runs twice. On the CPU, with values, what the host asks of a tensor is noted; on the GPU it is answered so.
There, torch refuses tensors of two devices and products of two dtypes; and what would wait for the device is counted.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
from tokenweight import Scorer, ShortContext, parse_weighting, with_weighted_loss
from tokenweight.method.device import products
from tokenweight.train.statistics import LateChecks, WeightStatistics

NAME = "gpu"
aten = torch.ops.aten
ASKED = {
    getattr(torch.Tensor, name)
    for name in ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")
} | {torch.nonzero, torch.equal, torch.masked_select}


class Gpu(backend_registration._DummyBackendModule):
    """What torch asks of a device beside its tensors."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed):
        pass

    def _is_in_bad_fork(self):
        return False


class Event:
    """What is recorded on a stream."""

    def __init__(self, device):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass


def asks(function, args):
    """Whether the host needs values, or a shape that depends on them."""
    if function in ASKED:
        return True
    indices = args[1] if function is torch.Tensor.__getitem__ else ()
    indices = indices if isinstance(indices, tuple) else (indices,)
    return any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in indices)


class Note(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.answers = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if asks(function, args):
            shape = (tuple(result.shape), result.dtype) if isinstance(result, torch.Tensor) else None
            self.answers.append((f"{function.__name__} in {place()}", result if shape is None else shape))
        return result


class Answer(TorchFunctionMode):
    """Gives the answers that were noted, and counts those for which the host would wait."""

    def __init__(self, answers):
        super().__init__()
        self.answers, self.waits = list(answers), Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if not asks(function, args):
            return function(*args, **(kwargs or {}))
        question = f"{function.__name__} in {place()}"
        while self.answers and self.answers[0][0] != question:  # transformers asks tensors without values less
            self.answers.pop(0)
        assert self.answers, f"{question}: the CPU was not asked"
        answer = self.answers.pop(0)[1]
        if args[0].device.type == NAME:
            self.waits[question] += 1
        if isinstance(answer, tuple):
            shape, dtype = answer
            device = "cpu" if function is torch.Tensor.cpu else args[0].device
            return torch.empty(shape, dtype=dtype, device=device)
        return answer


class Copies(TorchDispatchMode):
    """Counts copies between host and device for which the host waits, indices that have to be copied among them."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for one in tree_leaves(args):
            if isinstance(one, FakeTensor):
                one.constant = None  # of which torch would make a real one on the device
        result, kwargs = function(*args, **(kwargs or {})), kwargs or {}
        packet = function.overloadpacket
        if packet in (aten._to_copy, aten.copy_):
            source, target = (args[0], result) if packet is aten._to_copy else (args[1], args[0])
            waits = source.device != target.device and not kwargs.get("non_blocking", False)
        else:
            indexed = packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
            waits = indexed and any(one is not None and one.device != args[0].device for one in args[1])
        if waits:
            self.waits[f"copy in {place()}"] += 1
        return result


def place():
    """The innermost file of tokenweight, transformers or accelerate."""
    frame = sys._getframe()
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] not in ("tokenweight", "transformers"):
        frame = frame.f_back
    return "elsewhere" if frame is None else Path(frame.f_code.co_filename).name


class Step:
    """A bound model, a batch, and what a Trainer collects beside the loss."""

    def __init__(self, weighting, self_scored, packed):
        self.model = models.tiny(dtype=torch.bfloat16).train()
        scorer = Scorer(self.model, ShortContext(8, 4)) if self_scored else None
        with_weighted_loss(self.model, parse_weighting(weighting), scorer)
        self.checks, self.statistics = LateChecks(lambda error, where: error), WeightStatistics(self.model, size=8)
        tokens = models.some_tokens(1 if packed else 2, 24)
        self.given = {"input_ids": tokens, "labels": tokens.clone(), "num_items_in_batch": torch.tensor(40)}
        if packed:
            self.given["position_ids"] = torch.cat([torch.arange(11), torch.arange(13)])[None]
            self.given["labels"][:, 11] = -100
        if not self_scored:
            self.given |= {name: torch.rand(tokens.shape) for name in ("short_nll", "ref_nll")}

    def to_gpu(self):
        """Put tensors without values, on the GPU, in the place of all that the step has."""
        for module in self.model.modules():
            for name, one in module._parameters.items():
                module._parameters[name] = None if one is None else torch.nn.Parameter(on_gpu(one))
            module._buffers.update({name: on_gpu(one) for name, one in module._buffers.items() if one is not None})
        self.given = {name: on_gpu(one) for name, one in self.given.items()}

    def run(self):
        with self.checks.collecting(None):
            self.model(**self.given).loss.backward()
        self.checks.step()
        self.statistics.step()
        device = self.given["input_ids"].device
        assert all(one.grad.device == device and one.grad.dtype == one.dtype for one in self.model.parameters())


def on_gpu(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=NAME)


def waits_of(*case):
    """Run a step on the CPU, and then on the GPU; what the host waited for there."""
    torch.manual_seed(0)
    step = Step(*case)
    step.run()
    with Note() as noted:
        step.run()
    step.model.zero_grad()
    with FakeTensorMode(allow_non_fake_inputs=True):
        step.to_gpu()
        with Answer(noted.answers) as answering, Copies(answering.waits):
            step.run()
    return answering.waits


if __name__ == "__main__":
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Gpu())
    products.INTO_FLOAT32 = {*products.INTO_FLOAT32, NAME}
    torch.Event, FakeTensor.tolist = Event, torch.Tensor.tolist
    torch._C._set_only_lift_cpu_tensors(True)  # what is made of numbers is copied to the device, as on a GPU
    found = {case: waits_of(*json.loads(case)) for case in sys.argv[1:]}
    print(json.dumps(found))
