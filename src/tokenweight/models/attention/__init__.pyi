from .dual_chunk import DualChunk as DualChunk
from .dual_chunk import parse_attention as parse_attention
from .dual_chunk import with_dual_chunk as with_dual_chunk
