"""Loss by position of a model beyond its context length: unchanged, with YaRN, and with Dual Chunk Attention.

    python benchmarks/attention.py                    16,384 tokens
    python benchmarks/attention.py --lengths 32768    the same for other lengths
    python benchmarks/attention.py --quick            seconds, on a tiny model: a smoke test

One text, read once each way without training; SmolLM2-135M has 8,192 positions. The loss is the mean over the tokens of
a bin; with a single text, only differences within a column are meaningful. YaRN is that of `extend_context`, set to the
length that is read, so it changes short distances too.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import tyro

from bench.models import sotu_texts, tiny_llama
from bench.report import Bench
from tokenweight import load_model, load_tokenizer, token_nll
from tokenweight.cli.demo import packaged_model
from tokenweight.models import DualChunk, extend_context, with_dual_chunk

TEXT = "1981-Carter-1"


def opened(length: int, *, quick: bool) -> tuple[str, Callable[[dict[str, Any] | None], Any], torch.Tensor]:
    """Name, a function that loads the model with a given context extension, and the first tokens of the text."""
    if quick:

        def tiny(extend: dict[str, Any] | None) -> Any:
            model = tiny_llama(max_position_embeddings=64)
            return model if extend is None else type(model)(extend_context(model.config, **extend)).eval()

        return "tiny random Llama", tiny, torch.randint(256, (1, length))
    path = packaged_model()
    (text,) = (one.text for one in sotu_texts() if one.name == TEXT)
    tokens = torch.tensor([load_tokenizer(path)(text)["input_ids"]])[:, :length]
    if tokens.shape[1] < length:
        raise SystemExit(f"the text has {tokens.shape[1]} tokens: expected at least {length}")
    return f"SmolLM2-135M, {TEXT}", lambda extend: load_model(path, dtype="float32", extend=extend).eval(), tokens


def readings(load: Callable[[dict[str, Any] | None], Any], length: int) -> dict[str, Callable[[], Any]]:
    """Loaders of the models that read the text, by name."""
    return {
        "plain": lambda: load(None),
        "yarn": lambda: load({"length": length, "method": "yarn"}),
        "dual-chunk": lambda: with_dual_chunk(load(None)),
        "dual-chunk, mscale 0.05": lambda: with_dual_chunk(load(None), DualChunk(mscale=0.05)),
    }


@dataclass
class Attention(Bench):
    """Loss by position beyond the length of a model."""

    rounds: tyro.conf.Suppress[int] = 1
    lengths: tuple[int, ...] = (16384,)
    """Numbers of tokens to read."""
    ways: tuple[str, ...] = ("plain", "yarn", "dual-chunk", "dual-chunk, mscale 0.05")
    """Ways to read them."""

    def run(self) -> None:
        report = self.report("attention")
        for length in (256,) if self.quick else self.lengths:
            name, load, tokens = opened(length, quick=self.quick)
            x = f"{name}, 1 x {length} tokens, float32"
            for way in self.ways:
                model = readings(load, length)[way]()
                begin = time.process_time()
                nll = token_nll(model, tokens)[0]
                seconds = time.process_time() - begin
                setting = {"what": "loss by position beyond a model's length", "x": x, "implementation": way}
                for start, stop in pairwise(range(0, length + 1, length // 8)):
                    loss = nll[max(start, 1) : stop].mean().item()
                    report.add(**setting, metric=f"loss from {start} to {stop}", unit="nats", values=[loss])
                report.add(**setting, metric="CPU time", unit="s", values=[seconds])
                report.finish()


if __name__ == "__main__":
    tyro.cli(Attention).run()
