from .folder import score_folder as score_folder
from .write import ScoreSummary as ScoreSummary
from .write import process_share as process_share
from .write import score_rows as score_rows
