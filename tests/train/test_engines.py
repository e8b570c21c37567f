"""DDP and FSDP2 do what one process does: losses, gradients, weights of tokens, interruptions, and what is saved."""

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import engines
import pytest
import torch
from distributed import some_rows
from engines import CASES, PLANS, Run, fit
from runs import torchrun
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoModelForCausalLM

import models
from tokenweight import Dense, ShortContext, with_weighted_loss
from tokenweight.data import score_folder
from tokenweight.train import DataCollatorWithScores, prepare_engine, training_arguments

# Float64: two orders of the same sums differ by some 1e-16 of gradients and weights of size 1 to 10, a few layers
# amplify that tenfold, and clipping enlarges nothing. AdamW divides a gradient by its own size plus 1e-8, so that of
# one that is 0 but for rounding at most 1e-15 / 1e-8 of a step of 0.01 is left: 1e-9. Losses are logged in float32.
SAME_GRADIENTS, SAME_TRAINED, SAME_LOSSES = {"rtol": 0, "atol": 1e-12}, {"rtol": 0, "atol": 1e-9}, {"rel": 4 * 2**-24}
PAGE = (Path(__file__).parents[2] / "docs" / "train.md").read_text()
COMMANDS = [shlex.split(line.removeprefix("$ ")) for line in re.findall(r"^\$ torchrun .*$", PAGE, re.MULTILINE)]
SETTINGS = ["max_steps", "4", "save_steps", "2", "learning_rate", "1e-2", "warmup_steps", "1", "disable_tqdm", "true"]
QUICK = [word if i % 2 else f"--trainer.{word}" for i, word in enumerate(SETTINGS)]


