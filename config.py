"""All options with default, meaning and parser, and the command line of the commands. Imports nothing slow."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yacs.config import CfgNode

from model.errors import InputError, nearest

Parser = Callable[[Any], Any]


# ---- parsers: of text or a list of text, as users write them, or of a value as Python has it ----


def _checked(convert: Parser, words: str, accepts: Callable[[Any], bool] = lambda value: True) -> Parser:
    """Returns a parser of the values that `convert` converts and `accepts` accepts; `words` say which these are.

    The parser raises ValueError for others.
    """

    def parse(value: Any) -> Any:
        try:
            converted = convert(value)
            valid = accepts(converted)
        except (ValueError, TypeError, OverflowError):
            valid = False
        if not valid:
            raise ValueError(f"is not {words}")
        return converted

    return parse


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise TypeError
    return value


def _bool(value: Any) -> bool:
    word = str(value).lower()
    if word not in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        raise ValueError
    return word in ("true", "yes", "on", "1")


def _list(value: Any) -> list:
    """Returns the items of a list, or of text: "['a', 'b']", "(a, b)", "a,b" or "a"."""
    if isinstance(value, str):
        value = [_text(item).strip(" '\"") for item in value.strip("[]() ").split(",")]
    return [item for item in value if item != ""]


def _whole(low: int, high: int) -> Parser:
    return _checked(int, f"a whole number from {low} to {high}", lambda number: low <= number <= high)


def _number(low: float, high: float) -> Parser:
    return _checked(float, f"a number from {low:g} to {high:g}", lambda number: low <= number <= high)


def _one_of(*choices: str) -> Parser:
    return _checked(_text, f"one of {', '.join(choices)}", choices.__contains__)


_FLAG = _checked(_bool, "True or False")
_TEXT, _PATH = _checked(_text, "text"), _checked(_text, "a path", bool)
_SIZE, _COUNT = _whole(1, 1 << 20), _whole(0, 1 << 20)
_POWER = _checked(float, "a finite number above 0", lambda power: 0 < power < math.inf)
_MODULES = _checked(_list, "a list of names of submodules")
_NETWORK = _checked(
    _text, "cvnet, timm:NAME, torchvision:NAME, hub:OWNER/REPO:ENTRY or FILE.py:FUNCTION",
    lambda name: name == "cvnet" or re.fullmatch(r"(timm|torchvision|hub):.*|.+\.py:\w+", name) is not None,
)  # fmt: skip
_DEVICE = _checked(
    _text, "auto, cpu, cuda or cuda:N",
    lambda name: re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,2}))?", name) is not None,
)  # fmt: skip
_DATASETS = _checked(
    _list, "a list of names of folders",
    lambda names: names and all(re.fullmatch(r"(?!\.\.?$)[^/\\\0]{1,200}", name) for name in names),
)  # fmt: skip
_CHANNELS = _checked(
    lambda value: [float(item) for item in _list(value)], "three numbers, for R, G and B",
    lambda numbers: len(numbers) in (0, 3) and all(map(math.isfinite, numbers)),
)  # fmt: skip
_SIDES = _checked(
    lambda value: [int(item) for item in (_list(value) if isinstance(value, str | list) else [value])],
    "one side or HEIGHT,WIDTH, from 1 to 16384", lambda sides: len(sides) < 3 and all(0 < x <= 16384 for x in sides),
)  # fmt: skip
_WEIGHTS = _checked(
    lambda value: [float(item) for item in _list(value)], "a list of numbers from 0, not all 0",
    lambda weights: not weights or (min(weights) >= 0 and 0 < sum(weights) < math.inf),
)  # fmt: skip
_PATHS = _checked(_list, "a list of files and folders")
_NUMBERS = _checked(
    lambda value: [int(item) for item in _list(value)],
    "a list of whole numbers from 1 to 999999999", lambda numbers: numbers and 0 < min(numbers) <= max(numbers) < 1e9,
)  # fmt: skip

# The factors of the paper's sets of scales, by their number; a test compares them with modules/descriptor.py.
SCALE_SETS = {1: [1.0], 3: [0.7071, 1.0, 1.4142], 5: [0.5, 0.7071, 1.0, 1.4142, 2.0]}


def _factors(value: Any) -> list[float]:
    if isinstance(value, int) or (isinstance(value, str) and value.strip().isdecimal()):
        return [*SCALE_SETS.get(int(value), [])]
    return [float(each) for each in _list(value)]


_SCALES = _checked(
    _factors, "1, 3 or 5, or a list of up to 20 different factors between 0.01 and 16",
    lambda scales: 0 < len(set(scales)) == len(scales) <= 20 and all(0.01 <= each <= 16 for each in scales),
)  # fmt: skip


# Forms of rankings and descriptors for other programs, see revisitop/exports.py.
EXPORTS = ("nn", "ranks", "csv", "ames", "hloc")
_EXPORTS = _checked(_list, f"a list of {', '.join(EXPORTS)}", lambda forms: {*forms} <= {*EXPORTS})


def _rerankers(value: Any) -> list[str]:
    names = _checked(_list, "a list of names", bool)(value)
    if len(set(names)) < len(names) or ("none" in names and len(names) > 1):
        raise ValueError("has one twice, or none together with others")
    return names


# ---- conditions without which options have no effect ----


class Need(NamedTuple):
    """A condition without which an option has no effect: in words, and as a predicate of the options."""

    words: str
    holds: Callable[[CfgNode], bool]


def active_rerankers(cfg: CfgNode) -> list[str]:
    """Returns the rerankers of TEST.RERANKER, without superglobal if SupG.rerank is off; [] for none."""
    off = ("none",) if cfg.SupG.rerank else ("none", "superglobal")
    return [name for name in cfg.TEST.RERANKER if name not in off]


def _with_option(key: str) -> Need:
    return Need(f"without {key}", lambda cfg: bool(option_values(cfg)[key]))


def _with_reranker(*names: str) -> Need:
    return Need(
        f"without TEST.RERANKER {' or '.join(names)}", lambda cfg: not {*names}.isdisjoint(active_rerankers(cfg))
    )


# The networks of a fusion are named in its files.
_CVNET_NETWORK = Need("without MODEL.NAME cvnet", lambda cfg: cfg.MODEL.NAME == "cvnet" or bool(cfg.TEST.FUSION))
_OTHER_NETWORK = Need("with MODEL.NAME cvnet", lambda cfg: cfg.MODEL.NAME != "cvnet" or bool(cfg.TEST.FUSION))
_IMAGES = Need("with TEST.FEATURES", lambda cfg: not cfg.TEST.FEATURES)
_NAME_OF_DISTRACTORS = Need(  # the default file of the distractors is named after the network
    _IMAGES.words, lambda cfg: not cfg.TEST.FEATURES or (cfg.SupG.onemeval and not cfg.TEST.DISTRACTORS)
)
_RELUP = _with_option("SupG.relup")
_GEM = Need("without MODEL.POOLING gem", lambda cfg: cfg.MODEL.POOLING == "gem")
_SEVERAL_SCALES = Need("with a single scale", lambda cfg: len(cfg.TEST.SCALE_LIST) > 1)
_SUPERGLOBAL = (
    Need("without TEST.RERANKER superglobal", lambda cfg: "superglobal" in cfg.TEST.RERANKER),
    _with_option("SupG.rerank"),
)
_EXPANSION, _RECIPROCAL = _with_reranker("aqe", "alpha-qe"), _with_reranker("k-reciprocal")
_M = Need("without a reranker that uses it", lambda cfg: bool({*active_rerankers(cfg)} - {"dba", "cvnet"}))
_DIFFUSION, _CVNET = _with_reranker("diffusion"), _with_reranker("cvnet")


@dataclass(frozen=True)
class Option:
    """An option of the command line.

    Attributes:
        key, default, meaning: its name, its default, and its meaning for the help.
        parse: returns the checked value of a given one; raises ValueError with why it is invalid.
        needs: the conditions without which it has no effect.
    """

    key: str
    default: Any
    meaning: str
    parse: Parser
    needs: tuple[Need, ...] = ()


def _all_need(need: Need, *options: Option) -> tuple[Option, ...]:
    return tuple(replace(option, needs=(*option.needs, need)) for option in options)


# The defaults of the method are those of modules/; a test compares them.
_NETWORK_NAME = _all_need(
    _NAME_OF_DISTRACTORS,
    Option("MODEL.NAME", "cvnet",
           "network: cvnet, timm:NAME, torchvision:NAME, hub:OWNER/REPO[:BRANCH]:ENTRY[:KEY=VALUE,...] (or the path of "
           "a clone for OWNER/REPO) or your own FILE.py:FUNCTION", _NETWORK),
    Option("MODEL.DEPTH", 50, "layers of the ResNet encoder: 50 or 101",
           _checked(int, "50 or 101", (50, 101).__contains__), (_CVNET_NETWORK,)),
)  # fmt: skip
_NETWORK_OPTIONS = _all_need(
    _IMAGES,
    Option("MODEL.HEADS.REDUCTION_DIM", 2048, "dimensions of the descriptor, as in the checkpoint",
           _SIZE, (_CVNET_NETWORK,)),
    Option("MODEL.POOLING", "gem",
           "pooling: gem, average, max, class (a transformer's class token) or none (the network returns descriptors)",
           _TEXT),
    Option("MODEL.MEAN", [], "mean of R, G and B in 0..1, of other networks; default: the network's, or ImageNet's",
           _CHANNELS, (_OTHER_NETWORK,)),
    Option("MODEL.STD", [], "their standard deviation", _CHANNELS, (_OTHER_NETWORK,)),
    Option("MODEL.SIZE", [], "size to which images are resized, a side or HEIGHT,WIDTH; default: the network's, or any",
           _SIDES, (_OTHER_NETWORK,)),
    Option("MODEL.MULTIPLE", 0, "sides are enlarged to multiples of it (a transformer's patch); 0: the network's, or 1",
           _COUNT, (_OTHER_NETWORK,)),
    Option("MODEL.WHITENING", "", "whitening of the descriptors, a file of python -m tools.whiten", _TEXT),
    Option("TEST.WEIGHTS", "auto",
           "checkpoint, or a folder in which exactly one fits the depth; auto: ./weights, for toy random weights; "
           "of another network: a file, pretrained (auto) or untrained", _PATH),
    Option("TEST.SCALE_LIST", SCALE_SETS[3], "scales of an image: 1, 3 or 5 of them, or their factors, '(0.5, 1, 2.5)'",
           _SCALES),
    Option("TEST.MAX_SIDE", 0, "longer side to which larger images are reduced, in pixels; 0: no limit", _COUNT),
    Option("TEST.PRECISION", "fp32", "precision of the network: fp32, bf16 or fp16", _one_of("fp32", "bf16", "fp16")),
    Option("SupG.gemp", True, "GeM+; False: GeM with the trained power of the checkpoint", _FLAG),
    Option("SupG.gemp_p", 4.6, "power of GeM+", _POWER, (_with_option("SupG.gemp"), _GEM)),
    Option("SupG.rgem", True, "Regional-GeM", _FLAG),
    Option("SupG.rgem_p", 2.5, "power of Regional-GeM", _POWER, (_with_option("SupG.rgem"),)),
    Option("SupG.rgem_window", 5, "side of Regional-GeM's window, in map positions",
           _checked(int, "an odd number from 1 to 999", range(1, 1000, 2).__contains__), (_with_option("SupG.rgem"),)),
    Option("SupG.sgem", True, "Scale-GeM; False: mean over the scales", _FLAG),
    Option("SupG.sgem_p", math.inf, "power of Scale-GeM; inf is the maximum",
           _checked(float, "a number above 0", lambda power: power > 0),
           (_with_option("SupG.sgem"), _SEVERAL_SCALES)),
    Option("SupG.relup", True, "ReLU+; False: plain ReLU everywhere", _FLAG),
    Option("SupG.relup_threshold", 0.014, "threshold of ReLU+", _number(0, 1e30), (_RELUP,)),
    Option("SupG.relup_stages", ["auto"], "parts of other networks whose ReLUs become ReLU+; auto: a ResNet's layer1",
           _MODULES, (_OTHER_NETWORK, _RELUP)),
    Option("SupG.relup_ends", ["auto"], "stages of other networks that end in ReLU+; auto: a ResNet's layer2, layer3",
           _MODULES, (_OTHER_NETWORK, _RELUP)),
)  # fmt: skip
_LOADING_OPTIONS = _all_need(
    _IMAGES,
    Option("TEST.BATCH_SIZE", 0, "most images (of equal size) in a batch; 0: as the memory allows", _COUNT),
    Option("DATA_LOADER.NUM_WORKERS", 16, "processes that decode images, at most one per core", _whole(0, 1024)),
    Option("DATA_LOADER.MAX_PIXELS", 178956970, "largest number of pixels of an image; a small file can claim billions",
           _whole(1, 1 << 36)),
    Option("DATA_LOADER.TRUNCATED", False, "read what is there of a JPEG file whose end is missing; False: an error",
           _FLAG),
    Option("DATA_LOADER.PIN_MEMORY", True, "copy to the GPU from pinned memory", _FLAG),
)  # fmt: skip
_DATASET_OPTIONS = (
    Option("TEST.DATA_DIR", "./revisitop", "folder of the datasets", _PATH),
    Option("TEST.PLACE_RADIUS", 25.0, "metres within which a place is positive, in datasets with UTM coordinates",
           _number(0, 1e6)),
    Option("TEST.CROP_QUERIES", False, "crop queries to their boxes in ILIAS' layout", _FLAG),
)  # fmt: skip
_RUN_OPTIONS = (
    Option("TEST.DATASET_LIST", ["roxford5k", "rparis6k"],
           "datasets to evaluate: roxford5k, rparis6k, gldv2, toy, or any folder in TEST.DATA_DIR", _DATASETS),
    Option("TEST.FEATURES", "",
           "evaluate saved descriptors or a ranking, of a run or another program: docs/programs.md lists the files",
           _TEXT),
    Option("TEST.FUSION", [],
           "descriptors to fuse: YAML files with the options of a network, and saved descriptors as in TEST.FEATURES",
           _PATHS, (_IMAGES,)),
    Option("TEST.FUSION_WEIGHTS", [], "their weights in the similarity; default: equal ones",
           _WEIGHTS, (_with_option("TEST.FUSION"),)),
    Option("TEST.DEVICE", "auto", "auto (a GPU if there is one), cpu, cuda or cuda:N", _DEVICE),
    Option("TEST.OUT_DIR", "./output", "folder for descriptors and the results of each run", _PATH),
    Option("SupG.onemeval", False, "add the 1M distractors, extracted by extract_rop1m.py", _FLAG),
    Option("TEST.DISTRACTORS", "", "their descriptors; default: feats_1m_RN<depth>.pth or .npy in the current folder",
           _TEXT, (_with_option("SupG.onemeval"),)),
    Option("TEST.RESUME", True, "reuse and resume descriptors of the same settings in TEST.OUT_DIR", _FLAG),
    Option("TEST.EXPORT", [],
           "write for other programs, into the folder of the run: rankings as nn (AMES' nn_*.pkl), ranks (revisitop's, "
           "of all images) and csv (the challenge's), descriptors as ames and hloc (HDF5)", _EXPORTS),
    Option("TEST.REPORT", False, "write report/index.html in the folder of the run: metrics, results of each query",
           _FLAG),
)  # fmt: skip
_INDEX_OPTIONS = (
    Option("TEST.INDEX", "", "factory string of a FAISS index (IVF4096,PQ64; HNSW32; Flat); default: exact search",
           _TEXT),
    Option("TEST.INDEX_SEARCH", "", "its search parameters (nprobe=64); default: a 16th of an IVF's lists",
           _TEXT, (_with_option("TEST.INDEX"),)),
    Option("TEST.INDEX_ROWS", "exact", "rows that are reranked: exact (as saved) or decoded (from the index)",
           _one_of("exact", "decoded"), (_with_option("TEST.INDEX"),)),
)  # fmt: skip
_RERANKING_OPTIONS = (
    Option("TEST.RERANKER", ["superglobal"],
           "rerankers, a ranking for each: superglobal, aqe, alpha-qe, dba, k-reciprocal, diffusion, cvnet (local "
           "features); none for no reranking",
           _rerankers),
    Option("SupG.rerank", True, "SuperGlobal reranking, if it is in TEST.RERANKER", _FLAG, _SUPERGLOBAL[:1]),
    Option("SupG.rerank_m", 400, "M, candidates that superglobal, k-reciprocal and diffusion rerank",
           _SIZE, (_M,)),
    Option("SupG.rerank_k", 9, "K, neighbours of a candidate", _SIZE, _SUPERGLOBAL),
    Option("SupG.rerank_beta", 0.15, "beta, weight of the neighbours", _number(0, 1e6), _SUPERGLOBAL),
    Option("SupG.rerank_s2", "refined",
           "descriptors compared with the expanded query: refined (the paper's released code) or original (its text)",
           _one_of("refined", "original"), _SUPERGLOBAL),
    Option("RERANK.QE_N", 10, "number of results that expand a query with aqe and alpha-qe", _SIZE, (_EXPANSION,)),
    Option("RERANK.QE_ALPHA", 3.0, "power of their similarities", _number(0, 1e3), (_with_reranker("alpha-qe"),)),
    Option("RERANK.DBA_K", 10, "rows averaged by dba, including the row itself", _SIZE, (_with_reranker("dba"),)),
    Option("RERANK.K1", 20, "neighbours that k-reciprocal tests for reciprocity", _SIZE, (_RECIPROCAL,)),
    Option("RERANK.K2", 6, "neighbours over which its encodings are averaged", _SIZE, (_RECIPROCAL,)),
    Option("RERANK.LAMBDA", 0.3, "weight of its cosine distance", _number(0, 1), (_RECIPROCAL,)),
    Option("RERANK.DIFFUSION_K", 50, "neighbours of a candidate in the graph of diffusion", _SIZE, (_DIFFUSION,)),
    Option("RERANK.DIFFUSION_KQ", 10, "candidates from which diffusion starts", _SIZE, (_DIFFUSION,)),
    Option("RERANK.DIFFUSION_GAMMA", 3.0, "power of its similarities", _number(1e-3, 1e3), (_DIFFUSION,)),
    Option("RERANK.DIFFUSION_ALPHA", 0.99, "share of a score that comes from neighbours",
           _number(0, 0.9999), (_DIFFUSION,)),
)  # fmt: skip
_CVNET_OPTIONS = (
    Option("TEST.TOPK_LIST", [400], "numbers of candidates that cvnet reranks, a ranking for each",
           _NUMBERS, (_CVNET,)),
    Option("TEST.MAPS_GB", 0.0, "room for cvnet's feature maps in TEST.OUT_DIR, in GB; 0 for none",
           _number(0, 1e6), (_CVNET,)),
)  # fmt: skip

# Groups of options that several commands use.
NETWORK, LOADING, DATASET, INDEX, RERANKING = (
    tuple(option.key for option in group)
    for group in (
        *((*_NETWORK_NAME, *_NETWORK_OPTIONS), _LOADING_OPTIONS, _DATASET_OPTIONS, _INDEX_OPTIONS, _RERANKING_OPTIONS),
    )
)
FUSION = ("TEST.FUSION", "TEST.FUSION_WEIGHTS")
OPTIONS = (
    *(*_NETWORK_NAME, *_NETWORK_OPTIONS, *_LOADING_OPTIONS, *_DATASET_OPTIONS, *_RUN_OPTIONS),
    *(*_INDEX_OPTIONS, *_RERANKING_OPTIONS, *_CVNET_OPTIONS),
)
_BY_KEY = {option.key: option for option in OPTIONS}


# ---- the config: the values of all options ----


def make_config(settings: Sequence[tuple[str, Any]] = ()) -> CfgNode:
    """Returns the defaults changed by these settings, checked and frozen. Later settings override earlier ones."""
    cfg = CfgNode()
    for option in OPTIONS:
        *sections, leaf = option.key.split(".")
        reduce(lambda node, section: node.setdefault(section, CfgNode()), sections, cfg)[leaf] = option.default
    return varied(cfg, settings)


def varied(cfg: CfgNode, changes: Mapping[str, Any] | Sequence[tuple[str, Any]]) -> CfgNode:
    """Returns a copy with these options changed, checked and frozen.

    Raises:
        InputError: if a key is unknown or a value is invalid.
    """
    copy = cfg.clone()
    copy.defrost()
    for key, value in changes.items() if isinstance(changes, Mapping) else changes:
        *sections, leaf = key.split(".")
        reduce(getattr, sections, copy)[leaf] = _parsed(key, value)
    if "superglobal" in active_rerankers(copy) and copy.SupG.rerank_k > copy.SupG.rerank_m:
        raise InputError(
            f"SupG.rerank_k {copy.SupG.rerank_k} is above SupG.rerank_m {copy.SupG.rerank_m}: K can be M at most"
        )
    copy.freeze()
    return copy


def option_values(cfg: CfgNode) -> dict[str, Any]:
    """Returns the value of each option by its key: {"MODEL.DEPTH": 50, ...}."""
    return {key: reduce(getattr, key.split("."), cfg) for key in _BY_KEY}


def used_options(cfg: CfgNode) -> dict[str, Any]:
    """Returns the value of each option that has an effect, by its key; of fused networks, their files have the rest."""
    used = {key: value for key, value in option_values(cfg).items() if _missing_need(cfg, key) is None}
    if cfg.TEST.FUSION:
        used = {key: value for key, value in used.items() if key not in NETWORK or value != _BY_KEY[key].default}
    return used


def fusion_parts(cfg: CfgNode) -> list[tuple[float, CfgNode]]:
    """Returns the weight and the options of each part of TEST.FUSION whose weight is above 0; the weights add to 1.

    The options of a network are those in its YAML file, else those of `cfg`. Index and rerankers belong to the whole.

    Raises:
        InputError: if a file has an option that is not of a network, or the number of weights is another one.
    """
    names = cfg.TEST.FUSION
    weights = cfg.TEST.FUSION_WEIGHTS or [1.0] * len(names)
    if len(weights) != len(names):
        raise InputError(f"TEST.FUSION_WEIGHTS has {len(weights)} weights for the {len(names)} of TEST.FUSION")
    parts = []
    for name, weight in zip(names, weights, strict=True):
        changes: dict[str, Any] = {key: [] for key in FUSION} | {"TEST.INDEX": "", "TEST.RERANKER": "none"}
        if Path(name).suffix in (".yaml", ".yml"):
            options = dict(_read_yaml(Path(name), "TEST.FUSION"))
            if others := [key for key in options if key not in (*NETWORK, "TEST.DISTRACTORS")]:
                raise InputError(f"TEST.FUSION {name}: {others[0]} is not an option of a network")
            part = varied(cfg, {**changes, **options})
            for line in (line for key, line in idle_options(part).items() if key in options):
                raise InputError(f"TEST.FUSION {name}: {line}")
        else:
            part = varied(cfg, {**changes, "TEST.FEATURES": name})
        if weight:
            parts.append((weight / sum(weights), part))
    return parts


def as_words(cfg: CfgNode, *keys: str) -> list[str]:
    """Returns these options, by default all, that differ from their defaults, as words of a command line."""
    values = option_values(cfg)
    changed = [key for key in keys or values if values[key] != _BY_KEY[key].default]
    return [word for key in changed for word in (key, as_typed(values[key]))]


def plain(cfg: CfgNode) -> dict[str, Any]:
    """Returns the config as nested dicts."""
    return {key: plain(value) if isinstance(value, CfgNode) else value for key, value in cfg.items()}


def as_typed(value: Any) -> str:
    """Returns the value of an option as a user types it: a list without brackets and spaces."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def idle_options(cfg: CfgNode) -> dict[str, str]:
    """Returns a line with the reason for each option that differs from its default but has no effect, by its key."""
    lines = {}
    for key, value in option_values(cfg).items():
        missing = _missing_need(cfg, key)
        if missing and value != _BY_KEY[key].default:
            lines[key] = f"{key} {as_typed(value)} has no effect {missing.words}"
    return lines


