"""The demo: its story, its files, and that it repeats to the digit."""

import json

import pytest

from rvlm import demo


@pytest.mark.slow
def test_the_demo_tells_its_story_twice_the_same(tmp_path):
    page = demo.run(tmp_path / "a", quick=True)
    demo.run(tmp_path / "b", quick=True)
    first, second = (json.loads((tmp_path / d / "summary.json").read_text())["rows"] for d in "ab")
    strip = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]  # noqa: E731
    assert strip(first) == strip(second)
    at = {(row["name"], row["attack"], row["target"]): row for row in first}
    clip, tecoa = at["clip", "pgd-10", "white-box"], at["tecoa", "pgd-10", "white-box"]
    assert clip["clean"] > 0.85 and clip["robust"] < 0.15, "really attacked"
    assert tecoa["robust"] > clip["robust"] + 0.4
    assert at["tecoa", "pgd-50x3", "white-box"]["robust"] > tecoa["robust"] - 0.15, "what PGD-10 found holds up"
    assert at["resnet clip", "pgd-10", "transfer"]["robust"] > 0.7, "another architecture is hardly fooled"
    for row in first:
        assert (tmp_path / "a" / row["record"]).is_file()
    for name in ("images-clip.png", "images-tecoa.png", "accuracy.png", "accuracy.csv"):
        assert (tmp_path / "a" / name).stat().st_size > 0
    assert page.stat().st_size > 50_000
