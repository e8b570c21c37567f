"""What engines that divide a model among processes (FSDP2, DeepSpeed ZeRO-3) need beyond a stock Trainer."""

import dataclasses

import accelerate
import torch
import transformers
from transformers import Trainer

from tokenweight.train.arguments import check_one_gpu


def prepare_engine(trainer: Trainer) -> None:
    """Keep in float32 what Accelerate's FSDP2 would round to 16 bits: the loss, and sums of gradients.

    Raises:
        ValueError: for engines that do not train or save what they should, before any work starts.
    """
    steps = trainer.accelerator.gradient_accumulation_steps
    if steps > 1 and not trainer.is_deepspeed_enabled:  # the loss has divided them already (docs/log.md)
        raise ValueError(
            f"trainer: transformers {transformers.__version__} divides gradients by the {steps} accumulation steps a "
            "second time: expected transformers 5.8 or newer"
        )
    check_one_gpu(trainer.args)
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
        zero = trainer.accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
        if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
            raise ValueError(
                "trainer: deepspeed has ZeRO stage 3 without stage3_gather_16bit_weights_on_model_save, and would save "
                "no model: expected true under zero_optimization"
            )


def save_whole(trainer: Trainer) -> None:
    """Let the Trainer save the whole model from now on, even if its checkpoints hold a part per process."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
