"""An extractor for hloc (Hierarchical-Localization), and image pairs from its reranked descriptors.

pip install . torchvision, and hloc from its repository
python examples/hloc_extractor.py

In hloc, the class is the file hloc/extractors/superglobal.py, and the configuration of extract_features
{"model": {"name": "superglobal"}, "preprocessing": {"resize_max": 1024}, "output": "global-feats-superglobal"}. Without
hloc, a stand-in takes the place of its base class and of its selection of pairs.
"""

import torch
from superglobal import SuperGlobalReranker, attach
from torchvision.models import resnet18
from torchvision.transforms.functional import normalize, resize

try:
    from hloc.pairs_from_retrieval import pairs_from_score_matrix
    from hloc.utils.base_model import BaseModel
except ImportError:
    print("hloc is not installed: a stand-in with its interface runs instead")

    class BaseModel(torch.nn.Module):
        def __init__(self, conf):
            super().__init__()
            self._init({**self.default_conf, **conf})

        def forward(self, data):
            return self._forward(data)

    def pairs_from_score_matrix(scores, invalid, num_select):
        best = scores.masked_fill(torch.from_numpy(invalid), -torch.inf).topk(num_select, dim=1).indices
        return [(query, number) for query, row in enumerate(best.tolist()) for number in row]


class SuperGlobal(BaseModel):
    default_conf, required_inputs = {"pretrained": False}, ["image"]

    def _init(self, conf):
        network = resnet18(weights="DEFAULT" if conf["pretrained"] else None)
        self.net = attach(network.eval(), relup="layer1", relup_ends=("layer2", "layer3"))

    def _forward(self, data):
        return {"global_descriptor": self.net(normalize(data["image"], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))}


def main() -> None:
    torch.manual_seed(0)
    model, places = SuperGlobal({}).eval(), torch.rand(4, 3, 12, 16).repeat_interleave(5, dim=0)  # 5 views of each
    views = [resize(image + 0.1 * torch.randn_like(image), [96, 128], antialias=True).clamp(0, 1) for image in places]
    with torch.inference_mode():
        rows = torch.cat([model({"image": view[None]})["global_descriptor"] for view in views])
    scores = SuperGlobalReranker(m=20, k=4).similarities(rows, rows)  # (Q, N), for the einsum of pairs_from_retrieval.py
    pairs = pairs_from_score_matrix(scores, torch.eye(len(rows), dtype=torch.bool).numpy(), num_select=4)
    right = sum(query // 5 == number // 5 for query, number in pairs)
    print(f"{right} of {len(pairs)} pairs show the same place")


if __name__ == "__main__":
    main()
