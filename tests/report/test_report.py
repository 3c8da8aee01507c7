"""Reports: tables say the numbers, pictures come with theirs as CSV, the page needs nothing from outside."""

import csv
import io
import re

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from rvlm.report import Table, accuracy_over_eps, image_grid, markdown, rich_table, write_html
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


def test_long_names_cut_no_figure():
    out = io.StringIO()
    row = ROW | {"name": "runs/a-very-long-name-of-a-folder/checkpoint", "attack": "pgd-100x10@lowfreq=5.71"}
    Console(file=out, width=80).print(rich_table([row]))
    for whole in ("3.6 (2-6)", "98.6", "robust %", "white-box", "8/255", "500"):
        assert whole in out.getvalue()
    assert "…" not in out.getvalue() and max(map(len, out.getvalue().splitlines())) <= 80


def test_no_figure_is_cut_where_every_cell_is_wide():
    out = io.StringIO()
    wide = ROW | {"robust": 1.0, "robust_ci": [0.98, 1.0], "eps": "16/255", "attack": "autoattack", "samples": 50000}
    Console(file=out, width=80).print(rich_table([wide, wide | {"name": "resnet clip"}], "rvlm demo"))
    first = next(line for line in out.getvalue().splitlines() if "clip" in line)
    assert first.split() == ["clip", "98.6", "100.0", "(98-100)", "16/255", "autoattack", "white-box", "50000"]


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


def test_awkward_class_names_are_drawn_and_kept_whole_in_the_csv(tmp_path, monkeypatch):
    drawn = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda figure, *args, **options: (
            drawn.extend(axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes),
            savefig(figure, *args, **options),
        ),
    )
    x, words = torch.rand(2, 3, 8, 8), ["$\\undefined{$", "Staffordshire bullterrier, Staffordshire bull terrier"]
    image_grid(tmp_path / "g.png", x, x, words, words, ["x", words[1]])
    assert drawn[0] == "✓ $\\undefined{$" and drawn[4] == "✗ x"
    assert drawn[2] == "perturbation × 1", "no perturbation is not magnified"
    assert drawn[1].startswith("✓ ") and drawn[1].endswith("…")
    assert len(drawn[1].splitlines()) == 2 and max(map(len, drawn[1].splitlines())) <= 17
    assert list(csv.reader((tmp_path / "g.csv").open(newline="")))[2] == [words[1]] * 3


def test_the_perturbation_is_magnified_around_grey(tmp_path):
    x = torch.full((1, 3, 8, 8), 0.5)
    adversarial = x.clone()
    adversarial[:, 0] += 0.1  # red is brighter: the middle picture is (0.9, 0.5, 0.5)
    path = image_grid(tmp_path / "g.png", x, adversarial, ["a"], ["a"], ["a"], magnify=4.0)
    colours = {colour[:3] for _, colour in Image.open(path).convert("RGB").getcolors(1 << 24)}
    assert any(abs(r - 229) <= 1 and abs(g - 127) <= 1 and g == b for r, g, b in colours)


@pytest.mark.parametrize("words, images", [(["a"], 2), (["a", "b"], 1), ([], 0)])
def test_image_grid_wants_a_word_for_each_image(tmp_path, words, images):
    x = torch.rand(images, 3, 8, 8)
    with pytest.raises(ValueError, match="as many"):
        image_grid(tmp_path / "g.png", x, x, words, words, words)
    assert not list(tmp_path.iterdir())


def test_a_failed_figure_leaves_the_old_one(tmp_path, monkeypatch):
    path = accuracy_over_eps(tmp_path / "new" / "a.png", {"m": [("0", 1.0, 1.0, 1.0)]})
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}

    def fail(figure, file, **options):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        accuracy_over_eps(path, {"m": [("0", 0.5, 0.4, 0.6)]})
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_pick_rows_prefers_fooled_samples_of_different_classes():
    rows = pick_rows(torch.tensor([-2, -1, 0, 0, 0, -1]), torch.tensor([0, 1, 2, 2, 3, 4]), most=4)
    assert rows.tolist() == [2, 4, 1, 5]


def test_the_page_is_self_contained_and_escaped(tmp_path):
    figure = accuracy_over_eps(tmp_path / "a.png", {"m": [("0", 1.0, 1.0, 1.0)]})
    page = write_html(
        tmp_path / "r.html", title="T", intro="I",
        tables=[Table("R", [ROW | {"name": "<script>alert(1)</script>"}])],
        figures=[("F", figure)], facts={"command": "rvlm demo"},
    ).read_text()  # fmt: skip
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "http" not in page
    assert 'name="viewport"' in page and "98.6 <span>(97-99)</span>" in page and "data:image/png;base64,iVBOR" in page
    with pytest.raises(FileNotFoundError):
        write_html(tmp_path / "r.html", title="", intro="", tables=[], figures=[("F", tmp_path / "no.png")], facts={})
    assert (tmp_path / "r.html").read_text() == page, "a failed report leaves the old one"
