"""ResNet-20 for 32 px images (He et al. 2016, section 4.2): what adversarial training is most often shown on."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ResNet20"]


class Block(nn.Module):
    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.stride, self.more = stride, width - inside

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.more or self.stride > 1:  # option A: strided, new channels are zero
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return F.relu(x + y)


class ResNet20(nn.Module):
    """Pixels [B, 3, H, W] in [0, 1] -> logits [B, C]."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        shapes = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(*(Block(*shape) for shape in shapes))
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem((x - 0.5) / 0.25)))
        return self.head(self.blocks(x).mean((2, 3)))

    def fit(self, x: Tensor, y: Tensor, epochs: int) -> "ResNet20":
        """Trained with Adam on batches of 64, so that verdicts mean something; left in eval mode."""
        optimizer = torch.optim.Adam(self.parameters(), 2e-3)
        generator = torch.Generator().manual_seed(0)
        self.train()
        for _ in range(epochs):
            for rows in torch.randperm(len(x), generator=generator).to(x.device).split(64):
                optimizer.zero_grad()
                F.cross_entropy(self(x[rows]), y[rows]).backward()
                optimizer.step()
        return self.eval()
