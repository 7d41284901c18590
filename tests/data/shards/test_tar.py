"""What a tar file holds, in whatever order, and what is broken in it: named, left out, and shifting nothing."""

import json

import pytest
import torch

from lightning_itm import ShardDataset, ShardStream
from tests.helpers.shards import check_pairing, img2dataset_sample, png, streamed, write_img2dataset, write_tar

FAULTS = {
    "without a caption": (
        [*img2dataset_sample(0), ("000000001.jpg", png(1)), *img2dataset_sample(2)],
        "1 without a caption (the first: {shard}, key '000000001')",
    ),
    "an empty caption": (
        [*img2dataset_sample(0), *img2dataset_sample(1, caption=" "), *img2dataset_sample(2)],
        "1 without a caption (the first: {shard}, key '000000001')",
    ),
    "without an image": (
        [*img2dataset_sample(0), ("000000001.txt", b"number 1"), *img2dataset_sample(2)],
        "1 without an image (the first: {shard}, key '000000001')",
    ),
    "a key twice": (
        [*img2dataset_sample(0), *img2dataset_sample(2), ("000000000.jpg", png(1))],
        "1 with a key that came before (the first: {shard}, key '000000000')",
    ),
}


@pytest.mark.parametrize("kinds", [("jpg", "txt"), ("jpg", "json"), ("txt", "jpg"), ("json", "txt", "jpg")])
def test_any_order_of_members(kinds, tmp_path):
    members = dict(img2dataset_sample(7))
    write_tar(tmp_path / "a.tar", [(f"000000007.{kind}", members[f"000000007.{kind}"]) for kind in kinds])
    check_pairing(ShardDataset(tmp_path))


def test_texts_and_names_of_any_kind(tmp_path):
    samples = {
        "caf\udce9": (json.dumps({"caption": "a whole pair: \U0001f600"}).encode(), "a whole pair: \U0001f600"),
        "folder.of/日本": (json.dumps({"texts": ["犬", "dog"], "text_ids": ["x", "y"]}).encode(), "犬"),
        "b": (json.dumps({"texts": [], "caption": "the caption"}).encode(), "the caption"),
        "c": (json.dumps(["a", "list"]).encode(), "of the text file"),
    }
    members = []
    for key, (facts, _) in samples.items():
        members += [(f"{key}.PNG", png(7)), (f"{key}.json", facts)]
        members += [(f"{key}.txt", b"\xef\xbb\xbfof the text file" if key == "c" else b"")]
    write_tar(tmp_path / "0.tar", members)
    pairs = ShardDataset(tmp_path)
    first = [int((pairs.text_image_id == image).nonzero()[0]) for image in range(4)]
    assert [pairs.texts[text] for text in first] == [text for _, text in samples.values()]
    assert pairs.contents.key[:] == list(samples)
    assert torch.equal(pairs.load_image(1), pairs.load_image(2))


class TestCaptions:
    def read(self, tmp_path, *samples):
        members = [(f"{key}.png", png(key)) for key in range(len(samples))]
        members += [(f"{key}.{kind}", data) for key, sample in enumerate(samples) for kind, data in sample.items()]
        write_tar(
            tmp_path / "0.tar",
            sorted((name, data if isinstance(data, bytes) else data.encode()) for name, data in members),
        )
        return ShardDataset(tmp_path)

    def test_lines_and_lists_are_several(self, tmp_path):
        """The shards of CLIP_benchmark have five lines per ``.txt``. A folder of the same files gives the same texts."""
        five = "".join(f"caption {number}\r\n" for number in range(5))
        caption = {"caption": ["a dog", "a cat"]}
        pairs = self.read(
            tmp_path, {"txt": five}, {"json": json.dumps(caption)}, {"json": json.dumps({"texts": "one\ntwo"})}
        )
        assert pairs.texts[:] == [*five.split("\r\n")[:5], "a dog", "a cat", "one\ntwo"]
        assert pairs.text_image_id.tolist() == [0] * 5 + [1, 1, 2]

    @pytest.mark.parametrize("value", ["NaN", "3", '{"en": "a tree"}', "[[]]", '[["a"]]', r'"half \ud83d"', "true"])
    def test_what_is_no_text_is_left_out_and_named(self, value, tmp_path):
        samples = {"txt": "a"}, {"json": f'{{"caption": {value}}}'}, {"json": f'{{"texts": ["b", {value}]}}'}
        with pytest.warns(
            UserWarning, match=r"2 with a caption that is no text \(the first: .*0\.tar, key '1': "
        ) as said:
            assert self.read(tmp_path, *samples).texts[:] == ["a", "b"]
        assert len(said) == 1

    @pytest.mark.parametrize(
        "odd", ["[" * 100_000, '{"id": ' + "1" * 5000 + "}", "{", b"\xff", '{"caption":"a","caption":"b"}']
    )
    def test_an_odd_json_is_left_out_and_named(self, odd, tmp_path):
        with pytest.warns(UserWarning, match=r"2 with a \.json that can't be read \(the first: .*0\.tar, key '1': "):
            pairs = self.read(tmp_path, {"txt": "a"}, {"txt": "b", "json": odd}, {"json": odd})
        assert pairs.texts[:] == ["a", "b"]

    @pytest.mark.parametrize("ids", [[10**30], [-1], [0.0], [True], "0", [0, 1]])
    def test_ids_that_are_none_are_counted_anew(self, ids, tmp_path):
        assert self.read(tmp_path, {"json": json.dumps({"texts": ["a"], "text_ids": ids})}).texts[:] == ["a"]

    def test_encodings(self, tmp_path):
        texts = [{"txt": "a café".encode(code)} for code in ("utf-8-sig", "utf-16", "cp1252")]
        with pytest.warns(UserWarning, match=r"1 with a \.txt that is no UTF-8 \(the first: .*0\.tar, key '2': .*0xe9"):
            assert self.read(tmp_path, *texts).texts[:] == ["a café", "a café"]


