from .mapped import map_rows as map_rows
from .mapped import map_table as map_table
from .permutation import Permutation as Permutation
from .remote import local_folder as local_folder
from .remote import remote_url as remote_url
from .remote import stream_rows as stream_rows
from .remote import upload as upload
