from .gpus import PEAK_FLOPS as PEAK_FLOPS
from .gpus import Speed as Speed
from .run import Cost as Cost
from .run import plan as plan
from .tables import plan_tables as plan_tables
