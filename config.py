"""All options with default, meaning and check, and the parser of the commands. Imports nothing slow."""

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yacs.config import CfgNode

from model.errors import InputError, as_typed


@dataclass(frozen=True)
class Option:
    """An option of the command line.

    Attributes:
        check: returns why a value is invalid, or None.
        needs: values of other options without which it has no effect.
        parse: converts the given value, if the type of the default does not determine how.
    """

    key: str
    default: Any
    meaning: str
    check: Callable[[Any], str | None] = lambda value: None
    needs: Mapping[str, Any] | None = None
    parse: Callable[[Any], Any] | None = None


def _one_of(*choices) -> Callable[[Any], str | None]:
    return lambda value: None if value in choices else f"is not one of {', '.join(map(str, choices))}"


def _between(low: float, high: float) -> Callable[[Any], str | None]:
    return lambda value: None if low <= value <= high else f"is not between {low} and {high:g}"


_size, _count = _between(1, 1 << 20), _between(0, 1 << 20)


def _scales(value: Any) -> int | list[float]:
    """Parses a number of scales, or their factors: "(0.5, 1, 2.5)"."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,3}", value.strip()):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else [float(each) for each in _list(value)]


def _known_scales(value: int | list[float]) -> str | None:
    if isinstance(value, int):
        return None if value in (1, 3, 5) else "is not one of 1, 3, 5"
    if not value or len(value) > 20 or not all(0.01 <= factor <= 16 for factor in value):
        return "is not a list of 1 to 20 factors between 0.01 and 16"
    twice = [factor for factor in value if value.count(factor) > 1]
    return f"has {twice[0]:g} twice" if twice else None


def _positive(value: float) -> str | None:
    return None if value > 0 else "is not above 0"


def _positive_finite(value: float) -> str | None:
    return None if 0 < value < math.inf else "is not above 0 and finite"


def _odd(value: int) -> str | None:
    return None if 0 < value < 1000 and value % 2 else "is not odd and between 1 and 999"


def _not_empty(value: str) -> str | None:
    return "is empty" if not value else "contains a zero byte" if "\0" in value else None


def _no_zero_byte(value: str) -> str | None:
    return "contains a zero byte" if "\0" in value else None


def _datasets(value: list) -> str | None:
    if not value:
        return "is empty"
    wrong = [
        name
        for name in value
        if name in (".", "..") or re.search(r"[/\\\0]", name) or len(name.encode(errors="replace")) > 200
    ]
    return f"has {wrong[0]!r}, which is not the name of a folder" if wrong else None


def _device(value: str) -> str | None:
    return (
        None
        if re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,2}))?", value)
        else "is not one of auto, cpu, cuda, cuda:N"
    )


def _counts(value: list) -> str | None:
    if not value:
        return "is empty"
    wrong = [item for item in value if not re.fullmatch(r"[1-9][0-9]{0,8}", str(item))]
    return f"has {wrong[0]!r}, which is not a number from 1" if wrong else None


# The stages that can follow a search; assembly.py creates them.
RERANKER_NAMES = ("superglobal", "aqe", "alpha-qe", "dba", "k-reciprocal", "diffusion", "cvnet")


def _rerankers(value: list) -> str | None:
    if value == ["none"]:
        return None
    if not value:
        return "is empty; for no reranker use none"
    wrong = [name for name in value if name not in RERANKER_NAMES]
    if wrong == ["none"]:
        return "has none together with others"
    if wrong:
        return f"has {wrong[0]!r}, which is not one of {', '.join(RERANKER_NAMES)}, none"
    return "has one twice" if len(set(value)) < len(value) else None


class _Having:
    """Equals every list with one of these items; used in `needs` of options of a reranker."""

    def __init__(self, *items: str):
        self.items = items

    def __eq__(self, other: object) -> bool:
        return any(item in other for item in self.items)

    def __str__(self) -> str:
        return " or ".join(self.items)

    __hash__ = None


class _OtherThan:
    """Equals every other value; used in `needs` of options that have no effect with this value."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return other != self.value

    def __str__(self) -> str:
        return f"other than {self.value}" if self.value else "of some kind"

    __hash__ = None


def _network(value: str) -> str | None:
    if value == "cvnet" or value.startswith(("timm:", "torchvision:")) or re.fullmatch(r".+\.py:\w+", value):
        return None
    return "is not cvnet, timm:NAME, torchvision:NAME or FILE.py:FUNCTION"


