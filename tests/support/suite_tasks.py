"""A tokenizer, a model and small tasks for tests of suites."""

import json
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import models as tiny_models
from texts import TEXT

wonderwords = pytest.importorskip("wonderwords", reason="not installed: wonderwords, of tokenweight[eval]")


class FewWords(wonderwords.RandomWord):
    """Every twentieth word: RULER makes keys of all pairs of an adjective and a noun, which takes 20 s otherwise."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self._categories = {name: words[::20] for name, words in self._categories.items()}


wonderwords.RandomWord = FewWords  # before the harness imports it
RULER_TEXT = """The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. Memorize and
track the chain(s) of variable assignment hidden in the text. Question: Find all variables that have the value"""
# Short, but long enough for the samples of each task with the tokenizer below; of the others, 256.
LENGTHS = {"niah_multikey_3": 512, "ruler_vt": 1024, "ruler_cwe": 1024}


@cache
def ruler_tokenizer():
    """Knows the words of RULER, so that its samples are short."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = [f" {word}" for category in wonderwords.RandomWord()._categories.values() for word in category]
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([*TEXT.splitlines(), *words, *20 * RULER_TEXT.splitlines()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def tiny(seed=0, **settings):
    settings = {"vocab_size": 8000, "max_position_embeddings": 2048, "dtype": torch.float32, **settings}
    return tiny_models.tiny(seed=seed, **settings)


# Choices of several tokens: the harness reads a prompt with single ones once, and then warns once.
QUESTIONS = [
    {"text": "Call me", "choices": ["Ishmael.", "a man", "the whale and the sea"], "answer": 0},
    {"text": "It is a way I have of driving off", "choices": ["the spleen", "a melancholy"], "answer": 1},
    {"text": TEXT[:200], "choices": ["ship of mine", "sword and pistol ball", "sea and sky"], "answer": 2},
    {"text": TEXT[300:600], "choices": ["one of them", "two of them"], "answer": 0},
    {"text": TEXT[600:1200], "choices": ["water or so", "a whale"], "answer": 1},
]


def local(folder, name="local_choice", **settings):
    """A task over a file, as lm_eval is configured."""
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": metrics,
        "metadata": {"version": 3},
        **settings,
    }


def local_generation(folder, **settings):
    return local(
        folder,
        "local_generation",
        output_type="generate_until",
        doc_to_choice=None,
        doc_to_target="{{choices[answer]}}",
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        generation_kwargs={"max_gen_toks": 24, "until": ["\n"], "do_sample": False, **settings},
    )
