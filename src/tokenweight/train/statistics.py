"""Weight statistics, logged during training."""

import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokenweight.method import document_positions


class WeightStatistics(TrainerCallback):
    """Sums over the weights of all tokens that a model is trained on, for a `Trainer` or a loop of your own.

    A hook on the model adds to float64 sums on its device; nothing waits for the device, and no other process is asked,
    before `flush`. What counts are forward passes with labels in training mode, not those of an evaluation.

    Args:
        model: bound by `with_weighted_loss`; the model itself, not what DDP or FSDP wrap around it.
        size: tokens of the short context: the first `size` tokens of a document have the same context in both losses.
            By default that of the model's scorer; without either, `first_window_share` is left out.
        copies: how many processes read the same rows: those over which the tokens of a row are split.
    """

    def __init__(self, model: PreTrainedModel, *, size: int | None = None, copies: int = 1) -> None:
        scorer = getattr(getattr(model, "_token_weighting", None), "scorer", None)
        self.size, self.copies = scorer.context.size if size is None and scorer is not None else size, copies
        self._steps: list[Tensor] = []  # sums of the optimizer steps since the last flush
        self._open: Tensor | None = None  # of the step that is not done
        self._since = time.perf_counter()
        self._hook = model.register_forward_hook(self._add)

    def step(self) -> None:
        """End an optimizer step. A Trainer that has this object among its callbacks does so itself."""
        if self._open is not None:
            self._steps.append(self._open)
            self._open = None

    def flush(self) -> dict[str, float]:
        """The statistics since the last flush, over all processes; each has to call it. Empty if nothing was counted.

        Returns:
            `weight_mean`, `weight_std`, `unweighted_loss` (the mean long loss in nats) and `first_window_share` (of the
            total weight) of all predicted tokens; `effective_tokens`, the number of tokens of equal weight that would
            spread a total like that, (sum of w)² / (sum of w²) for each optimizer step, as a mean over steps;
            `effective_share`, the same as a share of the predicted tokens; and `tokens_per_second`, predicted tokens by
            the time since the last flush (or since this object was made), whatever it was spent on.
        """
        self.step()
        if not self._steps:
            return {}
        sums, self._steps = torch.stack(self._steps), []
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
            sums /= self.copies
        steps = sums.tolist()
        now, since = time.perf_counter(), self._since
        self._since = now
        num_tokens, total, squares, first, losses = map(sum, zip(*steps))
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
        return found

    def remove(self) -> None:
        """Take the hook off the model."""
        self._hook.remove()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to measure time."""
        self._since = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End an optimizer step."""
        self.step()

    @torch.no_grad()
    def _add(self, model: PreTrainedModel, arguments: tuple, output: Any) -> None:
        if not model.training or "mask" not in output:
            return
        mask, positions = output["mask"], output.get("position_ids")
        # Float64, or the sums of a long interval would lose what single tokens add; Apple's GPUs have none.
        dtype = torch.float32 if mask.device.type == "mps" else torch.float64
        weights = output["weights"].to(dtype)  # 0 outside the mask, as the losses are
        early = document_positions(mask.long(), positions) < (self.size or 0)
        sums = (mask, weights, weights**2, weights * early, output["long_nll"])
        added = torch.stack([values.sum(dtype=dtype) for values in sums])
        self._open = added if self._open is None else self._open + added