def _with_reranker(*names: str) -> dict[str, Any]:
    return {"TEST.RERANKER": _Having(*names)}


_OTHER, _OWN = {"MODEL.NAME": _OtherThan("cvnet")}, {"MODEL.NAME": "cvnet"}
_INDEX = {"TEST.INDEX": _OtherThan("")}
_CVNET, _SUPERGLOBAL = _with_reranker("cvnet"), {**_with_reranker("superglobal"), "SupG.rerank": True}
_EXPANSION, _DIFFUSION, _RECIPROCAL = (
    _with_reranker(*names) for names in (("aqe", "alpha-qe"), ("diffusion",), ("k-reciprocal",))
)

# The defaults of the method are those of modules/; a test compares them.
OPTIONS = (
    Option("MODEL.NAME", "cvnet", "network: cvnet, timm:NAME, torchvision:NAME or your own FILE.py:FUNCTION", _network),
    Option("MODEL.DEPTH", 50, "layers of the ResNet encoder: 50 or 101", _one_of(50, 101), _OWN),
    Option("MODEL.HEADS.REDUCTION_DIM", 2048, "dimensions of the descriptor, as in the checkpoint", _size, _OWN),
    Option(
        "MODEL.POOLING", "gem", "pooling of another network: gem, average, max or class (a transformer's class token)",
        _one_of("gem", "average", "max", "class"), _OTHER,
    ),
    Option("MODEL.WHITENING", "", "whitening of the descriptors, a file of python -m tools.whiten", _no_zero_byte),
    Option(
        "TEST.WEIGHTS", "auto",
        "checkpoint, or a folder in which exactly one fits the depth; auto: ./weights, for toy random weights; "
        "of another network: a file, pretrained (auto) or untrained", _not_empty,
    ),
    Option("TEST.DATA_DIR", "./revisitop", "folder of the datasets", _not_empty),
    Option("TEST.DATASET_LIST", ["roxford5k", "rparis6k"],
        "datasets to evaluate: roxford5k, rparis6k, gldv2, toy, or any folder in TEST.DATA_DIR", _datasets),
    Option(
        "TEST.SCALE_LIST", 3, "number of scales, 1, 3 or 5, or their factors, '(0.5, 1, 2.5)'", _known_scales,
        parse=_scales,
    ),
    Option("TEST.MAX_SIDE", 0, "longer side to which larger images are reduced, in pixels; 0: no limit", _count),
    Option(
        "TEST.FEATURES", "",
        "evaluate saved descriptors (.mat, .npy, .npz, .pth, a folder of a run) or a ranking (.pkl, .csv); no network",
        _no_zero_byte,
    ),
    Option("TEST.DEVICE", "auto", "auto (a GPU if there is one), cpu, cuda or cuda:N", _device),
    Option("TEST.PRECISION", "fp32", "precision of the network: fp32, bf16 or fp16", _one_of("fp32", "bf16", "fp16")),
    Option("TEST.BATCH_SIZE", 0, "most images (of equal size) in a batch; 0: as the memory allows", _count),
    Option("TEST.OUT_DIR", "./output", "folder for descriptors and the results of each run", _not_empty),
    Option(
        "TEST.DISTRACTORS", "",
        "descriptors for SupG.onemeval; default: feats_1m_RN<depth>.pth or .npy in the current folder", _no_zero_byte,
        {"SupG.onemeval": True},
    ),
    Option(
        "TEST.INDEX", "",
        "approximate search: factory string of a FAISS index (IVF4096,PQ64; HNSW32; Flat); default: exact search",
        _no_zero_byte,
    ),
    Option(
        "TEST.INDEX_SEARCH", "",
        "FAISS's search parameters for the index (nprobe=64); default: a 16th of an IVF's lists",
        _no_zero_byte, _INDEX,
    ),
    Option(
        "TEST.INDEX_ROWS", "exact", "rows that are reranked: exact (as saved) or decoded (from the index)",
        _one_of("exact", "decoded"), _INDEX,
    ),
    Option("TEST.RESUME", True, "reuse and resume descriptors of the same settings in TEST.OUT_DIR"),
    Option(
        "TEST.RERANKER", ["superglobal"],
        f"rerankers, a ranking for each: {', '.join(RERANKER_NAMES)} (local features); none for no reranking",
        _rerankers,
    ),
    Option(
        "TEST.TOPK_LIST", [400], "numbers of candidates that cvnet reranks, a ranking for each", _counts, _CVNET
    ),
    Option(
        "TEST.MAPS_GB", 0.0, "room for cvnet's feature maps in TEST.OUT_DIR, in GB; 0 for none", _between(0, 1e6),
        _CVNET,
    ),
    Option("TEST.REPORT", False, "write report/index.html in the folder of the run: metrics, results of each query"),
    Option("DATA_LOADER.NUM_WORKERS", 16, "processes that decode images, at most one per core", _between(0, 1024)),
    Option(
        "DATA_LOADER.MAX_PIXELS", 178956970, "largest number of pixels of an image; a small file can claim billions",
        _between(1, 1 << 36),
    ),
    Option("DATA_LOADER.PIN_MEMORY", True, "copy to the GPU from pinned memory"),
    Option("SupG.gemp", True, "GeM+; False: GeM with the trained power of the checkpoint"),
    Option("SupG.gemp_p", 4.6, "power of GeM+", _positive_finite, {"SupG.gemp": True}),
    Option("SupG.rgem", True, "Regional-GeM"),
    Option("SupG.rgem_p", 2.5, "power of Regional-GeM", _positive_finite, {"SupG.rgem": True}),
    Option("SupG.rgem_window", 5, "side of Regional-GeM's window, in map positions", _odd, {"SupG.rgem": True}),
    Option("SupG.sgem", True, "Scale-GeM; False: mean over the scales"),
    Option("SupG.sgem_p", math.inf, "power of Scale-GeM; inf is the maximum", _positive, {"SupG.sgem": True}),
    Option("SupG.relup", True, "ReLU+; False: plain ReLU everywhere"),
    Option("SupG.relup_threshold", 0.014, "threshold of ReLU+", _between(0, 1e30), {"SupG.relup": True}),
    Option(
        "SupG.relup_stages", ["auto"], "submodules of other networks whose ReLUs become ReLU+; auto: a ResNet's layer1",
        needs=_OTHER,
    ),
    Option(
        "SupG.relup_ends", ["auto"], "stages of other networks that end in ReLU+; auto: a ResNet's layer2, layer3",
        needs=_OTHER,
    ),
    Option(
        "SupG.rerank", True, "SuperGlobal reranking, if it is in TEST.RERANKER", needs=_with_reranker("superglobal")
    ),
    Option(
        "SupG.rerank_m", 400, "M, candidates that superglobal, k-reciprocal and diffusion rerank", _size,
        _with_reranker("superglobal", "k-reciprocal", "diffusion"),
    ),
    Option("SupG.rerank_k", 9, "K, neighbours of a candidate", _size, _SUPERGLOBAL),
    Option("SupG.rerank_beta", 0.15, "beta, weight of the neighbours", _between(0, 1e6), _SUPERGLOBAL),
    Option(
        "SupG.rerank_s2", "refined",
        "descriptors compared with the expanded query: refined (the paper's released code) or original (its text)",
        _one_of("refined", "original"), _SUPERGLOBAL,
    ),
    Option("RERANK.QE_N", 10, "number of results that expand a query with aqe and alpha-qe", _size, _EXPANSION),
    Option("RERANK.QE_ALPHA", 3.0, "power of their similarities", _between(0, 1e3), _with_reranker("alpha-qe")),
    Option("RERANK.DBA_K", 10, "rows averaged by dba, including the row itself", _size, _with_reranker("dba")),
    Option("RERANK.K1", 20, "neighbours that k-reciprocal tests for reciprocity", _size, _RECIPROCAL),
    Option("RERANK.K2", 6, "neighbours over which its encodings are averaged", _size, _RECIPROCAL),
    Option("RERANK.LAMBDA", 0.3, "weight of its cosine distance", _between(0, 1), _RECIPROCAL),
    Option("RERANK.DIFFUSION_K", 50, "neighbours of a candidate in the graph of diffusion", _size, _DIFFUSION),
    Option("RERANK.DIFFUSION_KQ", 10, "candidates from which diffusion starts", _size, _DIFFUSION),
    Option("RERANK.DIFFUSION_GAMMA", 3.0, "power of its similarities", _between(1e-3, 1e3), _DIFFUSION),
    Option(
        "RERANK.DIFFUSION_ALPHA", 0.99, "share of a score that comes from neighbours", _between(0, 0.9999), _DIFFUSION
    ),
    Option("SupG.onemeval", False, "add the 1M distractors, extracted by extract_rop1m.py"),
)  # fmt: skip
_BY_KEY = {option.key: option for option in OPTIONS}
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")

