"""Reports: tables say the numbers, pictures come with theirs as CSV, the page needs nothing from outside."""

import csv
import io
import re

import pytest
import torch
from PIL import Image
from rich.console import Console

from rvlm.report import accuracy_over_eps, image_grid, markdown, rich_table, write_html
from rvlm.report.plots import pick_rows

ROW = dict(name="clip", clean=0.986, clean_ci=[0.97, 0.99], robust=0.036, robust_ci=[0.02, 0.06], eps="8/255",
           attack="pgd-10", target="white-box", samples=500)  # fmt: skip


def test_tables():
    text = markdown([ROW, ROW | {"name": "a|b", "clean_ci": None}])
    assert "| clip | 98.6 (97-99) | 3.6 (2-6) | 8/255 | pgd-10 | white-box | 500 |" in text
    assert "a\\|b | 98.6 |" in text
    out = io.StringIO()
    Console(file=out, width=80).print(rich_table([ROW | {"name": "resnet clip", "attack": "pgd-50x3"}]))
    assert "3.6 (2-6)" in out.getvalue() and "white-box" in out.getvalue() and "…" not in out.getvalue(), (
        "fits 80 columns"
    )


def test_accuracy_over_eps(tmp_path):
    curves = {"clip": [("8/255", 0.03, 0.02, 0.06), ("0", 0.98, 0.97, 0.99)], "tecoa": [("0", 0.98, 0.9, 1.0)]}
    path = accuracy_over_eps(tmp_path / "a.png", curves)
    assert len(Image.open(path).getcolors(1 << 24)) > 50
    rows = list(csv.reader((tmp_path / "a.csv").open()))
    assert rows[0] == ["name", "eps", "accuracy", "ci_low", "ci_high"] and rows[1] == [
        "clip",
        "8/255",
        "0.03",
        "0.02",
        "0.06",
    ]


def test_image_grid(tmp_path):
    x = torch.rand(4, 3, 8, 8)
    path = image_grid(tmp_path / "g.png", x, (x + 0.03).clamp(0, 1), list("abcd"), list("abcd"), list("abxx"))
    assert Image.open(path).size[0] > 600
    assert (tmp_path / "g.csv").read_text().splitlines()[3] == "c,c,x"


def test_pick_rows_prefers_fooled_samples_of_different_classes():
    rows = pick_rows(torch.tensor([-2, -1, 0, 0, 0, -1]), torch.tensor([0, 1, 2, 2, 3, 4]), most=4)
    assert rows.tolist() == [2, 4, 1, 5]


def test_the_page_is_self_contained_and_escaped(tmp_path):
    figure = accuracy_over_eps(tmp_path / "a.png", {"m": [("0", 1.0, 1.0, 1.0)]})
    page = write_html(
        tmp_path / "r.html", title="T", intro="I", rows=[ROW | {"name": "<script>alert(1)</script>"}],
        figures=[("F", figure)], facts={"command": "rvlm demo"},
    ).read_text()  # fmt: skip
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "http" not in page
    assert 'name="viewport"' in page and "98.6 (97-99)" in page and "data:image/png;base64,iVBOR" in page
    with pytest.raises(FileNotFoundError):
        write_html(tmp_path / "r.html", title="", intro="", rows=[], figures=[("F", tmp_path / "no.png")], facts={})
    assert (tmp_path / "r.html").read_text() == page, "a failed report leaves the old one"
