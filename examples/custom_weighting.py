"""A weighting of your own: any function of the two losses of each token.

    python examples/custom_weighting.py HuggingFaceTB/SmolLM2-135M book.txt --size 512

By its name, `my_package.my_module.surprise`, it is a setting too: `tokenweight train --weighting ...`.
"""

import argparse
from pathlib import Path

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenweight import Scorer, with_weighted_loss

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="folder or hub id of a causal language model")
parser.add_argument("text", type=Path, help="a text file")
parser.add_argument("--size", type=int, default=512, help="tokens of the short context")
args = parser.parse_args()


def surprise(long: Tensor, short: Tensor, mask: Tensor) -> Tensor:
    """Weigh what the long context makes likelier by how unlikely it was. Nats, [batch, seq]; mask: what counts."""
    gain = (short - long).clamp(min=0) * short
    mean = (gain * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)
    return 0.5 + 0.5 * gain / mean.clamp(min=1e-6)  # what stands outside the mask is ignored


model = AutoModelForCausalLM.from_pretrained(args.model)
tokenizer = AutoTokenizer.from_pretrained(args.model)
tokens = tokenizer(args.text.read_text(), return_tensors="pt")["input_ids"][:, : 4 * args.size]

# Weights that are negative, infinite or not a number raise, by row and position.
with_weighted_loss(model, surprise, Scorer(model, size=args.size))
output = model(input_ids=tokens, labels=tokens)

print(f"loss {output.loss:.4f}")
for position in output.weights[0].topk(5).indices.tolist():
    token = tokenizer.decode(tokens[0, position].item())
    print(f"{token!r} at {position}: weight {output.weights[0, position]:.2f}, ", end="")
    print(f"loss {output.long_nll[0, position]:.2f}, with the short context {output.short_nll[0, position]:.2f}")
