"""Fine-tune a network with pytorch-metric-learning: SuperGlobal's poolings, whose powers learn, against the average.

pip install . pytorch-metric-learning
python examples/fine_tuning.py

The images are drawn: 24 objects, small patterns of colour anywhere on a noisy background. The network is trained on
some objects; the recall is that of others. It is for these images and says nothing about real ones.
"""

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from superglobal import GeM, RegionalGeM, attach
from torch import Tensor, nn

OBJECTS, VIEWS, SIDE = 24, 4, 48


def draw_images(patterns: Tensor) -> Tensor:
    """Draws each object (3, 4, 4) at random places of new images, (objects * VIEWS, 3, SIDE, SIDE)."""
    images = 0.5 * torch.rand(len(patterns) * VIEWS, 3, SIDE, SIDE)
    for pattern, image in zip(patterns.repeat_interleave(VIEWS, dim=0), images, strict=True):
        top, left = torch.randint(SIDE - 16, (2,)).tolist()
        image[:, top : top + 16, left : left + 16] += pattern.repeat_interleave(4, 1).repeat_interleave(4, 2)
    return images


def recall_at_1(model: nn.Module, images: Tensor) -> float:
    """Returns the share of images whose nearest other image shows the same object, in percent."""
    with torch.inference_mode():
        rows = model(images)
    nearest = (rows @ rows.T).fill_diagonal_(-1).argmax(dim=1)
    return 100 * (nearest // VIEWS == torch.arange(len(rows)) // VIEWS).float().mean().item()


def train(title: str, steps: int = 60, **modules: nn.Module | None) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 4, 4), nn.ReLU(), nn.Conv2d(32, 64, 3, 1, 1), nn.ReLU()]
    model = attach(nn.Sequential(*layers), scales=(1.0,), sgem=None, **modules)
    seen, unseen, loss = torch.rand(OBJECTS, 3, 4, 4), draw_images(torch.rand(OBJECTS, 3, 4, 4)), MultiSimilarityLoss()
    before, optimizer = recall_at_1(model, unseen), torch.optim.Adam(model.parameters(), lr=1e-3)
    labels = torch.arange(OBJECTS).repeat_interleave(VIEWS)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(draw_images(seen)), labels).backward()
        optimizer.step()
    powers = ", ".join(f"{name} {value.item():.2f}" for name, value in model.named_parameters() if value.ndim == 0)
    print(f"{title}: recall@1 {before:.1f} before, {recall_at_1(model, unseen):.1f} after {powers}")


if __name__ == "__main__":
    train("average", pooling=nn.AdaptiveAvgPool2d(1), rgem=None)
    train("GeM", pooling=GeM(nn.Parameter(torch.tensor(3.0))), rgem=None)
    train("SuperGlobal", pooling=GeM(nn.Parameter(torch.tensor(4.6))), rgem=RegionalGeM())
