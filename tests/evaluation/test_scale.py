"""Memory and time in the number of images: an evaluation's peak, its state file, shards larger than memory."""

import functools
import io
import json
import os
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch

from rvlm.data import Data, load_data
from rvlm.data.rows import Places, npz_rows, number_text, safetensors_rows, short_sha
from rvlm.evaluation import evaluate
from rvlm.evaluation.resume import SHARE, Keeper

PER_SAMPLE = 350  # bytes of memory, all of them counted: stated in docs/data.md
MEGABYTE = 1 << 20

CHILD = """
import resource, sys, time, json
import torch
torch.set_num_threads(1)
from rvlm.cli import main
from rvlm.data import load
from rvlm.data.base import Data

def made(path, split, size=None):
    n = int(path)
    y = torch.arange(n) % 10

    def read(index):
        return (index[:, None] * 7919 + torch.arange(192) * 104729).remainder(256).to(torch.uint8).view(-1, 3, 8, 8)

    return Data("made", split, [str(c) for c in range(10)], y, torch.arange(n), read, "plain", n)

load.LOADERS["made"] = made

def kept(what):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))

def peak():  # ru_maxrss begins with that of the process that started this one
    return kept("VmHWM")

def from_now_on():
    open("/proc/self/clear_refs", "w").write("5")
    return peak()
"""
NET = """
import torch
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Flatten(), nn.LazyLinear(10)).eval()
net(torch.zeros(1, 3, SIDE, SIDE))
"""


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads memory from Linux's /proc")


@pytest.fixture
def child(tmp_path):
    """child(code) -> what it prints, as JSON; OUT is a folder, NET a model of 8 x 8 pixels, BIG one of 224 x 224."""
    for name, side in (("net", 8), ("big", 224)):
        (tmp_path / f"{name}.py").write_text(NET.replace("SIDE", str(side)))

    def run(code):
        names = (
            f"OUT, NET, BIG = {str(tmp_path)!r}, {str(tmp_path / 'net.py:net')!r}, {str(tmp_path / 'big.py:net')!r}\n"
        )
        env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        words = [sys.executable, "-c", CHILD + names + code]
        found = subprocess.run(words, capture_output=True, text=True, env=env, timeout=300)
        assert found.returncode == 0, found.stderr[-3000:]
        return json.loads(found.stdout.splitlines()[-1])

    return run


@needs_proc
@pytest.mark.slow
def test_the_peak_of_an_evaluation_is_flat(child):
    code = """
main(["eval", "--model", NET, "--data", "made:%d", "--attack", "pgd-2", "--batch-size", "500", "--out", OUT + "/%d"])
print(json.dumps(peak()))
"""
    # Both give a stage four batches at once, and are large beside what an allocator takes in one piece.
    few, many = (child(code % (n, n)) for n in (100_000, 300_000))
    print(f"{few / MEGABYTE:.0f} MB, {many / MEGABYTE:.0f} MB, {(many - few) / 200_000:.0f} bytes per sample")
    assert many - few < PER_SAMPLE * 200_000


def parts_of(child, code):
    """Bytes by which reading grows a process, beyond one that has read a little."""
    return child("before = None\n" + code + "\nprint(json.dumps(peak() - before))")


READ = """
from rvlm.data import load_data
data = load_data({spec!r}, "test", size={size})
data.batch(torch.arange(2))
before = from_now_on()
for rows in torch.arange(len(data)).split(10):
    data.batch(rows)
"""


@functools.cache
def noise_png(seed, side=320):
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", compress_level=0)
    return buffer.getvalue()


@needs_proc
@pytest.mark.slow
def test_a_tar_is_not_read_whole(child, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for k in range(1000):
            for suffix, content in (("png", noise_png(k % 7)), ("cls", b"0" if k % 2 else b"1")):
                info = tarfile.TarInfo(f"s{k:07d}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    assert (tmp_path / "0.tar").stat().st_size > 300_000_000
    grown = parts_of(child, READ.format(spec=f"wds:{tmp_path / '0.tar'}", size=32))
    print(f"tar: {grown / MEGABYTE:.1f} MB")
    assert grown < 50 * MEGABYTE


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("group", [50, 1000])
def test_parquet_is_not_read_whole(child, tmp_path, group):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary())])), ("label", pa.int64())])
    pages = {"compression": "none", "use_dictionary": False, "write_batch_size": 4, "data_page_size": MEGABYTE}
    with pq.ParquetWriter(tmp_path / "a.parquet", schema, **pages) as writer:
        for first in range(0, 1000, group):
            rows = range(first, first + group)
            images = [{"bytes": noise_png(k % 7)} for k in rows]
            writer.write_table(pa.table({"image": images, "label": [k % 2 for k in rows]}, schema=schema))
    assert (tmp_path / "a.parquet").stat().st_size > 300_000_000
    grown = parts_of(child, READ.format(spec=f"parquet:{tmp_path / 'a.parquet'}", size=32))
    print(f"Parquet, groups of {group}: {grown / MEGABYTE:.1f} MB")
    assert grown < 50 * MEGABYTE


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("save", ["savez", "savez_compressed"])
def test_npz_is_not_read_whole(child, tmp_path, save):
    x = np.zeros((2000, 224, 224, 3), np.uint8)
    x[:, 0, 0, 0] = np.arange(2000) % 251
    getattr(np, save)(tmp_path / "a.npz", x=x, y=np.arange(2000) % 2)
    grown = parts_of(child, READ.format(spec=f"npz:{tmp_path / 'a.npz'}", size=None))
    print(f"{save}: {grown / MEGABYTE:.1f} MB of {x.nbytes / MEGABYTE:.0f}")
    assert grown < 50 * MEGABYTE


