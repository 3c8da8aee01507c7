"""Reports of runs: every row is a record's, unlike ones are told apart, every format holds the same rows."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from rvlm import cli
from rvlm.data.base import Data
from rvlm.evaluation import evaluate, write_evaluation
from rvlm.report import facts, figures, gather, hypervolume, pareto, result_tables, training_curves
from rvlm.report.tables import Table, csv_text, latex


def test_a_row_is_the_summary_row_of_its_record(tmp_path):
    pixels = torch.arange(8).div(10).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    data = Data(
        "toy", "test", ["dark", "bright"], (torch.arange(8) > 3).long(), torch.arange(8), lambda i: pixels[i], n_total=8
    )

    def model(x):
        z = 20 * (x.flatten(1).mean(1) - 0.35)
        return torch.stack([-z, z], 1)

    found = evaluate(model, data, attack="pgd-10", eps="8/255", progress=False)
    written = write_evaluation(tmp_path / "run", "toy model", found, data, model)
    [row] = gather([tmp_path]).rows
    assert {key: row[key] for key in written if key != "record"} == {k: v for k, v in written.items() if k != "record"}
    assert row["record"] == str(tmp_path / "run" / "result" / written["record"].rpartition("/")[2])


def test_unlike_threats_and_protocols_do_not_share_a_table(tmp_path, record):
    record(tmp_path / "a", "clip")
    record(tmp_path / "a", "clip", eps="4/255")
    record(tmp_path / "a", "clip", attack="autoattack")
    record(tmp_path / "a", "clip", target="transfer", source="resnet")
    record(tmp_path / "a", "clip", status="partial", n=20)
    record(tmp_path / "a", "fare", protocol={"name": "fast", "sha": "12ab"})
    titles = [table.title for table in result_tables(gather([tmp_path]))]
    assert sorted(titles) == sorted([
        "pgd-10, Linf 8/255, white-box", "pgd-10, Linf 4/255, white-box", "autoattack, Linf 8/255, white-box",
        "pgd-10, Linf 8/255, transfer from resnet", "pgd-10, Linf 8/255, white-box, partial",
        "fast 12ab: pgd-10, Linf 8/255, white-box",
    ])  # fmt: skip


def test_rows_that_differ_in_more_than_the_model_say_so(tmp_path, record):
    record(tmp_path / "a", "clip")
    record(tmp_path / "b", "fare")
    [table] = result_tables(gather([tmp_path]))
    assert not table.note and "setup" not in table.columns
    record(tmp_path / "c", "tecoa", seed=1, fingerprint="g")
    found = gather([tmp_path])
    [table] = result_tables(found)
    assert [row["setup"] for row in table.rows] == ["a", "a", "b"]
    assert table.note == "Rows with different letters differ in more than the model (digits: data, seed)."
    titles = []
    for _, png in figures(found, tmp_path / "figures"):
        titles.append(png.name)
    assert titles == ["01-clean-against-robust.png"]


def test_one_name_for_several_models_gets_its_run(tmp_path, record):
    for run in ("x", "y"):
        record(tmp_path / run, "after", sha=run)
    record(tmp_path / "x", "before", sha="same")
    record(tmp_path / "z", "other", sha="same")
    assert sorted(row["name"] for row in gather([tmp_path]).rows) == ["before", "other", "x: after", "y: after"]


def test_means_are_of_the_sets_that_all_models_have(tmp_path, record):
    for name, sets in (("clip", {"dtd": 0.2, "pets": 0.4, "cars": 0.9}), ("fare", {"dtd": 0.6, "pets": 0.8})):
        for data, robust in sets.items():
            record(tmp_path, name, robust, data=data)
    found = gather([tmp_path])
    [table] = result_tables(found)
    means = {row["name"]: row["robust"] for row in table.rows if row["data"] == "mean of 2 sets"}
    assert means == pytest.approx({"clip": 0.3, "fare": 0.7}) and "dtd, pets" in table.note
    drawn = dict(figures(found, tmp_path / "figures"))
    assert list(drawn) == ["Clean against robust", "By data set"]
    lines = drawn["By data set"].with_suffix(".csv").read_text().splitlines()
    assert lines == [",clip,fare", "dtd,20.0,60.0", "pets,40.0,80.0"]


def test_curves_over_radii_begin_at_the_clean_accuracy(tmp_path, record):
    for eps, robust in (("4/255", 0.5), ("2/255", 0.7)):
        record(tmp_path, "clip", robust, eps=eps)
    (caption, png), *rest = figures(gather([tmp_path]), tmp_path / "figures")
    rows = list(csv.reader(png.with_suffix(".csv").open()))
    assert caption == "Accuracy over the radius" and not rest
    assert [row[:3] for row in rows[1:]] == [["clip", "0", "0.9"], ["clip", "2/255", "0.7"], ["clip", "4/255", "0.5"]]


def test_pareto_and_training_curves_keep_their_numbers(tmp_path):
    png = pareto(tmp_path / "p.png", {"a": (0.9, 0.1), "b": (0.8, 0.5), "c": (0.7, 0.4)}, "t")
    assert Image.open(png).size[0] > 600
    assert hypervolume([(0.9, 0.1), (0.8, 0.5), (0.7, 0.4)]) == pytest.approx(0.8 * 0.5 + 0.1 * 0.1)
    assert hypervolume([(1.0, 1.0), (0.5, 0.5)]) == 1 and hypervolume([]) == 0
    assert png.with_suffix(".csv").read_text().splitlines()[1:] == [
        "a,0.9,0.1,True",
        "b,0.8,0.5,True",
        "c,0.7,0.4,False",
    ]
    png = training_curves(
        tmp_path / "t.png", {"run": [{"stage": 0, "loss": 2.0, "robust_acc": 0.1}, {"stage": 1, "loss": 1.0}]}
    )
    lines = png.with_suffix(".csv").read_text().splitlines()
    assert lines == ["name,epoch,stage,loss,robust_acc", "run,1,0,2.0,0.1", "run,2,1,1.0,"]


def test_failed_checks_stand_in_the_table_and_under_it(tmp_path, record):
    record(
        tmp_path, "clip", checks=[{"id": "loss_increases", "ok": False, "detail": "it fell"}, {"id": "x", "ok": True}]
    )
    found = gather([tmp_path])
    [table] = result_tables(found)
    assert table.rows[0]["checks"] == "loss_increases" and "checks" in table.columns
    about = "WARNING loss_increases: clip on digits, pgd-10, Linf 8/255, white-box"
    assert facts(found)[about] == "it fell"


def test_cells_of_a_transfer_matrix_go_by_their_source(tmp_path):
    record = {
        "schema": "rvlm.transfer/1", "status": "complete", "data": {"name": "digits", "n_used": 10, "fingerprint": "f"},
        "threat": {"norm": "linf", "eps_str": "8/255", "target": "transfer"}, "attack": {"name": "pgd-10", "seed": 0},
        "sources": ["vit", "rn"], "targets": ["vit", "rn"], "clean_acc": [0.9, 0.8],
        "robust_acc": [[0.1, 0.7], [0.6, 0.2]],
        "checks": [], "perf": {"wall_s": 1.0}, "env": {"rvlm": "0", "torch": "2", "device": "cpu"},
    }  # fmt: skip
    (tmp_path / "transfer.json").write_text(json.dumps(record))
    tables = {table.title: table.rows for table in result_tables(gather([tmp_path]))}
    found = {title: [(row["name"], row["clean"], row["robust"]) for row in rows] for title, rows in tables.items()}
    assert found == {
        "pgd-10, Linf 8/255, white-box": [("rn", 0.8, 0.2), ("vit", 0.9, 0.1)],
        "pgd-10, Linf 8/255, transfer from vit": [("rn", 0.8, 0.7)],
        "pgd-10, Linf 8/255, transfer from rn": [("vit", 0.9, 0.6)],
    }


def test_what_is_no_record_is_named(tmp_path, record):
    record(tmp_path / "run", "clip")
    (tmp_path / "run" / "result" / "cka.json").write_text('{"schema": "rvlm.analysis/1"}')
    found = gather([tmp_path, tmp_path / "run", tmp_path / "run" / "result"])
    assert len(found.rows) == 1, "a record that is found on several ways is one row"
    assert list(found.left_out.values()) == ["rvlm.analysis/1 has no clean and robust figure"]
    with pytest.raises(FileNotFoundError, match="expected a run folder"):
        gather([tmp_path / "no"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no record"):
        gather([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="nothing to report in 1 files: .*cka.json"):
        gather([tmp_path / "run" / "result" / "cka.json"])
    (tmp_path / "run" / "result" / "half.json").write_text('{"schema": "rvlm.result/1", "na')
    with pytest.raises(ValueError, match="half.json is no JSON"):
        gather([tmp_path])
    (tmp_path / "run" / "result" / "half.json").write_text('{"schema": "rvlm.result/1", "name": "x"}')
    with pytest.raises(ValueError, match="no whole record"):
        gather([tmp_path])


def test_a_summary_stands_for_records_that_are_gone(tmp_path, record):
    row = dict(name="clip", clean=0.9, robust=0.1, eps="8/255", norm="linf", attack="pgd-10", target="white-box",
               samples=10, record="result/gone.json")  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps({"schema": "rvlm.summary/1", "rows": [row]}))
    [table] = result_tables(gather([tmp_path]))
    assert table.title == "pgd-10, Linf 8/255, white-box, unknown" and table.rows[0]["robust"] == 0.1


def test_every_format_holds_every_row(tmp_path, record, capsys):
    for name, robust in (("clip", 0.03), ("a_b & $c", 0.44)):
        record(tmp_path / "runs", name, robust)
    (tmp_path / "runs" / "metrics.jsonl").write_text('{"stage": 0, "epoch": 0, "loss": 1.5, "robust_acc": 0.5}\n')
    for ending in ("html", "md", "csv", "tex"):
        assert cli.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / f"r.{ending}")]) == 0
        text = (tmp_path / f"r.{ending}").read_text()
        assert ("0.44" if ending == "csv" else "44.0") in text and ("0.03" if ending == "csv" else "3.0") in text
    assert r"a\_b \& \$c & digits" in (tmp_path / "r.tex").read_text()
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert {row["eps"] for row in rows} == {"8/255"} and all(row["record"].endswith(".json") for row in rows)
    page = (tmp_path / "r.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "http" not in page
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", (tmp_path / "r.md").read_text())
    assert len(pictures) == 2 and all((tmp_path / picture).is_file() for picture in pictures)
    assert all((tmp_path / picture).with_suffix(".csv").is_file() for picture in pictures)
    capsys.readouterr()
    assert cli.main(["report", str(tmp_path / "runs")]) == 0
    assert "| clip | digits | 90.0" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "r.docx")]) == 2
    assert "expected a file that ends in .html" in capsys.readouterr().err
    assert cli.main(["report"]) == 2


def test_cells_of_latex_and_csv():
    table = Table(
        "50 % of {x}~\\", [{"name": "a", "clean": 0.5, "clean_ci": (0.4, 0.6)}], {"name": "m", "clean": "c %"}
    )
    assert r"\caption{50 \% of \{x\}\textasciitilde{}\textbackslash{}.}" in latex([table])
    assert "a & 50.0 (40-60)" + r" \\" in latex([table])
    assert csv_text([table]).splitlines() == ["table,name,clean,clean_low,clean_high", "50 % of {x}~\\,a,0.5,0.4,0.6"]


def test_curves_over_steps_fall_to_the_robust_accuracy(measured, tmp_path):
    folder, found, _ = measured
    drawn = {caption.partition(":")[0]: (caption, png) for caption, png in figures(gather([folder]), tmp_path / "f")}
    caption, png = drawn["Accuracy over steps"]
    assert caption.endswith("toy; pgd-5@alpha=1/255,fmn-2,square-20, Linf 4/255, white-box") and png.is_file()
    rows = list(csv.DictReader(png.with_suffix(".csv").open()))
    plain = [row for row in rows if row["name"] == "plain"]
    assert [int(row["step"]) for row in plain] == [0, 1, 2, 3, 4, 5, 5, *range(5, 26)]
    assert [row["stage"] for row in plain[5:8]] == ["pgd-5@alpha=1/255", "fmn-2", "square-20"]
    shares = [float(row["accuracy"]) for row in plain]
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1] == pytest.approx(found["plain"].robust)
    assert float(plain[-1]["mean_loss"]) > float(plain[7]["mean_loss"]) and plain[6]["mean_loss"] == "nan"


def test_calibration_is_pooled_over_data_sets(measured, tmp_path):
    folder, found, data = measured
    drawn = {caption.partition(":")[0]: png for caption, png in figures(gather([folder]), tmp_path / "f")}
    rows = list(csv.DictReader(drawn["Confidence and accuracy"].with_suffix(".csv").open()))
    mine = [row for row in rows if (row["name"], row["images"]) == ("plain", "attacked")]
    assert sum(int(row["samples"]) for row in mine) == 30
    assert float(mine[0]["ece"]) == pytest.approx(found["plain"].calibration()["robust"]["ece"])
    other = dataclasses.replace(data, name="other")
    write_evaluation(tmp_path / "o", "plain", found["plain"], data, torch.nn.Flatten())
    path = write_evaluation(tmp_path / "p", "plain", found["plain"], other, torch.nn.Flatten())["record"]
    (tmp_path / "o" / "result" / "other.json").write_text((tmp_path / "p" / path).read_text())
    drawn = {caption.partition(":")[0]: png for caption, png in figures(gather([tmp_path / "o"]), tmp_path / "g")}
    both = list(csv.DictReader(drawn["Confidence and accuracy"].with_suffix(".csv").open()))
    attacked = [row for row in both if row["images"] == "attacked"]
    assert [2 * int(row["samples"]) for row in mine] == [int(row["samples"]) for row in attacked]
    assert float(attacked[0]["ece"]) == pytest.approx(float(mine[0]["ece"]))


def test_images_stand_beside_the_words_before_and_after(measured, tmp_path, monkeypatch):
    folder, found, data = measured
    monkeypatch.chdir(folder / "result")
    records = sorted(file.name for file in Path().glob("*.json"))
    assert {row["run"] for row in gather(records).rows} == {folder.name}, "not result"
    assert cli.main(["report", *records, "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    alts = re.findall(r'<img alt="([^"]*)"', page)
    assert sum("Images and words: plain on toy; pgd-5" in alt for alt in alts) == 1 and len(set(alts)) == len(alts)
    assert "<h2>Images and words</h2>" in page and page.count("data:image/png") == len(alts)
    rows = list(csv.DictReader(min((tmp_path / "r-figures").glob("*images-and-words.csv")).open()))
    evaluation = found["plain"]
    first = [row for row in rows if row["image"] == "0"]
    for which, top, prob in (("clean", evaluation.top_clean, evaluation.prob_clean),
                             ("adversarial", evaluation.top_adv, evaluation.prob_adv)):  # fmt: skip
        said = [(row["word"], float(row["probability"])) for row in first if row["which"] == which]
        assert [word for word, _ in said] == [data.class_names[c] for c in top[0]]
        assert [p for _, p in said] == pytest.approx(prob[0].tolist())
    assert {row["image"] for row in rows} == {"0", "1", "2"}, "the first three, whatever became of them"
    monkeypatch.setattr("rvlm.report.pages.MOST_GRIDS", 1)
    few = gather([folder])
    drawn = figures(few, tmp_path / "f")
    assert sum(caption.startswith("Images and words") for caption, _ in drawn) == 1
    assert facts(few)["images"].startswith("those of 1 records of 2")