# Groups of options that several commands use.
NETWORK = (
    *("MODEL.NAME", "MODEL.DEPTH", "MODEL.HEADS.REDUCTION_DIM", "MODEL.POOLING", "MODEL.WHITENING"),
    *("TEST.WEIGHTS", "TEST.SCALE_LIST", "TEST.MAX_SIDE", "TEST.PRECISION", "SupG.relup_stages", "SupG.relup_ends"),
    *("SupG.gemp", "SupG.gemp_p", "SupG.rgem", "SupG.rgem_p", "SupG.rgem_window"),
    *("SupG.sgem", "SupG.sgem_p", "SupG.relup", "SupG.relup_threshold"),
)
LOADING = ("TEST.BATCH_SIZE", "DATA_LOADER.NUM_WORKERS", "DATA_LOADER.MAX_PIXELS", "DATA_LOADER.PIN_MEMORY")
INDEX = ("TEST.INDEX", "TEST.INDEX_SEARCH", "TEST.INDEX_ROWS")
RERANKING = ("TEST.RERANKER", *(key for key in _BY_KEY if key.startswith(("SupG.rerank", "RERANK."))))

# The options that correspond to the advice of an InputError, as a user types them.
ADVICE: dict[str, Callable[[Any], str]] = {
    "depth": "MODEL.DEPTH {}".format,
    "dim": "MODEL.HEADS.REDUCTION_DIM {}".format,
    "scales": lambda scales: f"TEST.SCALE_LIST {len(scales)}",
    "precision": "TEST.PRECISION {}".format,
    "pooling": "MODEL.POOLING {}".format,
    "rgem": lambda rgem: "SupG.rgem False",
    "device": "TEST.DEVICE {}".format,
    "max_pixels": "DATA_LOADER.MAX_PIXELS {}".format,
    "workers": "DATA_LOADER.NUM_WORKERS {}".format,
    "resume": "TEST.RESUME {}".format,
    "path": lambda path: "another TEST.OUT_DIR",
}


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
        prog: the name of the command, if it is not that of the script.
        instead: for refused options, what to use in their place.
    """

    def __init__(
        self,
        description: str,
        uses: Collection[str] = tuple(_BY_KEY),
        prog: str | None = None,
        instead: Mapping[str, str] | None = None,
    ):
        self.uses, self.instead = set(uses), dict(instead or {})
        self.parser = _Parser(
            prog=as_typed(prog or Path(sys.argv[0]).name),
            description=as_typed(description),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add, self.name = self.parser.add_argument, self.parser.prog
        self._flags: dict[str, str] = {}

    def refuse(self, instead: Mapping[str, str]) -> None:
        """Refuses further options, given what to use in their place."""
        self.uses -= instead.keys()
        self.instead |= instead

    def add_flag(self, flag: str, key: str, **how: Any) -> None:
        """Adds a flag that sets an option."""
        self._flags[flag] = key
        self.add(flag, dest=key, **how)

    def parse(self, argv: list[str]) -> Parsed:
        """Parses a command line, see read and config."""
        return self.config(self.read(argv))

    def read(self, argv: list[str]) -> argparse.Namespace:
        """Returns the command's own arguments; options are not parsed yet.

        Raises:
            InputError: if arguments are unknown or missing.
        """
        self.parser.epilog = _options_help(self.uses)
        self.add("--config-file", type=Path, metavar="FILE", help="YAML file of options, merged first")
        self.add("options", nargs="*", metavar="KEY VALUE", help="options, listed below")
        return self.parser.parse_intermixed_args(argv)

    def config(self, args: argparse.Namespace, assumed: Mapping[str, Any] | None = None) -> Parsed:
        """Returns the config: defaults, then the YAML file, then KEY VALUE pairs, then flags.

        Args:
            args: the result of read.
            assumed: options that the command sets itself, to check whether others have an effect.

        Raises:
            InputError: if a key is unknown (the message suggests the closest), a type or value is invalid, the
                command does not use an option, an option has no effect, or a flag and an option contradict
                each other.
        """
        written = pair_options(args.options)
        settings = [*(_read_yaml(args.config_file) if args.config_file else []), *written]
        for key, value in settings:
            self._refuse_unused(_option(key), value)
        for flag, key in self._flags.items():
            value = getattr(args, key)
            if value is not None:
                for other in (each for name, each in written if name == key):
                    if _typed(_option(key), other) != _typed(_option(key), value):
                        raise InputError(f"{flag} {value} and {key} {other} contradict each other; give only one")
                settings.append((key, value))
        cfg = make_config(settings)
        _refuse_idle(varied(cfg, assumed or {}))
        return Parsed(args, cfg, {key for key, _ in settings})

    def _refuse_unused(self, option: Option, value: Any) -> None:
        if option.key not in self.uses and _typed(option, value) != option.default:
            hint = self.instead.get(option.key, "--help lists the options that it uses")
            raise InputError(f"{option.key} is not an option of {self.name}; {hint}")


def parse_config(argv: list[str], description: str) -> CfgNode:
    """Parses the command line of a command that uses all options, see CommandLine.parse."""
    return CommandLine(description).parse(argv).cfg


def default_config() -> CfgNode:
    """Returns the config with all defaults."""
    cfg = CfgNode()
    for option in OPTIONS:
        *sections, leaf = option.key.split(".")
        node = cfg
        for section in sections:
            node = node.setdefault(section, CfgNode())
        node[leaf] = option.default
    return cfg


def make_config(settings: Sequence[tuple[str, Any]]) -> CfgNode:
    """Returns the defaults changed by these settings, checked and frozen. Later settings override earlier ones."""
    return _with(default_config(), settings)


def varied(cfg: CfgNode, changes: Mapping[str, Any]) -> CfgNode:
    """Returns a copy with these options changed, checked and frozen."""
    copy = cfg.clone()
    copy.defrost()
    return _with(copy, changes.items())


def option_values(cfg: CfgNode) -> dict[str, Any]:
    """Returns the value of each option by its key: {"MODEL.DEPTH": 50, ...}."""
    return {option.key: reduce(getattr, option.key.split("."), cfg) for option in OPTIONS}


def plain(cfg: CfgNode) -> dict[str, Any]:
    """Returns the config as nested dicts."""
    return {key: plain(value) if isinstance(value, CfgNode) else value for key, value in cfg.items()}


def idle_options(cfg: CfgNode) -> list[str]:
    """Returns a line for each changed option that has no effect, with the reason."""
    values, lines = option_values(cfg), []
    for option in OPTIONS:
        if values[option.key] != option.default:
            needs = (option.needs or {}).items()
            reasons = [f"{key} {_as_typed(values[key])}" for key, wanted in needs if values[key] != wanted]
            names_distractors = option.key == "MODEL.DEPTH" and values["SupG.onemeval"]
            if values["TEST.FEATURES"] and option.key in (*NETWORK, *LOADING) and not names_distractors:
                reasons.append("TEST.FEATURES")
            if reasons:
                value = _as_typed(values[option.key])
                lines.append(f"{option.key} {value} has no effect with {' and '.join(reasons)}")
    return lines


def _as_typed(value: Any) -> str:
    """Returns the value as a user types it: a list without brackets."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def used_options(cfg: CfgNode) -> dict[str, Any]:
    """Returns the value of each option by its key; without those of the network if saved descriptors are evaluated."""
    without = (*NETWORK, *LOADING) if cfg.TEST.FEATURES else ()
    return {key: value for key, value in option_values(cfg).items() if key not in without}