ATTACKED = """
limit = 400 << 20  # of memory that is not a file's, beyond what is there now: the images are 575 MB
import numpy as np
main(["attack", "--model", BIG, "--data", "npz:" + OUT + "/a.npz", "--attack", "fgsm", "--batch-size", "20",
      "--limit", "20", "--format", "{kind}", "--out", OUT + "/warm"])
held = kept("VmData")
resource.setrlimit(resource.RLIMIT_DATA, (held + limit, held + limit))
code = main(["attack", "--model", BIG, "--data", "npz:" + OUT + "/a.npz", "--attack", "fgsm", "--batch-size", "20",
             "--format", "{kind}", "--out", OUT + "/run"])
assert code == 0
code = main(["eval", "--model", BIG, "--data", "npz:" + OUT + "/a.npz", "--batch-size", "20",
             "--images", OUT + "/run/{name}", "--out", OUT + "/again"])
print(json.dumps(code))
"""


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("kind, name", [
    ("safetensors", "adversarial.safetensors"), ("npz", "adversarial.npz"), ("wds", "adversarial"),
])  # fmt: skip
def test_adversarial_images_are_not_held(child, tmp_path, kind, name):
    """1,000 of them are 575 MB; made, written, read and scored where no more than 400 MB may be held."""
    np.savez(tmp_path / "a.npz", x=np.full((1000, 224, 224, 3), 128, np.uint8), y=np.arange(1000) % 10)
    assert child(ATTACKED.format(kind=kind, name=name)) == 0


def test_rows_are_those_of_the_array(tmp_path):
    from safetensors.numpy import save_file

    x = np.random.default_rng(0).integers(0, 256, (30, 3, 4, 5), dtype=np.uint8)
    arrays = {"plain": x, "floats": x.astype(np.float32), "columns": np.asfortranarray(x), "one": x[:, 0, 0, 0].copy()}
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez_compressed(tmp_path / "b.npz", **arrays)
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, tmp_path / "c.safetensors")
    index = torch.tensor([3, 4, 5, 0, 29, 29, 7, 6])
    of_tensors, _ = safetensors_rows(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="is no safetensors file"):
        safetensors_rows(tmp_path / "a.npz")
    for file, rows in (("a.npz", npz_rows), ("b.npz", npz_rows), ("c.safetensors", lambda _, name: of_tensors[name])):
        for name, array in arrays.items():
            stored = rows(tmp_path / file, name)
            assert (stored.shape, stored.dtype) == (array.shape, array.dtype) and len(stored) == 30
            assert np.array_equal(stored(index), array[index]), (file, name)
            assert np.array_equal(np.concatenate([*stored.pieces()]), array) and not len(stored(index[:0]))
        with pytest.raises(KeyError):
            rows(tmp_path / file, "none")
    stored = npz_rows(tmp_path / "a.npz", "plain")
    with pytest.raises(IndexError, match="rows 0 .. 29 of a.npz, got 30 .. 30"):
        stored(torch.tensor([30]))
    unpacked = npz_rows(tmp_path / "b.npz", "plain")
    place = unpacked.path
    assert place.exists()
    del unpacked
    assert not place.exists(), "a temporary file goes with the object"
    with open(tmp_path / "a.npz", "r+b") as file:
        file.truncate(stored.offset + 100)
    with pytest.raises(OSError, match="a.npz was cut off after it was opened"):
        stored(index)


def test_hashes_are_those_of_the_text_in_one_piece():
    for n in (0, 1, 4096, 4097, 10_000):
        numbers = torch.arange(n) * 3 - 5
        assert b"".join(number_text(numbers)).decode() == json.dumps(numbers.tolist())
    data = load_data("digits", limit=50)
    text = json.dumps([data.name, data.split, data.class_names, data.y.tolist(), data.index.tolist()])
    assert data.fingerprint == short_sha([text.encode()])
    assert data.index_sha == short_sha([json.dumps(data.index.tolist()).encode()])
    places = Places(torch.tensor([7, 3, 11]))
    assert places(torch.tensor([11, 7, 5, 99, 3])).tolist() == [2, 0, -1, -1, 1]
    assert Places(torch.zeros(0, dtype=torch.int64))(torch.tensor([1])).tolist() == [-1]


@pytest.mark.slow
def test_chunks_take_as_long_at_the_end_as_at_the_start(tmp_path, monkeypatch):
    """A state of 300,000 samples is 37 MB; it is not written for more than its share of the time."""
    n, began, saves, save = 300_000, [], [], Keeper.save

    def read(index):
        began.append(time.perf_counter())
        return (index[:, None] * 7919 + torch.arange(12) * 104729).remainder(256).to(torch.uint8).view(-1, 3, 2, 2)

    def timed(keeper):
        before = time.perf_counter()
        save(keeper)
        saves.append(time.perf_counter() - before)

    monkeypatch.setattr(Keeper, "save", timed)
    data = Data("made", "test", ["0", "1"], torch.arange(n) % 2, torch.arange(n), read, n_total=n)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    before = time.perf_counter()
    state = tmp_path / "state.npz"
    evaluate(net, data, attack="fgsm", eps="0", batch_size=100, progress=False, state=state)
    whole = time.perf_counter() - before
    gaps = np.diff(began[10:3000])  # the pass over clean images
    first, last = np.median(gaps[:300]), np.median(gaps[-300:])
    print(f"{1e3 * first:.2f} ms a chunk at the start, {1e3 * last:.2f} at the end; {len(saves)} saves, ", end="")
    print(f"{sum(saves):.2f} s of {whole:.1f}, a state of {state.stat().st_size / n:.0f} bytes per sample")
    assert last < 2 * first
    assert sum(saves) - 3 * max(saves) < 3 * SHARE * whole, "two are at the end of a stage, one is the first"
    assert state.stat().st_size < 150 * n
