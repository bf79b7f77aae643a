"""ReLU+: the rectifier of SuperGlobal, and its place in a trained network."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from .checks import values_can_be_seen

RELUP_THRESHOLD = 0.014

RECTIFIERS = (nn.ReLU, nn.ReLU6)


def relu_plus(x: Tensor, threshold: float = RELUP_THRESHOLD) -> Tensor:
    """Returns max(x, threshold) elementwise, for any shape.

    Shao et al., "Global Features are All You Need for Image Retrieval and Reranking", ICCV 2023, sec. 3.
    """
    return x.clamp(min=threshold)


class ReLUPlus(nn.Module):
    """ReLU+, see :func:`relu_plus`: values below the threshold are set to the threshold instead of 0.

    Args:
        threshold: the lower bound, 0.014 in the paper; 0 gives the plain ReLU.

    >>> import torch
    >>> ReLUPlus()(torch.tensor([-1.0, 0.01, 0.5]))
    tensor([0.0140, 0.0140, 0.5000])
    """

    def __init__(self, threshold: float = RELUP_THRESHOLD):
        super().__init__()
        if not 0 <= threshold < math.inf:
            raise ValueError(f"the threshold of ReLU+ must be 0 or more and finite, got {threshold}")
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise ValueError(f"ReLUPlus takes a floating-point tensor, got {x.dtype} of shape {tuple(x.shape)}")
        return relu_plus(x, self.threshold)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


class Change(NamedTuple):
    """A layer of a network that was changed for ReLU+: its name, the change in words, and a function that undoes it."""

    layer: str
    meaning: str
    undo: Callable[[], None]


def replace_rectifiers(
    model: Any, relup: Sequence[str], relup_ends: Sequence[str], threshold: float = RELUP_THRESHOLD
) -> list[Change]:
    """Puts ReLU+ into a network, and returns the changes; undo them in reverse, as layers may share a module.

    Args:
        model: the network.
        relup: names of the submodules, stages or layers in which every ReLU (or ReLU6) becomes ReLU+.
        relup_ends: names of the stages whose blocks end in ReLU+, while the ReLUs inside stay.
        threshold: the threshold of ReLU+.

    Raises:
        ValueError: if there is no such submodule, or it has no ReLU; nothing is changed then.
    """
    rectifier = ReLUPlus(threshold)
    layers = dict.fromkeys(layer for stage in relup for layer in _rectifiers(model, stage))
    blocks = dict.fromkeys(block for stage in relup_ends for block in _blocks(model, stage))
    changes = []
    for layer in layers:
        parent, name = model.get_submodule(layer.rpartition(".")[0]), layer.rpartition(".")[2]
        original = getattr(parent, name)
        setattr(parent, name, rectifier if isinstance(original, nn.ReLU) else nn.Sequential(original, rectifier))
        changes.append(Change(layer, f"{original} -> {rectifier}", partial(setattr, parent, name, original)))
    for block in blocks:
        handle = model.get_submodule(block).register_forward_hook(_End(block, threshold))
        changes.append(Change(block, f"ends in {rectifier}", handle.remove))
    return changes


def layers_with_relu_plus(model: Any, changes: Sequence[Change]) -> list[str]:
    """Returns the names of the layers of a network that have ReLU+ for another reason than these changes."""
    changed = {change.layer for change in changes}
    modules = model.named_modules(remove_duplicate=False) if isinstance(model, nn.Module) else ()
    return [
        name
        for name, module in modules
        if name not in changed
        and (isinstance(module, ReLUPlus) or any(isinstance(hook, _End) for hook in module._forward_hooks.values()))
    ]


class _End:
    """A forward hook that applies ReLU+ to the output of a block."""

    def __init__(self, block: str, threshold: float):
        self.block, self.threshold, self.checked = block, threshold, False

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        if not self.checked and values_can_be_seen(output):
            if (output < 0).any():
                raise ValueError(
                    f"relup_ends: {self.block} ({type(module).__name__}) returns negative values: it does not end in "
                    "a ReLU"
                )
            self.checked = True
        return relu_plus(output, self.threshold)


def children_in_words(model: Any) -> str:
    """Lists the submodules of a network, as the end of an error message about a name."""
    return f"; it has {', '.join(name for name, _ in model.named_children())}" if isinstance(model, nn.Module) else ""


def _stage(model: Any, argument: str, stage: str) -> nn.Module:
    try:
        return model.get_submodule(stage)
    except AttributeError:
        name = getattr(model, "__name__", type(model).__name__)
        raise ValueError(f"{argument}: {name} has no submodule {stage!r}{children_in_words(model)}") from None


def _rectifiers(model: Any, stage: str) -> list[str]:
    """Returns the names of the ReLUs in a stage."""
    modules = dict(_stage(model, "relup", stage).named_modules(prefix=stage, remove_duplicate=False))
    names = [name for name, module in modules.items() if isinstance(module, RECTIFIERS)]
    if not names:
        kinds = dict.fromkeys(type(each).__name__ for each in modules.values() if "activation" in type(each).__module__)
        present = f"but {', '.join(kinds)}" if kinds else "nor another activation module; functions cannot be changed"
        if any(isinstance(each, ReLUPlus) for each in modules.values()):
            present = (
                "but ReLUPlus: it is attached already; call detach() on the first result, or build the network anew"
            )
        raise ValueError(f"relup: {stage!r} has no ReLU, {present}")
    return names


def _blocks(model: Any, stage: str) -> list[str]:
    """Returns the names of the blocks of a stage, each of which has a ReLU of its own."""
    parent = _stage(model, "relup_ends", stage)
    for name, block in parent.named_children():
        if not any(isinstance(child, RECTIFIERS) for child in block.children()):
            raise ValueError(f"relup_ends: {stage}.{name} ({type(block).__name__}) has no ReLU of its own to end in")
    names = [f"{stage}.{name}" for name, _ in parent.named_children()]
    if not names:
        raise ValueError(f"relup_ends: {stage!r} has no blocks; it is {type(parent).__name__}")
    return names