def pair_options(words: list[str]) -> list[tuple[str, Any]]:
    """Parses KEY VALUE pairs; a boolean key is True if it is followed by another key or by nothing."""
    settings, rest = [], list(words)
    while rest:
        option = _option(rest.pop(0))
        if isinstance(option.default, bool) and (not rest or _is_key(rest[0])):
            settings.append((option.key, True))
        elif not rest or rest[0] in _BY_KEY:
            raise InputError(f"{option.key} needs a value ({option.meaning})")
        else:
            settings.append((option.key, rest.pop(0)))
    return settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message}; options are given as KEY VALUE, such as MODEL.DEPTH 50; see --help")


def _with(cfg: CfgNode, settings: Sequence[tuple[str, Any]]) -> CfgNode:
    for key, value in settings:
        *sections, leaf = key.split(".")
        reduce(getattr, sections, cfg)[leaf] = _typed(_option(key), value)
    if cfg.SupG.rerank_k > cfg.SupG.rerank_m:
        raise InputError(
            f"SupG.rerank_k {cfg.SupG.rerank_k} is above SupG.rerank_m {cfg.SupG.rerank_m}: K can be M at most"
        )
    cfg.freeze()
    return cfg


def _refuse_idle(cfg: CfgNode) -> None:
    """Raises InputError if an option was changed that has no effect without another one, which is off by default."""
    for key, value in option_values(cfg).items():
        option = _BY_KEY[key]
        for needed, wanted in (option.needs or {}).items():
            off = _BY_KEY[needed].default != wanted != reduce(getattr, needed.split("."), cfg)
            if value != option.default and off:
                raise InputError(f"{key} {_as_typed(value)} has no effect without {needed} {wanted}")


