"""Extract descriptors with a torchvision ResNet, with SuperGlobal's modules in the places of the paper.

pip install . torchvision pillow
python examples/torchvision_resnet.py --pretrained a.jpg b.jpg c.jpg

Without --pretrained (which downloads torchvision's ImageNet weights) and without images it runs
on random ones. Prints what was attached, and the cosine similarities of all pairs of images.
"""

import argparse

import torch
from PIL import Image
from superglobal import attach
from torchvision.models import resnet50
from torchvision.transforms.functional import normalize, to_tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of torchvision's weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", help="files, of any sizes")
    parser.add_argument("--pretrained", action="store_true", help="download the ImageNet weights")
    args = parser.parse_args()
    torch.manual_seed(0)

    network = resnet50(weights="DEFAULT" if args.pretrained else None).eval()
    extract = attach(network, relup="layer1", relup_ends=("layer2", "layer3"))
    print(extract)

    images = [to_tensor(Image.open(path).convert("RGB")) for path in args.images]
    images = images or [torch.rand(3, 160, 224), torch.rand(3, 224, 160)]
    with torch.inference_mode():
        descriptors = torch.cat([extract(normalize(image, MEAN, STD)[None]) for image in images])
    print(f"descriptors: {tuple(descriptors.shape)}")
    print(f"cosine similarities:\n{descriptors @ descriptors.T}")

    extract.detach()  # the network is torchvision's again


if __name__ == "__main__":
    main()
