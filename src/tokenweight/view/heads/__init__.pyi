from .figure import head_figure as head_figure
from .shown import head_map as head_map
from .shown import heads_line as heads_line
from .shown import heads_view as heads_view
