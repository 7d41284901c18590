"""Shards that are not those that were indexed: replaced, listed twice, or of another set with the same index."""

import functools
import http.server
import os
import shutil
import threading

import pytest

from lightning_itm import ShardDataset, ShardStream
from lightning_itm.data.shards.stamps import is_same
from tests.helpers.shards import check_pairing, img2dataset_sample, png, streamed, write_tar


def write(path, numbers, keys=None):
    """Pictures and captions that say their numbers, under keys that count from 0 where they are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members = []
    for key, number in zip(keys or numbers, numbers, strict=True):
        for name, content in img2dataset_sample(number):
            members.append((f"{key:09d}.{name.split('.')[1]}", content))
    write_tar(path, members)


class TestLocal:
    def replace(self, path, members):
        """Write another shard with the size and the time of the first one."""
        status = path.stat()
        write_tar(path, members)
        os.truncate(path, status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def test_replaced_by_one_of_equal_size_and_time(self, tmp_path):
        write(tmp_path / "0.tar", range(10, 14))
        index = ShardDataset(tmp_path).contents.file
        others = [member for number in (20, 21, 22, 23) for member in img2dataset_sample(number)]
        self.replace(tmp_path / "0.tar", others)
        pairs = ShardDataset(tmp_path)
        with pytest.raises(
            RuntimeError, match=rf"0\.tar to be as it was indexed, got 000000020\.jpg .*Delete.*{index}"
        ):
            pairs[0]

    def test_replaced_by_one_with_other_sizes(self, tmp_path):
        write(tmp_path / "0.tar", range(10, 14))
        ShardDataset(tmp_path)
        shifted = [("x.txt", b"longer"), *img2dataset_sample(10), *img2dataset_sample(11), *img2dataset_sample(12)]
        self.replace(tmp_path / "0.tar", shifted)
        with pytest.raises(RuntimeError, match="to be as it was indexed, got "):
            ShardDataset(tmp_path)[0]

    def test_replaced_while_it_is_streamed(self, tmp_path):
        write(tmp_path / "0.tar", range(10, 14))
        stream = ShardStream(ShardDataset(tmp_path))
        write_tar(tmp_path / "0.tar", [("000000010.jpg", png(20) + b" "), ("000000010.txt", b"number 20")])
        with pytest.raises(
            RuntimeError, match=r"0\.tar to be as it was indexed, got 000000010 of \d+ bytes instead of"
        ):
            streamed(stream, num_workers=0)

    def test_captions_that_changed_while_they_are_streamed(self, tmp_path):
        write_tar(tmp_path / "0.tar", [("0.png", png(10)), ("0.txt", b"number 10\na number")])
        stream = ShardStream(ShardDataset(tmp_path))
        self.replace(tmp_path / "0.tar", [("0.png", png(10)), ("0.txt", b"number 20\na number")])
        with pytest.raises(
            RuntimeError, match=r"got the captions \['number 20', 'a number'\] of 0, and not 'number 10'"
        ):
            streamed(stream, num_workers=0)

    @pytest.mark.parametrize("key", ["a" * 150, "folder/" + "b" * 97, "über", "a.b/c"])
    def test_names_that_a_header_does_not_hold_are_read(self, key, tmp_path):
        write_tar(tmp_path / "0.tar", [(f"{key}.png", png(7)), (f"{key}.txt", b"number 7")])
        check_pairing(ShardDataset(tmp_path))

    def test_that_moved_with_its_index_is_not_indexed_anew(self, tmp_path):
        write(tmp_path / "here" / "0.tar", range(4))
        index = ShardDataset(tmp_path / "here").contents.file
        shutil.copytree(tmp_path / "here", tmp_path / "there")
        time = os.stat(tmp_path / "there" / os.path.basename(index)).st_mtime_ns
        shutil.rmtree(tmp_path / "here")
        check_pairing(ShardDataset(tmp_path / "there"))
        assert os.stat(tmp_path / "there" / os.path.basename(index)).st_mtime_ns == time

    @pytest.mark.parametrize(
        "copy", [shutil.copytree, lambda here, there: os.symlink(here, there)], ids=["copy", "link"]
    )
    def test_a_copy_beside_the_first_is_opened(self, copy, tmp_path):
        write(tmp_path / "here" / "0.tar", range(4))
        ShardDataset(tmp_path / "here")
        copy(tmp_path / "here", tmp_path / "there")
        check_pairing(ShardDataset(tmp_path / "there"))
        check_pairing(ShardDataset(tmp_path / "here"))

    def test_two_sets_do_not_share_an_index_file(self, tmp_path):
        for name in ("one", "other"):
            write(tmp_path / name / "0.tar", range(4))
        ShardDataset(tmp_path / "one", index=tmp_path / "index")
        os.utime(tmp_path / "other" / "0.tar", (1, 1))
        with pytest.raises(ValueError, match=r"index to be the index of .*other.*got that of .*one.*Name another file"):
            ShardDataset(tmp_path / "other", index=tmp_path / "index")
        check_pairing(ShardDataset(tmp_path / "one", index=tmp_path / "index"))


@pytest.mark.parametrize("again", ["0.tar", "./0.tar", "link.tar"])
def test_a_shard_that_is_listed_twice(again, tmp_path):
    write(tmp_path / "0.tar", range(4))
    (tmp_path / "link.tar").symlink_to(tmp_path / "0.tar")
    with pytest.raises(ValueError, match=r"every shard once, got .* twice .*List it once"):
        ShardDataset(["0.tar", again])


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def address(tmp_path):
    (tmp_path / "www").mkdir()
    handler = functools.partial(Quiet, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class TestRemote:
    def test_that_changed_since_it_was_indexed(self, address, tmp_path):
        write(tmp_path / "www" / "0.tar", range(8))
        pairs = ShardDataset(f"{address}/0.tar", index=tmp_path / "index")
        texts = [text for batch in streamed(ShardStream(pairs), num_workers=0) for text in batch["text"]]
        assert sorted(texts) == sorted(pairs.texts)
        write(tmp_path / "www" / "0.tar", range(100, 108), keys=range(8))
        os.utime(tmp_path / "www" / "0.tar", (1, 1))
        again = ShardDataset(f"{address}/0.tar", index=tmp_path / "index")
        with pytest.raises(RuntimeError, match=r"0\.tar to be as it was indexed, got \['\d+', None, 'Thu, 01 Jan 1970"):
            streamed(ShardStream(again), num_workers=0)
        (tmp_path / "index").unlink()
        check = ShardDataset(f"{address}/0.tar", index=tmp_path / "index")
        assert list(check.texts) == [f"number {number}" for number in range(100, 108)]

    def test_at_another_address_with_the_same_index(self, address, tmp_path):
        for folder in ("v1", "v2"):
            write(tmp_path / "www" / folder / "0.tar", range(4))
        ShardDataset(f"{address}/v1/0.tar", index=tmp_path / "index")
        ShardDataset(f"{address}/v1/0.tar?signature=abc", index=tmp_path / "index")
        with pytest.raises(ValueError, match=r"v2/0\.tar and the shards beside it, got that of .*v1/0\.tar"):
            ShardDataset(f"{address}/v2/0.tar", index=tmp_path / "index")


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        (["9", "a", "Mon"], ["9", "a", "Mon"], True),
        (["9", "a", "Mon"], ["8", "a", "Mon"], False),
        (["9", "a", "Mon"], ["9", "b", "Mon"], True),  # two servers, each with tags of its own
        (["9", "a", "Mon"], ["9", "b", "Tue"], False),
        (["9", "a", None], ["9", "b", None], False),
        (["9", None, None], ["9", None, None], True),
        ([None, None, None], ["9", "a", "Mon"], True),
        ([], ["9", "a", "Mon"], True),  # of an older index
        ([9, 123], [9, 124], False),
    ],
)
def test_is_same(then, now, expected):
    assert is_same(then, now) is expected

    def test_that_changed_within_a_second(self, address, tmp_path):
        """Neither the size nor the time that the server tells is another one."""
        path, url = tmp_path / "www" / "0.tar", f"{address}/0.tar"
        write_tar(path, [("0.png", png(10)), ("0.txt", b"number 10")])
        ShardDataset(url, index=tmp_path / "index")
        status = path.stat()
        write_tar(path, [("0.png", png(10)), ("0.txt", b"number 20")])
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert path.stat().st_size == status.st_size
        with pytest.raises(RuntimeError, match=r"got the captions \['number 20'\] of 0, and not 'number 10'"):
            streamed(ShardStream(ShardDataset(url, index=tmp_path / "index")), num_workers=0)
