import pytest

from tests.helpers.pictures import cut_outs

NUM_FILES = 20


@pytest.fixture
def folder(tmp_path):
    """A folder with ``val2014/0.png`` to ``val2014/19.png``."""
    for number, image in enumerate(cut_outs(NUM_FILES)):
        path = tmp_path / "val2014" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    return tmp_path
