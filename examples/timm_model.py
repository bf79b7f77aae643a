"""Extract descriptors with timm's models: convolutional ones directly, a ViT through a four-line adapter.

pip install . timm
python examples/timm_model.py --pretrained --model resnet50
"""

import argparse

import timm
import torch
from superglobal import attach


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a convolutional model, see timm.list_models()")
    parser.add_argument("--vit", default="vit_tiny_patch16_224", help="a ViT")
    parser.add_argument("--pretrained", action="store_true", help="download the weights")
    args = parser.parse_args()
    torch.manual_seed(0)
    images = torch.rand(2, 3, 224, 320)

    network = timm.create_model(args.model, pretrained=args.pretrained).eval()
    resnet = hasattr(network, "layer1")
    extract = attach(network, **({"relup": "layer1", "relup_ends": ("layer2", "layer3")} if resnet else {}))
    with torch.inference_mode():
        print(f"{args.model}: {tuple(extract(images).shape)}\n{extract}")

    vit = timm.create_model(args.vit, pretrained=args.pretrained, dynamic_img_size=True, dynamic_img_pad=True).eval()

    def token_map(x: torch.Tensor) -> torch.Tensor:
        tokens = vit.forward_features(x)[:, vit.num_prefix_tokens :]
        height, width = vit.patch_embed.dynamic_feat_size(x.shape[2:])
        return tokens.mT.unflatten(2, (height, width))

    # Tokens have both signs, but GeM is for positive feature maps: use the average, without Regional-GeM.
    extract = attach(token_map, pooling=torch.nn.AdaptiveAvgPool2d(1), rgem=None)
    with torch.inference_mode():
        print(f"{args.vit}: {tuple(extract(images).shape)}\n{extract}")


if __name__ == "__main__":
    main()
