"""Pages that show code: some run, every block and command line of them; of the others, the command lines parse."""

import ast
import contextlib
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from rvlm import attacks, cli
from rvlm.models import load_clip
from rvlm.training import zoo

from .pages import DOCS, commands, files

PAGES = ["index.md", "quickstart.md", "eps.md", "threat-models.md", "mistakes.md"]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SAID = re.compile(r"#\s*(?:(\w+Error|\w+Warning): (.+)|.*exit code (\d))")
ELSEWHERE = ("pip", "rvlm demo")  # .ci/run runs them
SHORT = {"eval": ["--limit", "8"], "train": ["--epochs", "1", "--limit", "32", "--eval_limit", "8"]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a page's commands run, with two of the photos that they name."""
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (40, 32), name == "cat" and "grey" or "white").save(tmp_path / "photos" / name / "1.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page, folder, monkeypatch):
    """With random weights in place of the bundled models, fewer samples and one epoch."""
    monkeypatch.setenv("RVLM_CACHE", str(folder / "cache"))
    for name, tiny in (("digits-vit", "tiny-vit"), ("digits-rn", "tiny-rn")):
        load_clip(tiny).save(folder / "cache" / "zoo" / f"{name}-{zoo._key(name)}")
    _run(page, SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["quickstart.md", "threat-models.md", "mistakes.md"])
def test_a_page_runs_word_for_word(page, folder):
    _run(page, {})


def _run(page, short):
    blocks, names = BLOCK.findall((DOCS / page).read_text()), {}
    assert blocks, "nothing would be tested"
    for language, text in blocks:
        if language == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                _command(line, short)
        elif match := re.match(r"# (\w+\.py)\n", text):
            Path(match[1]).write_text(text)
        else:
            _python(text, names)


def _command(line, short):
    words = shlex.split(line, comments=True)
    if not words or line.startswith(ELSEWHERE):
        return
    assert words[0] == "rvlm"
    command, said = words[1], SAID.search(line)
    flags = [] if "--limit" in words or "--print_config" in words else short.get(command, [])
    try:
        code = cli.main([*words[1:], *flags])
    except SystemExit as stop:
        code = stop.code
    assert code == (int(said[3]) if said else 0), line


def _python(text, names):
    lines = text.splitlines()
    for statement in ast.parse(text).body:
        said = SAID.search(lines[statement.end_lineno - 1])
        with _expected(said) if said else contextlib.nullcontext():
            exec(compile(ast.Module([statement], []), "page", "exec"), names)


def _expected(said):
    name, text = said[1], re.escape(said[2])
    if name.endswith("Error"):
        return pytest.raises({"ValueError": ValueError, "TypeError": TypeError}[name], match=text)
    return pytest.warns(getattr(attacks, name), match=text)


def test_the_runner_sees_what_it_should():
    with pytest.raises(pytest.fail.Exception):
        _python("pass  # ValueError: never raised", {})
    with pytest.raises(AssertionError):
        _command("rvlm ls cats", {})
    _command("rvlm ls cats    # exit code 2", {})
    names = {}
    _python("x = 1\nraise_it = int\nraise_it('a')  # ValueError: invalid literal\nx = 2", names)
    assert names["x"] == 2


ALL = [
    DOCS.parent / "README.md",
    *(path for folder in (".", "methods", "extending") for path in DOCS.glob(f"{folder}/*.md")),
]
LINES = [
    (str(path.relative_to(DOCS.parent)), words)
    for path in sorted(ALL)
    if path not in [DOCS / page for page in PAGES]
    for words in commands(path)
    if words != ["--help"]
]


@pytest.mark.parametrize("page, words", LINES, ids=lambda part: part if isinstance(part, str) else " ".join(part)[:60])
def test_a_command_line_parses(page, words, tmp_path, monkeypatch):
    for name, code in files(DOCS.parent / page).items():
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    try:
        cli._parse(words[0], words[1:])
    except SystemExit as stop:
        assert stop.code == 0, "only --help ends here"


def test_there_are_command_lines():
    assert len(LINES) > 80 and {str(Path(page).parent) for page, _ in LINES} == {
        ".", "docs", "docs/methods", "docs/extending",
    }  # fmt: skip


def test_links_lead_somewhere():
    for path in ALL:
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if not link.startswith("https://") and "reference/" not in link:  # the reference is written with the site
                assert (path.parent / link).exists(), f"{path.name}: {link}"
