from .cutters import Decomposer as Decomposer
from .cutters import InOrder as InOrder
from .index import TextIndex as TextIndex
from .index import rank_chunks as rank_chunks
from .path import by_similarity as by_similarity
from .path import similar_path as similar_path
from .shares import ContextShare as ContextShare
from .shares import context_shares as context_shares
