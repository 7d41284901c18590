"""The suite and its checks in environments of their own: ``nox -s tests``, ``lowest``, ``newest``, ``lint``, ``docs``.

What follows ``--`` goes to pytest: ``nox -s lowest -- -m "not slow"``.
"""

from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "uv"
nox.options.sessions = ["tests", "lint"]


@nox.session
def tests(session: nox.Session) -> None:
    """Run the suite on what an installation brings today."""
    session.install("-e", ".[dev]")
    _pytest(session)


@nox.session
def lowest(session: nox.Session) -> None:
    """Run the suite on the lower bounds that pyproject.toml declares."""
    session.install("--resolution", "lowest-direct", "-e", ".[dev]")
    _pytest(session)


@nox.session
def newest(session: nox.Session) -> None:
    """Run the suite on the newest releases of everything, with warnings as errors."""
    session.install("--upgrade", "-e", ".[dev]")
    pytest_options = nox.project.load_toml("pyproject.toml")["tool"]["pytest"]["ini_options"]
    first, *others = pytest_options["filterwarnings"]
    assert first == "default", "the other lines of `filterwarnings` are exceptions to this one"
    _pytest(session, "--override-ini", "\n".join(["filterwarnings=error", *others]))


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, types, import rules and workflows."""
    session.install("-e", ".[dev]")
    session.run("ruff", "format", "--check")
    session.run("ruff", "check")
    session.run("mypy")
    session.run("lint-imports")
    session.run("python", "tools/prose.py")
    workflows = [str(path) for path in sorted(Path(".github/workflows").glob("*.yml"))]
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    session.run("zizmor", "--offline", ".github")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site into ``site/``, with warnings as errors."""
    session.install("-e", ".[docs]")
    session.run("mkdocs", "build", "--strict")


def _pytest(session: nox.Session, *options: str) -> None:
    session.run("uv", "pip", "list", external=True)  # so that a log says what was tested
    session.run("python", "-m", "pytest", *options, *session.posargs)
