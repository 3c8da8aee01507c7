"""What tests of adapters share."""

import pytest
import torch


@pytest.fixture
def both_ways():
    """Outputs of a model with an adapter, which the fused and the hooked way must agree on, as on all gradients."""

    def compare(clip, x, make):
        results = []
        for fused in (True, False):
            one = make()
            for p in one.parameters():
                p.requires_grad_(True)
            one.attach(clip, fused)
            leaf = x.clone().requires_grad_()
            out = clip.encode_pixels(leaf, unit_norm=False)
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
            results.append((out, *torch.autograd.grad((out * weight).sum(), [leaf, *one.parameters()])))
            one.detach(clip)
        for fused, hooked in zip(*results, strict=True):
            torch.testing.assert_close(fused, hooked, rtol=1e-4, atol=2e-5 * hooked.abs().max().item())
        return results[0][0]

    return compare