def _is_key(word: str) -> bool:
    return re.match(r"[A-Za-z_]+\.[A-Za-z_]", word) is not None


def _option(key: str) -> Option:
    if key in _BY_KEY:
        return _BY_KEY[key]

    def likeness(other: str) -> tuple[float, bool]:
        return difflib.SequenceMatcher(None, key.lower(), other.lower()).ratio(), other.startswith(key)

    nearest = max(_BY_KEY, key=likeness)
    meant = f"did you mean {nearest}? " if likeness(nearest)[0] > 0.6 else ""
    raise InputError(f"unknown option {key}; {meant}--help lists all")


def _typed(option: Option, value: Any) -> Any:
    """Returns the value in the type of the option's default, checked."""
    wanted = type(option.default)
    problem = None
    try:
        if option.parse is not None:
            value = option.parse(value)
        elif wanted is bool and str(value).lower() in (*_TRUE, *_FALSE):
            value = str(value).lower() in _TRUE
        elif wanted is int and not isinstance(value, bool | float):
            value = int(value)
        elif wanted is float and not isinstance(value, bool):
            value = float(value)
        elif wanted is str and isinstance(value, str):
            pass
        elif wanted is list:
            value = _list(value)
        else:
            problem = "has an invalid type"
    except (ValueError, TypeError):
        problem = "has an invalid type"
    if problem is None:
        problem = option.check(value)
    if problem is not None:
        names = {bool: "True or False", int: "a whole number", float: "a number", str: "text", list: "a list"}
        raise InputError(f"{option.key} takes {names[wanted]} ({option.meaning}): {value!r} {problem}")
    return value


