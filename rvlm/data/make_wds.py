"""Any data set as WebDataset shards in the layout of CLIP_benchmark, which `wds:PATH` reads back bit for bit."""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from rvlm.data.base import Data
from rvlm.data.files import SPLITS
from rvlm.data.images import Reader, as_png
from rvlm.data.prompts import templates
from rvlm.data.wds import NAMES, TEMPLATES

__all__ = ["make_wds"]


def make_wds(data: Data, folder: str | Path, *, count: int = 10_000, megabytes: int = 1000) -> list[Path]:
    """Writes FOLDER/<split>/0.tar ..., nshards.txt, class names and templates.

    JPEG, PNG and WebP files go in as they are, unless the data resizes them; what else there is becomes PNG.

    Args:
        data: what to write; of a subset its samples alone.
        folder: another split of the same set may be there already.
        count, megabytes: a tar is closed when it holds so much.

    Returns:
        The tars.

    Raises:
        ValueError: no samples, an image that cannot be read, a class name that is no single line, a split that is
        there already, or that tars do not have, or splits beside it that have other classes.
    """
    from tqdm import tqdm

    folder, into = Path(folder), Path(folder) / data.split
    if not len(data):
        raise ValueError(f"{data.name} has no samples to write")
    if data.split not in SPLITS:
        raise ValueError(f"tars are of the splits {', '.join(SPLITS)}, {data.name} is of {data.split!r}")
    if bad := [name for name in data.class_names if not name.strip() or "\n" in name]:
        raise ValueError(f"{data.name}: class name {bad[0]!r} does not fit on a line of {NAMES}")
    if into.is_dir() and any(into.iterdir()):
        raise ValueError(f"{into} is not empty: give another folder, or remove it")
    names = "\n".join(data.class_names) + "\n"
    if (folder / NAMES).is_file() and (folder / NAMES).read_text(encoding="utf-8") != names:
        raise ValueError(f"{folder / NAMES} names other classes than {data.name}: give another folder")
    into.mkdir(parents=True, exist_ok=True)
    (into / "nshards.txt").write_text("unfinished\n")  # without the file, tars would be read as they are
    tars: list[Path] = []
    samples = enumerate(tqdm(_encoded(data), desc="writing", total=len(data), disable=None, leave=False, unit="image"))
    while chunk := next(samples, None):
        tars.append(into / f"{len(tars)}.tar")
        with tarfile.open(tars[-1], "w") as archive:
            held = 0
            while chunk is not None:
                _add(archive, data, *chunk)
                held += 1
                full = held == count or archive.offset >= megabytes * 10**6
                chunk = None if full else next(samples, None)
    (folder / NAMES).write_text(names, encoding="utf-8")
    words = [template.replace("{}", "{c}") for template in templates(data.template)]
    (folder / TEMPLATES).write_text("\n".join(words) + "\n", encoding="utf-8")
    (into / "nshards.txt.part").write_text(f"{len(tars)}\n")
    os.replace(into / "nshards.txt.part", into / "nshards.txt")
    return tars


def _add(archive: tarfile.TarFile, data: Data, row: int, encoded: tuple[str, bytes]) -> None:
    suffix, content = encoded
    for name, part in ((suffix, content), ("cls", str(int(data.y[row])).encode())):
        info = tarfile.TarInfo(f"s{row:07d}.{name}")
        info.size = len(part)
        archive.addfile(info, io.BytesIO(part))


def _encoded(data: Data) -> Iterator[tuple[str, bytes]]:
    """Suffix and bytes of each sample's image file."""
    from PIL import Image

    whole = isinstance(data.read, Reader) and data.read.size is None
    for row in range(len(data)):
        i = data.index[row : row + 1]
        if whole:
            yield data.read.encoded(int(i))
        else:
            yield "png", as_png(Image.fromarray(data.read(i)[0].permute(1, 2, 0).numpy()))
