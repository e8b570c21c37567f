"""A `transformers.Trainer` for long runs: it logs statistics of the weights, stops at non-finite values, and saves
complete checkpoints."""

import contextlib
import dataclasses
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate.utils import DynamoBackend
from torch import Tensor
from torch.utils.data import RandomSampler, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_utils import unwrap_peft_model

from tokenweight.method import NonFinite
from tokenweight.models import (
    add_older_rope,
    any_process,
    context_mesh,
    verify_again,
    with_weighted_loss,
    without_distillation,
)
from tokenweight.train.card import write_card
from tokenweight.train.checkpoints import WeightingState, last_whole_named, mark_whole, rotate, writing
from tokenweight.train.checks import check_one_gpu, check_processes, check_values
from tokenweight.train.lengths import Pieces
from tokenweight.train.records import FinishedRun
from tokenweight.train.sequences import LISTED, SOURCE, Drawn, HeldOut, InOrder, Mixture, name_row
from tokenweight.train.statistics import HeldOutLosses, LateChecks, WeightStatistics

logger = logging.getLogger(__name__)


class WeightedTrainer(Trainer):
    """Trains a model that `with_weighted_loss` has bound, on a `datasets.Dataset`, a `Mixture` or `Pieces`.

    Statistics of the weights are logged beside the loss. Held-out sequences that come as `HeldOut` are evaluated
    exactly (`HeldOutLosses`). Sharded backends are prepared (`prepare_engine`), and where the tokens of a sequence are
    split over processes (context parallelism), weights are computed over whole sequences.

    Args:
        *args: as for `transformers.Trainer`.
        size: tokens of the short context, for `first_window_share` of `WeightStatistics`; None leaves that out.
        sources: names of the folders of a mixture, or of the lengths of pieces, for statistics of each.
        **kwargs: as for `transformers.Trainer`.

    Raises:
        ValueError: on construction, for arguments that are invalid or incompatible with weighted losses, such as
            `compute_metrics`, and for a model whose parameters are all frozen; when a loss, a gradient norm or a
            weight of the model is not finite, with the step, the row if one is the cause, and the last complete
            checkpoint.
        OSError: when a checkpoint or the trained model cannot be written.

    Example:
        >>> model = with_weighted_loss(model, Sparse(keep=0.2))  # doctest: +SKIP
        >>> trainer = WeightedTrainer(
        ...     model, arguments, train_dataset=rows, data_collator=DataCollatorWithScores(), size=1024
        ... )  # doctest: +SKIP
        >>> trainer.fit()  # doctest: +SKIP
    """

    def __init__(self, *args: Any, size: int | None = None, sources: Sequence[str] = (), **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # its engines raise all kinds of errors
            kind = "" if isinstance(error, ValueError) else f" ({type(error).__name__})"
            raise ValueError(f"trainer: {' '.join(str(error).split())}{kind}") from error
        check_processes(self.args)
        prepare_engine(self)
        if self.compute_metrics is not None:
            raise ValueError(
                "compute_metrics: needs logits, which a model with a weighted loss never makes where labels are given: "
                "expected none; evaluate what without_weighted_loss(model) returns in a Trainer of transformers"
            )
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(
                "model: all of its parameters are frozen (requires_grad is false): expected some that are trained"
            )
        rows, batch = self.train_dataset, self.get_total_train_batch_size(self.args)
        if isinstance(rows, Pieces) and rows.batch != batch:
            raise ValueError(f"trainer: {batch} items a step: expected {rows.batch}, the batch of its Pieces")
        bound = self.model._token_weighting
        if self.args.neftune_noise_alpha and bound.reads_trained_pass:
            logger.warning(
                "trainer.neftune_noise_alpha %g: weights are made without this noise, which costs a forward pass more "
                "in each step",
                self.args.neftune_noise_alpha,
            )
        if (ranks := context_mesh(self.accelerator)) is not None:
            with_weighted_loss(self.model, bound.weighting, bound.scorer, ranks, bound.contrast, bound.distillation)
        self._copies = 1 if ranks is None else ranks.size()
        self.statistics = WeightStatistics(self.model, size=size, copies=self._copies, sources=sources)
        self.out = Path(self.args.output_dir)
        use_liger(self)
        compile_decoder(self)
        self.late = LateChecks(self._named)
        self.add_callback(self.statistics)
        self.add_callback(self.late)
        if bound.weighting.history:
            self.add_callback(WeightingState())
        # The Trainer would delete old checkpoints as soon as the first process has written its part of the new one.
        self._limit, self.args.save_total_limit = self.args.save_total_limit, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what the Trainer does, and the statistics of the weights, to all trackers.

        With float16, gradients overflow now and then and their step is skipped.
        """
        self.late.finish()  # it names the row, and logging the mean synchronizes anyway
        losses = {key: key for key in logs if key.startswith("eval_")}
        for key, name in {"loss": "loss", "grad_norm": "gradient norm", **losses}.items():
            scaled = key == "grad_norm" and self.accelerator.scaler is not None
            if not math.isfinite(logs.get(key, 0.0)) and not scaled:
                raise self._stop(f"the {name} is {logs[key]}: expected a finite number")
        statistics = self.statistics.flush() if "loss" in logs else {}
        super().log({**logs, **statistics}, start_time)

    def training_step(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward; errors about a row of the batch are raised a step later, about the row of the data."""
        self.statistics.source = inputs.pop(SOURCE, None)
        where: Any = (
            self.state.global_step + 1,
            {name: inputs[name] for name in ("input_ids", "labels") if name in inputs},
        )
        try:
            with self.late.collecting(where):
                return super().training_step(model, inputs, *args, **kwargs)
        except NonFinite as error:  # of what a batch came with
            raise self._named(error, where) from error

    def _named(self, error: NonFinite, where: tuple[int, dict[str, Tensor]]) -> ValueError:
        """The error about a non-finite value in a batch of a step."""
        step, inputs = where
        tokens, labels = (inputs[name][error.row] for name in ("input_ids", "labels"))
        named = name_row(self.train_dataset, tokens, labels, error.position)
        told = f"{error.name} of {named}, position {error.position} is {error.value}: expected a finite number"
        return self._stop(told, step)

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate as the Trainer does; for `HeldOut`, with losses over all tokens instead of means of batch means."""
        self.late.finish()
        rows = dataloader.dataset
        if not isinstance(rows, HeldOut):
            return super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        measured = HeldOutLosses(half=rows.half, short=rows.short, copies=self._copies)
        # A loader draws a random number when it starts: without a fork, later steps would have other dropout.
        with torch.random.fork_rng(devices=[]), measured.measuring(self.model):
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update({f"{metric_key_prefix}_{name}": loss for name, loss in measured.losses().items()})
        return output

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """The Trainer's sampler, except for mixtures and pieces (their own order) and very many rows (no list)."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(rows, Mixture | Pieces):
            return InOrder(rows, lambda: int(self.state.epoch or 0))
        sampler = super()._get_train_sampler(train_dataset)
        if type(sampler) is not RandomSampler or len(sampler) <= LISTED:
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return Drawn(len(sampler), seed, lambda: int(self.state.epoch or 0))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if SOURCE not in self._signature_columns:
            self._signature_columns.append(SOURCE)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create it as the Trainer does, with errors that name its fields."""
        with _named("optim", self.args.optim, "optim_args", self.args.optim_args):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Create it as the Trainer does, with errors that name its fields."""
        schedule = ("lr_scheduler_type", self.args.lr_scheduler_type)
        with _named(*schedule, "lr_scheduler_kwargs", self.args.lr_scheduler_kwargs):
            return super().create_scheduler(*args, **kwargs)

    def fit(self, checkpoint: Path | None = None, *, saves: bool = True) -> None:
        """Train, from a checkpoint if given, and write the trained model into the folder of the run.

        Args:
            checkpoint: to resume from.
            saves: whether the trained model is written.
        """
        try:
            try:
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            except FinishedRun:
                if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None and saves:
                    self._load_best_model()
            if saves:
                self.save_trained()
        finally:
            self.statistics.remove()

    def save_trained(self) -> None:
        """Write the trained model, an ordinary transformers model, into the folder of the run."""
        self._check_weights_finite()
        save_whole(self)
        with writing("the trained model", self.out, self.out):
            self.save_model(_internal_call=True)  # without the upload, which fails separately
        self.create_model_card()
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write our card, and RoPE settings for transformers 4; `push_to_hub` calls this between save and upload."""
        if self.is_world_process_zero():
            add_older_rope(self.out, self.model.config)  # not in checkpoints: the Trainer could not resume from them
            write_card(self.out)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save as the Trainer does; then mark the checkpoint, and only then delete old ones."""
        self.late.finish()
        self._check_weights_finite()
        folder = self.out / f"checkpoint-{self.state.global_step}"
        try:
            with writing("a checkpoint", folder, self.out):
                super()._save_checkpoint(*args, **kwargs)
                self.accelerator.wait_for_everyone()  # every process writes its random state
                if self.args.should_save:
                    mark_whole(folder)
                    rotate(self.out, self._limit, self.state.best_model_checkpoint)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)  # unusable, and it fills the disk
            raise

    def _check_weights_finite(self) -> None:
        # Under ZeRO-3 a parameter is empty between passes, and this process's shard is an attribute of it.
        parameters = ((name, getattr(one, "ds_tensor", one)) for name, one in self.model.named_parameters())
        name = next((name for name, parameter in parameters if not parameter.isfinite().all()), None)
        # Each process may hold a shard, and all have to stop, or the others would wait for this one.
        if self.args.world_size > 1 and any_process(name is not None, self.args.device):
            name = name or "a weight in another process"
        if name is not None:
            raise self._stop(f"{name} is not finite, after gradients that were not: it is not saved")

    def _stop(self, what: str, step: int | None = None) -> ValueError:
        step = self.state.global_step if step is None else step
        return ValueError(f"step {step}: {what}; {last_whole_named(self.out)}")


