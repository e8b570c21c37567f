"""The page without a browser: what is embedded, what is written in its tables, and what is refused."""

import datasets
import torch
from evaluations import settings as eval_settings

import models
from texts import EXCERPT, trained_tokenizer
from tokenweight import ShortContext
from tokenweight.data import score_folder
from tokenweight.evaluate import evaluate
from tokenweight.train import TrainSettings, train

LENGTH = 240
HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='hacked=1'> &amp; <!-- \x00\x1b[31m \u202eabc\u2066 "
    "{{ 7 * 7 }} {% raw %} naïve 你好 🙂 ahab saw ahab"
)


def make_runs(root):
    """Scored rows of two contexts, of a text and a hostile one; packed ones; a training run; an evaluation."""
    tokenizer = trained_tokenizer()
    for name, seed in (("model", 0), ("base", 1)):
        models.tiny(dtype=torch.float32, vocab_size=300, max_position_embeddings=256, seed=seed).save_pretrained(
            root / name
        )
        tokenizer.save_pretrained(root / name)
    texts = [EXCERPT.read_text(encoding="utf-8")[2000:4000], (HOSTILE + " ") * 3]
    tokens = [tokenizer(text)["input_ids"][:LENGTH] for text in texts]
    rows = datasets.Dataset.from_dict({"input_ids": tokens, "document": ["a", "b"]}).with_format("numpy")
    rows.save_to_disk(str(root / "rows"))
    positions = [[*range(40), *range(LENGTH - 40)]] * 2
    rows.add_column("position_ids", positions).save_to_disk(str(root / "rows-packed"))
    for name, size, data in (("scored", 32, "rows"), ("other", 16, "rows"), ("packed", 16, "rows-packed")):
        score_folder(root / data, str(root / "model"), [ShortContext(size, size // 2)], root / name, with_long=True)
    trainer = {"max_steps": 3, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    train(TrainSettings(str(root / "base"), str(root / "scored"), str(root / "run"), "sparse", trainer=trainer))
    evaluate(eval_settings(root, root / "evaluated", model="model", baseline="base"))
    return root
