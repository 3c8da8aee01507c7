"""The built site: every public name and every setting is in it, every link leads somewhere, and it fits a phone."""

import dataclasses
import html
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rvlm
from rvlm.arguments import COMMANDS

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docs"))
docstrings, links, pages = (importlib.import_module(f"_tools.{name}") for name in ("docstrings", "links", "pages"))

INSIDE = {"rvlm.commands", "rvlm.recipes"}  # of the command line
PROBE = """<script>addEventListener("load", () => parent.postMessage(JSON.stringify({
  name: location.pathname, width: innerWidth, needed: document.documentElement.scrollWidth,
  wide: [...document.querySelectorAll("article *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1
    && !e.closest("pre, .table-wrapper, .math")).map(e => e.outerHTML.slice(0, 80)),
  broken: [...document.images].filter(i => !i.naturalWidth && i.loading != "lazy").map(i => i.src),
}), "*"));</script></body>"""
COLLECT = """<!doctype html><body data-probe="[]"><script>const seen = [];
addEventListener("message", event => {
  seen.push(JSON.parse(event.data));
  document.body.dataset.probe = JSON.stringify(seen);
});</script>%s</body>"""


def test_every_public_module_is_in_the_reference():
    told = {module for modules in pages.MODULES.values() for module in modules}
    packages = {f"rvlm.{module.name}" for module in pkgutil.iter_modules(rvlm.__path__) if module.ispkg}
    assert packages - INSIDE - {"rvlm.kernels"} <= told
    compat = importlib.import_module("rvlm.compat")
    doors = {m.name for m in pkgutil.iter_modules(compat.__path__) if not m.ispkg} - {"common", "parts"}
    assert {f"rvlm.compat.{name}" for name in doors} <= told


def test_docstrings_are_shown_as_they_were_meant():
    text = """Steps x_ of `pgd` by `alpha * sign`, |d| <= eps; `Data`s.

    x = x + 1

fgsm     one step
pgd-N    N steps

Args:
    x: pixels.

    y: labels."""
    assert (
        "\n".join(docstrings.as_rest(text.splitlines()))
        == r"""Steps x\_ of `pgd` by ``alpha * sign``, \|d\| <= eps; `Data`\ s.

::

        x = x + 1

::

    fgsm     one step
    pgd-N    N steps

Args:
    x: pixels.

    y: labels.
"""
    )


def test_links_lead_to_pages_or_name_the_file(tmp_path):
    docs = tmp_path / "docs"
    copies = {tmp_path / "bench" / "r.md": docs / "reference" / "r.md"}
    for text, shown in {
        "[a](data.md#x), ![i](i.png), [w](https://w.org)": "[a](data.md#x), ![i](i.png), [w](https://w.org)",
        "[b](../bench/r.md)": "[b](reference/r.md)",
        "[code](../rvlm/a.py), [rvlm/a.py](../rvlm/a.py)": "code (`rvlm/a.py`), rvlm/a.py",
        "\n```\n[c](../d.py)\n```\n": "\n```\n[c](../d.py)\n```\n",
    }.items():
        assert links.relinked(text, docs / "p.md", docs / "p.md", docs, copies) == shown


def test_formulas():
    pytest.importorskip("latex2mathml", reason="formulas need the extra [docs]")
    formulas = importlib.import_module("_tools.formulas")
    assert "<mfrac>" in formulas.as_mathml(r"\frac{a}{b}") and "\\" not in formulas.as_mathml(r"\arg\max_x f(x)")
    assert '<mrow class="overline"><mrow><mi>a</mi>' in formulas.as_mathml(r"\overline{a + b}")
    with pytest.raises(ValueError, match="unknown"):
        formulas.as_mathml(r"\nothing{x}")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("sphinx", "furo", "myst_nb", "sphinx_copybutton", "latex2mathml"):
        pytest.importorskip(package, reason="the site needs the extra [docs]")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", str(folder / "trees")]
    done = subprocess.run([*command, str(ROOT / "docs"), str(folder / "html")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def read(page):
    return html.unescape(page.read_text())


@pytest.mark.slow
def test_every_public_name_and_setting_is_there(site):
    shown = {name for page in (site / "reference" / "api").glob("*.html") for name in ids(page)}
    wanted = {
        f"{module}.{name}" for modules in pages.MODULES.values() for module in modules
        for name in pages.public_names(module)
    }  # fmt: skip
    modules = {f"module-{name}" for names in pages.MODULES.values() for name in names}
    assert len(wanted) > 150 and wanted <= shown | {name.removeprefix("module-") for name in modules}
    assert modules <= shown
    text = read(site / "reference" / "commands.html")
    for command, kind in COMMANDS.items():
        section = text[text.index(f'id="rvlm-{command}"') :].split("</section>")[0]
        assert all(f">--{field.name}<" in section for field in dataclasses.fields(kind)), command


def ids(page):
    return set(re.findall(r'\bid="([^"]+)"', read(page)))


@pytest.mark.slow
def test_every_link_leads_somewhere_and_no_page_fetches(site):
    files = sorted(site.rglob("*.html"))
    anchors, lost, fetched, count = {page: ids(page) for page in files}, [], [], 0
    for page in files:
        for match in re.finditer(r'<(?:a|img|link|script)\b[^>]*?\b(?:href|src)="([^"]*)"', read(page)):
            target = match[1]
            path, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", path):
                fetched += [target] if not match[0].startswith("<a") else []
                continue
            file = (page.parent / path.partition("?")[0]).resolve() if path else page
            count += 1
            if not file.is_file() or (anchor and file.suffix == ".html" and anchor not in anchors[file]):
                lost.append(f"{page.relative_to(site)}: {target}")
    assert count > 1000 and not lost, lost[:20]
    assert not fetched, "a page reads from elsewhere"


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_scrolls_sideways(site, browse, width):
    probed = []
    for page in sorted(site.rglob("*.html")):
        if "_modules" in page.parts or page.name in ("genindex.html", "search.html") or page.name.startswith("probed"):
            continue
        probed.append(page.with_name(f"probed-{width}-{page.name}"))
        probed[-1].write_text(page.read_text().replace("</body>", PROBE))
    frames = "".join(
        f'<iframe src="{page.relative_to(site)}" style="width: {width}px; height: 900px; border: 0"></iframe>'
        for page in probed
    )
    (site / f"probed-{width}.html").write_text(COLLECT % frames)
    dom = browse(site / f"probed-{width}.html", 1400, 2400, "--dump-dom", "--virtual-time-budget=60000")
    seen = json.loads(html.unescape(re.search(r'data-probe="(.*?)"', dom)[1]))
    assert len(seen) == len(probed) > 20
    assert {page["width"] for page in seen} == {width}
    assert not [(page["name"], page["wide"][:3]) for page in seen if page["needed"] > width]
    assert not [page["broken"] for page in seen if page["broken"]]
