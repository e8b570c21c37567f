from .aligned import AlignedScorer as AlignedScorer
from .contrast import Contrast as Contrast
from .contrast import ContrastScorer as ContrastScorer
from .count import CountScorer as CountScorer
from .count import count_scorer as count_scorer
from .teacher import Distillation as Distillation
from .teacher import Teacher as Teacher
