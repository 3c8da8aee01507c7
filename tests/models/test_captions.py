"""Attacks on what a captioner says, through a real one: open_clip's CoCa with random weights."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rvlm.attacks import apgd, pgd
from rvlm.attacks.losses import given

VISION = {
    "image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "attentional_pool": True,
    "attn_pooler_queries": 8, "attn_pooler_heads": 2, "output_tokens": True,
}  # fmt: skip
TEXT = {"context_length": 12, "vocab_size": 200, "layers": 2, "heads": 2, "width": 64, "embed_cls": True,
        "output_tokens": True}  # fmt: skip
DECODER = {"context_length": 12, "vocab_size": 200, "layers": 2, "heads": 2, "width": 64}


class CaptionLoss(nn.Module):
    """Pixels -> mean cross-entropy of each image's caption [B], given the image and the words before."""

    def __init__(self, captioner: nn.Module, captions: torch.Tensor) -> None:
        super().__init__()
        self.captioner, self.captions = captioner, captions

    def forward(self, x):
        out = self.captioner(x, self.captions)
        words = F.cross_entropy(out["logits"].mT, out["labels"], reduction="none", ignore_index=0)
        return words.sum(1) / out["labels"].ne(0).sum(1)


@pytest.fixture(scope="module")
def scene():
    coca_model = pytest.importorskip("open_clip.coca_model")
    torch.manual_seed(0)
    model = coca_model.CoCa(64, multimodal_cfg=DECODER, text_cfg=TEXT, vision_cfg=VISION).eval()
    for name, parameter in model.named_parameters():  # CoCa leaves some of them as memory happened to be
        if parameter.dim() > 1 or "emb" in name:
            nn.init.normal_(parameter, std=0.1)
    captions = torch.randint(1, 190, (4, 11))
    captions[1, 8:] = 0  # a shorter one, padded
    return CaptionLoss(model, captions), torch.rand(4, 3, 32, 32), model


def test_captions_become_less_likely_and_others_likelier(scene):
    loss, x, _ = scene
    with torch.no_grad():
        clean = loss(x)
    found = pgd(loss, x, eps=8 / 255, loss=given, best="loss", return_info=True)
    assert found.success is None and (found.loss > clean).all()
    aimed = apgd(loss, x, eps=8 / 255, steps=20, loss=given, targeted=True, best="loss", return_info=True)
    assert (aimed.loss < clean).all() and (aimed.x_adv - x).abs().max() <= 8 / 255 + 1e-6


def test_a_caption_does_not_depend_on_its_batch(scene):
    loss, x, model = scene
    settings = dict(eps=4 / 255, steps=3, loss=given, generator=torch.Generator().manual_seed(0))
    together = pgd(loss, x, **settings)
    settings["generator"].manual_seed(0)
    one = CaptionLoss(model, loss.captions[2:3])
    alone = pgd(one, x[2:3], sample_ids=torch.tensor([2]), **settings)
    assert (alone - together[2:3]).abs().max() < 1e-4
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
