"""Published figures: each has a source and a trust tag, and ours stand under the same data, norm and radius alone."""

import pytest
import yaml

from rvlm import cli
from rvlm.data.registry import entries
from rvlm.report import gather, load_published, published_tables


def test_every_figure_has_a_source_and_names_that_we_know():
    known = set(entries())
    papers = load_published()
    assert len([table for paper in papers for table in paper["tables"]]) >= 17
    for table in (table for paper in papers for table in paper["tables"]):
        for column in table["columns"]:
            names = column.get("data", [])
            assert set([names] if isinstance(names, str) else names) <= known, table["title"]
        for figures in table["rows"].values():
            assert all(v is None or 0 <= v <= 100 for v in figures)


@pytest.mark.parametrize("rows", ["Clean Dis (distilled on clean images only)", "HPT-GPD, adaptive attack"])
def test_means_agree_with_their_entries(rows):
    [table] = [t for paper in load_published() for t in paper["tables"] if rows in t["rows"]]
    mean, *entries_ = table["rows"][rows]
    assert len(entries_) == 16 and sum(entries_) / 16 == pytest.approx(mean, abs=0.006)


def test_ours_stand_beside_theirs_where_data_norm_and_radius_are_the_same(tmp_path, record):
    names = next(t for p in load_published() for t in p["tables"] if "FARE4" in t["rows"])["columns"][0]["data"]
    for k, name in enumerate(names):
        record(tmp_path / "mine", "fare", k / 100, clean=0.5, data=f"{name}@wds", eps="4/255")
    record(tmp_path / "mine", "fare", 0.77, clean=0.5, data="cifar10@wds", eps="3/255")
    tables = {table.title: table for table in published_tables(gather([tmp_path]))}
    rows = {row["name"]: row for row in tables["FARE and TeCoA by RobustVLM, ViT-L/14, mean over zero-shot sets"].rows}
    ours = rows["ours: fare (pgd-10, white-box, 100 samples)"]
    assert (ours["clean"], ours["2/255"], ours["4/255"], ours["trust"]) == ("50.00", "", "6.00", "ours")
    assert rows["FARE4"]["4/255"] == "32.4" and rows["FARE4"]["trust"] == "README"
    (tmp_path / "mine" / "result").joinpath(f"fare-{names[-1]}@wds-white-box-pgd-10-4-255-100-0.json").unlink()
    tables = {table.title: table for table in published_tables(gather([tmp_path]))}
    rows = tables["FARE and TeCoA by RobustVLM, ViT-L/14, mean over zero-shot sets"].rows
    assert not [row for row in rows if row["trust"] == "ours"], "a mean over fewer sets is another figure"


def test_layouts_of_a_set_are_not_averaged(tmp_path, record):
    for layout, robust in (("coop", 0.2), ("torchvision", 0.8)):
        record(tmp_path, "both", robust, data=f"caltech101@{layout}", eps="1/255")
    rows = [row for row in published_tables(gather([tmp_path]))[0].rows if row["trust"] == "ours"]
    assert [row["caltech101"] for row in rows] == ["20.00", "80.00"]
    assert "coop" in rows[0]["name"] and "torchvision" in rows[1]["name"]


def test_half_of_the_classes_is_not_the_set(tmp_path, record):
    record(tmp_path, "half", 0.9, data="cifar10@wds+classes=base", eps="1/255")
    assert not [row for table in published_tables(gather([tmp_path])) for row in table.rows if row["trust"] == "ours"]
    record(tmp_path, "whole", 0.9, data="cifar10@wds", eps="1/255")
    assert [row for table in published_tables(gather([tmp_path])) for row in table.rows if row["trust"] == "ours"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"trust": "rumour"}, "trust is 'rumour'"),
        ({"source": None}, "names no source"),
        ({"rows": {"a": [1.0, 2.0]}}, "expected 1 figures, got 2"),
        ({"columns": [{"data": "dtd"}, {"data": "dtd"}]}, "two columns of one heading"),
    ],
)
def test_a_table_that_cannot_be_trusted_is_refused(tmp_path, change, message):
    table = {"title": "t", "trust": "paper", "source": "s", "columns": [{"data": "dtd"}], "rows": {"a": [1.0]}} | change
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"title": "x", "link": "y", "tables": [table]}))
    with pytest.raises(ValueError, match=message):
        load_published(tmp_path)


def test_the_command(tmp_path, capsys):
    assert cli.main(["report", "--published"]) == 0
    text = capsys.readouterr().out
    assert "| FARE4 | README | 61.1 | 45.9 | 32.4 |" in text and "| MMT-ARD | +4.32 points robust" in text
    assert cli.main(["report", "--published", "--out", str(tmp_path / "p.html")]) == 0
    assert "digitised: read off a figure" in (tmp_path / "p.html").read_text()
