"""Replace torchattacks' PGD by rvlm's: one import, the same images from the same start.

python examples/drop_in_pgd.py
"""

import torch
from torch import nn

from rvlm.attacks import PGD  # was: from torchattacks import PGD

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(8 * 15 * 15, 10)).eval()
images, labels = torch.rand(16, 3, 32, 32), torch.randint(0, 10, (16,))

attack = PGD(model, eps=8 / 255, alpha=2 / 255, steps=10, random_start=False)
adversarial = attack(images, labels)

changed = (model(adversarial).argmax(1) != model(images).argmax(1)).sum().item()
largest = (adversarial - images).abs().max().item() * 255
print(f"{changed} of 16 predictions changed; largest change of a pixel {largest:.2f}/255")

try:
    import torchattacks
except ImportError:
    print("torchattacks is not installed, so there is nothing to compare with (pip install torchattacks)")
else:
    theirs = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=10, random_start=False)(images, labels)
    print(f"largest difference from torchattacks' images: {(adversarial - theirs).abs().max().item():g}")
    assert (adversarial - theirs).abs().max() < 1e-6
