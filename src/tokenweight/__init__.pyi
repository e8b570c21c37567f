from . import data as data
from . import evaluate as evaluate
from . import method as method
from . import models as models
from . import plan as plan
from . import records as records
from . import train as train
from . import view as view
from .method import NPMI as NPMI
from .method import PPMI as PPMI
from .method import Dense as Dense
from .method import LongCE as LongCE
from .method import ShortContext as ShortContext
from .method import Sparse as Sparse
from .method import Uniform as Uniform
from .method import Weighting as Weighting
from .method import linear_nll as linear_nll
from .method import parse_weighting as parse_weighting
from .method import weighted_linear_cross_entropy as weighted_linear_cross_entropy
from .models import Scorer as Scorer
from .models import extend_context as extend_context
from .models import load_model as load_model
from .models import load_tokenizer as load_tokenizer
from .models import token_nll as token_nll
from .models import with_weighted_loss as with_weighted_loss
from .models import without_weighted_loss as without_weighted_loss

__version__: str
