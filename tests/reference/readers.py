"""What each reader of files finds, the plain way. A file that is broken gives None, or any exception."""

import json
import re
from pathlib import PurePosixPath

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")


def texts_of(value):
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, str) and v.strip() and not re.search("[\ud800-\udfff]", v)]


def group(pairs):
    """List each image that has a text, in the order in which images come first, with its texts."""
    texts = {}
    for image, value in pairs:
        assert isinstance(image, str)
        assert image.strip()
        texts.setdefault(str(PurePosixPath(image)), []).extend(texts_of(value))
    return [(image, of_image) for image, of_image in texts.items() if of_image] or None


def decode(data):
    return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")


def lines(content):
    return re.split("\r\n|\r|\n", content)


def rows(content, sign):
    """Split a table by one pattern: a quoted cell or another, and then the sign or the end of a line."""
    found, row, start = [], [], 0
    cell = re.compile(rf'(?:"((?:[^"]|"")*)"|((?!")[^{re.escape(sign)}\r\n]*))({re.escape(sign)}|\r\n|\r|\n|\Z)')
    while start < len(content):
        part = cell.match(content, start)
        row.append(part[2] if part[1] is None else part[1].replace('""', '"'))
        if part[3] != sign:
            found, row = [*found, row], []
        start = part.end()
    return found + ([[*row, ""]] if row else [])


def table(content):
    for sign in ",\t|;":
        try:
            header, *body = [row for row in rows(content, sign) if row != [""]]
        except (TypeError, ValueError):  # a cell that does not match, or no row
            continue
        names = [name.strip() for name in header]
        if names.count("image") == names.count("text") == 1:
            assert all(len(row) == len(header) for row in body)
            return group((row[names.index("image")], row[names.index("text")]) for row in body)
    return None


def json_lines(content):
    objects = [json.loads(line) for line in lines(content) if line.strip()]
    return group((entry["image"], entry["text"]) for entry in objects)


def json_file(content):
    found = json.loads(content)
    if isinstance(found, list):
        return group((entry["image"], entry["text" if "text" in entry else "caption"]) for entry in found)
    if "annotations" in found:
        names = {image["id"]: image["file_name"] for image in found["images"]}
        captions = [(names[entry["image_id"]], entry["caption"]) for entry in found["annotations"]]
        return group([*((name, []) for name in names.values()), *captions])
    entries = [entry for entry in found["images"] if entry["split"] in ("train", "restval")]
    return group((entry["filename"], sentences(entry["sentences"])) for entry in entries)


def sentences(found):
    """A sentence is an object with its text in "raw". What stands there instead is taken as it is."""
    if not isinstance(found, list):
        return found
    return [one.get("raw", one) if isinstance(one, dict) else one for one in found]


def folder(files):
    shown = [(*name.rsplit(".", 1), data) for name, data in files.items() if not re.search(r"(^|/)\.[^/]*$", name)]
    texts = {stem: data for stem, ending, data in shown if ending.lower() == "txt"}
    images = [(stem, ending) for stem, ending, _ in shown if ending.lower() in IMAGES]
    assert len({stem for stem, _ in images}) == len(images)
    return group((f"{stem}.{ending}", lines(decode(texts[stem]))) for stem, ending in images)


def tar(members):
    samples, first = [], {}
    for name, data in members:
        stem, _, ending = name.rpartition("/")[2].partition(".")
        if stem and "." in name:
            key = name[: len(name) - len(ending) - 1]
            samples += [(key, {})] if not samples or samples[-1][0] != key else []
            samples[-1][1].setdefault(ending.lower(), data)
    for key, sample in samples:
        first.setdefault(key, sample)
    return group((key, sample_texts(sample)) for key, sample in first.items() if set(sample) & set(IMAGES))


def sample_texts(sample):
    try:
        facts = json.loads(sample.get("json", b""))
    except ValueError:
        facts = {}
    try:
        content = decode(sample.get("txt", b""))
    except UnicodeError:
        content = ""
    facts = facts if isinstance(facts, dict) else {}
    return texts_of(facts.get("texts")) or texts_of(lines(content)) or texts_of(facts.get("caption"))
