"""SuperGlobal's modules for any trained network and any index; they need nothing but PyTorch.

Installed (``pip install .``) this package is `superglobal`, in its repository it is `modules`.
"""

from .activation import ReLUPlus
from .attach import attach
from .descriptor import multi_scale_descriptor
from .pooling import GeM, GeMPlus, RegionalGeM, ScaleGeM
from .reranking import SuperGlobalReranker
from .search import Database, search
from .whitening import Whitening

__all__ = [
    "Database",
    "GeM",
    "GeMPlus",
    "ReLUPlus",
    "RegionalGeM",
    "ScaleGeM",
    "SuperGlobalReranker",
    "Whitening",
    "attach",
    "multi_scale_descriptor",
    "search",
]
