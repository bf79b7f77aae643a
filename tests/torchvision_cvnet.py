"""CVNet's weights in torchvision's ResNet-50, whose layers have other names."""

import re
from pathlib import Path

import torchvision
from torch import nn

from model.checkpoint import encoder_state


def network(checkpoint: Path | str) -> nn.Module:
    """Returns torchvision's ResNet-50 with the weights of a checkpoint; its fc is the projection."""
    resnet = torchvision.models.resnet50(num_classes=2048)
    state = encoder_state(Path(checkpoint))
    state.pop("head.pool.p")
    resnet.load_state_dict({_renamed(key): value for key, value in state.items()})
    return resnet.eval()


def _renamed(key: str) -> str:
    key = key.replace("head.fc.", "fc.").replace("stem.conv.", "conv1.").replace("stem.bn.", "bn1.")
    block = re.match(r"s(\d)\.b(\d+)\.(.*)", key)
    if block is None:
        return key
    stage, number, rest = block.groups()
    rest = re.sub(r"^bn\.", "downsample.1.", rest.replace("proj.", "downsample.0."))
    for letter, place in zip("abc", "123", strict=True):
        rest = rest.replace(f"f.{letter}.", f"conv{place}.").replace(f"f.{letter}_bn.", f"bn{place}.")
    return f"layer{stage}.{int(number) - 1}.{rest}"
