"""Every input gives the pairs that a few plain lines find, too, or an error in our words. Never another text."""

import csv
import io
import json
import shutil
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_itm.data.readers import read_folder, read_json, read_jsonl, read_table
from lightning_itm.data.shards.tar import read_shard
from tests.helpers.shards import write_tar
from tests.reference import readers as reference

SOME, MANY = settings(max_examples=200), settings(max_examples=2000)
IMAGE_NAMES = [f"{number}.png" for number in range(4)]

texts = st.text(st.one_of(st.sampled_from("a\"',\n\r\t|; é\u2028\ufeff"), st.characters(codec="utf-8")), max_size=8)
# Halves of surrogate pairs, too, which JSON can escape.
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts, st.text(st.characters(), max_size=3))
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2), max_leaves=5
)
words = st.text("ab é", min_size=1, max_size=5)
values = st.one_of(words, st.lists(st.one_of(words, scalars), max_size=3), anything)


@st.composite
def changes(draw, content):
    """Return a content as it is, or with a sign or two lost or added."""
    num_changes = draw(st.sampled_from([0, 0, 1, 2]))
    for _ in range(num_changes):
        index = draw(st.integers(0, len(content)))
        added = draw(st.sampled_from(["", *'",\n\t|;a[]{}:\\\r\0']))
        content = content[:index] + added + content[index + draw(st.integers(0, 1)) :]
    return content, num_changes == 0


@st.composite
def tables(draw):
    rows = draw(st.lists(st.tuples(st.sampled_from(IMAGE_NAMES), texts, texts), max_size=4))
    file = io.StringIO()
    writer = csv.writer(
        file,
        delimiter=draw(st.sampled_from(",\t|;")),
        lineterminator=draw(st.sampled_from(["\n", "\r\n", "\r"])),
        quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
    )
    order = draw(st.permutations([0, 1, 2]))
    writer.writerows([row[index] for index in order] for row in [("image", "text", "note"), *rows])
    return draw(changes(file.getvalue()))


@st.composite
def json_lines(draw):
    rows = draw(st.lists(st.fixed_dictionaries({"image": st.sampled_from(IMAGE_NAMES), "text": values}), max_size=3))
    end = draw(st.sampled_from(["\n", "\r\n", "\n\n"]))
    return draw(changes(end.join(json.dumps(row) for row in rows)))


@st.composite
def json_files(draw):
    names = draw(st.lists(st.sampled_from(IMAGE_NAMES), unique=True, max_size=3))
    captions = draw(st.lists(st.tuples(st.sampled_from(names), values), max_size=4)) if names else []
    form = draw(st.sampled_from(["list", "coco", "karpathy"]))
    if form == "list":
        key = draw(st.sampled_from(["text", "caption"]))
        content = [{"image": name, key: caption} for name, caption in captions]
    elif form == "coco":
        images = [{"id": index, "file_name": name} for index, name in enumerate(names)]
        annotations = [{"image_id": names.index(name), "caption": caption} for name, caption in captions]
        content = {"images": images, "annotations": annotations}
    else:
        splits = st.sampled_from(["train", "restval", "val"])
        sentences = {name: [{"raw": caption} for other, caption in captions if other == name] for name in names}
        content = {
            "images": [{"filename": name, "split": draw(splits), "sentences": sentences[name]} for name in names]
        }
    return draw(changes(json.dumps(content)))


encoded = st.one_of(
    st.builds(str.encode, texts, st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])), st.binary(max_size=4)
)
stems = st.builds("{}{}".format, st.sampled_from(["", "", "sub/", "a.b/"]), st.sampled_from(["a", "b", "b.c", "._a"]))
endings = st.sampled_from(["png", "JPG", "gif", "heic", "txt", "TXT", "json"])
names = st.builds("{}.{}".format, stems, endings)
facts = st.builds(
    lambda found, end: json.dumps(found).encode()[: end or None],
    st.dictionaries(st.sampled_from(["texts", "caption", "text_ids"]), values) | values,
    st.sampled_from([0, 0, 0, -1]),
)
content = st.one_of(words.map(str.encode), encoded)


@st.composite
def folders(draw):
    files = draw(st.dictionaries(names, content, max_size=1))
    for stem, data in draw(st.dictionaries(stems, content, max_size=4)).items():
        files |= {f"{stem}.{draw(endings)}": b"", f"{stem}.txt": data}
    return files


@st.composite
def members(draw):
    files = []
    for stem in draw(st.lists(stems, max_size=4)):
        own = draw(st.permutations([draw(endings), "png", draw(st.sampled_from(["txt", "json"]))]))
        files += [(f"{stem}.{ending}", draw(facts if ending == "json" else content)) for ending in own]
    return files


def check(read, expected, *, is_whole):
    """Compare a reader with its reference. Where the content is whole, it must not be refused."""
    try:
        wanted = expected()
    except Exception:
        wanted = None
    refusal = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = [(image.as_posix(), of_image) for image, of_image in zip(*read(), strict=True)]
    except (ValueError, FileNotFoundError) as error:
        refusal = error
    if refusal is None:
        assert found == wanted
    else:
        assert str(refusal).startswith("Expected "), "an error of Python's, which says nothing of the file"
        assert wanted is None or not is_whole, refusal


def check_file(name, content, read, expected):
    content, is_whole = content
    for image in IMAGE_NAMES:
        Path(image).touch()
    data = content.encode()
    Path(name).write_bytes(data)
    check(lambda: read(name), lambda: expected(reference.decode(data)), is_whole=is_whole)


def check_table(content):
    check_file("a.csv", content, lambda path: read_table(path, "", "image", "text")[:2], reference.table)


def check_json_lines(content):
    check_file("a.jsonl", content, lambda path: read_jsonl(path, "", "image", "text")[:2], reference.json_lines)


def check_json_file(content):
    check_file("a.json", content, lambda path: read_json(path, "", "train", "image", "text")[:2], reference.json_file)


def check_folder(files):
    shutil.rmtree("folder", ignore_errors=True)
    for name, data in files.items():
        Path("folder", name).parent.mkdir(parents=True, exist_ok=True)
        Path("folder", name).write_bytes(data)

    def read():
        images, texts_of_images = read_folder("folder")
        return sorted(image.relative_to("folder") for image in images), [
            texts for _, texts in sorted(zip(images, texts_of_images, strict=True))
        ]

    def expected():
        found = reference.folder(files)
        return found and sorted(found, key=lambda pair: Path(pair[0]))

    check(read, expected, is_whole=False)


def check_tar(files):
    write_tar("a.tar", files)
    found = read_shard("a.tar")
    assert list(zip(found.keys, found.texts, strict=True)) == (reference.tar(files) or [])


CHECKS = {
    "table": (check_table, tables()),
    "json lines": (check_json_lines, json_lines()),
    "json file": (check_json_file, json_files()),
    "folder": (check_folder, folders()),
    "tar": (check_tar, members()),
}


def test_a_sentence_without_its_text():
    content = '{"images": [{"filename": "%s", "split": "train", "sentences": [{"raw": "a"}, {"tokens": ["b"]}]}]}'
    check_json_file((content % IMAGE_NAMES[0], True))


@pytest.mark.parametrize("form", CHECKS)
def test_some(form):
    check_form, inputs = CHECKS[form]
    SOME(given(inputs)(check_form))()


@pytest.mark.slow
@pytest.mark.parametrize("form", CHECKS)
def test_many(form):
    check_form, inputs = CHECKS[form]
    MANY(given(inputs)(check_form))()
