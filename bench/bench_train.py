"""Training steps of the methods against the papers' style of loop (peers/train.py): same batches, same losses first.

Neither side's time holds the loading of teachers; ours holds the setup of a run (class embeddings, the cached rows).
Teachers' caches are warm; that the first run fills them is not in the medians.

Two sizes. "tiny": the library's own CLIPs for 32 px, with 10 classes, as the digits, and with 200, as TinyImageNet, on
which the papers train with batches of 64. "1/8": the papers' models with an eighth of the width and all of the depth
and of the tokens (ViT-B/32 as student, ViT-B/16 as proxy, ViT-L/14 as MMT-ARD's teachers; texts of 77 tokens), so that
text, student and teachers cost each other's share of the time that they cost there. On a GPU "full" takes its place:
those models themselves, one step of 32 images.
"""

import copy

import pytest
import torch
from measure import QUICK
from peers.train import STEPS, TEACHERS, epoch

pytest.importorskip("open_clip", reason="open_clip is needed for the models that are trained")

from rvlm.data import Data, load_data  # noqa: E402
from rvlm.methods import build_method  # noqa: E402
from rvlm.models import Clip, load_clip  # noqa: E402
from rvlm.training import train  # noqa: E402

ON_GPU = torch.cuda.is_available()
BATCH = 8 if QUICK else 64
SCENES = {"tiny C=10": (4 * BATCH, 10), "tiny C=200": (4 * BATCH, 200), "1/8 C=200": (BATCH, 200)}  # images, classes
if ON_GPU:
    SCENES = {"full C=200": (32, 200), "tiny C=10": SCENES["tiny C=10"], "tiny C=200": SCENES["tiny C=200"]}
MORE = {
    "hpt_gpd": {"stages": "hpt"},
    "mmt_ard": {"weights": "fixed"},
    # Batches of 32, as the released configurations of prompt learning have.
    "apd": {"visual_tokens": 2, "text_tokens": 2, "words": "", "sentence": "of a {}.", "batch_size": BATCH // 2},
}  # fmt: skip
SETTINGS = {
    "epochs": 1, "batch_size": BATCH, "warmup_steps": 0, "lr": 1e-4, "random_start": False, "clip_grad": None,
    "templates": "plain", "optimizer": "adamw", "eps": 4 / 255, "alpha": 2 / 255, "steps": 2,
    "teacher_precision": "fp32",
}  # fmt: skip
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 12}
TOWERS = {  # width / 8, and as many patches as the originals have at 224 px
    "ViT-B-32": {"patch_size": 8, "width": 96, "layers": 12},
    "ViT-B-16": {"patch_size": 4, "width": 96, "layers": 12},
    "ViT-L-14": {"patch_size": 4, "width": 128, "layers": 24, "image_size": 64},
}


def eighth(name, device):
    """An architecture with an eighth of its width; heads of 32, since those of 8 would be all overhead."""
    import open_clip

    shallow = {"layers": 2} if QUICK else {}
    tower = {"image_size": 56, "head_width": 32} | TOWERS[name] | shallow
    model = open_clip.CLIP(embed_dim=64, vision_cfg=tower, text_cfg=TEXT | shallow)
    return Clip.wrap(model, open_clip.SimpleTokenizer(context_length=77), f"{name} / 8").to(device).eval()


@pytest.fixture(scope="module", params=SCENES)
def scene(request, device):
    """Its name, the data, the student, and the frozen models under the names that the peer gives them."""
    images, classes = (BATCH, 10) if QUICK else SCENES[request.param]
    kind = request.param.split()[0]
    data = load_data("digits", "train", size={"tiny": 32, "1/8": 56, "full": 224}[kind], limit=images)
    if classes > 10:
        names = [f"thing number {k}" for k in range(classes)]
        y = torch.randint(0, classes, (len(data),), generator=torch.Generator().manual_seed(0))
        data = Data("many", "train", names, y, data.index, data.read, n_total=data.n_total)
    if kind == "tiny":
        student = load_clip("tiny-vit", device, seed=1)
        names = {"proxy": "tiny-rn", "clean": "tiny-rn", "robust": "tiny-vit", "origin": "tiny-vit"}
        return request.param, data, student, {role: load_clip(name, device) for role, name in names.items()}
    torch.manual_seed(0)
    student, proxy, large = (load_clip(n, device) if kind == "full" else eighth(n, device) for n in TOWERS)
    return request.param, data, student, {"proxy": proxy, "clean": large, "robust": large, "origin": large}


def method_of(name, teachers, title):
    depth = 2 if QUICK or title.startswith("tiny") else 9
    given = {"visual_depth": depth, "text_depth": depth} if name == "apd" else {}
    given |= {setting: teachers[role] for role, setting in TEACHERS[name].items() if role != "origin"}
    return build_method(name, **(SETTINGS | MORE.get(name, {}) | given))


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.benchmark(group="training")
def test_epoch(name, scene, compare, benchmark, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("RVLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr("rvlm.training.trainer._order", lambda n, *_: torch.arange(n))  # as the peer
    title, data, student, teachers = scene
    twin, losses = epoch(method_of(name, teachers, title), student, data), []

    def ours():
        return train(copy.deepcopy(student), data, method_of(name, teachers, title), progress=False)

    mine = ours().history[0]["loss"]
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "backward", _noting(losses, torch.Tensor.backward))
        twin()
    batch = min(method_of(name, teachers, title).config.batch_size, len(data))
    per_step = len(losses) // -(-len(data) // batch)
    outer = losses[per_step - 1 :: per_step]
    # Rounding decides about signs of small gradients, so the images and, after a step, the weights drift apart.
    assert abs(mine / (sum(outer) / len(outer)) - 1) < 2e-2, (mine, outer)
    info = {"impl": "rvlm", "peer": "paper style", "case": f"{name}, {title}, B={batch}"}
    compare(ours, twin, round_seconds=0.02, **info)


def _noting(values, backward):
    def noted(self, *args, **kwargs):
        values.append(self.item())
        return backward(self, *args, **kwargs)

    return noted
