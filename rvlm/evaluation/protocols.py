"""Protocols: frozen YAML that says on what and how models are measured, so that two numbers can be compared.

    protocol = load_protocol("robustvlm-aa1000")
    for part in protocol.parts:
        data = protocol.open(part, root)

A file holds data sets with their splits, prompts and drawn samples, how images are resized, and attacks with their
radii. Its hash covers all of that, and of what the file only names, prompts and tasks of LVLMs (`rvlm.data.tasks`), the
words themselves; prompts that a data set brings along are covered by their hash, `prompts`. Records carry the hash. A
bundled file also holds it as `frozen`: what was edited needs another name. Samples are lists of row numbers that depend
on the seed and the size of the set alone.
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from rvlm.attacks.ball import ORDER
from rvlm.attacks.stages import parse_attack
from rvlm.data import Data, Fit, load_data
from rvlm.data.captions import Captions, holds_captions, load_captions
from rvlm.data.images import Reader
from rvlm.data.load import rooted
from rvlm.data.prompts import fingerprint, templates
from rvlm.data.rows import number_sha, short_sha
from rvlm.data.tasks import TASKS
from rvlm.evaluation.retrieval import parse_retrieval_attack
from rvlm.plugins import is_own
from rvlm.units import Eps

__all__ = ["Part", "Protocol", "load_protocol", "protocol_names"]

FOLDER = Path(__file__).parents[1] / "protocols"


@dataclasses.dataclass(frozen=True)
class Part:
    """One data set of a protocol.

    Attributes:
        data: its spec; of a set of the registry without its root.
        split: of it.
        templates: id of the prompts, a list of them, or None for the data's own.
        prompts: hash of the prompts, where it is known.
        index: hash of the drawn row numbers, where the size of the set is known.
        n, attacks: of this set instead of the protocol's.
        task: name in `rvlm.data.tasks`, which LVLMs are asked (`rvlm lvlm --protocol`); then data is a benchmark of
            `rvlm.lvlm.layouts`, attacks are pgd-STEPS and apgd-STEPS, and images have the model's own size.
    """

    data: str
    split: str = "test"
    templates: str | list[str] | None = None
    prompts: str | None = None
    index: str | None = None
    n: int | None = None
    attacks: dict[str, list[str]] | None = None
    task: str | None = None

    @property
    def name(self) -> str:
        return self.data.partition("@")[0]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What a file says.

    Attributes:
        name, sha: of the protocol.
        about: what it follows; differs: where it does not, as far as we know.
        parts: the data sets.
        attacks: radii by the name of the attack.
        norm, seed: as in `evaluate`.
        targets: white-box, and transfer where images are made on the undefended model, too.
        fit: how images are resized before they are attacked, None: not at all.
        native: names of sets that are attacked at their own size, and enlarged inside the model.
        n: images of each set, None: all; the first n of a permutation by the seed, in their old order.
        ids: {"file", "sha256"}: the images that a file names instead; it lies in the root.
    """

    name: str
    sha: str
    about: str
    parts: tuple[Part, ...]
    attacks: dict[str, list[str]]
    differs: str = ""
    norm: str = "linf"
    seed: int = 0
    targets: tuple[str, ...] = ("white-box",)
    fit: Fit | None = None
    native: tuple[str, ...] = ()
    n: int | None = None
    ids: dict[str, str] | None = None

    def open(self, part: Part, root: Path | None = None, limit: int | None = None) -> Data | Captions:
        """The samples of one data set.

        Args:
            part: of this protocol.
            root: where data sets lie.
            limit: no more than this many; what comes of them is partial.

        Raises:
            FileNotFoundError: not there. ValueError: not what it should be, or other samples than the frozen ones.
        """
        spec = part.data if root is None else rooted(part.data, root)
        load = load_captions if holds_captions(spec) else load_data
        data = load(spec, part.split, size=None if part.name in self.native else self.fit)
        data = self.drawn(part, data) if self.ids is None else self._named(data, root)
        return data.limited(limit, self.seed)

    def drawn(self, part: Part, data):
        """The samples of a part out of all of its data, or of its questions.

        Raises:
            ValueError: other samples than the frozen ones.
        """
        data = data.limited(part.n or self.n, self.seed)
        if part.index is not None and (found := number_sha(data.index)) != part.index:
            raise ValueError(f"{part.data}: the draw of {self.name} has the hash {part.index}, here it is {found}")
        return data

    def prompts(self, part: Part, data: Data) -> tuple[list[str], dict[str, Any]]:
        """The prompts of a data set, and a check for the record: whether they are the frozen ones."""
        found = part.templates if isinstance(part.templates, list) else templates(part.templates or data.template)
        sha = fingerprint(found)
        detail = f"hash {sha}, expected {part.prompts or 'unknown'}"
        return found, {"id": "prompts_as_frozen", "ok": part.prompts in (None, sha), "detail": detail}

    def mark(self, part: Part, data: Data) -> dict[str, str]:
        """What a record says of its protocol, and whether the data is all of the part."""
        n = part.n or self.n
        whole = "all" if n is None or n >= data.n_total else f"perm(seed={self.seed})[:{n}]"
        whole = self.ids["file"] if self.ids is not None else whole
        return {"name": self.name, "sha": self.sha, "status": "complete" if data.index_rule == whole else "partial"}

    def _named(self, data: Data, root: Path | None) -> Data:
        file = (root or Path()) / self.ids["file"]
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}, which names the images of {self.name}; {self.ids['from']}")
        content = file.read_bytes()
        if (sha := hashlib.sha256(content).hexdigest()) != self.ids["sha256"]:
            raise ValueError(f"{file} has the sha256 {sha}, expected {self.ids['sha256']}: it is another list")
        if not isinstance(data.read, Reader) or not data.read.names:
            raise ValueError(f"{data.name} has no file names, by which {self.name} picks images: use class folders")
        place = {"/".join(name.split("/")[-2:]): row for row, name in enumerate(data.read.names)}
        wanted = content.decode().split()
        if absent := [name for name in wanted if name not in place]:
            raise ValueError(f"{data.name} lacks {len(absent)} images of {file}, the first is {absent[0]}")
        rows = torch.tensor([place[name] for name in wanted]).sort().values
        return data.subset(rows, self.ids["file"])


