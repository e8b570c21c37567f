"""TRL's SFTTrainer with a model that scores itself: from plain texts, without any preparation.

python examples/with_trl.py HuggingFaceTB/SmolLM2-135M 'books/*.txt' run --size 512
"""

import argparse

import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenweight.train.trl import TokenWeightedSFTConfig, TokenWeightedSFTTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="folder or hub id of a causal language model")
parser.add_argument("texts", help="text files, one document each")
parser.add_argument("out", help="folder for the trained model")
parser.add_argument("--size", type=int, default=512, help="tokens of the short context")
parser.add_argument("--steps", type=int, default=10)
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model)
texts = datasets.load_dataset("text", data_files=args.texts, sample_by="document", split="train")

# SFTConfig of TRL with a weighting and a scorer. "stored" in place of "self" reads the column short_nll of a data set
# of tokenweight.data.load_scores; the name of another model lets that one score.
arguments = TokenWeightedSFTConfig(
    args.out, weighting="dense:interpolation=0.75", scorer="self", size=args.size, max_steps=args.steps, bf16=False
)
trainer = TokenWeightedSFTTrainer(
    model=model, args=arguments, train_dataset=texts, processing_class=AutoTokenizer.from_pretrained(args.model)
)
trainer.train()
trainer.save_model()
