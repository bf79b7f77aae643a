"""PyTorch Hub's entry points: torch.hub.load("<owner>/<repository>", "superglobal_resnet50", weights="FILE").

From a checkout, without a connection: torch.hub.load(".", "superglobal_resnet50", source="local", weights="FILE").
"""

from pathlib import Path

try:
    from extraction.hub import ImageDescriptor
    from model.checkpoint import find_checkpoint
    from model.recipe import Recipe
    from modules.descriptor import SCALE_SETS
    from modules.reranking import SuperGlobalReranker
except ModuleNotFoundError as error:
    name = (error.name or "").split(".")[0]
    if name not in ("extraction", "model", "modules"):
        raise
    raise ImportError(f"another module named {name!r} is imported already; rename it") from None

dependencies = ["torch", "torchvision", "numpy", "PIL", "tqdm"]


def superglobal_resnet50(weights: str | Path, device: str = "cpu", **settings) -> ImageDescriptor:
    """Returns SuperGlobal on CVNet's ResNet-50: RGB tensors in 0..1 or PIL images -> unit descriptors (N, 2048).

    Args:
        weights: the checkpoint (CVPR2022_CVNet_R50.pyth), or a folder in which exactly one fits.
        device: cpu or cuda.
        settings: those of model.recipe.Recipe: relup_threshold, gemp_p, rgem_p, sgem_p (None or False leaves one
            out, True is the default), scales (1, 3, 5, or factors), precision, max_side, whitening and others.
    """
    return _on_cvnet(50, weights, device, settings)


def superglobal_resnet101(weights: str | Path, device: str = "cpu", **settings) -> ImageDescriptor:
    """Returns SuperGlobal on CVNet's ResNet-101, see superglobal_resnet50."""
    return _on_cvnet(101, weights, device, settings)


def superglobal(network: str, weights: str | Path = "pretrained", device: str = "cpu", **settings) -> ImageDescriptor:
    """Returns SuperGlobal on any network: RGB tensors in 0..1 or PIL images -> unit descriptors (N, D).

    Args:
        network: timm:NAME, torchvision:NAME, hub:OWNER/REPO:ENTRY or FILE.py:FUNCTION, see docs/networks.md.
        weights: a file, "pretrained" or "untrained".
        device, settings: as in superglobal_resnet50.
    """
    return _image_descriptor(device, settings | {"network": network, "weights": weights})


def reranker(m: int = 400, k: int = 9, beta: float = 0.15) -> SuperGlobalReranker:
    """Returns the reranker for each query's first m results: (queries, candidates), or .rerank(queries, ids, fetch)."""
    return SuperGlobalReranker(m, k, beta)


def _on_cvnet(depth: int, weights: str | Path, device: str, settings: dict) -> ImageDescriptor:
    return _image_descriptor(device, settings | {"weights": find_checkpoint(Path(weights), depth), "depth": depth})


def _image_descriptor(device: str, settings: dict) -> ImageDescriptor:
    """Returns the network of a recipe with these settings, in which True and False stand for the default and None."""
    settings = {name: None if value is False else value for name, value in settings.items() if value is not True}
    if isinstance(scales := settings.get("scales"), int):
        if scales not in SCALE_SETS:
            raise ValueError(f"scales must be one of {', '.join(map(str, SCALE_SETS))}, or factors, got {scales}")
        settings["scales"] = SCALE_SETS[scales]
    recipe = Recipe(**settings)
    return ImageDescriptor(recipe.extractor(device), recipe.max_side).eval()