@contextlib.contextmanager
def _named(field: str, value: Any, settings: str, given: Any) -> Iterator[None]:
    """Turn any error within into a ValueError that names a field of TrainingArguments, and its settings."""
    try:
        yield
    except Exception as error:  # a missing package, an unknown setting, text for a number
        named = f"trainer.{field} {getattr(value, 'value', value)}" + (f": {settings} {given}" if given else "")
        raise ValueError(f"{named}: {' '.join(str(error).split())}") from error


def prepare_engine(trainer: Trainer) -> None:
    """Keep the loss and accumulated gradients in float32, which Accelerate's FSDP2 would round to 16 bits.

    Raises:
        ValueError: for backends that do not train or save what they should, before any work starts.
    """
    steps = trainer.accelerator.gradient_accumulation_steps
    if steps > 1 and not trainer.is_deepspeed_enabled:  # the loss already divides by them (docs/log.md)
        raise ValueError(
            f"trainer: transformers {transformers.__version__} divides gradients by the {steps} accumulation steps a "
            "second time: expected transformers 5.8 or newer"
        )
    check_one_gpu(trainer.args)
    _check_dimensions(trainer)
    if trainer.args.fsdp and not trainer.is_fsdp_enabled:
        raise ValueError(
            f"trainer: fsdp is true, but Accelerate {accelerate.__version__} leaves it out on this device: expected "
            "a GPU or another accelerator for each process"
        )
    if trainer.is_fsdp_enabled:
        plugin = trainer.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(
                f"trainer: fsdp_config has version {plugin.fsdp_version}: expected 2, which is the default"
            )
        policy = plugin.mixed_precision_policy
        if policy is not None:
            float32 = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)
            plugin.mixed_precision_policy = float32
    if trainer.is_deepspeed_enabled:
        settings = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
        tensor, zero = (settings.get(name, {}) for name in ("tensor_parallel", "zero_optimization"))
        if tensor.get("autotp_size", 0) > 1:
            raise ValueError(
                f"trainer: deepspeed has autotp_size {tensor['autotp_size']}: a weighted loss knows no tensor "
                "parallelism: expected it unset"
            )
        if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
            raise ValueError(
                "trainer: deepspeed has ZeRO stage 3 without stage3_gather_16bit_weights_on_model_save, and would save "
                "no model: expected true under zero_optimization"
            )


