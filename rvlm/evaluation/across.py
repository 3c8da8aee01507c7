"""What evaluations say only beside each other: signs that a robust accuracy means less than it seems to."""

from collections.abc import Sequence

from rvlm.evaluation.evaluate import Evaluation
from rvlm.evaluation.transfer import STRONGER

__all__ = ["both_targets", "over_radii"]

GAP = 0.10  # share of the samples that stand images of the undefended model but not the model's own
BREAKS, FALLS = 0.05, 0.01  # shares: an attack that breaks so many must break so many more at a larger radius


def both_targets(white_box: Evaluation, transfer: Evaluation) -> list[dict]:
    """Checks of a defence that was attacked white-box and by images of the undefended model.

    A defence that moves away from the model that images are made on stands those images, not an attack on itself;
    published figures of R-Adapt look like that (see rvlm.methods.r_adapt). And if images of another model fool it more
    than its own, its gradients mislead.
    """
    said = f"robust accuracy {white_box.robust:.1%} white-box, {transfer.robust:.1%} on images of the undefended model"
    holds = transfer.robust - white_box.robust <= GAP
    strongest = white_box.robust - transfer.robust <= STRONGER
    return [
        {
            "id": "robust_beyond_transfer", "ok": holds,
            "detail": said + ("" if holds else ": the difference is no robustness, so quote the white-box figure"),
        },
        {
            "id": "white_box_is_strongest", "ok": strongest,
            "detail": said + ("" if strongest else ": its gradients mislead, so attack with BPDA or a black box"),
        },
    ]  # fmt: skip


def over_radii(found: Sequence[Evaluation]) -> list[dict]:
    """Checks of evaluations that differ in the radius alone; none for fewer than two.

    By transfer, attacks that stop as soon as their own model is fooled (cw, fmn, deepfool) make the same images at
    every radius, and an accuracy that does not fall says nothing about the larger one.
    """
    small, large = (pick(found, key=lambda one: float(one.eps)) for pick in (min, max))
    if float(small.eps) == float(large.eps):
        return []
    broken = small.clean - small.robust
    stuck = broken >= BREAKS and small.robust >= BREAKS and large.robust > small.robust - FALLS
    said = f"{small.attack} leaves {small.robust:.1%} at eps {small.eps} and {large.robust:.1%} at {large.eps}"
    wrong = ": it does not use the larger radius, so take an attack that does, such as apgd-ce"
    return [{"id": "eps_matters", "ok": not stuck, "detail": said + (wrong if stuck else "")}]
