"""docs/methods is what the code and the measured runs say."""

import collections
import dataclasses
import importlib.util
import math
import re

import pytest

from rvlm.arguments import recipes
from rvlm.data import load_data
from rvlm.methods import MethodConfig, build_method, list_methods, method_class
from rvlm.methods.prompts import PromptConfig
from rvlm.models import load_clip
from rvlm.training import train

from .pages import DOCS

PAGES = sorted((DOCS / "methods").glob("*.md"))


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", DOCS / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_is_what_the_code_and_the_runs_say(path, tables):
    text = path.read_text()
    assert tables.page(text) == text, "run python docs/tables.py"
    parts = re.findall(r"<!-- (?!end)(.*?) -->\n(.*?)<!-- end -->", text, re.S)
    assert parts and len(parts) == text.count("<!-- end -->") == text.count("<!-- ") / 2
    assert all(len(part.splitlines()) > 2 for _, part in parts), "an empty part"


def test_an_edited_figure_is_found(tables):
    text = (DOCS / "methods" / "tecoa.md").read_text()
    assert "91.0 ±0.6" in text and tables.page(text.replace("91.0 ±0.6", "99.0 ±0.6")) == text
    with pytest.raises(ValueError, match="has no row magic"):
        tables.results("digits | tecoa; magic")


def test_every_method_has_a_page_and_every_setting_a_row(tables):
    assert list(tables.METHODS) and set(tables.METHODS) == set(tables.SETTINGS) == set(list_methods())
    assert {path.stem for path in PAGES} == {page for page, *_ in tables.METHODS.values()} | {"index"}
    shared = {field.name for field in dataclasses.fields(MethodConfig)}
    prompts = {field.name for field in dataclasses.fields(PromptConfig)} - shared
    assert set(tables.SHARED) == shared and set(tables.PROMPTS) == prompts
    for name in list_methods():
        text = (DOCS / "methods" / f"{tables.METHODS[name][0]}.md").read_text()
        config = method_class(name).Config
        own = {field.name for field in dataclasses.fields(config)} - shared
        own -= prompts if issubclass(config, PromptConfig) else set()
        assert set(tables.SETTINGS[name]) == own, name
        assert f"<!-- presets: {name} -->" in text and (not own or f"<!-- settings: {name} -->" in text)
        for recipe in recipes():
            if recipe.removeprefix("digits/").startswith(name):
                assert f"`{recipe}`" in text, f"{recipe} is not on its page"


def ranges(tables):
    every = [("tecoa", key, limits) for key, limits in tables.SHARED.items()]
    every += [("advvlp", key, limits) for key, (limits, _) in tables.PROMPTS.items()]
    return every + [(name, key, limits) for name, own in tables.SETTINGS.items() for key, (limits, _) in own.items()]


def test_settings_outside_their_range_are_refused(tables):
    tried = 0
    for name, key, limits in ranges(tables):
        words = limits.removesuffix(", or a model").split(", ")
        if interval := re.fullmatch(r"\[(\d), (\d)([])])", limits):
            low, high, end = int(interval[1]), int(interval[2]), interval[3]
            fine, refused = [low, high if end == "]" else math.nextafter(high, 0)], [low - 0.1, high + 0.1]
            refused += [high] if end == ")" else []
            fine = [value for value in fine if not (key == "eps" and value > 0.9)]  # one step below the whole box
        elif least := re.match(r">= (\d)", limits):
            fine, refused = [int(least[1])], [int(least[1]) - 1]
        elif limits.startswith("positive"):
            fine, refused = [0.5], [0, -1.0]
        elif all(re.fullmatch(r"[a-z0-9_]+", word) for word in words) and words != ["true", "false"] and len(words) > 1:
            fine, refused = words, [] if "model" in limits else ["magic"]
        else:
            continue
        alike = {"visual_tokens": 4, "text_tokens": 4, "visual_depth": 2, "text_depth": 2} if key == "coupling" else {}
        for value in fine:
            build_method(name, **alike, **{key: value})
            tried += 1
        for value in refused:
            with pytest.raises(ValueError):
                build_method(name, **{key: value})
                pytest.fail(f"{name} took {key}={value!r}")
    assert tried > 60


def passes(name):
    """Passes of a training image through the student's tower and through others', with two steps."""
    data, seen, counts = load_data("digits", "train", limit=32), collections.Counter(), []
    clip, proxy, guide = load_clip("tiny-vit"), load_clip("tiny-rn"), load_clip("tiny-vit")
    clip.model.visual.register_forward_pre_hook(
        lambda tower, inputs: seen.update({"student" if tower is clip.model.visual else "others": len(inputs[0])})
    )
    for other in (proxy, guide):
        other.model.visual.register_forward_pre_hook(lambda _, inputs: seen.update(others=len(inputs[0])))
    teachers = {
        "hpt_gpd": {"proxy": proxy, "ga_epochs": 1}, "ard": {"teacher": guide},
        "mmt_ard": {"robust_teacher": guide, "clean_teacher": proxy},
    }  # fmt: skip
    method = build_method(name, epochs=1, batch_size=32, steps=2, **teachers.get(name, {}))
    stages, finish = method.stages, method.finish

    def begin():
        seen.clear()  # what was computed once
        return stages()

    def end():
        counts.append(dict(seen))
        finish()

    method.stages, method.finish = begin, end
    images = train(clip, data, method, progress=False).images
    return tuple(counts[0].get(of, 0) / images for of in ("student", "others"))


@pytest.mark.slow
@pytest.mark.parametrize("name", list_methods())
def test_the_passes_of_the_table(name, tables):
    assert passes(name) == tables.METHODS[name][3]
