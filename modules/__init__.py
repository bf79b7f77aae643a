"""SuperGlobal's modules for any trained network and any index. They need nothing but PyTorch.

Once installed (``pip install .``), the package is called `superglobal`; in the repository it is `modules`.
"""

from .activation import ReLUPlus
from .attach import attach
from .candidates import CandidateReranker, Reranker, Reranking
from .descriptor import multi_scale_descriptor
from .diffusion import DiffusionReranker
from .expansion import QueryExpansion, augmented_rows, expanded_queries
from .explanation import Explanation, explain
from .matching import Match, match_maps
from .pooling import GeM, GeMPlus, RegionalGeM, ScaleGeM
from .reciprocal import KReciprocalReranker
from .reranking import SuperGlobalReranker
from .search import Database, SearchResult, merged, search
from .whitening import Whitening

__all__ = [
    "CandidateReranker",
    "Database",
    "DiffusionReranker",
    "Explanation",
    "GeM",
    "GeMPlus",
    "KReciprocalReranker",
    "Match",
    "QueryExpansion",
    "ReLUPlus",
    "RegionalGeM",
    "Reranker",
    "Reranking",
    "ScaleGeM",
    "SearchResult",
    "SuperGlobalReranker",
    "Whitening",
    "attach",
    "augmented_rows",
    "expanded_queries",
    "explain",
    "match_maps",
    "merged",
    "multi_scale_descriptor",
    "search",
]
