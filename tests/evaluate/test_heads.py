"""Retrieval heads: a model made by hand, attention beside whole matrices, masks, and what an evaluation keeps."""

import copy
import dataclasses
from pathlib import Path

import architectures
import pytest
import torch
from architectures import build, tiny_config
from evaluations import settings
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import models
from texts import TEXT, trained_tokenizer
from tokenweight.cli.eval import Eval
from tokenweight.evaluate import HeadSample, HeadScores, evaluate, retrieval_scores, without_heads
from tokenweight.evaluate.heads import add_heads, around_attention, attention_rows, choose_heads, head_samples
from tokenweight.evaluate.heads.attention import check_rows
from tokenweight.evaluate.settings import EvalSettings, make_plan
from tokenweight.records import read_json

VOCAB, PLACES = 16, 32


@pytest.fixture(scope="module")
def induction():
    """Two layers of two heads. A state is the token, its place, and the token before it, all one-hot.

    0.0 looks at the token before and notes it; 0.1 looks at the first token; 1.0 looks at what followed the same token
    earlier; 1.1 looks at everything alike.
    """
    width = 2 * VOCAB + PLACES
    size = width // 2
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=width, n_head=2, n_layer=2, n_positions=PLACES, vocab_size=VOCAB, bos_token_id=0)
    ).double()
    for name, parameter in model.named_parameters():
        if "ln_" not in name:
            parameter.data.zero_()
    token, place, before = slice(0, VOCAB), slice(VOCAB, VOCAB + PLACES), slice(VOCAB + PLACES, width)
    body, sharp = model.transformer, 3.0
    body.wte.weight.data[:, token] = torch.eye(VOCAB)
    body.wpe.weight.data[:, place] = torch.eye(PLACES)
    first, second = (block.attn for block in body.h)
    query, key, value = (slice(i * width, i * width + size) for i in range(3))
    first.c_attn.weight.data[place, query] = sharp * torch.eye(PLACES)
    first.c_attn.weight.data[place, key] = sharp * torch.eye(PLACES).roll(1, dims=1)
    first.c_attn.weight.data[token, value][:, :VOCAB] = torch.eye(VOCAB)
    first.c_proj.weight.data[:VOCAB, before] = torch.eye(VOCAB)
    first.c_attn.bias.data[size] = sharp  # the second head: every query is the same
    first.c_attn.weight.data[VOCAB, width + size] = sharp  # and only the first place has its key
    second.c_attn.weight.data[token, query][:, :VOCAB] = sharp * torch.eye(VOCAB)
    second.c_attn.weight.data[before, key][:, :VOCAB] = sharp * torch.eye(VOCAB)
    return model.eval()