def _missing_need(cfg: CfgNode, key: str) -> Need | None:
    return next((need for need in _BY_KEY[key].needs if not need.holds(cfg)), None)


def _option(key: str) -> Option:
    if key not in _BY_KEY:
        hint = nearest(key, _BY_KEY) or ("--help lists all" if "." in key else "a list is written with commas, a,b")
        raise InputError(f"unknown option {key}; {hint}")
    return _BY_KEY[key]


def _parsed(key: str, value: Any) -> Any:
    option = _option(key)
    try:
        return option.parse(value)
    except ValueError as error:
        raise InputError(f"{key}: {value!r:.100} {error}") from None


# ---- the command line ----


class Parsed(NamedTuple):
    """A parsed command line: the command's own arguments, the options, and the keys of the given options."""

    args: argparse.Namespace
    cfg: CfgNode
    given: set[str]


class CommandLine:
    """The command line of one command: ``[--config-file FILE] [KEY VALUE | BOOLEAN_KEY]...`` and its own arguments.

    Args:
        description: the description of the command, for its help.
        uses: the options that the command uses; all others are refused.
        instead: options that it does not use, with what a user can do in their place.
    """

    def __init__(
        self, description: str, uses: Collection[str] = tuple(_BY_KEY), instead: Mapping[str, str] | None = None
    ):
        self.instead = instead or {}
        self.uses = {*uses} - self.instead.keys()
        script = Path(sys.argv[0])
        self.name = f"python -m tools.{script.stem}" if script.parent.name == "tools" else script.name
        self.parser = _Parser(
            prog=self.name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.add = self.parser.add_argument
        self._flags: dict[str, str] = {}

    def add_flag(self, flag: str, key: str, **how: Any) -> None:
        """Adds a flag that sets an option."""
        self._flags[flag] = key
        self.add(flag, dest=key, **how)

    def add_weights(self, default: str = "./weights") -> None:
        """Adds the flag --weights for TEST.WEIGHTS."""
        words = (
            f"the checkpoint, or a folder in which exactly one fits the depth; TEST.WEIGHTS means the same [{default}]"
        )
        self.add_flag("--weights", "TEST.WEIGHTS", metavar="PATH", help=words)

    def parse(self, argv: list[str], defaults: Callable[[Any], Mapping[str, Any]] = lambda args: {}) -> Parsed:
        """Returns the arguments and the config: defaults, then the YAML file, then KEY VALUE pairs, then flags.

        Args:
            argv: the words of the command line.
            defaults: returns the command's own defaults of options, given its arguments.

        Raises:
            InputError: if arguments are unknown or missing, a key is unknown (the message suggests the closest), a
                value is invalid, the command does not use an option, an option has no effect, or a flag and an
                option contradict each other.
        """
        self.parser.epilog = _options_help(self.uses)
        self.add("--config-file", type=Path, action="append", metavar="FILE", help="YAML file of options, merged first")
        self.add("options", nargs="*", metavar="KEY VALUE", help="options, listed below")
        args = self.parser.parse_intermixed_args(argv)
        files, written = args.config_file or [], list(pair_options(args.options))
        if len(files) > 1:
            raise InputError(f"--config-file is given {len(files)} times; put all options into one file")
        settings = [*(setting for file in files for setting in _read_yaml(file)), *written]
        typed = dict(written)  # a file may list all options, so that only values other than the defaults are refused
        for key, value in settings:
            if key not in self.uses and (key in typed or _parsed(key, value) != _BY_KEY[key].default):
                hint = f"; {self.instead[key]}" if key in self.instead else ""
                raise InputError(f"{key} is not an option of {self.name}{hint}")
        for flag, key in self._flags.items():
            if (value := getattr(args, key)) is not None:
                other = typed.get(key, value)
                if _parsed(key, other) != _parsed(key, value):
                    raise InputError(f"{flag} {value} and {key} {other} contradict each other; give only one")
                settings.append((key, value))
        cfg = make_config([*defaults(args).items(), *settings])
        for line in idle_options(cfg).values():
            raise InputError(line)
        return Parsed(args, cfg, {key for key, _ in settings})


def pair_options(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yields KEY VALUE pairs; a boolean key is True if it is followed by another key or by nothing."""
    rest = list(words)
    while rest:
        key, equals, value = rest[0].partition("=")
        if equals and key in _BY_KEY:
            raise InputError(f"{rest[0]}: write {key} {value}, with a space")
        option = _option(rest.pop(0))
        if isinstance(option.default, bool) and (not rest or re.match(r"[A-Za-z_]+\.[A-Za-z_]", rest[0])):
            yield option.key, True
        elif not rest or rest[0] in _BY_KEY:
            raise InputError(f"{option.key} needs a value ({option.meaning})")
        else:
            yield option.key, rest.pop(0)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        hint = ""
        if message.startswith("unrecognized"):
            hint = nearest(message.split()[-1], self._option_string_actions) or "options are given as KEY VALUE"
        raise InputError(f"{message}; {hint}{'; ' * bool(hint)}see --help")


def _read_yaml(path: Path, flag: str = "--config-file") -> Iterator[tuple[str, Any]]:
    """Yields the options in a YAML file, with their values as text or lists of text. Errors begin with the flag.

    References are refused, a few lines of which can expand beyond any memory.
    """
    try:
        content = path.read_bytes()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(content)):
            raise ValueError("it has references")
        root = yaml.compose(content, yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise ValueError("it has no keys")
    except OSError as error:
        raise InputError(f"{flag} {path}: {error.strerror}") from None
    except Exception as error:  # exceptions of the YAML reader
        reason = " ".join(str(error).split())
        raise InputError(f"{flag} {path} is not YAML such as 'MODEL: {{DEPTH: 50}}' ({reason})") from None
    yield from _flatten(f"{flag} {path}", root, "")


def _flatten(file: str, node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, Any]]:
    keys = [f"{prefix}{key.value}" for key, _ in node.value]
    for key, (_, value) in zip(keys, node.value, strict=True):
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if keys.count(key) > 1:
            raise InputError(f"{file} has {key} twice")
        if isinstance(value, yaml.MappingNode):
            yield from _flatten(file, value, f"{key}.")
        elif any(not isinstance(item, yaml.ScalarNode) or item.tag.endswith(":null") for item in items):
            raise InputError(f"{file}: {key} has a value that no option takes")
        else:
            yield key, [item.value for item in items] if isinstance(value, yaml.SequenceNode) else value.value


def _options_help(uses: Collection[str]) -> str:
    used = [option for option in OPTIONS if option.key in uses]
    width = max(len(option.key) for option in used)
    lines = [f"  {option.key:<{width}}  {option.meaning} [{option.default!r}]" for option in used]
    return "options, with their defaults (a boolean option without a value means True):\n" + "\n".join(lines)
