"""The page in a real browser, as wide as a phone and as a desktop: it fits, its pictures load, its tables sort."""

import html
import json
import re

import pytest
from PIL import Image

from rvlm import cli

# Sorts the first table by its robust column, measures, and sends what it found to the page around it.
PROBE = """<script>
addEventListener("load", () => {
  const table = document.querySelector("table");
  const column = [...table.tHead.rows[0].cells].findIndex(th => th.textContent.startsWith("robust"));
  const values = () => [...table.tBodies[0].rows].map(row => row.cells[column].textContent);
  const before = values();
  table.tHead.rows[0].cells[column].querySelector("button").click();
  parent.postMessage(JSON.stringify({
    before, after: values(), width: innerWidth, needed: document.documentElement.scrollWidth,
    robust: table.tBodies[0].rows[0].cells[column].getBoundingClientRect().right,
    pictures: [...document.images].map(img => img.naturalWidth && img.getBoundingClientRect().right),
    texts: [...document.images].map(img => img.alt),
    fetched: performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).map(e => e.name),
  }), "*");
});
</script></body>"""

# A window is never narrower than 500 pixels; a frame is.
FRAME = """<script>addEventListener("message", event => { document.body.dataset.probe = event.data; });</script>
<iframe src="probed.html" style="width: %dpx; height: 2400px; border: 0"></iframe>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory, record, measured):
    folder = tmp_path_factory.mktemp("page")
    for name, robust in (
        ("clip", 0.04),
        ("a method with a name that is long", 0.9),
        ("hf-hub:org/robust-ViT-L-14", 0.36),
    ):
        for data in ("cifar10", "imagenet-sketch"):
            for eps in ("2/255", "4/255"):
                record(folder / "runs", name.replace("/", "-"), robust, data=data, eps=eps, n=1000)
    assert cli.main(["report", str(folder / "runs"), str(measured[0]), "--out", str(folder / "r.html")]) == 0
    text = (folder / "r.html").read_text()
    (folder / "probed.html").write_text(text.replace("</body>", PROBE))
    return folder


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_at(width, page, browse):
    picture = page / f"{width}.png"
    browse(page / "r.html", width, 2400, f"--screenshot={picture}")
    shot = Image.open(picture).convert("RGB")
    assert shot.size == (width, 2400)
    for part in range(3):
        colours = shot.crop((0, 800 * part, width, 800 * (part + 1))).getcolors(1 << 24)
        assert len(colours) > 30, f"nothing is drawn in part {part}"
    (page / f"{width}.html").write_text(f"<!doctype html><body>{FRAME % width}</body>")
    dom = browse(page / f"{width}.html", 1400, 2400, "--dump-dom", "--virtual-time-budget=5000")
    seen = json.loads(html.unescape(re.search(r'data-probe="(.*?)"', dom)[1]))
    assert seen["width"] == width and seen["needed"] <= width, "the page scrolls sideways"
    assert seen["robust"] <= width, "the robust accuracy is out of sight"
    assert len(seen["pictures"]) == 10 and all(0 < right <= width for right in seen["pictures"])
    new = ("Accuracy over steps: ", "Confidence and accuracy: ", "Images and words: plain", "Images and words: smooth")
    assert all(seen["texts"]) and all(sum(text.startswith(kind) for text in seen["texts"]) == 1 for kind in new)
    assert seen["fetched"] == []
    numbers = [float(text.split()[0]) for text in seen["after"]]
    assert numbers == sorted(numbers) and seen["before"] != seen["after"]