def test_files_of_macos_are_passed_over(tmp_path):
    junk = b"\0\5\x16\7\xff"
    members = [
        entry
        for number in range(3)
        for name, data in img2dataset_sample(number)
        for entry in ((f"pictures/._{name}", junk), (f"pictures/{name}", data))
    ]
    write_tar(tmp_path / "0.tar", members)
    pairs = ShardDataset(tmp_path)
    assert len(pairs) == 3
    check_pairing(pairs)
    streamed_pairs = streamed(ShardStream(pairs), num_workers=0, batch_size=3)[0]
    assert sorted(streamed_pairs["text"]) == ["number 0", "number 1", "number 2"]


class TestFaults:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_bad_sample_is_left_out_and_named(self, fault, tmp_path):
        members, message = FAULTS[fault]
        write_tar(tmp_path / "00000.tar", members)
        with pytest.warns(UserWarning, match="can't be used") as caught:
            pairs = ShardDataset(tmp_path)
        assert len(caught) == 1
        assert message.format(shard=tmp_path / "00000.tar") in str(caught[0].message)
        assert list(pairs.texts) == ["number 0", "number 2"]
        check_pairing(pairs)

    @pytest.mark.parametrize("keep", [0.2, 0.35, 0.4, 0.48])
    def test_a_truncated_shard_loses_its_end_and_nothing_else(self, keep, tmp_path):
        write_img2dataset(tmp_path, shards=3)
        path = tmp_path / "00001.tar"
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
        with pytest.warns(UserWarning, match=r"after which the file breaks off \(the first: .*00001\.tar"):
            pairs = ShardDataset(tmp_path)
        counts = pairs.contents.first.diff().tolist()
        assert counts[0] == counts[2] == 4
        assert 0 < counts[1] < 4
        check_pairing(pairs)

    @pytest.mark.parametrize("remote", [False, True])
    @pytest.mark.parametrize("fault", ["damaged header", "two archives", "no end"])
    def test_what_tarfile_takes_for_the_end(self, fault, remote, tmp_path):
        folder = tmp_path / "shards"
        folder.mkdir()
        write_img2dataset(folder, shards=2, per_shard=12)
        path, other = folder / "00000.tar", folder / "00001.tar"
        data = path.read_bytes()
        if fault == "damaged header":
            data = data[: 9 * 1024] + b"\xff" * 512 + data[9 * 1024 + 512 :]
        elif fault == "two archives":
            data += other.read_bytes()
        else:
            data = data[: 36 * 1024]
        path.write_bytes(data)
        other.unlink()
        source, index = (f"pipe:cat {path}", "remote.index") if remote else (folder, None)
        with pytest.warns(UserWarning, match=r"1 after which the file breaks off \(the first: .*00000\.tar, key '0000"):
            pairs = ShardDataset(source, index=index)
        assert len(pairs) == (3 if fault == "damaged header" else 12)

    def test_a_compressed_shard_is_named(self, tmp_path):
        write_tar(tmp_path / "00000.tar", img2dataset_sample(0))
        write_tar(tmp_path / "00001.tar", img2dataset_sample(1), mode="w:gz")
        with pytest.warns(UserWarning, match=r"no uncompressed tar .*00001\.tar"):
            assert len(ShardDataset(tmp_path)) == 1