def use_liger(trainer: Trainer) -> None:
    """Patch Liger's kernels into a bound model if `use_liger_kernel` is set, and verify the loss with them.

    The Trainer still patches in the same kernels when training begins, which changes nothing.

    Raises:
        ValueError: if they include losses, Liger is not installed, or the loss is no longer the model's own.
    """
    arguments = trainer.args
    check_values({name: getattr(arguments, name) for name in ("use_liger_kernel", "liger_kernel_config")})
    if arguments.use_liger_kernel:
        try:
            apply_liger_kernel(trainer.model, arguments.liger_kernel_config)
        except ImportError as error:
            raise ValueError(f"trainer.use_liger_kernel: {error}: expected liger-kernel to be installed") from error
        verify_again(unwrap_peft_model(trainer.model))


def compile_decoder(trainer: Trainer) -> None:
    """Compile the decoder of a bound model if `torch_compile` is set, instead of everything that Accelerate would.

    The rest of a step synchronizes with the device and holds logits in chunks, which would break the graph again and
    again. The decoder is one graph for training, and one for scoring.
    """
    plugin = trainer.accelerator.state.dynamo_plugin
    if plugin.backend != DynamoBackend.NO:
        settings = plugin.to_kwargs()
        plugin.backend = DynamoBackend.NO
        trainer.model._token_weighting.parts.decoder.compile(**settings)


def _check_dimensions(trainer: Trainer) -> None:
    """Raise a ValueError for kinds of model parallelism that a weighted loss does not support."""
    config = getattr(trainer.accelerator, "parallelism_config", None)
    for name, what in {"tp_size": "tensor", "sp_size": "sequence"}.items():
        if (size := getattr(config, name, None) or 1) > 1:
            raise ValueError(
                f"trainer: parallelism_config has {name} {size}: a weighted loss knows no {what} parallelism: "
                "expected 1, and dp_replicate_size, dp_shard_size or cp_size in its place"
            )


def save_whole(trainer: Trainer) -> None:
    """Make the Trainer save the full model from now on, even if its checkpoints are sharded."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")


class EndOfDistillation(TrainerCallback):
    """Ends a distillation after a number of steps, also if the run resumes later than that."""

    def __init__(self, model: PreTrainedModel, steps: int) -> None:
        self.model, self.steps = model, steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the distillation term from the first step after the last."""
        if state.global_step >= self.steps:
            without_distillation(self.model)