def protocol_names() -> list[str]:
    """The bundled protocols."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load_protocol(name: str | Path) -> Protocol:
    """A bundled protocol, or one from a YAML file.

    Raises:
        FileNotFoundError: neither. ValueError: unknown keys, attacks, radii or norms; an edited frozen file.
    """
    import yaml

    file = Path(name) if str(name).endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"no protocol {name}: expected one of {', '.join(protocol_names())}, or a YAML file")
    told = yaml.safe_load(file.read_text())
    fields = {field.name for field in dataclasses.fields(Protocol)} - {"sha"} | {"frozen"}
    if not isinstance(told, dict) or not {"name", "about", "parts", "attacks"} <= set(told) <= fields:
        raise ValueError(f"{file}: expected name, about, parts, attacks and of {', '.join(sorted(fields))}")
    if not isinstance(told["parts"], list) or not all(isinstance(part, str | dict) for part in told["parts"]):
        raise ValueError(f"{file}: parts must be a list of data specs and of mappings with data, got {told['parts']!r}")
    frozen = told.pop("frozen", None)
    words = _words(told["parts"])
    sha = short_sha([json.dumps(told | ({"words": words} if words else {}), sort_keys=True).encode()])
    if frozen not in (None, sha):
        raise ValueError(
            f"{file}, or what it asks in words, was edited: its hash is {sha}, frozen is {frozen}. Give what you "
            "changed another name."
        )
    return _checked(file, sha, told)


def _words(parts: list[Any]) -> list[Any]:
    """What stands in the code and parts only name: tasks, and prompts whose hash no part holds."""
    named = [part for part in parts if isinstance(part, dict)]
    tasks = [dataclasses.asdict(TASKS[name]) for part in named if (name := str(part.get("task"))) in TASKS]
    unhashed = [part.get("templates") for part in named if part.get("prompts") is None]
    return tasks + [templates(name) for name in unhashed if isinstance(name, str)]


def _checked(file: Path, sha: str, told: dict[str, Any]) -> Protocol:
    known = {field.name for field in dataclasses.fields(Part)}
    parts = [{"data": part} if isinstance(part, str) else part for part in told.pop("parts")]
    for part in parts:
        if not {"data"} <= set(part) <= known:
            raise ValueError(f"{file}: part {part} must have data, and of {', '.join(sorted(known))}")
        if is_own(part["data"]):
            raise ValueError(f"{file}: {part['data']} may change, and a protocol is frozen: run it by rvlm eval --data")
        if "task" in part and not (str(part["task"]) in TASKS and part.get("attacks")):
            raise ValueError(f"{file}: part {part} must have a task of {', '.join(TASKS)}, and attacks of its own")
    norm = told.get("norm", "linf")
    if norm not in ORDER:
        raise ValueError(f"{file}: unknown norm {norm!r}, expected {', '.join(ORDER)}")
    if norm != "linf" and any("task" in part for part in parts):
        raise ValueError(
            f"{file}: answers of LVLMs are attacked in linf, not in {norm}: put their parts in another file"
        )
    for holder in [told, *(part for part in parts if part.get("attacks"))]:
        asked = "task" in holder
        if not isinstance(holder["attacks"], dict):
            raise ValueError(f"{file}: attacks must be a mapping of names to radii, got {holder['attacks']!r}")
        holder["attacks"] = {name: _radii(file, name, radii, norm, asked) for name, radii in holder["attacks"].items()}
    if unknown := set(told.get("targets", ())) - {"white-box", "transfer"}:
        raise ValueError(f"{file}: unknown target {', '.join(unknown)}, expected white-box or transfer")
    told |= {key: tuple(told[key]) for key in ("targets", "native") if key in told}
    fit = Fit(**told.pop("fit")) if told.get("fit") else told.pop("fit", None)
    return Protocol(sha=sha, parts=tuple(Part(**part) for part in parts), fit=fit, **told)


def _radii(file: Path, attack: str, radii: Any, norm: str, asked: bool) -> list[str]:
    """The radii of an attack, as records write them. asked: it is on the answers of LVLMs."""
    if not asked:
        _check_attack(attack, norm)
    elif re.fullmatch(r"a?pgd-[1-9]\d*", attack) is None:
        raise ValueError(f"unknown attack {attack!r} on answers: expected pgd-STEPS or apgd-STEPS")
    if not isinstance(radii, list) or not radii:
        raise ValueError(f"{file}: {attack} must have a list of radii, such as [4/255], got {radii!r}")
    return [str(Eps(eps).check(norm)) for eps in radii]


def _check_attack(name: str, norm: str) -> None:
    """Raises ValueError for what is an attack neither on retrieval nor on classification, or is not frozen."""
    if is_own(name):
        raise ValueError(f"{name} may change, and a protocol is frozen: run it by rvlm eval --attack {name}")
    try:
        parse_retrieval_attack(name)
    except ValueError:
        parse_attack(name, norm)
