"""What is counted from a config is what torch counts while a model with values runs."""

import pytest
import torch
from architectures import picture_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import models
from tokenweight import Scorer, ShortContext, parse_weighting, with_weighted_loss
from tokenweight.method import SCORES, Window, sliding_windows
from tokenweight.method.device import products
from tokenweight.models import with_adapter
from tokenweight.plan.flops import Attention, Forward, count_forward, step_flops

LENGTH, CONTEXT = 64, ShortContext(size=16, stride=12)
EAGER = {"attn_implementation": "eager"}  # torch counts its products; it has no count for the flash kernel of a CPU
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}


def config_of(kind, **changes):
    model_type, own = models.KINDS.get(kind, (kind, {}))
    return AutoConfig.for_model(model_type, **{**models.COMMON, **own, **changes})


def test_a_small_model_counts_as_by_hand():
    # Of each of 2 layers: queries 16 x 16, keys and values 16 x 8 each, output 16 x 16, and 3 matrices of 16 x 24.
    per_layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24
    layer = Attention(width=4 * (4 + 4), window=None)
    forward = count_forward(config_of("llama"))
    # Of 2 frequencies: older versions of transformers make the angles by a product.
    angles = forward.linear - 2 * 2 * per_layer
    assert angles in (0, 2 * 2)
    assert forward[1:] == (2 * 16 * 61, (layer, layer), None)
    # 5 tokens see 1 + 2 + 3 + 4 + 5 tokens: two products of 4 heads x 4 dimensions for each pair, in 2 layers.
    assert forward.attended(5) == 2 * 15 * 2 * 2 * 16
    long, head = 5 * forward.linear + forward.attended(5), 4 * forward.head
    step = step_flops(
        forward, 5, parse_weighting("sparse:keep=0.5"), [Window(1, 2, 5)], checkpointing=True, num_sequences=3
    )
    scoring = 4 * forward.linear + 2 * 10 * 2 * 2 * 16 + 3 * forward.head
    assert step[:5] == (3 * long, 3 * scoring, 6 * long, 3 * (1 + 3 * 0.5) * head, 3 * long)
    assert step.attention == 3 * (4 * forward.attended(5) + 2 * 10 * 2 * 2 * 16)
    assert step.total == sum(step[:5])


@given(st.integers(1, 40), st.one_of(st.none(), st.integers(1, 50)))
def test_pairs_are_those_that_a_mask_leaves(length, window):
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    mask = (key <= query) & ((window is None) | (key > query - (window or 0)))
    assert Forward(0.0, 0.0, (Attention(1, window),)).attended(length) == 2 * int(mask.sum())


class Square(Forward):
    """Every pair of tokens is attended to, as eager attention computes, which masks afterwards."""

    def attended(self, length, layers=None):
        return sum((2.0 * layer.width * length**2 for layer in (self.attention if layers is None else layers)), 0.0)


def product(added, one, other, **kwargs):
    return 2 * one[0] * one[1] * other[1]


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """As of long sequences: not all logits fit the buffer."""
    monkeypatch.setattr(products, "BUFFER_BYTES", 1)


def counted(model, weighting, scorer=None, contrast="trained"):
    """What torch counts in a step of a bound model, with values."""
    with_weighted_loss(model.train(), parse_weighting(weighting), scorer, contrast=contrast)
    tokens = models.some_tokens(1, LENGTH)
    scores = {} if scorer else {name: torch.rand(1, LENGTH) for name in SCORES}
    # The loss adds its gradients in place, a product that torch knows under another name only.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product}) as counter:
        model(input_ids=tokens, labels=tokens, **scores).loss.backward()
    return counter.get_total_flops()


FROZEN = [("llama", weighting) for weighting in ("uniform", "dense", "longce", "sparse:keep=0.3")]
FROZEN += [(kind, "dense") for kind in ("gpt2", "phi", "qwen2", "gemma2", "mistral", "mixtral")]
FROZEN += [
    ("llama", weighting) for weighting in ("exact:threshold=8", "expected(gain)", "expected(sparse)", "rho1:keep=0.3")
]
SELF_SCORED = [("llama", "dense"), ("llama", "longce"), ("phi", "sparse:keep=0.3"), ("llama", "expected(boundedgain)")]
KNOWN = ["dense", "longce", "sparse:keep=0.3"]


@pytest.mark.parametrize(
    ("kind", "weighting", "mode"),
    [(*pair, "frozen") for pair in FROZEN] + [(*pair, "self-scored") for pair in SELF_SCORED],
)
def test_a_step_computes_what_is_counted_from_its_config(kind, weighting, mode):
    extra = MOE if kind == "mixtral" else {}
    model = moe() if kind == "mixtral" else models.tiny(kind, dtype=torch.float32, **EAGER)
    scorer = Scorer(model, CONTEXT) if mode == "self-scored" else None
    found = counted(model, weighting, scorer)
    scored = sliding_windows(LENGTH, CONTEXT.size, CONTEXT.stride) if scorer else []
    forward = Square(*count_forward(config_of(kind, **extra)))
    expected = step_flops(forward, LENGTH, parse_weighting(weighting), scored).total
    # Exact in most; a hundredth leaves room for what a model multiplies for its positions.
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("weighting", KNOWN)
def test_weights_that_are_known_before_the_losses_cost_less(weighting):
    model = models.tiny("llama", dtype=torch.float32, **EAGER)
    forward = Square(*count_forward(config_of("llama")))
    costs = [
        step_flops(forward, LENGTH, parse_weighting(weighting), contrast=one).total for one in ("scorer", "trained")
    ]
    assert counted(model, weighting, contrast="scorer") == pytest.approx(costs[0], rel=0.01)
    assert costs[0] <= costs[1] * (1 if weighting == "longce" else 0.99)


