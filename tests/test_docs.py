"""What README and site show, run as it stands there, and the site itself."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest

from lightning_itm import ImageTextDataModule
from lightning_itm.cli import main
from tests.helpers.documented import SMALL, small_model, small_sets, write_checkpoint
from tests.helpers.tiny import SILENT, tiny_pairs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "api")]
CODE = re.compile(r"(<!-- not run: .+ -->\n+)?```python\n(.*?)```", re.DOTALL)
SHELL = re.compile(r"```bash\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"^(?:\.venv/bin/)?lightning-itm (.*)$", re.MULTILINE)
SCRIPT = re.compile(r"(?:^|&& )(?:\S*/)?python ([a-z]+/\S+\.py)(.*)$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?://)([^)#]*)(?:#[^)]*)?\)")
WARNINGS = (
    "ignore:The number of training batches",
    "ignore:Precision bf16-mixed is not supported by the model summary",
    "ignore:Starting from v1.9.0, `tensorboardX` has been removed",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:The dirpath has changed",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:The run has .* optimizer steps and `warmup_steps=200`",
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",  # of Lightning's CLI
)


def warnings_of_small_runs(function):
    """Leave out what Lightning says of runs as short as these."""
    for one in WARNINGS:
        function = pytest.mark.filterwarnings(one)(function)
    return function


def pages_with(pattern):
    return [pytest.param(page, id=page.stem) for page in PAGES if pattern.search(page.read_text())]


@warnings_of_small_runs
@pytest.mark.parametrize("page", pages_with(CODE))
def test_the_code_of_a_page_runs(page, tmp_path):
    """No weights can be downloaded here: a small model stands in, and nothing else is changed."""
    names = small_sets(tmp_path)
    for skipped, code in CODE.findall(page.read_text()):
        if skipped:
            compile(code, page.name, "exec")
        else:
            exec(small_model(code), names)


@pytest.mark.slow
@warnings_of_small_runs
@pytest.mark.parametrize("page", pages_with(COMMAND))
def test_the_commands_of_a_page_run(page, tmp_path, monkeypatch):
    """A small model in float32 on a small set, for one epoch, and nothing else is changed."""
    small_sets(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.setattr(sys, "argv", ["lightning-itm"])
    commands = [shlex.split(command) for command in COMMAND.findall(page.read_text())]
    if any("runs/last.ckpt" in given for given in commands):
        write_checkpoint(tmp_path)
    for given in commands:
        main([*given, *SMALL] if given[0] in ("fit", "validate", "predict", "mine") else given)
    assert {given[0] for given in commands} <= {"fit", "validate", "predict", "mine", "export", "shards"}
    outputs = [given[given.index("--output") + 1] for given in commands if "--output" in given]
    assert all(any((tmp_path / output).iterdir()) for output in outputs)


def test_an_encoder_of_ones_own_has_ten_lines_and_trains():
    code = CODE.findall((ROOT / "docs" / "guides" / "own-model.md").read_text())[0][1]
    assert len([line for line in code.split("class MyEncoder")[1].splitlines() if line.strip()]) <= 10
    names = {}
    exec(code, names)
    model = names["MyEncoder"](image_dim=768, learning_rate=1e-3)
    data = ImageTextDataModule(tiny_pairs(), tiny_pairs(), batch_size=8, num_workers=0)
    trainer = L.Trainer(max_epochs=2, **SILENT)
    trainer.fit(model, datamodule=data)
    assert "val/rsum" in trainer.callback_metrics


def test_all_commands_are_shown():
    shown = {command.split()[0] for page in PAGES for command in COMMAND.findall(page.read_text())}
    assert shown == {"fit", "validate", "predict", "mine", "export", "shards"}


@pytest.mark.slow
def test_scripts_have_the_options_that_are_shown():
    """They take minutes to hours: here each only says which options it has."""
    shown = {}
    for page in PAGES:
        for block in SHELL.findall(page.read_text()):
            for script, options in SCRIPT.findall(block):
                shown.setdefault(script, set()).update(re.findall(r"--[a-z0-9-]+", options))
    assert len(shown) >= 9
    environment = {**os.environ, "COLUMNS": "200"}
    for script, options in shown.items():
        command = [sys.executable, script, "--help"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
        assert run.returncode == 0, run.stderr
        assert not [option for option in options if option not in run.stdout], script


def test_tables_of_results_are_printed_from_the_file():
    command = [sys.executable, "benchmarks/negatives.py", "--setting", "icons", "--table"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "hardness 9" in run.stdout


def test_extras_that_are_shown_exist():
    text = (ROOT / "pyproject.toml").read_text()
    shown = {
        extra
        for page in PAGES
        for names in re.findall(r'\.\[([a-z,]+)\]"', page.read_text())
        for extra in names.split(",")
    }
    assert shown >= {"demo", "dev", "docs", "hf", "lora", "plot"}
    assert not [extra for extra in shown if not re.search(rf"^{extra} = \[", text, re.MULTILINE)]


def test_the_readme_is_short_and_its_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    first = CODE.findall(readme)[0][1]  # from a table of one's own to a model that open_clip loads
    assert len([line for line in first.splitlines() if line.strip()]) <= 15
    assert 'train="train.csv"' in first
    links = LINK.findall(readme)
    assert len(links) >= 15
    assert not [link for link in links if not (ROOT / link).exists()]


def test_each_message_of_the_faq_is_one_of_ours():
    source = "".join(path.read_text() for path in (ROOT / "lightning_itm").rglob("*.py"))
    titles = re.findall(r'^### "(.*)"$', (ROOT / "docs" / "faq.md").read_text(), flags=re.MULTILINE)
    assert len(titles) >= 8
    for title in titles:
        assert all(part in source for part in re.split(r"\d[\d.]*%", title)), title


def test_api_pages_have_what_the_rooms_export():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import docs_api
    finally:
        sys.path.remove(str(ROOT / "tools"))
    for room in docs_api.ROOMS:
        page = ROOT / "docs" / "api" / f"{room.rpartition('.')[2]}.md"
        assert page.read_text() == docs_api.page(room), f"run `python tools/docs_api.py`: {room}"


def test_the_site_builds_without_a_warning(tmp_path):
    """Links, anchors and references are checked by MkDocs itself."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    text = (tmp_path / "site" / "api" / "losses.html").read_text()
    assert "<math" in text
    assert ":class:" not in text