def filled(words, folder, out):
    """The words of a page's command after `train`, with folders that are there."""
    given = words[words.index("train") + 1 :]
    places = {"MODEL": str(folder / "model"), "scored": str(folder / "scored"), "run": str(folder / out)}
    return [places.get(word, word) for word in given] + QUICK


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Everything that two processes did, in one start of torchrun: cases in `found`, commands in the folder."""
    folder = tmp_path_factory.mktemp("engines")
    models.tiny(dtype=torch.float32).save_pretrained(folder / "model")
    some_rows((40, 33, 40, 21, 40, 36, 40, 40), scored=False).save_to_disk(str(folder / "rows"))
    score_folder(folder / "rows", str(folder / "model"), [ShortContext(10, 7)], folder / "scored")
    sharded = {"ddp": COMMANDS[0], "fsdp2": COMMANDS[1]}
    sharded["fsdp2-sharded"] = [*COMMANDS[1], "--trainer.fsdp_config", '{"state_dict_type": "SHARDED_STATE_DICT"}']
    commands = []
    for name, words in sharded.items():
        resume = ["--trainer.resume_from_checkpoint", str(folder / name / "checkpoint-2")]
        undisturbed, resumed = filled(words, folder, name), [*filled(words, folder, f"{name}-resumed"), *resume]
        commands += [[name, ["train", *undisturbed]], [name, ["train", *resumed]]]
    torchrun(Path(engines.__file__), folder / "found.pt", json.dumps(commands))
    num_processes, found = torch.load(folder / "found.pt")
    assert num_processes == 2
    return SimpleNamespace(folder=folder, found={key: Run(**run) for key, run in found.items()})


@pytest.fixture(scope="module")
def alone():
    """What one process does in each case, once."""
    return {case: fit("alone", **settings) for case, settings in CASES.items()}


def assert_same(parts, others, **tolerance):
    assert parts.keys() == others.keys()
    for name, value in parts.items():
        torch.testing.assert_close(value, others[name], **tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "case"), [(engine, case) for engine, cases in PLANS.items() for case in cases])
def test_two_processes_make_the_steps_of_one(engine, case, ran, alone):
    run, expected = ran.found[engine, case], alone[case]
    assert run.sharded == engine.startswith("fsdp2")
    assert run.losses == pytest.approx(expected.losses, **SAME_LOSSES)
    assert run.norms == pytest.approx(expected.norms, rel=1e-12)
    assert len(run.gradients) == 3
    for gradients, others in zip(run.gradients, expected.gradients):
        assert_same(gradients, others, **SAME_GRADIENTS)
    assert_same(run.weights, expected.weights, **SAME_GRADIENTS)
    assert_same(run.trained, expected.trained, **SAME_TRAINED)
    num_tokens = {len(tokens) for _, tokens in run.weights}
    assert len(num_tokens) > 3  # so that the processes' shares of a step differ
    if case not in ("uniform", "a 64th"):
        assert any(weights[1:].unique().numel() > 1 for weights in run.weights.values())


@pytest.mark.slow
def test_hsdp_of_two_shards_in_two_copies_makes_the_steps_of_one_process(tmp_path):
    torchrun(Path(engines.__file__), tmp_path / "found.pt", "[]", processes=4, **engines.HSDP)
    num_processes, found = torch.load(tmp_path / "found.pt")
    assert num_processes == 4
    for case, run in found.items():
        run, expected = Run(**run), fit("alone", **CASES[case], per_device_train_batch_size=4)
        assert run.sharded
        assert run.losses == pytest.approx(expected.losses, **SAME_LOSSES)
        for gradients, others in zip(run.gradients, expected.gradients, strict=True):
            assert_same(gradients, others, **SAME_GRADIENTS)
        assert_same(run.trained, expected.trained, **SAME_TRAINED)
    assert len(found) == 2


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["alone", "ddp", "fsdp2"])
def test_weights_of_a_64th_scale_the_gradient_by_a_64th_exactly(engine, ran, alone):
    small, whole = (alone[case] if engine == "alone" else ran.found[engine, case] for case in ("a 64th", "uniform"))
    assert 64 * small.norms[0] == whole.norms[0] > 0
    assert {weight for weights in small.weights.values() for weight in weights[1:].tolist()} == {1 / 64}


@pytest.mark.slow
def test_fsdp2_in_bfloat16_keeps_short_losses_losses_and_sums_of_gradients_in_float32(ran):
    run = ran.found["fsdp2", "bf16"]
    stored = [(tuple(row["input_ids"]), torch.tensor(row["short_nll"])[1:]) for row in some_rows()]
    assert len(run.short_nll) == 6
    for (_, tokens), short_nll in run.short_nll.items():
        assert any(row == tokens and torch.equal(short_nll[1:], expected) for row, expected in stored)
    for loss in run.losses:
        assert torch.tensor(loss).bfloat16().item() != loss
    for gradient in run.gradients[0].values():
        assert gradient.dtype == torch.float32
    # Weights of 16 bits have 8: a loss of some nats is off by some parts in 2**8.
    exact = fit("alone", "longce", "stored", dtype=torch.float32)
    assert run.losses[0] == pytest.approx(exact.losses[0], rel=2**-5)
    embedding = run.gradients[0]["model.embed_tokens.weight"]
    assert not torch.equal(embedding, embedding.bfloat16().float())


def logged(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "fsdp2-sharded"])
def test_a_resumed_run_ends_as_if_undisturbed_and_leaves_an_ordinary_model(engine, ran):
    folder = ran.folder
    assert logged(folder / f"{engine}-resumed") == logged(folder / engine)  # its first half is the checkpoint's
    assert not (folder / f"{engine}-resumed" / "checkpoint-2").exists()
    assert [step for step, *_ in logged(folder / engine)] == [1, 2, 3, 4]
    trained, resumed = (AutoModelForCausalLM.from_pretrained(folder / name) for name in (engine, f"{engine}-resumed"))
    before = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    assert trained.state_dict().keys() == before.keys()
    for name, value in trained.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
        assert value.shape == before[name].shape
        assert not torch.equal(value, before[name]), name
    sharded = (folder / engine / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir()
    assert sharded == (engine == "fsdp2-sharded")


@pytest.mark.slow
def test_the_command_of_the_page_trains_with_two_processes(ran):
    assert COMMANDS[0][:4] == ["torchrun", "--nproc-per-node", "8", "-m"]
    torchrun("-m", "tokenweight", "train", *filled(COMMANDS[0], ran.folder, "command"))
    assert logged(ran.folder / "command") == logged(ran.folder / "ddp")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs tokenweight[deepspeed]")
@pytest.mark.parametrize("scorer", ["stored", "self"])
def test_zero_3_as_the_page_sets_it_trains_like_ddp(scorer, ran):
    folder, out = ran.folder, ran.folder / f"zero3-{scorer}"
    (folder / "zero3.json").write_text(re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1])
    words = filled(COMMANDS[0], folder, out.name)
    if scorer == "self":
        words[words.index(str(folder / "scored"))] = str(folder / "rows")
        words += ["--scorer", "self", "--size", "10", "--stride", "7", "--trainer.max_steps", "1"]
    torchrun("-m", "tokenweight", "train", *words, "--trainer.deepspeed", folder / "zero3.json", DS_ACCELERATOR="cpu")
    found, expected = logged(out), logged(folder / "ddp")
    assert len(found) == (4 if scorer == "stored" else 1)  # the model that scored is the one trained, until it steps
    for (_, *numbers), (_, *others) in zip(found, expected):
        # Float32, whose sums DeepSpeed orders otherwise: some hundred roundings.
        assert numbers == pytest.approx(others, rel=1e-5)
    if scorer == "stored":
        trained, ddp = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (out, folder / "ddp"))
        # Steps of up to 0.01; a few weights have gradients so small that AdamW enlarges their rounding.
        assert_same(trained, ddp, rtol=0, atol=1e-4)


def bound(**trainer):
    plugin = SimpleNamespace(fsdp_version=2, mixed_precision_policy=None)
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator = SimpleNamespace(state=state, gradient_accumulation_steps=1)
    stub = {"accelerator": accelerator, "is_fsdp_enabled": True, "is_deepspeed_enabled": False}
    stub["args"] = SimpleNamespace(fsdp=True, n_gpu=1)
    return SimpleNamespace(**{**stub, **trainer}), plugin


def test_gradients_that_would_be_divided_twice_are_refused(unchecked):
    trainer, _ = bound()
    trainer.accelerator.gradient_accumulation_steps = 4
    with pytest.raises(ValueError, match=r"divides gradients by the 4 accumulation steps a second time: expected"):
        prepare_engine(trainer)


def test_several_gpus_in_one_process_are_refused(unchecked):
    trainer, _ = bound()
    trainer.args.n_gpu = 4
    with pytest.raises(ValueError, match=r"4 GPUs in one process: expected one, as under `torchrun --nproc-per-node 4"):
        prepare_engine(trainer)


@pytest.mark.parametrize(
    ("config", "deepspeed", "message"),
    [
        ({"tp_size": 2}, {}, "parallelism_config has tp_size 2: .* no tensor parallelism"),
        ({"sp_size": 4}, {}, "parallelism_config has sp_size 4: .* no sequence parallelism"),
        ({}, {"tensor_parallel": {"autotp_size": 2}}, "deepspeed has autotp_size 2"),
    ],
)
def test_tensor_and_sequence_parallelism_are_refused(config, deepspeed, message, unchecked):
    trainer, _ = bound()
    trainer.accelerator.parallelism_config = SimpleNamespace(**{"tp_size": 1, "sp_size": 1, "cp_size": 2, **config})
    trainer.accelerator.state.deepspeed_plugin = SimpleNamespace(deepspeed_config=deepspeed)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match=message):
        prepare_engine(trainer)


def test_the_first_version_of_fsdp_is_refused(unchecked):
    trainer, plugin = bound()
    plugin.fsdp_version = 1
    with pytest.raises(ValueError, match=r"fsdp_config has version 1: expected 2"):
        prepare_engine(trainer)


def test_fsdp_that_accelerate_leaves_out_is_refused(unchecked):
    trainer, _ = bound(is_fsdp_enabled=False)
    with pytest.raises(ValueError, match=r"fsdp is true, but Accelerate .* leaves it out on this device: expected"):
        prepare_engine(trainer)


def test_sums_of_gradients_and_losses_of_fsdp2_stay_in_float32(unchecked):
    trainer, plugin = bound()
    prepare_engine(trainer)
    assert plugin.mixed_precision_policy is None
    half = torch.bfloat16
    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half, output_dtype=half)
    prepare_engine(trainer)
    expected = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, output_dtype=None)
    assert plugin.mixed_precision_policy == expected


def test_zero_3_that_would_save_no_model_is_refused(unchecked):
    trainer, _ = bound(is_fsdp_enabled=False, is_deepspeed_enabled=True, args=SimpleNamespace(fsdp=None, n_gpu=1))
    settings = {"stage": 3}
    config = {"zero_optimization": settings}
    trainer.accelerator.state.deepspeed_plugin = SimpleNamespace(deepspeed_config=config)
    with pytest.raises(ValueError, match=r"without stage3_gather_16bit_weights_on_model_save.* expected true"):
        prepare_engine(trainer)
    settings["stage3_gather_16bit_weights_on_model_save"] = True
    prepare_engine(trainer)


def test_settings_of_fsdp_without_fsdp_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.fsdp_config does nothing by itself: expected trainer\.fsdp true"):
        training_arguments({"fsdp_config": {"version": 2}}, tmp_path / "out")
    assert training_arguments({"fsdp": "true", "fsdp_config": "{}"}, tmp_path / "out").fsdp is True
    assert not training_arguments({"fsdp": False}, tmp_path / "out").fsdp


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_short_losses_that_were_rounded_on_the_way_are_refused(dtype):
    batch = DataCollatorWithScores()([{"input_ids": [5, 6, 7], "short_nll": [0.0, 1.5, 2.5]}])
    model = with_weighted_loss(models.tiny(), Dense())
    expected = model(**{**batch, "short_nll": batch["short_nll"].view(torch.float32)})
    assert torch.equal(model(**batch).loss, expected.loss)
    assert expected.short_nll.tolist() == [[0.0, 1.5, 2.5]]
    rounded = batch["short_nll"].view(torch.float32).to(dtype)
    with pytest.raises(ValueError, match=f"short_nll came as {dtype}, .* expected float32"):
        model(**{**batch, "short_nll": rounded})