@pytest.mark.parametrize(
    ("kind", "lora", "weighting"),
    [
        ("llama", {"target_modules": "all-linear"}, "uniform"),
        # With q_proj alone, eager attention leaves a product out in the first layer, as a flash kernel does not.
        ("llama", {"target_modules": ["q_proj", "k_proj", "v_proj"]}, "sparse:keep=0.3"),
        # Nothing before the last layer has a gradient, and nothing of the first layer has a backward pass.
        ("llama", {"target_modules": ["o_proj"], "layers_to_transform": [1]}, "dense"),
        ("llama", {"target_modules": ["down_proj"], "bias": "all"}, "longce"),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}, "dense"),
        ("gemma2", {"target_modules": ["up_proj"], "use_dora": True}, "dense"),
    ],
    ids=str,
)
def test_a_step_with_an_adapter_computes_what_is_counted_from_its_config(kind, lora, weighting):
    pytest.importorskip("peft")
    lora = {"r": 3, "task_type": "CAUSAL_LM", **lora}
    model = models.tiny(kind, dtype=torch.float32, **EAGER)
    adapted = with_adapter(model, lora)
    forward = Square(*count_forward(config_of(kind), lora))
    assert forward.adapted.num_trained == adapted.get_nb_trainable_parameters()[0]
    expected = step_flops(forward, LENGTH, parse_weighting(weighting))
    assert counted(model, weighting) == pytest.approx(expected.total, rel=0.01)
    assert expected.backward < step_flops(forward._replace(adapted=None), LENGTH, parse_weighting(weighting)).backward


@pytest.mark.parametrize("weighting", ["dense", "sparse:keep=0.3"])
@pytest.mark.parametrize("lora", [None, {"target_modules": "all-linear", "r": 3, "task_type": "CAUSAL_LM"}])
def test_where_all_logits_fit_weights_that_need_all_losses_cost_no_product_more(weighting, lora, monkeypatch):
    monkeypatch.undo()
    model = models.tiny("llama", dtype=torch.float32, **EAGER)
    if lora is not None:
        pytest.importorskip("peft")
        with_adapter(model, lora)
    forward, parsed = Square(*count_forward(config_of("llama"), lora)), parse_weighting(weighting)
    steps = {at_once: step_flops(forward, LENGTH, parsed, at_once=at_once) for at_once in (False, True)}
    assert counted(model, weighting) == pytest.approx(steps[True].total, rel=0.01)
    saved = steps[False].head - steps[True].head
    assert saved == (forward.head * (LENGTH - 1) if weighting == "dense" else 0)


def moe():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of("mixtral", **MOE), experts_implementation="eager", **EAGER)


def test_recomputation_is_one_more_forward_pass_but_for_what_nobody_needs():
    model = models.tiny(dtype=torch.float32, **EAGER)
    models.enable_checkpointing(model)
    found, forward = counted(model, "dense"), Square(*count_forward(model.config))
    step = step_flops(forward, LENGTH, parse_weighting("dense"), checkpointing=True)
    # The last product of a layer is not needed for any gradient, and torch stops before it.
    unneeded = 2 * LENGTH * 2 * 16 * 24
    assert found == pytest.approx(step.total - unneeded, rel=0.01)


@settings(max_examples=30)
@given(st.integers(2, 200), st.integers(2, 50), st.integers(1, 49))
def test_more_tokens_cost_more_and_weights_of_zero_less(length, size, stride):
    forward = Forward(10.0, 7.0, (Attention(4, None), Attention(4, 16)))
    weightings = {name: parse_weighting(name) for name in ("uniform", "dense", "longce", "sparse:keep=0.5")}
    costs = {name: step_flops(forward, length, weighting).total for name, weighting in weightings.items()}
    assert costs["uniform"] == costs["longce"] < costs["dense"]
    assert costs["sparse:keep=0.5"] <= costs["dense"]
    for weighting in weightings.values():
        one, more = (step_flops(forward, tokens, weighting) for tokens in (length, length + 1))
        assert one.total < more.total
        assert one.total < step_flops(forward, length, weighting, checkpointing=True).total
    if stride < size < length:
        one = step_flops(forward, length, weightings["dense"])
        scored = step_flops(forward, length, weightings["dense"], sliding_windows(length, size, stride))
        assert 0 < scored.scoring == pytest.approx(scored.total - one.total)
        assert one.attention < scored.attention < scored.total


@pytest.mark.parametrize(("kind", "changes"), [("bloom", {"n_layer": 1}), ("t5", {})])
def test_what_cannot_be_counted_is_refused(kind, changes):
    with pytest.raises(ValueError, match=f"model: {kind} ") as refusal:
        count_forward(AutoConfig.for_model(kind, **changes))
    assert "\n" not in str(refusal.value)


def test_a_model_whose_work_depends_on_its_inputs_is_refused_in_words():
    with pytest.raises(ValueError, match=r"gemma3 cannot be counted from its config: .* depends on the values"):
        count_forward(picture_config())


def test_a_config_is_left_as_it_is_and_angles_by_length_do_not_matter():
    scaled = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    config = config_of("llama", rope_parameters=scaled)
    before = config.to_dict()
    assert count_forward(config) == count_forward(config_of("llama"))
    assert config.to_dict() == before
