"""Statistics collected on the device during training: sums of weights and losses for the log, and non-finite values."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokenweight.method import LATER, NonFinite, document_positions
from tokenweight.models import sum_over_processes


class WeightStatistics(TrainerCallback):
    """Sums over the weights of all tokens that a model is trained on, for a `Trainer` or a loop of your own.

    A hook on the model adds to float64 sums on its device, without synchronizing with the device or other processes
    before `flush`. Only forward passes with labels in training mode count, not those of an evaluation.

    Args:
        model: bound by `with_weighted_loss`; the model itself (or a `PeftModel` around it), not what DDP or FSDP wrap
            around it.
        size: tokens of the short context: the first `size` tokens of a document have the same context in both losses.
            By default that of the model's scorer; without either, `first_window_share` is left out.
        copies: number of processes that read the same sequences, over which the tokens of a sequence are split.
        sources: names of the folders of a mixture. Before each forward pass, set `source` to those that the
            sequences of the batch come from.
    """

    def __init__(
        self, model: nn.Module, *, size: int | None = None, copies: int = 1, sources: Sequence[str] = ()
    ) -> None:
        scorer = getattr(getattr(model, "_token_weighting", None), "scorer", None)
        self.size, self.copies = scorer.context.size if size is None and scorer is not None else size, copies
        self.sources = list(sources)
        self.source: Tensor | None = None
        """Index of the source of each sequence in the batch, `[batch]`."""
        self._steps: list[Tensor] = []  # sums of the optimizer steps since the last flush
        self._open: Tensor | None = None  # of the unfinished step
        self._since = time.perf_counter()
        self._hook = model.register_forward_hook(self._add)

    def step(self) -> None:
        """End an optimizer step. A Trainer with this object among its callbacks calls it."""
        if self._open is not None:
            self._steps.append(self._open)
            self._open = None

    def flush(self) -> dict[str, float]:
        """The statistics since the last flush, over all processes; each has to call this. Empty if nothing was counted.

        Returns:
            `weight_mean`, `weight_std`, `unweighted_loss` (the mean long loss in nats) and `first_window_share` (of the
            total weight) of all predicted tokens; `effective_tokens`, the effective sample size of the weights,
            (sum of w)² / (sum of w²) for each optimizer step, as a mean over steps; `effective_share`, the same as a
            fraction of the predicted tokens; and `tokens_per_second`, predicted tokens by the time since the last flush
            (or since this object was made), whatever it was spent on. For a mixture, also `tokens/NAME` and
            `loss/NAME`: predicted tokens of each source, and their mean long loss.
        """
        self.step()
        if not self._steps:
            return {}
        sums, self._steps = torch.stack(self._steps), []
        steps = (sum_over_processes(sums) / self.copies).tolist()
        now, since = time.perf_counter(), self._since
        self._since = now
        num_tokens, total, squares, first, losses, *by_source = map(sum, zip(*steps))
        if not num_tokens:
            return {}
        mean = total / num_tokens
        effective = sum(step[1] ** 2 / step[2] for step in steps if step[2])
        found = {
            "weight_mean": mean,
            "weight_std": max(0.0, squares / num_tokens - mean**2) ** 0.5,
            "effective_tokens": effective / len(steps),
            "effective_share": effective / num_tokens,
            "first_window_share": first / total if total else 0.0,
            "unweighted_loss": losses / num_tokens,
            "tokens_per_second": num_tokens / (now - since),
        }
        if self.size is None:
            del found["first_window_share"]
        for name, number, nll in zip(self.sources, by_source, by_source[len(self.sources) :]):
            found |= {f"tokens/{name}": number} | ({f"loss/{name}": nll / number} if number else {})
        return found

    def remove(self) -> None:
        """Remove the hook from the model."""
        self._hook.remove()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start measuring time."""
        self._since = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End an optimizer step."""
        self.step()

    @torch.no_grad()
    def _add(self, model: nn.Module, arguments: tuple, output: Any) -> None:
        if not model.training or "mask" not in output:
            return
        mask, positions = output["mask"], output.get("position_ids")
        # Float64, or sums over a long interval would lose single tokens; Apple's GPUs lack it.
        dtype = torch.float32 if mask.device.type == "mps" else torch.float64
        weights = output["weights"].to(dtype)  # 0 outside the mask, as the losses are
        early = document_positions(mask.long(), positions) < (self.size or 0)
        sums = (mask, weights, weights**2, weights * early, output["long_nll"])
        added = torch.stack([values.sum(dtype=dtype) for values in sums])
        if self.sources and self.source is not None:
            rows = torch.stack([values.sum(dim=1, dtype=dtype) for values in (mask, output["long_nll"])])
            parts = rows.new_zeros(2, len(self.sources))
            added = torch.cat(
                [added, parts.index_add(1, self.source.to(rows.device, non_blocking=True), rows).flatten()]
            )
        self._open = added if self._open is None else self._open + added


class _Checked(NamedTuple):
    """One check: the values it covers, and the position of the first non-finite one."""

    number: Tensor
    """Index of that value among all; their count if all are finite."""
    value: Tensor
    shape: torch.Size
    names: list[str]
    where: Any


class LateChecks(TrainerCallback):
    """Finds non-finite losses and weights on the device, and raises a step later, when no synchronization is needed.

    Args:
        error: function from what was found, and the `where` of its batch, to the exception to raise.
    """

    def __init__(self, error: Callable[[NonFinite, Any], Exception]) -> None:
        self._error = error
        self._open: list[_Checked] = []  # of the unfinished step
        self._sent: tuple[list[_Checked], Tensor, Tensor, Any] | None = None  # of the previous step, in transfer

    @contextlib.contextmanager
    def collecting(self, where: Any) -> Iterator[None]:
        """Collect the checks of a batch, instead of raising their errors at once."""

        def look(losses: Mapping[str, Tensor], bad: Tensor) -> None:
            num, flat = bad.numel(), bad.flatten()
            number = torch.arange(num, device=bad.device).where(flat, num).amin()
            values = torch.stack([one.float() for one in losses.values()]).flatten()
            self._open.append(_Checked(number, values[number.clamp(max=num - 1)[None]][0], bad.shape, [*losses], where))

        token = LATER.set(look)
        try:
            yield
        finally:
            LATER.reset(token)

    def step(self) -> None:
        """End an optimizer step: raise what the previous one found, and send this one's findings to the host."""
        self._read()
        if not self._open:
            return
        checked, self._open = self._open, []
        found = [torch.stack(list(column)) for column in zip(*(one[:2] for one in checked))]
        numbers, values = (one.to("cpu", non_blocking=True) for one in found)
        arrived = None
        if found[0].device.type != "cpu":
            arrived = torch.Event(found[0].device)
            arrived.record()
        self._sent = checked, numbers, values, arrived

    def finish(self) -> None:
        """Raise what was found so far, synchronizing with the device."""
        self.step()
        self._read()

    def _read(self) -> None:
        sent, self._sent = self._sent, None
        if sent is None:
            return
        checked, numbers, values, arrived = sent
        if arrived is not None:
            arrived.synchronize()
        for one, number, value in zip(checked, numbers.tolist(), values.tolist()):
            if number < one.shape.numel():
                name, row, position = torch.unravel_index(torch.tensor(number), one.shape)
                raise self._error(NonFinite(one.names[int(name)], int(row), int(position), value), one.where)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End an optimizer step."""
        self.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise what the last step found."""
        self.finish()


