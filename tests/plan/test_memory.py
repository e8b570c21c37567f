"""What a step is said to hold is what torch's allocator says while it runs with values."""

import contextlib
import gc
import json

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

import models
from tokenweight import Scorer, ShortContext, parse_weighting, with_weighted_loss
from tokenweight.models import with_adapter
from tokenweight.plan.flops import count_forward
from tokenweight.plan.gpus import Fixed, Peak, fixed_bytes, peak
from tokenweight.plan.memory import Held, hold
from tokenweight.train import training_arguments

LENGTH, CONTEXT = 768, ShortContext(size=192, stride=144)
SIZES = {
    "vocab_size": 1500, "hidden_size": 160, "intermediate_size": 448, "num_hidden_layers": 3, "head_dim": 32,
    "num_attention_heads": 5, "num_key_value_heads": 1, "max_position_embeddings": 1024, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {
    "n_embd": 160,
    "n_layer": 3,
    "n_head": 5,
    "n_positions": 1024,
    "resid_pdrop": 0,
    "embd_pdrop": 0,
    "attn_pdrop": 0,
}
LORA = {"r": 8, "target_modules": "all-linear", "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
KEEP_INPUTS = {"use_reentrant": False}


def config_of(kind, **changes):
    return AutoConfig.for_model(kind, **{**SIZES, **(GPT2 if kind == "gpt2" else {}), **changes})


def measured(
    config, tmp_path, *, lora=None, scored=False, checkpointing=None, autocast=None, batch=1, accumulated=False
):
    """Largest sum of all bytes that the allocator has given and not got back, in forward and backward pass."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    with_adapter(model, lora or {})
    if checkpointing is not None:
        models.enable_checkpointing(model, checkpointing)
    with_weighted_loss(model, parse_weighting("dense"), Scorer(model, CONTEXT) if scored else None)
    tokens = torch.randint(3, config.vocab_size, (batch, LENGTH))
    short_nll = None if scored else torch.rand(batch, LENGTH)
    if accumulated:
        model(input_ids=tokens, labels=tokens, short_nll=short_nll).loss.backward()
    gc.collect()
    casting = contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with casting:
            loss = model(input_ids=tokens, labels=tokens, short_nll=short_nll).loss
        loss.backward()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    live = torch.tensor([change for _, change in changes]).cumsum(0)
    return int(live.max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", {"scored": True}),
        ("llama", {"checkpointing": KEEP_INPUTS, "scored": True}),
        ("llama", {"autocast": torch.bfloat16, "batch": 2}),
        ("gpt2", {}),
        ("qwen3", {"checkpointing": KEEP_INPUTS, "accumulated": True}),
        ("llama", {"lora": LORA}),
        ("llama", {"lora": LORA, "checkpointing": KEEP_INPUTS, "autocast": torch.bfloat16}),
    ],
    ids=str,
)
def test_a_step_holds_what_the_allocator_says(kind, settings, tmp_path):
    config = config_of(kind)
    options = {**settings, "context": CONTEXT, "new_gradients": not settings.get("accumulated", False)}
    for name in ("scored", "accumulated"):
        options.pop(name, None)
    held = hold(config, LENGTH, **options)
    worst = peak(Fixed(0, 0, 0, 0), held, scoring=settings.get("scored", False))
    # Kernels hold a little that no tensor of ours is: the losses and weights of each token, the buffers of attention on
    # a CPU, copies while it casts. In these models, of 1 to 2 million parameters, that is up to 7 % here.
    assert worst.total == pytest.approx(measured(config, tmp_path, **settings), rel=0.1)


@pytest.mark.slow
def test_what_is_held_grows_with_rows_and_shrinks_with_checkpointing():
    config = config_of("llama")
    short, long = (hold(config, length, context=CONTEXT) for length in (512, 1024))
    both, saved = hold(config, 1024, batch=2), hold(config, 1024, checkpointing=KEEP_INPUTS)
    for name in ("forward", "kept", "loss", "backward"):
        assert getattr(short, name) < getattr(long, name) < getattr(both, name)
    # Without a square of tokens, what is kept is in proportion to them.
    assert long.kept == pytest.approx(2 * short.kept, rel=0.01)
    assert both.kept == pytest.approx(2 * long.kept, rel=0.01)
    assert saved.kept < long.kept / 5
    # Of each of 3 layers its input; and for the head what comes out, once more for the norm, and once shifted.
    state, number = 1024 * 160 * 4, 1024 * 4
    assert saved.kept == pytest.approx((3 + 3) * state, abs=0.5 * state + 40 * number)
    assert hold(config, 1024).scoring == 0 < long.scoring


@pytest.mark.parametrize(("kind", "copies"), [("llama", 1), ("gemma2", 2)])
def test_a_loss_holds_gradients_of_states_and_head_and_a_chunk_of_logits(kind, copies):
    config = config_of(kind, num_hidden_layers=2, tie_word_embeddings=False)
    chunk = 255  # all predicted tokens of a row fit; a soft-cap, which only gemma2 has, needs a copy of their logits
    numbers = 256 * 160 + 1500 * 160 + chunk * (copies * 1500 + 160)
    assert hold(config, 256).loss == pytest.approx(4 * numbers, abs=64)


def test_gradients_that_are_added_or_given_away_are_not_held():
    config = config_of("llama", num_hidden_layers=4)
    kept, given = (hold(config, 64, new_gradients=new) for new in (True, False))
    assert given.gradients == 0 < kept.gradients
    assert given.backward < kept.backward


def test_the_phase_that_holds_most_is_found():
    held = Held(forward=50, kept=40, scoring=30, loss=20, backward=70, gradients=10)
    fixed = Fixed(weights=100, optimizer=200, before=5, after=60)
    assert peak(fixed, held, scoring=False) == Peak("backward", 100, 15, 200, 60, 0, 0)
    assert peak(fixed, held._replace(loss=31), scoring=False) == Peak("loss", 100, 5, 200, 40, 31, 0)
    assert peak(fixed, held._replace(scoring=71), scoring=True) == Peak("scoring", 100, 5, 200, 0, 0, 71)
    assert peak(fixed._replace(after=76), held, scoring=True) == Peak("update", 100, 76, 200, 0, 0, 0)
    assert peak(fixed, held, scoring=True).total == 375
    passing = fixed._replace(passing=7, last=66)
    assert peak(passing, held, scoring=False) == Peak("backward", 100, 22, 200, 60, 0, 0)
    assert peak(passing._replace(last=80), held, scoring=False) == Peak("reduction", 100, 85, 200, 0, 0, 0)


def arguments(tmp_path, **settings):
    return training_arguments({"per_device_train_batch_size": 1, **settings}, tmp_path / "out")


def test_weights_gradients_and_states_are_those_of_a_trainer(tmp_path):
    config = config_of("llama")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    for optim, times in (("adamw_torch_fused", 2), ("adamw_torch", 2), ("sgd", 0), ("rmsprop", 1)):
        found = fixed_bytes(config, arguments(tmp_path, optim=optim), torch.float32, 1)
        assert found == Fixed(whole, times * whole, 0, whole)
    accumulating = arguments(tmp_path, gradient_accumulation_steps=2)
    assert fixed_bytes(config, accumulating, torch.float32, 1) == Fixed(whole, 2 * whole, whole, whole)
    several = fixed_bytes(config, arguments(tmp_path), torch.float32, 4)
    assert several == Fixed(whole, 2 * whole, whole, 2 * whole)


@pytest.mark.slow
def test_of_an_adapter_alone_there_are_gradients_and_states(tmp_path):
    pytest.importorskip("peft")
    config = config_of("llama")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with_adapter(model, LORA)
    frozen, trained = (
        sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad == wanted)
        for wanted in (False, True)
    )
    # PEFT keeps an adapter in float32.
    assert trained == 4 * count_forward(config, LORA).adapted.num_trained < frozen / 5

    def fixed(num_gpus, **settings):
        return fixed_bytes(config, arguments(tmp_path, **settings), torch.bfloat16, num_gpus, LORA)

    assert fixed(1) == Fixed(frozen + trained, 2 * trained, 0, trained)
    assert fixed(1, gradient_accumulation_steps=2) == Fixed(frozen + trained, 2 * trained, trained, trained)
    assert fixed(4) == Fixed(frozen + trained, 2 * trained, trained, 2 * trained)
    # Of three layers two are gathered, and all that is in none; nothing of it is trained.
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    whole, adapter = sum(parameter.numel() for parameter in model.parameters()), trained / 4
    sharded = fixed(4, fsdp=True, bf16=True)
    assert sharded[:4] == ((frozen + trained) / 4 + 2 * (whole - layer), trained / 2, trained / 4, trained / 4)
    assert sharded[4:] == (adapter / 3 * (2 + 4), 0)
    assert hold(config, 64, lora=LORA).loss == hold(config, 64).loss - 4 * 1500 * 160  # a frozen head's gradient


def test_fsdp_slices_all_but_what_is_gathered(tmp_path):
    config = config_of("llama")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    whole = sum(parameter.numel() for parameter in model.parameters())
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    sharded = arguments(tmp_path, fsdp=True, bf16=True)
    # Embeddings, head, last norm and two of three layers are gathered in 2 bytes; a quarter of each is stored in 4.
    found = fixed_bytes(config, sharded, torch.float32, 4)
    assert found[:4] == (whole + 2 * (whole - layer), 2 * whole, whole, whole)
    with pytest.raises(ValueError, match="offload"):
        fixed_bytes(config, arguments(tmp_path, fsdp=True, fsdp_config={"cpu_offload": True}), torch.float32, 4)


@pytest.fixture
def world_of_one():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("dtype", "bf16"), [("float32", True), ("float32", False), ("bfloat16", False)])
def test_gradients_that_wait_under_fsdp_are_those_that_torch_keeps(dtype, bf16, world_of_one, tmp_path):
    dtype, config = getattr(torch, dtype), config_of("llama", vocab_size=50)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    # Accelerate's policy under bf16, with the float32 sums that `prepare_engine` puts in; none without.
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    modules = [*model.model.layers, model]
    for module in modules:
        fully_shard(module, mesh=world_of_one, mp_policy=policy)
    model.set_requires_gradient_sync(False)  # all micro-steps but the last
    tokens = torch.randint(3, 50, (1, 8))
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
    parameters = [
        parameter for module in modules for parameter in module._get_fsdp_state()._fsdp_param_group.fsdp_params
    ]
    kept = [parameter.unsharded_accumulated_grad for parameter in parameters]  # None if of the dtype it was made in
    waiting = sum(p.unsharded_param.grad.nbytes if grad is None else grad.nbytes for p, grad in zip(parameters, kept))
    steps = {"fsdp": True, "bf16": bf16}
    one, more = (
        fixed_bytes(config, arguments(tmp_path, **steps, gradient_accumulation_steps=num), dtype, 1) for num in (1, 2)
    )
    assert more.before - one.before == more.after - one.after == waiting > 0


@pytest.mark.parametrize(("num_steps", "bf16"), [(1, True), (1, False), (2, True)])
def test_gradients_on_their_way_under_fsdp_are_those_that_torch_holds(
    num_steps, bf16, world_of_one, tmp_path, monkeypatch
):
    config = config_of("llama", vocab_size=50)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for module in [*model.model.layers, model]:
        fully_shard(module, mesh=world_of_one, mp_policy=policy)
    rest, held = model._get_fsdp_state()._fsdp_param_group.fsdp_params, []
    copy_in = _fsdp_collectives.foreach_reduce_scatter_copy_in

    def recorded(gradients, buffer, world_size):
        whole = [p.unsharded_param.grad for p in rest]  # those that wait for what is in no block: here, of the head
        # Torch has let go of those that it reduces now, in their parameters.
        held.append([buffer.nbytes, *(sum(t.nbytes for t in some if t is not None) for some in (gradients, whole))])
        copy_in(gradients, buffer, world_size)

    monkeypatch.setattr(_fsdp_collectives, "foreach_reduce_scatter_copy_in", recorded)
    tokens = torch.randint(3, 50, (1, 8))
    for step in range(num_steps):
        model.set_requires_gradient_sync(step == num_steps - 1)
        model(input_ids=tokens, labels=tokens).loss.backward()
    steps = {"fsdp": True, "bf16": bf16, "gradient_accumulation_steps": num_steps}
    fixed = fixed_bytes(config, arguments(tmp_path, **steps), torch.float32, 1)
    *blocks, (buffer, gradients, _) = held
    assert len(blocks) == len(model.model.layers)
    waiting = fixed.before - fixed_bytes(config, arguments(tmp_path, fsdp=True, bf16=bf16), torch.float32, 1).before
    if waiting:  # what is reduced is among them
        assert {buffer for buffer, *_ in blocks} == {fixed.passing}
        assert buffer == fixed.last
    else:
        assert {sum(block) for block in blocks} == {fixed.passing}
        assert buffer + gradients == fixed.last


def test_an_optimizer_that_cannot_be_counted_is_refused(tmp_path):
    with pytest.raises(ValueError, match="states of optim adamw_bnb_8bit cannot be counted"):
        fixed_bytes(config_of("llama"), arguments(tmp_path, optim="adamw_bnb_8bit"), torch.float32, 1)
