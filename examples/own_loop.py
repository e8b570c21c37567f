"""A training loop of your own: the model scores itself with a short context, and tokens are weighted by the difference.

python examples/own_loop.py HuggingFaceTB/SmolLM2-135M book.txt --length 2048 --size 512
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenweight import Dense, Scorer, with_weighted_loss

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="folder or hub id of a causal language model")
parser.add_argument("text", type=Path, help="a text file")
parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence: the long context")
parser.add_argument("--size", type=int, default=512, help="tokens of the short context")
parser.add_argument("--steps", type=int, default=10)
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model)
tokens = AutoTokenizer.from_pretrained(args.model)(args.text.read_text(), return_tensors="pt")["input_ids"][0]
sequences = tokens[: len(tokens) // args.length * args.length].view(-1, args.length)

# From now on model(...).loss is the weighted loss. The scorer reads windows of `size` tokens with the same model,
# without gradient; with another model in its place, that one scores.
with_weighted_loss(model, Dense(interpolation=0.75), Scorer(model, size=args.size))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
model.train()

for step in range(args.steps):
    batch = sequences[step % len(sequences)][None]
    output = model(input_ids=batch, labels=batch)
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    # Beside the loss: the weight and both losses of every token, [batch, seq], 0 where none is predicted.
    heaviest = output.weights[0].argmax()
    print(f"step {step + 1}: loss {output.loss:.4f}, mean long loss {output.long_nll[0, 1:].mean():.4f}, ", end="")
    print(f"heaviest token {heaviest} with weight {output.weights[0, heaviest]:.2f}")