def _list(value: Any) -> list:
    """Parses a list from a list or text: "['a', 'b']", "[a, b]", "a,b" or "a"."""
    if isinstance(value, str):
        value = [item.strip(" '\"") for item in value.strip("[]() ").split(",")]
    return [str(item) for item in value if item]


def _read_yaml(path: Path) -> list[tuple[str, Any]]:
    try:
        content = yaml.load(path.read_bytes(), _PlainLoader)
    except OSError as error:
        raise InputError(f"--config-file {path}: {error.strerror}") from None
    except Exception as error:  # exceptions of the YAML reader
        text = " ".join(str(error).split())
        reason = f" ({text})" if "line" in text else ""
        raise _no_options(path, reason) from None
    if not isinstance(content, dict):
        raise _no_options(path)

    def flatten(node: dict, prefix: str) -> list[tuple[str, Any]]:
        pairs = []
        for key, value in node.items():
            if not isinstance(value, str | int | float | bool | list | dict):
                raise InputError(f"--config-file {path}: {prefix}{key} has a value that no option takes")
            pairs += flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
        return pairs

    return flatten(content, "")


class _PlainLoader(yaml.SafeLoader):
    """Reads YAML without references, a few lines of which can expand beyond any memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise yaml.YAMLError(f"it has a reference (*name) in line {line}")
        return super().compose_node(parent, index)


def _no_options(path: Path, reason: str = "") -> InputError:
    return InputError(f"--config-file {path} contains no YAML options such as 'MODEL: {{DEPTH: 50}}'{reason}")


def _options_help(uses: Collection[str]) -> str:
    used = [option for option in OPTIONS if option.key in uses]
    width = max(len(option.key) for option in used)
    lines = [f"  {option.key:<{width}}  {as_typed(option.meaning)} [{option.default!r}]" for option in used]
    return "options, with their defaults (a boolean option without a value means True):\n" + "\n".join(lines)
