"""transformers' Trainer with stored short losses: a frozen model has scored the data once.

tokenweight prepare books/ --tokenizer HuggingFaceTB/SmolLM2-135M --length 2048 --out rows
tokenweight score rows --model HuggingFaceTB/SmolLM2-135M --size 512 --out scored
python examples/with_trainer.py HuggingFaceTB/SmolLM2-135M scored run
"""

import argparse

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tokenweight import Sparse, with_weighted_loss
from tokenweight.data import load_scores
from tokenweight.train import DataCollatorWithScores

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="folder or hub id of a causal language model")
parser.add_argument("data", help="a folder that `tokenweight score` wrote")
parser.add_argument("out", help="folder for the trained model")
parser.add_argument("--steps", type=int, default=10)
args = parser.parse_args()

rows, provenance = load_scores(args.data)  # a datasets.Dataset with the column short_nll, and who scored it
model = AutoModelForCausalLM.from_pretrained(args.model)
with_weighted_loss(model, Sparse(keep=0.2))  # no scorer: the short losses come with the batches

arguments = TrainingArguments(
    args.out, max_steps=args.steps, per_device_train_batch_size=1, learning_rate=2e-5, logging_steps=1, report_to="none"
)
# The collator carries short_nll into the batch. With one that drops it, the first step raises: no token silently
# has the weight 1.
trainer = Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorWithScores())
trainer.train()
trainer.save_model()  # an ordinary model of transformers
