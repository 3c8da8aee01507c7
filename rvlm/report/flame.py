"""A flame chart of a Chrome trace as one HTML file that needs nothing from outside.

Every thread and every stream of a device is a lane. In it a range stands under the one that it ran inside, as wide as
it lasted; calls of the same name at the same place are drawn as one, in the order in which they first came. The order
of single calls in time is in the trace itself, which Perfetto shows.
"""

import dataclasses
from pathlib import Path
from typing import Any

from rvlm.files import write_bytes

__all__ = ["Frame", "frames", "write_flame"]

PHASE, OP, DEVICE = "phase", "op", "device"
KINDS = {
    "user_annotation": PHASE, "gpu_user_annotation": PHASE, "cpu_op": OP, "kernel": DEVICE, "gpu_memcpy": DEVICE,
    "gpu_memset": DEVICE,
}  # fmt: skip
LEAST = 1e-3  # of a lane's time, below which a frame is not drawn: it would be less than a pixel


@dataclasses.dataclass
class Frame:
    """All calls of one name at one place.

    Attributes:
        name: of the range.
        kind: "phase", "op" or "device" (what ran there).
        seconds: of all calls, with what ran inside.
        calls: how many.
        inside: by name.
    """

    name: str
    kind: str
    seconds: float = 0.0
    calls: int = 0
    inside: dict[str, "Frame"] = dataclasses.field(default_factory=dict)

    @property
    def own(self) -> float:
        """Seconds in no frame inside."""
        return self.seconds - sum(frame.seconds for frame in self.inside.values())


def frames(trace: dict[str, Any]) -> list[Frame]:
    """A frame for each lane of a Chrome trace by torch.profiler, the longest first; its calls are 0 and its seconds
    those of what is in it."""
    lanes: dict[tuple, list[dict]] = {}
    titles: dict[tuple, str] = {}
    for event in trace["traceEvents"]:
        lane = (event.get("pid"), event.get("tid"))
        if event.get("ph") == "X" and event.get("cat") in KINDS:
            lanes.setdefault(lane, []).append(event)
        elif event.get("ph") == "M" and event.get("name") == "thread_name":
            titles[lane] = str(event["args"]["name"])
    found = [_lane(titles.get(lane, f"thread {lane[1]}"), events) for lane, events in lanes.items()]
    return sorted(found, key=lambda frame: -frame.seconds)


def _lane(title: str, events: list[dict]) -> Frame:
    root = Frame(title, PHASE)
    around: list[tuple[Frame, float]] = []  # the frames that are open, and when they end
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        while around and around[-1][1] <= event["ts"]:
            around.pop()
        parent, limit = around[-1] if around else (root, float("inf"))
        end = min(event["ts"] + event["dur"], limit)
        frame = parent.inside.setdefault(event["name"], Frame(event["name"], KINDS[event["cat"]]))
        frame.seconds += (end - event["ts"]) / 1e6
        frame.calls += 1
        around.append((frame, end))
    root.seconds = sum(frame.seconds for frame in root.inside.values())
    return root


def write_flame(path: str | Path, title: str, intro: str, lanes: list[Frame]) -> Path:
    """Writes the page, whole or not at all.

    Args:
        path: where to.
        title, intro: heading and the paragraph under it.
        lanes: of `frames`.
    """
    from jinja2 import Environment, PackageLoader

    template = Environment(loader=PackageLoader("rvlm.report", "."), autoescape=True).get_template("flame.html")
    charts = []
    for lane in lanes:
        boxes = _boxes(lane, 0.0, 0, lane.seconds)
        if boxes:
            charts.append({"title": lane.name, "boxes": boxes, "depth": 1 + max(box["depth"] for box in boxes)})
    return write_bytes(path, template.render(title=title, intro=intro, charts=charts).encode())


def _boxes(frame: Frame, left: float, depth: int, whole: float) -> list[dict[str, Any]]:
    """What is inside a frame: left edge and width in shares of the lane, and rows from the top."""
    boxes = []
    for inner in frame.inside.values():
        width = inner.seconds / whole if whole else 0.0
        if width >= LEAST:
            about = f"{inner.name}: {1e3 * inner.seconds:.2f} ms, {width:.1%}, {inner.calls} calls"
            own = f", {1e3 * inner.own:.2f} ms of its own" if inner.inside else ""
            boxes.append(
                {"name": inner.name, "kind": inner.kind, "left": left, "width": width, "depth": depth,
                 "about": about + own}
            )  # fmt: skip
            boxes += _boxes(inner, left, depth + 1, whole)
        left += width
    return boxes
