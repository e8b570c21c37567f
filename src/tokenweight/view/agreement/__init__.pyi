from .measure import Agreement as Agreement
from .measure import Comparison as Comparison
from .measure import Losses as Losses
from .measure import Picks as Picks
from .measure import compare_scores as compare_scores
from .shown import agreement_view as agreement_view
