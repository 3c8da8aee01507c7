"""The leaderboard: ranked by the best known figure, with RobustBench's fields, and nothing unlike among them."""

import csv

import pytest

from rvlm import cli
from rvlm.report import gather, leaderboards, load_entries

BOARD = "data: digits\nnorm: linf\neps: 8/255\n"


@pytest.fixture
def folder(tmp_path, record):
    record(tmp_path / "clip", "clip", 0.02, attack="autoattack")
    record(tmp_path / "fare", "fare", 0.46, clean=0.7, attack="autoattack")
    record(tmp_path / "tecoa", "tecoa", 0.44, clean=0.6, attack="autoattack",
           checks=[{"id": "loss_increases", "ok": False, "detail": "d"}])  # fmt: skip
    return tmp_path


def boards(folder):
    return leaderboards(gather([folder]), load_entries(folder))


def test_an_external_figure_moves_a_model_down(folder):
    [board], unranked = boards(folder)
    assert board.title == "digits; autoattack, Linf 8/255, white-box" and not unranked
    assert [row["name"] for row in board.rows] == ["fare", "tecoa", "clip"]
    (folder / "fare.yaml").write_text(f"model: fare\n{BOARD}reported: 45.9\nexternal: 40.0\nadditional_data: false\n")
    (folder / "about.yaml").write_text("model: fare\ntitle: Robust CLIP\nvenue: ICML 2024\n")
    (folder / "other.yaml").write_text("model: fare\ndata: digits\nnorm: linf\neps: 4/255\nexternal: 1.0\n")
    [board], _ = boards(folder)
    first, second, _ = board.rows
    assert (first["name"], first["unreliable"], first["footnote"]) == ("tecoa", "yes", "failed checks: loss_increases")
    assert second["rank"] == 2 and second["best_known"] == 40.0 and second["autoattack_acc"] == pytest.approx(46)
    assert second["reported"] == 45.9 and second["additional_data"] == "no" and second["title"] == "Robust CLIP"


def test_a_rank_by_another_set_up_says_so(folder, record):
    record(folder / "lucky", "lucky", 0.5, attack="autoattack", fingerprint="other images")
    [board], _ = boards(folder)
    assert [row["setup"] for row in board.rows] == ["b", "a", "a", "a"] and board.note.endswith("(digits: data).")


def test_only_whole_white_box_records_are_ranked(folder, record):
    record(folder / "moved", "moved", 0.99, attack="autoattack", target="transfer", source="clip")
    record(folder / "cut", "cut", 0.99, attack="autoattack", status="partial", n=10)
    [board], unranked = boards(folder)
    assert len(board.rows) == 3
    assert sorted(unranked.values()) == ["not ranked: transfer", "not ranked: white-box, partial"]


def test_a_protocol_is_ranked_by_means_over_all_its_sets(tmp_path, record):
    protocol = {"name": "p", "sha": "1"}
    for name, sets in (("a", {"dtd": 0.2, "pets": 0.4}), ("b", {"dtd": 0.5, "pets": 0.3}), ("c", {"dtd": 0.9})):
        for data, robust in sets.items():
            record(tmp_path, name, robust, data=data, protocol=protocol)
    [board], unranked = boards(tmp_path)
    assert [(row["name"], round(row["robust_acc"])) for row in board.rows] == [("b", 40), ("a", 30)]
    assert board.title.startswith("mean of 2 sets; p 1: ") and "fewer than the 2 sets" in [*unranked.values()][0]


@pytest.mark.parametrize(
    "text, message",
    [
        ("name: fare", "expected a mapping with `model`"),
        ("model: fare\nyear: 2024", "unknown key 'year'"),
        ("model: fare\nreported: 40", "needs data, norm and eps"),
        (f"model: fare\n{BOARD}external: 400", "external is in per cent"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, text, message):
    (tmp_path / "e.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_entries(tmp_path)


def test_the_command(folder, capsys):
    assert cli.main(["report", str(folder), "--leaderboard", "--out", str(folder / "board.csv")]) == 0
    rows = list(csv.DictReader((folder / "board.csv").open()))
    assert [row["rank"] for row in rows] == ["1", "2", "3"] and {row["eps"] for row in rows} == {"8/255"}
    assert {"clean_acc", "autoattack_acc", "unreliable", "footnote"} <= set(rows[0])
    assert cli.main(["report", str(folder), "--leaderboard", "--out", str(folder / "board.html")]) == 0
    assert "best known" in (folder / "board.html").read_text()
    assert cli.main(["report", "--leaderboard"]) == 2
