"""Training by two processes: the gradient of the whole batch, by one reduction a step, and one model at the end."""

import os
import subprocess
import sys

import pytest
import torch

from rvlm.data import load_data
from rvlm.methods import build_method
from rvlm.models import apply_adapter, load_clip
from rvlm.models.towers import attention_output
from rvlm.training import train

# SGD steps of known sizes on 62 samples, 31 for each process. Those in 16 bits, and with a tower whose batch norm sees
# a process's own samples, differ from one process; what they must do is run, and end with one model.
RUNS = {
    "tecoa": ("tecoa", "ddp", {"ema": 0.5, "epochs": 3}),
    "pmg_aft in parts": ("pmg_aft", "ddp", {"reduction": "sum", "accumulate": 3}),
    "hpt_gpd": ("hpt_gpd", "ddp", {"proxy": "tiny-rn", "ga_epochs": 1, "epochs": 3, "beta": 0.5, "lr": 0.02}),
    "hpt_gpd of both towers": ("hpt_gpd", "ddp", {"proxy": "tiny-rn", "stages": "hpt", "trains": "all"}),
    "clip": ("clip", "ddp", {}),
    "tecoa sharded": ("tecoa", "fsdp", {"ema": 0.5, "epochs": 3}),
    "pmg_aft sharded": ("pmg_aft", "fsdp", {"reduction": "sum", "accumulate": 3}),
    "hpt_gpd sharded": (
        "hpt_gpd", "fsdp", {"proxy": "tiny-rn", "ga_epochs": 1, "epochs": 3, "beta": 0.5, "lr": 0.02, "clip_grad": 1.0}
    ),
    "bf16": ("tecoa", "ddp", {"precision": "bf16", "epochs": 2}),
    "bf16 sharded": ("tecoa", "fsdp", {"precision": "bf16", "epochs": 2}),
    "fp16": ("tecoa", "ddp", {"precision": "fp16", "epochs": 2}),
    "advmaple": ("advmaple", "ddp", {"visual_depth": 2}),
    "advpt": ("advpt", "ddp", {"text_tokens": 4, "epochs": 2}),
    "apd": ("apd", "ddp", {"epochs": 2}),
    "apd, teacher tuned first": ("apd", "ddp", {"teacher": "fine_tuned", "clip_grad": 1.0}),
    "ResNet": ("tecoa", "ddp", {"student": "tiny-rn", "epochs": 2}),
    "ResNet sharded": ("tecoa", "fsdp", {"student": "tiny-rn", "epochs": 2}),
}  # fmt: skip


