from pathlib import Path

import pytest
import torch

from lightning_itm import ImageTextDataset


class TestMissingFiles:
    """Looked for when a set is made, and not only when a pair is read."""

    def paths(self, folder, num=100):
        for name in ("a", "b"):
            (folder / name).mkdir()
        # One folder with many files, which is listed, and one with few.
        return [folder / ("b" if number % 10 == 0 else "a") / f"{number:03d}.png" for number in range(num)]

    @pytest.mark.parametrize("num_missing", [0, 1, 5])
    def test_a_few_are_counted_and_named(self, num_missing, tmp_path, recwarn):
        paths = self.paths(tmp_path)
        for path in paths[num_missing:]:
            path.touch()
        ImageTextDataset(paths, [f"text {i}" for i in range(100)])
        said = [str(warning.message) for warning in recwarn if warning.filename == __file__]
        assert len(said) == (num_missing > 0)
        assert all(f"{num_missing} of 100 images are missing, the first: {paths[0]}" in text for text in said)

    @pytest.mark.parametrize(("num_missing", "allowed"), [(6, 0.05), (80, 0.5), (100, 0.99)])
    def test_many_are_an_error(self, num_missing, allowed, tmp_path):
        paths = [str(path) for path in self.paths(tmp_path)]
        for path in paths[num_missing:]:
            Path(path).touch()
        message = (
            rf"{allowed:.1%} of the 100 images to be missing .*found no file for {num_missing}, the first: {paths[0]}, "
        )
        with pytest.raises(FileNotFoundError, match=message):
            ImageTextDataset(paths, [f"text {i}" for i in range(100)], max_unreadable=allowed)

    def test_a_folder_that_is_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"found no file for 60, .*Is the folder right\?"):
            ImageTextDataset(
                [tmp_path / "no" / f"{number}.png" for number in range(60)], [f"text {i}" for i in range(60)]
            )

    def test_links_and_names_below_the_current_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("0.png").touch()
        for number in range(1, 60):
            Path(f"{number}.png").symlink_to("0.png")
        pairs = ImageTextDataset([f"{number}.png" for number in range(60)], [f"text {i}" for i in range(60)])
        assert len(pairs) == 60, "no error and no warning, which would be one here"


@pytest.mark.parametrize(
    "item", [{"bytes": b"", "path": "a.png"}, 3, torch.zeros(3, 4, 4)], ids=["dict", "int", "tensor"]
)
def test_a_sequence_of_what_is_no_image(item):
    class Column:
        def __len__(self):
            return 2

        def __getitem__(self, number):
            return item

    with pytest.raises(TypeError, match=f"paths, bytes, PIL images or arrays, got {type(item).__name__} for image 0"):
        ImageTextDataset(Column(), ["a", "b"])
