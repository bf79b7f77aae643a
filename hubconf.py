"""PyTorch Hub's entry points: torch.hub.load("<owner>/<repository>", "superglobal_resnet50", weights="FILE").

From a checkout, without a connection: torch.hub.load(".", "superglobal_resnet50", source="local", weights="FILE").
"""

from dataclasses import replace
from pathlib import Path

try:
    from extraction.hub import ImageDescriptor
    from model.checkpoint import find_checkpoint
    from model.network_recipe import NetworkRecipe
    from model.recipe import Recipe
    from modules.descriptor import SCALE_SETS
    from modules.reranking import SuperGlobalReranker
except ModuleNotFoundError as error:
    name = (error.name or "").split(".")[0]
    if name not in ("model", "modules"):
        raise
    raise ImportError(f"another module named {name!r} is imported already; rename it") from None

dependencies = ["torch", "torchvision", "numpy", "PIL", "tqdm"]


def superglobal_resnet50(weights: str | Path, **options) -> ImageDescriptor:
    """Returns SuperGlobal on CVNet's ResNet-50: RGB tensors in 0..1 or PIL images -> unit descriptors (N, 2048).

    Args:
        weights: the checkpoint (CVPR2022_CVNet_R50.pyth), or a folder in which exactly one fits.
        options: device, and the settings of model.recipe.Recipe: scales (1, 3, 5, or factors), relup (the
            threshold), gemp, rgem, sgem (the powers; False or None leaves one out), rgem_window, dim, precision.
    """
    return _superglobal(50, weights, options)


def superglobal_resnet101(weights: str | Path, **options) -> ImageDescriptor:
    """Returns SuperGlobal on CVNet's ResNet-101, see superglobal_resnet50."""
    return _superglobal(101, weights, options)


def superglobal(network: str, weights: str | Path = "pretrained", **options) -> ImageDescriptor:
    """Returns SuperGlobal on any network: RGB tensors in 0..1 or PIL images -> unit descriptors (N, D).

    Args:
        network: timm:NAME, torchvision:NAME or FILE.py:FUNCTION.
        weights: a file, "pretrained" or "untrained".
        options: device, and the settings of model.network_recipe.NetworkRecipe, in the same form as above.
    """
    chosen, device = _settings(options)
    return ImageDescriptor(NetworkRecipe(network, str(weights), **chosen).extractor(device)).eval()


def reranker(m: int = 400, k: int = 9, beta: float = 0.15) -> SuperGlobalReranker:
    """Returns the reranker for each query's first m results: (queries, candidates), or .rerank(queries, ids, fetch)."""
    return SuperGlobalReranker(m, k, beta)


def _settings(options: dict) -> tuple[dict, str]:
    """Returns the settings of a recipe, and the device."""
    chosen = {key: None if value is False else value for key, value in options.items() if value is not True}
    device = chosen.pop("device", "cpu")
    if isinstance(chosen.get("scales"), int):
        if chosen["scales"] not in SCALE_SETS:
            raise ValueError(
                f"scales must be one of {', '.join(map(str, SCALE_SETS))}, or factors, got {chosen['scales']}"
            )
        chosen["scales"] = SCALE_SETS[chosen["scales"]]
    return chosen, device


def _superglobal(depth: int, weights: str | Path, options: dict) -> ImageDescriptor:
    chosen, device = _settings(options)
    recipe = replace(Recipe(find_checkpoint(Path(weights), depth), depth), **chosen)
    return ImageDescriptor(recipe.extractor(device)).eval()