SCRIPT = """
import sys, torch
from torch import distributed
from rvlm.data import load_data
from rvlm.methods import build_method
from rvlm.models import apply_adapter, load_clip
from rvlm.ranks import joined
from rvlm.training import train, trainer

name, parallel, settings, folder = sys.argv[1], sys.argv[2], eval(sys.argv[3]), sys.argv[4]
spec = settings.pop("student", "tiny-vit")
with joined() as ranks:
    calls = []
    wrap = trainer.DistributedDataParallel

    def counted(student, **given):
        ddp = wrap(student, **given)

        def hook(state, bucket):
            calls.append(bucket.is_last())
            average = bucket.buffer() / ranks.size
            return distributed.all_reduce(average, async_op=True).get_future().then(lambda f: f.value()[0])

        ddp.register_comm_hook(None, hook)
        return ddp

    trainer.DistributedDataParallel = counted
    data = load_data("digits", "train", limit=62)

    def stopping(method, calls):
        loss, left = method.loss, [calls]

        def counted(*args):
            left[0] -= 1
            if left[0] < 0:
                raise InterruptedError
            return loss(*args)

        method.loss = counted
        return method

    cuts = [settings["ga_epochs"] + 1] if "ga_epochs" in settings else []  # in stage 2, before its first pull
    for cut in [*cuts, None]:
        student, method = load_clip(spec, seed=1), build_method(name, **settings)
        given = {"out": folder, "progress": False, "parallel": parallel}
        if cut is None:
            result = train(student, data, method, **given)
            continue
        try:
            train(student, data, stopping(method, cut), **given)
            raise AssertionError("not cut")
        except InterruptedError:
            pass
    steps = sum(row["loss"] == row["loss"] for row in result.history)
    same = ranks.gather(torch.cat([t.flatten().double() for t in student.state_dict().values()]))
    if ranks.first:
        assert torch.equal(*same), "the processes' models differ"
        # The last bucket of a reduction, once a step; fsdp reduces block by block instead.
        assert sum(calls) == (0 if parallel == "fsdp" else steps), (calls, steps)
        assert all(type(p.data) is torch.Tensor for p in student.parameters()), "the student is whole again"
        torch.save((result.history, student.state_dict()), folder + "/two.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_two_processes_take_the_step_of_one(tmp_path, monkeypatch, run):
    monkeypatch.setenv("RVLM_CACHE", str(tmp_path / "cache"))
    name, parallel, more = RUNS[run]
    settings = {"optimizer": "sgd", "lr": 0.05, "epochs": 1, "batch_size": 62, "warmup_steps": 1, "clip_grad": None}
    settings |= more
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(tmp_path / "script.py"), name, parallel, repr(settings), str(tmp_path)],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    history, weights = torch.load(tmp_path / "two.pt", weights_only=True)
    saved = load_clip("tiny-vit", seed=1)
    if (tmp_path / "checkpoint" / "adapter.json").is_file():
        saved = apply_adapter(saved, tmp_path).state_dict()
    else:
        saved = load_clip(str(tmp_path)).state_dict()
    assert saved.keys() == weights.keys() and all(torch.equal(saved[key], t) for key, t in weights.items())
    assert all(row["loss"] == row["loss"] for row in history) and len(history) >= settings["epochs"]
    if "precision" in more or "student" in more:
        return
    start = load_clip("tiny-vit", seed=1)
    one = train(start, load_data("digits", "train", limit=62), build_method(name, **settings), progress=False)
    start = load_clip("tiny-vit", seed=1).state_dict()
    for key, value in one.student.state_dict().items():
        moved = (value - start.get(key, 0)).abs().max()  # prompts have no start: by how large they are
        assert (weights[key] - value).abs().max() <= 1e-5 + 2e-3 * moved, key
    for theirs, ours in zip(history, one.history, strict=True):
        assert theirs.pop("name", "") == ours.pop("name", "")
        assert theirs == pytest.approx(ours, rel=1e-3)


COLD = """
import sys
from rvlm.models import apply_adapter, load_clip
from rvlm.ranks import joined
from rvlm.training import zoo
from rvlm.methods import build_method
zoo.build_method = lambda name: build_method(name, epochs=1, batch_size=512)
with joined() as ranks:
    with ranks.first_before_others():
        load_clip("digits-vit")
"""


@pytest.mark.slow
def test_a_model_of_the_zoo_is_trained_by_the_first_process_alone(tmp_path):
    (tmp_path / "cold.py").write_text(COLD)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RVLM_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([*launcher, str(tmp_path / "cold.py")], capture_output=True, text=True, timeout=300,
                          env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "cache" / "zoo").iterdir())) == 1


R_ADAPT = """
import sys
from pathlib import Path
import torch
from rvlm.data import load_data
from rvlm.files import cache_root
from rvlm.methods import build_method
from rvlm.models import load_clip
from rvlm.ranks import joined
from rvlm.training import train

with joined() as ranks:
    student = load_clip("tiny-vit", seed=1)
    method = build_method("r_adapt", optimizer="sgd", lr=0.05, epochs=2, batch_size=20, warmup_steps=1, steps=2)
    result = train(student, load_data("digits", "train", limit=62), method, progress=False)
    anchors = ranks.gather(student.adapter.anchor.detach())
    if ranks.first:
        assert all(torch.equal(anchors[0], anchor) for anchor in anchors), "the processes' anchors differ"
        torch.save((result.history, anchors[0]), sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_make_the_images_of_one_and_learn_its_anchor(tmp_path):
    (tmp_path / "script.py").write_text(R_ADAPT)
    made, learned = [], []
    for size in (1, 2):
        cache, out = tmp_path / f"cache{size}", tmp_path / f"{size}.pt"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "RVLM_CACHE": str(cache)}
        done = subprocess.run([*launcher, str(tmp_path / "script.py"), str(out)], capture_output=True, text=True,
                              timeout=300, env=environment)  # fmt: skip
        assert done.returncode == 0, done.stderr
        files = (cache / "offline").rglob("*.npy")
        made.append({str(path.relative_to(cache)): path.read_bytes() for path in files})
        learned.append(torch.load(out, weights_only=True))
    assert made[0] == made[1] and len(made[0]) == 4, "the same files to the last bit"
    (history, anchor), (again, shared) = learned
    start = attention_output(load_clip("tiny-vit", seed=1), torch.ones(1, 3, 32, 32))[0]
    assert (anchor - shared).abs().max() <= 1e-5 + 2e-3 * (anchor - start).abs().max() < (anchor - start).abs().max()
    for ours, theirs in zip(history, again, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3)
