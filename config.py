"""Every option once: default, one-line meaning, check. Only the command lines read it."""

import argparse
import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset
from yacs.config import CfgNode

from model.checkpoint import sha256
from model.cvnet_rerank import load_cvnet_rerank
from model.errors import InputError
from model.folding import PRECISIONS
from model.images import ImageFile
from model.resnet import STAGE_DEPTHS
from model.superglobal import SCALES, build_model
from modules.activation import RELUP_THRESHOLD
from modules.pooling import GEMP_P, RGEM_P, RGEM_WINDOW, SGEM_P
from modules.reranking import RERANK_BETA, RERANK_K, RERANK_M, SuperGlobalReranker
from revisitop.cvnet import CVNetReranking
from revisitop.dataset import DATASETS, Dataset


@dataclass(frozen=True)
class Option:
    """A key of the command line. `check` gives the reason why a value is refused, or None."""

    key: str
    default: Any
    meaning: str
    check: Callable[[Any], str | None] = lambda value: None


def _one_of(*choices) -> Callable[[Any], str | None]:
    return lambda value: None if value in choices else f"is not one of {', '.join(map(str, choices))}"


def _at_least(low: float) -> Callable[[Any], str | None]:
    return lambda value: None if low <= value < math.inf else f"is not {low} or more"


def _positive(value: float) -> str | None:
    return None if value > 0 else "is not above 0"


def _positive_finite(value: float) -> str | None:
    return None if 0 < value < math.inf else "is not above 0 and finite"


def _odd(value: int) -> str | None:
    return None if value > 0 and value % 2 else "is not odd and positive"


def _not_empty(value: str) -> str | None:
    return None if value else "is empty"


def _datasets(value: list) -> str | None:
    if not value:
        return "is empty"
    unknown = [name for name in value if name not in DATASETS]
    return f"has {unknown[0]!r}, which is not one of {', '.join(DATASETS)}" if unknown else None


def _device(value: str) -> str | None:
    return None if re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) else "is not one of auto, cpu, cuda, cuda:N"


def _counts(value: list) -> str | None:
    if not value:
        return "is empty"
    wrong = [item for item in value if not str(item).isdecimal() or int(item) < 1]
    return f"has {wrong[0]!r}, which is no number from 1" if wrong else None


RERANKERS = ("superglobal", "cvnet", "none")

OPTIONS = (
    Option("MODEL.DEPTH", 50, "layers of the ResNet encoder: 50 or 101", _one_of(*STAGE_DEPTHS)),
    Option("MODEL.HEADS.REDUCTION_DIM", 2048, "dimensions of the descriptor, as in the checkpoint", _at_least(1)),
    Option("TEST.WEIGHTS", "./weights", "checkpoint, or a folder in which exactly one fits the depth", _not_empty),
    Option("TEST.DATA_DIR", "./revisitop", "folder of the datasets", _not_empty),
    Option("TEST.DATASET_LIST", ["roxford5k", "rparis6k"], f"datasets to run: {', '.join(DATASETS)}", _datasets),
    Option("TEST.SCALE_LIST", 3, "number of scales: 1, 3 or 5", _one_of(*SCALES)),
    Option("TEST.FEATURES", "", "evaluate saved descriptors (.mat, .npy, .npz, .pth, a folder of ours); no network"),
    Option("TEST.DEVICE", "auto", "auto (GPU where there is one), cpu, cuda or cuda:N", _device),
    Option("TEST.PRECISION", "fp32", "precision of the network: fp32, bf16 or fp16", _one_of(*PRECISIONS)),
    Option("TEST.BATCH_SIZE", 0, "pictures (of equal size) in a batch at most; 0: as the memory allows", _at_least(0)),
    Option("TEST.OUT_DIR", "./output", "folder of results.json, descriptors and rankings", _not_empty),
    Option("TEST.DISTRACTORS", "", "descriptors for SupG.onemeval; default: feats_1m_RN<depth>.pth or .npy here"),
    Option("TEST.RESUME", True, "go on with, and use again, descriptors of the same run in TEST.OUT_DIR"),
    Option("TEST.RERANKER", "superglobal", f"reranker: {', '.join(RERANKERS)}", _one_of(*RERANKERS)),
    Option("TEST.TOPK_LIST", [400], "numbers of candidates that cvnet reranks, a ranking for each", _counts),
    Option("TEST.MAPS_GB", 0.0, "feature maps of cvnet kept in TEST.OUT_DIR, in GB at most; 0 for none", _at_least(0)),
    Option("TEST.REPORT", False, "write report/index.html into TEST.OUT_DIR: figures, and what each query found"),
    Option("DATA_LOADER.NUM_WORKERS", 4, "processes that decode pictures, at most one per core", _at_least(0)),
    Option("DATA_LOADER.PIN_MEMORY", True, "copy to the GPU from pinned memory"),
    Option("SupG.gemp", True, "GeM+; False: GeM with the power that the checkpoint was trained with"),
    Option("SupG.gemp_p", GEMP_P, "power of GeM+", _positive_finite),
    Option("SupG.rgem", True, "Regional-GeM"),
    Option("SupG.rgem_p", RGEM_P, "power of Regional-GeM", _positive_finite),
    Option("SupG.rgem_window", RGEM_WINDOW, "side of Regional-GeM's window, in positions of the map", _odd),
    Option("SupG.sgem", True, "Scale-GeM; False: mean over the scales"),
    Option("SupG.sgem_p", SGEM_P, "power of Scale-GeM; inf is the maximum", _positive),
    Option("SupG.relup", True, "ReLU+; False: plain ReLU everywhere"),
    Option("SupG.relup_threshold", RELUP_THRESHOLD, "threshold of ReLU+", _at_least(0)),
    Option("SupG.rerank", True, "SuperGlobal reranking"),
    Option("SupG.rerank_m", RERANK_M, "M, candidates that are reranked", _at_least(1)),
    Option("SupG.rerank_k", RERANK_K, "K, neighbours of a candidate", _at_least(1)),
    Option("SupG.rerank_beta", RERANK_BETA, "beta, weight of the neighbours", _at_least(0)),
    Option("SupG.onemeval", False, "add the 1M distractors, described by extract_rop1m.py"),
)
_BY_KEY = {option.key: option for option in OPTIONS}
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def default_config() -> CfgNode:
    """All options at their defaults."""
    cfg = CfgNode()
    for option in OPTIONS:
        *sections, leaf = option.key.split(".")
        node = cfg
        for section in sections:
            node = node.setdefault(section, CfgNode())
        node[leaf] = option.default
    return cfg


