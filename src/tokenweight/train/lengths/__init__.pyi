from .curriculum import LengthCurriculum as LengthCurriculum
from .pieces import Pieces as Pieces