class HeldOutLosses:
    """Losses of all predicted tokens of held-out sequences, over all processes: total sums divided by total counts.

    Args:
        half: tokens before the second half of the longest sequence.
        short: tokens of the short range.
        copies: number of processes that read the same sequences, over which the tokens of a sequence are split.
    """

    def __init__(self, *, half: int, short: int, copies: int = 1) -> None:
        self.half, self.short, self.copies = half, short, copies
        self._sums: Tensor | None = None

    @contextlib.contextmanager
    def measuring(self, model: nn.Module) -> Iterator[None]:
        """Count the forward passes with labels of a bound model in evaluation mode."""
        hook = model.register_forward_hook(self._add)
        try:
            yield
        finally:
            hook.remove()

    def losses(self) -> dict[str, float]:
        """The mean losses in nats; each process has to call this.

        Returns:
            `loss` of all predicted tokens, unweighted; `loss_beyond_half` and `loss_short` of those after `half` tokens
            of their document, and within the first `short`, if there are any; and `weighted_loss`, if there are weights
            of all sequences.
        """
        if self._sums is None:
            return {}
        sums = sum_over_processes(self._sums.clone()) / self.copies
        (total, late, early, weighted), (num, num_late, num_early, num_weighted) = sums.tolist()
        found = {"loss": (total, num), "loss_beyond_half": (late, num_late), "loss_short": (early, num_early)}
        if num_weighted == num:
            found["weighted_loss"] = (weighted, num)
        return {name: nll / number for name, (nll, number) in found.items() if number}

    @torch.no_grad()
    def _add(self, model: nn.Module, arguments: tuple, output: Any) -> None:
        if model.training or "mask" not in output:
            return
        mask, nll, weights = output["mask"], output["long_nll"], output.get("weights")
        dtype = torch.float32 if mask.device.type == "mps" else torch.float64
        places = document_positions(mask.long(), output.get("position_ids"))
        masks = [mask, mask & (places >= self.half), mask & (places < self.short)]
        totals = [(nll.to(dtype) * one).sum() for one in masks]
        totals.append((nll.to(dtype) * weights).sum() if weights is not None else nll.new_zeros((), dtype=dtype))
        masks.append(mask if weights is not None else torch.zeros_like(mask))
        sums = torch.stack([torch.stack(totals), torch.stack([one.sum(dtype=dtype) for one in masks])])
        self._sums = sums if self._sums is None else self._sums + sums
