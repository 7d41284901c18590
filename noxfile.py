"""The suite and its checks in environments of their own: ``nox -s tests``.

Others: ``lowest``, ``newest``, ``lint``, ``bare``, ``docs``, ``build``. What follows ``--`` goes to pytest:
``nox -s lowest -- -m "not slow"``.
"""

import shutil
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
def bare(session: nox.Session) -> None:
    """See that the package alone, without any of its extras, works and names what is missing."""
    session.install("-e", ".", "pytest", "pytest-xdist", "hypothesis", "jaxtyping", "beartype", "scikit-image")
    session.run("python", "-m", "pytest", "tests/test_extras.py", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build wheel and sdist into ``dist/``, check them, and use the wheel in an environment that has nothing else."""
    session.install("build", "twine")
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build", "--installer", "uv")
    built = sorted(str(path) for path in Path("dist").iterdir())
    session.run("twine", "check", "--strict", *built)
    session.install(next(path for path in built if path.endswith(".whl")))
    folder = session.create_tmp()
    with session.chdir(folder):  # where the clone can't be imported
        session.run("python", "-c", "import lightning_itm; print(lightning_itm.__version__, lightning_itm.__file__)")
        session.run("lightning-itm", "--help", silent=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site into ``site/``, with warnings as errors."""
    session.install("-e", ".[docs]")
    session.run("mkdocs", "build", "--strict")


def _pytest(session: nox.Session, *options: str) -> None:
    session.run("uv", "pip", "list", external=True)  # so that a log says what was tested
    session.run("python", "-m", "pytest", *options, *session.posargs)
