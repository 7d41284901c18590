"""What the site shows, run as it stands there, and the site itself."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_itm.cli import main
from tests.helpers.documented import small_model, small_sets

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "api")
CODE = re.compile(r"(<!-- not run: .+ -->\n+)?```python\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"^lightning-itm (.*)$", re.MULTILINE)
SMALL = ["--model.model_name", "tiny-vit", "--model.pretrained", "null", "--data.num_workers", "0"]
SMALL += ["--data.batch_size", "16", "--trainer.max_epochs", "1", "--trainer.precision", "32-true"]
SMALL += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.stem
)
def test_the_code_of_a_page_runs(page, tmp_path):
    """No weights can be downloaded here: a small model stands in, and nothing else is changed."""
    names = small_sets(tmp_path)
    for skipped, code in CODE.findall(page.read_text()):
        if skipped:
            compile(code, page.name, "exec")
        else:
            exec(small_model(code), names)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # of Lightning's CLI
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_the_commands_of_all_pages_run(tmp_path, monkeypatch):
    small_sets(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-itm"])
    commands = [shlex.split(command) for page in PAGES for command in COMMAND.findall(page.read_text())]
    assert {given[0] for given in commands} == {"fit", "validate", "export", "shards"}
    for given in sorted(commands, key=lambda given: given[0] != "fit"):  # the others find a checkpoint
        main([*given, *SMALL] if given[0] in ("fit", "validate") else given)
        if not (tmp_path / "runs").exists():
            (tmp_path / "runs").mkdir()
            shutil.copy(next(tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt")), "runs/last.ckpt")
    assert (tmp_path / "clip-recipes" / "open_clip_config.json").exists()


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
