"""Train language models that use a long context, by weighting the loss of each token."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tokenweight.loss import linear_nll as linear_nll
    from tokenweight.loss import weighted_linear_cross_entropy as weighted_linear_cross_entropy
    from tokenweight.model import load_model as load_model
    from tokenweight.model import load_tokenizer as load_tokenizer
    from tokenweight.model import token_nll as token_nll
    from tokenweight.objective import with_weighted_loss as with_weighted_loss
    from tokenweight.scoring import Scorer as Scorer
    from tokenweight.scoring import ShortContext as ShortContext
    from tokenweight.weighting import NPMI as NPMI
    from tokenweight.weighting import PPMI as PPMI
    from tokenweight.weighting import Dense as Dense
    from tokenweight.weighting import LongCE as LongCE
    from tokenweight.weighting import Sparse as Sparse
    from tokenweight.weighting import Uniform as Uniform
    from tokenweight.weighting import Weighting as Weighting
    from tokenweight.weighting import parse_weighting as parse_weighting

_HOME = {
    "weighting": ["NPMI", "PPMI", "Dense", "LongCE", "Sparse", "Uniform", "Weighting", "parse_weighting"],
    "loss": ["linear_nll", "weighted_linear_cross_entropy"],
    "model": ["load_model", "load_tokenizer", "token_nll"],
    "scoring": ["Scorer", "ShortContext"],
    "objective": ["with_weighted_loss"],
}
__all__ = [*(name for names in _HOME.values() for name in names), "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import tokenweight`, and `--help`, then need no torch."""
    for module, names in _HOME.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"tokenweight.{module}"), name)
            return value
    raise AttributeError(f"module 'tokenweight' has no attribute {name!r}")
