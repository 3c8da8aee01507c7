"""Attack an open_clip model with your own class names, and keep images that survive being saved as PNG.

python examples/attack_open_clip.py                       # random weights: shows the calls, needs no download
python examples/attack_open_clip.py ViT-B-32:openai       # OpenAI's weights, downloaded by open_clip
"""

import sys

import torch

from rvlm.attacks import pgd
from rvlm.models import ZeroShotClassifier, load_clip

clip = load_clip(sys.argv[1] if len(sys.argv) > 1 else "tiny-vit")
classifier = ZeroShotClassifier(clip, ["a cat", "a dog", "a ship"], templates=["a photo of {}.", "a drawing of {}."])

generator = torch.Generator().manual_seed(0)
x = torch.randint(0, 256, (8, 3, clip.size, clip.size), generator=generator) / 255  # your pixels, in [0, 1]

result = pgd(classifier, x, eps=4 / 255, steps=10, quantize=255, best="adv", generator=generator, return_info=True)
print(f"{result.success.sum()} of 8 predictions changed with {result.backwards} image gradients")

stored = (result.x_adv * 255).round().to(torch.uint8)
assert torch.equal(stored / 255, result.x_adv), "quantize=255 returns valid uint8 images"
assert (stored.int() - (x * 255).round().int()).abs().max() <= 4