def parse_config(argv: list[str], description: str) -> CfgNode:
    """The config of a command line: ``[--config-file FILE] [KEY VALUE | BOOLEAN_KEY]...``.

    Raises:
        InputError: on an unknown key (suggesting the nearest), a wrong type, or a refused value.
    """
    return read_config(make_parser(description).parse_intermixed_args(argv))


def make_parser(
    description: str, prog: str | None = None, tasks: Sequence[str] | None = None
) -> argparse.ArgumentParser:
    """A parser of these options, for a command to add its own to. Its errors are InputErrors.

    Args:
        description: of the command, for its help.
        prog: how it is called, where that is not the script's name.
        tasks: the choices of its first word, `task`, if it has one.
    """
    parser = _Parser(
        prog=prog,
        description=description,
        epilog=_options_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if tasks:
        parser.add_argument("task", choices=tasks, help="see above")
    parser.add_argument("--config-file", type=Path, metavar="FILE", help="YAML file of options, merged first")
    parser.add_argument("options", nargs="*", metavar="KEY VALUE", help="options, listed below")
    return parser


def read_config(args: argparse.Namespace, *fixed: tuple[str, Any]) -> CfgNode:
    """The config of parsed arguments; `fixed` settings come last."""
    settings = _read_yaml(args.config_file) if args.config_file else []
    return make_config(settings + pair_options(args.options) + list(fixed))


def make_config(settings: list[tuple[str, Any]]) -> CfgNode:
    """The defaults with these settings, checked and frozen. Later ones win."""
    cfg = default_config()
    for key, value in settings:
        cfg.merge_from_list([key, _typed(_option(key), value)])
    if cfg.SupG.rerank_k > cfg.SupG.rerank_m:
        raise InputError(f"SupG.rerank_k {cfg.SupG.rerank_k} is above SupG.rerank_m {cfg.SupG.rerank_m}")
    cfg.freeze()
    return cfg


def option_values(cfg: CfgNode) -> dict[str, Any]:
    """Each option's value by its key: {"MODEL.DEPTH": 50, ...}."""
    return {option.key: reduce(getattr, option.key.split("."), cfg) for option in OPTIONS}


def model_arguments(cfg: CfgNode) -> dict[str, Any]:
    """What model.superglobal.build_model takes beside the checkpoint: all that a descriptor depends on."""
    method = cfg.SupG
    return {
        "depth": cfg.MODEL.DEPTH,
        "reduction_dim": cfg.MODEL.HEADS.REDUCTION_DIM,
        "scales": SCALES[cfg.TEST.SCALE_LIST],
        "relup": method.relup_threshold if method.relup else None,
        "gemp": method.gemp_p if method.gemp else None,
        "rgem": method.rgem_p if method.rgem else None,
        "rgem_window": method.rgem_window,
        "sgem": method.sgem_p if method.sgem else None,
        "precision": cfg.TEST.PRECISION,
    }


def descriptor_source(cfg: CfgNode, checkpoint: Path) -> dict[str, Any]:
    """All that a descriptor is made from beside the picture, to be kept with it and compared."""
    return {
        "checkpoint_sha256": sha256(checkpoint),
        **model_arguments(cfg),
    }


def describe_arguments(cfg: CfgNode, checkpoint: Path, source: dict, device: torch.device) -> dict[str, Any]:
    """What revisitop.run.describe_lists takes beside the pictures; `source` is descriptor_source's."""
    return {
        "build": partial(build_model, checkpoint, device=device, **model_arguments(cfg)),
        "source": source,
        "dim": cfg.MODEL.HEADS.REDUCTION_DIM,
        "resume": cfg.TEST.RESUME,
        **loader_arguments(cfg, device),
    }


def loader_arguments(cfg: CfgNode, device: torch.device) -> dict[str, Any]:
    """What model.extract takes for the reading and batching of pictures."""
    pin_memory = cfg.DATA_LOADER.PIN_MEMORY and device.type == "cuda"
    return {"workers": cfg.DATA_LOADER.NUM_WORKERS, "pin_memory": pin_memory, "batch_size": cfg.TEST.BATCH_SIZE}


def make_reranker(
    cfg: CfgNode,
    dataset: Dataset,
    distractors: Sequence[ImageFile],
    checkpoint: Path,
    source: dict,
    folder: Path,
    device: torch.device,
) -> SuperGlobalReranker | CVNetReranking | None:
    """What TEST.RERANKER asks for; SupG.rerank False is none instead of superglobal.

    Args:
        distractors: their pictures, behind the dataset's.
        checkpoint, source: of the network, see descriptor_source.
        folder: for cvnet's scores and maps.
    """
    if cfg.TEST.RERANKER == "cvnet":
        network = {name: source[name] for name in ("checkpoint_sha256", "depth", "precision")}
        return CVNetReranking(
            build=partial(
                load_cvnet_rerank,
                checkpoint,
                cfg.MODEL.DEPTH,
                cfg.MODEL.HEADS.REDUCTION_DIM,
                cfg.TEST.PRECISION,
                device,
            ),
            source=network,
            queries=dataset.queries,
            database=ConcatDataset([dataset.database, distractors]) if len(distractors) else dataset.database,
            ground_truth=dataset.ground_truth,
            topk=sorted({int(count) for count in cfg.TEST.TOPK_LIST}),
            scores=folder / f"{dataset.name}_cvnet.npy",
            maps=folder / "cvnet_maps" if cfg.TEST.MAPS_GB else None,
            maps_bytes=int(cfg.TEST.MAPS_GB * 1e9),
            workers=cfg.DATA_LOADER.NUM_WORKERS,
            resume=cfg.TEST.RESUME,
        )
    if cfg.TEST.RERANKER == "none" or not cfg.SupG.rerank:
        return None
    return SuperGlobalReranker(cfg.SupG.rerank_m, cfg.SupG.rerank_k, cfg.SupG.rerank_beta)


def pair_options(words: list[str]) -> list[tuple[str, Any]]:
    """KEY VALUE pairs; a boolean key that another key, or nothing, follows is True."""
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
        raise InputError(f"{message}; --help lists the options")


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
    """The value in the type of the option's default, checked."""
    wanted = type(option.default)
    problem = None
    try:
        if wanted is bool and str(value).lower() in (*_TRUE, *_FALSE):
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
            problem = "has the wrong type"
    except (ValueError, TypeError):
        problem = "has the wrong type"
    if problem is None:
        problem = option.check(value)
    if problem is not None:
        names = {bool: "True or False", int: "a whole number", float: "a number", str: "text", list: "a list"}
        raise InputError(f"{option.key} takes {names[wanted]} ({option.meaning}): {value!r} {problem}")
    return value


def _list(value: Any) -> list:
    """A list, or text: "['a', 'b']", "[a, b]", "a,b" or "a"."""
    if isinstance(value, str):
        value = [item.strip(" '\"") for item in value.strip("[]() ").split(",")]
    return [str(item) for item in value if item]


def _read_yaml(path: Path) -> list[tuple[str, Any]]:
    try:
        with path.open() as file:
            content = CfgNode.load_cfg(file)
    except OSError as error:
        raise InputError(f"--config-file {path}: {error.strerror}") from None
    except Exception as error:  # the YAML reader's own, through yacs
        text = " ".join(str(error).split())
        reason = f" ({text})" if "line" in text else ""
        raise InputError(f"--config-file {path} holds no YAML options such as 'MODEL: {{DEPTH: 50}}'{reason}") from None

    def flatten(node: dict, prefix: str) -> list[tuple[str, Any]]:
        pairs = []
        for key, value in node.items():
            pairs += flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
        return pairs

    return flatten(content, "")


def _options_help() -> str:
    width = max(len(option.key) for option in OPTIONS)
    lines = [f"  {option.key:<{width}}  {option.meaning} [{option.default!r}]" for option in OPTIONS]
    return "options, with their defaults (a boolean one alone means True):\n" + "\n".join(lines)
