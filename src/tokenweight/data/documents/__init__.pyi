from .find import find_sources as find_sources
from .find import sources_note as sources_note
from .parse import Document as Document
from .read import naming as naming
from .read import read_documents as read_documents
from .read import shuffled as shuffled