#         first  text  |  fact        |  text |  answer
TOKENS = [0, 7, 8, 1, 2, 3, 4, 5, 9, 10, 11, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_induction_head_copies_everything_and_the_others_nothing(induction, attention):
    induction.set_attn_implementation(attention)
    found = retrieval_scores(induction, [HeadSample(TOKENS, range(4, 8), 12)])
    assert found.layers == [0, 1]
    assert found.means() == [[0, 0], [1, 0]]
    assert found.ranked()[0] == (1, 0, 1.0)


def test_a_token_is_copied_once_and_only_from_inside_the_fact(induction):
    # 2 3 2 3 4: after 2 comes 3, after the second 3 either 2 or 4; of the tokens {2, 3, 4} not all can be copied.
    tokens = [0, 1, 2, 3, 4, 2, 3, 5, 9, 10, 1, 2, 3, 4, 2, 3, 5]
    whole = retrieval_scores(induction, [HeadSample(tokens, range(2, 8), 11)]).scores[1][0, 0].item()
    assert 0 < whole <= 1
    assert whole * 4 == round(whole * 4)  # of four different tokens
    part = retrieval_scores(induction, [HeadSample(TOKENS, range(5, 7), 12)])
    assert part.means()[1] == [1.0, 0.0]  # 3 and 4
    apart = retrieval_scores(induction, [HeadSample(TOKENS, range(1, 3), 12)])
    assert apart.means() == [[0, 0], [0, 0]]


def rows_of(model, tokens, first):
    """Probabilities of the queries from `first` on, by layer, as the watched function is given its inputs."""
    found = []

    def around(attend, module, query, key, value, mask, **options):
        output = attend(module, query, key, value, mask, **options)
        found.append(attention_rows(query, key, mask, first, options))
        check_rows(found[-1], value, output[0][0, first:], module)
        return output

    with around_attention(around), torch.no_grad():
        model(tokens, use_cache=False)
    return found


@pytest.mark.parametrize("kind", [*models.KINDS, "gpt_oss"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_probabilities_are_rows_of_the_whole_matrix(kind, attention):
    model = build(tiny_config(kind)) if kind == "gpt_oss" else models.tiny(kind)
    model = model.eval()
    if kind == "gpt_oss":
        attention = "eager"  # its sinks need it
    if attention == "sdpa" and kind == "gemma2":
        attention = "eager"  # as its soft cap does
    tokens = models.some_tokens(1, 20)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        whole = model(tokens, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(attention)
    for rows, expected in zip(rows_of(model, tokens, 13), whole, strict=True):
        assert rows.shape[2] == 20 + (kind == "gpt_oss")
        torch.testing.assert_close(rows[..., :20].to(expected.dtype), expected[0, :, 13:], atol=1e-6, rtol=1e-5)
        assert (rows[..., :20].triu(14) == 0).all()  # causal


def test_the_interface_is_that_of_transformers_again_whatever_happens():
    model, tokens = models.tiny(), models.some_tokens(1, 9)
    before = model(tokens).logits
    with pytest.raises(RuntimeError, match="stop"), around_attention(lambda *inputs, **settings: 1 / 0):
        raise RuntimeError("stop")
    torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_masked_head_adds_exactly_nothing(kind):
    model, tokens = models.tiny(kind), models.some_tokens(2, 15)
    cut = copy.deepcopy(model)
    for layer, head in ((0, 1), (1, 0), (1, 3)):
        cut.model.layers[layer].self_attn.o_proj.weight.data[:, 4 * head : 4 * head + 4] = 0
    with torch.no_grad(), without_heads([(0, 1), (1, 0), (1, 3)]):
        masked = model(tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(masked, cut(tokens).logits, rtol=0, atol=1e-12)
        assert (masked - model(tokens).logits).abs().max() > 0.01


def test_models_and_attention_without_a_softmax_of_queries_and_keys_are_refused_by_name():
    options = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **options))
    with pytest.raises(ValueError, match=r"^heads: MambaForCausalLM has no attention with queries and keys"):
        retrieval_scores(mamba, [HeadSample(TOKENS, range(4, 8), 12)])
    rows, value = torch.full((2, 3, 5), 0.2), torch.randn(1, 1, 5, 4)
    output = (rows @ value[0]).transpose(0, 1)
    check_rows(rows, value, output, torch.nn.Identity())
    with pytest.raises(ValueError, match=r"^heads: the attention of Identity is not the softmax"):
        check_rows(rows, value, 1.1 * output, torch.nn.Identity())
    with pytest.raises(ValueError, match=r"^attn_implementation: "):
        attention_rows(torch.ones(1, 2, 5, 4), torch.ones(1, 1, 5, 4), "a block mask", 3, {})


NO_INTERFACE = {"bloom", "falcon", "falcon alibi", "gpt_neo", "mpt", "openai-gpt", "xglm"}
NO_KEYS = {"falcon_mamba", "mamba", "mamba2", "rwkv"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", architectures.KINDS)
def test_every_architecture_is_watched_or_refused_by_name(kind):
    model = build(tiny_config(kind)).eval()
    tokens = [token % model.config.get_text_config().vocab_size for token in [*range(3, 23), *range(3, 9)]]
    samples = [HeadSample(tokens, range(2, 7), 20)]
    if kind in NO_INTERFACE | NO_KEYS:
        with pytest.raises(ValueError, match=f"^heads: {type(model).__name__} has no attention"):
            retrieval_scores(model, samples)
    else:
        assert sum(own.shape[1] for own in retrieval_scores(model, samples).scores) > 0


@pytest.mark.parametrize("framed", [False, True], ids=["plain", "framed"])
def test_samples_hold_the_fact_in_the_text_and_as_the_answer(framed, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    options = {"probe_lengths": "480,560", "depths": "0,1", "num_probes": 2, "haystack": tmp_path / "text"}
    plan = make_plan(EvalSettings("", Path(), Path(), probes="none", heads=True, **options), 560)
    tokenizer = trained_tokenizer(framed=framed)
    samples = head_samples(tokenizer, plan)
    facts = [tokenizer.decode(sample.tokens[sample.answer :]) for sample in samples]
    assert len(set(facts)) == len(facts) == 8  # each has its own
    for sample, fact in zip(samples, facts):
        assert tokenizer.decode(sample.tokens[sample.needle.start : sample.needle.stop]).strip() == fact.strip()
        assert "locker code" in fact
        assert tokenizer.decode(sample.tokens[: sample.answer]).endswith("Answer:")
        assert len(sample.tokens) <= 560


def some_scores(*, seed=0, samples=6):
    rng = torch.Generator().manual_seed(seed)
    return HeadScores([1, 4], [torch.rand(samples, num, generator=rng).double() for num in (2, 3)])


def test_the_first_model_s_heads_are_chosen_and_compared_by_different_samples():
    base, tuned = some_scores(), some_scores(seed=1)
    base.scores[1][:, 2] = 0
    records = [{"measures": []}, {"measures": []}]
    add_heads(records, [base, tuned], None)
    followed = records[0]["heads"]["followed"]
    assert sorted(followed) == [[1, 0], [1, 1], [4, 0], [4, 1]] == sorted(records[1]["heads"]["followed"])
    for record, own in zip(records, (base, tuned)):
        (measure,) = record["measures"]
        each = [sum(own.scores[i][t, h].item() for i, h in ((0, 0), (0, 1), (1, 0), (1, 1))) / 4 for t in (1, 3, 5)]
        assert measure["total"] == pytest.approx(each)
        assert measure["value"] == pytest.approx(sum(each) / 3)
        assert (measure["name"], measure["unit"], measure["better"]) == ("retrieval_heads", "share", "higher")
    later = {"measures": []}
    add_heads([later], [tuned], records[0])
    assert later["measures"] == records[1]["measures"]
    small = {"measures": []}
    add_heads([small], [HeadScores([1], [torch.ones(6, 2).double()])], records[0])  # without layer 4
    assert small["measures"] == []


def plan_of(text):
    return make_plan(EvalSettings("", Path(), Path(), heads=True, mask_heads=text), 64)


def test_masked_heads_are_the_best_or_those_named_and_as_many_others():
    scores = some_scores()
    best = [(layer, head) for layer, head, _ in scores.ranked()[:2]]
    heads, control = choose_heads(plan_of("top:2"), scores)
    assert heads == best
    assert len(set(control)) == 2
    assert not set(control) & set(heads)
    scores.scores[1][:] = 0.05
    heads, control = choose_heads(plan_of("1.0,1.1"), scores)
    assert (heads, {layer for layer, _ in control}) == ([(1, 0), (1, 1)], {4})
    for text, message in (("2.0", "mask_heads 2.0: "), ("1.2", "mask_heads 1.2: "), ("top:3", "mask_heads top:3: ")):
        with pytest.raises(ValueError, match=message):
            choose_heads(plan_of(text), scores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_heads": "top:3"}, "mask_heads top:3: expected heads beside it"),
        ({"mask_heads": "top:3", "heads": True, "probes": "none"}, "mask_heads top:3: expected probes beside it"),
        ({"mask_heads": "top:0", "heads": True}, "mask_heads top:0: expected top: and a number"),
        ({"mask_heads": "3", "heads": True}, "mask_heads 3: expected top: and a number"),
        ({"mask_heads": "3.1,3.1", "heads": True}, "mask_heads 3.1,3.1: expected each head once"),
    ],
    ids=str,
)
def test_heads_to_mask_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(EvalSettings("", Path(), Path(), **options), 64)


def test_an_evaluation_keeps_scores_and_recall_without_heads(with_tokenizer, tmp_path, capsys):
    options = {"probe_lengths": "260", "depths": "0.5", "num_probes": 2, "sizes": "110", "probes": "single"}
    options |= {"heads": True, "mask_heads": "0.1,1.2"}
    whole = evaluate(settings(with_tokenizer, tmp_path / "whole", baseline="base", **options))
    for model in whole["models"]:
        heads = model["heads"]
        assert (heads["layers"], [len(own) for own in heads["scores"]], heads["samples"]) == ([0, 1], [4, 4], 2)
        assert heads["masked"]["heads"] == [[0, 1], [1, 2]]
        names = [row[0]["model"] for row in heads["masked"]["comparison"]]
        assert names == ["all heads", "masked", "others masked"]
        found = {one["name"]: one["value"] for one in model["measures"]}
        margins = [row[1]["value"] for row in heads["masked"]["comparison"]]
        assert margins[0] == found["probe_single_margin"]
        assert len(set(margins)) == 3
    options["baseline"] = tmp_path / "whole"
    again = Eval(**dataclasses.asdict(settings(with_tokenizer, tmp_path / "again", model="base", **options)))
    again.run()
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("retrieval score of each head, in tenths, over 2 texts") == 3
    assert shown.count("2 heads masked, and as many others:") == 3
    again = read_json(tmp_path / "again" / "eval.json")
    assert again["models"][2]["heads"] == whole["models"][0]["heads"]  # those of a copy, which follows its original
    assert "of 8 heads" in (tmp_path / "whole" / "table.md").read_text()
