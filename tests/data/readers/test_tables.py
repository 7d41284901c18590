"""CSV, TSV and JSON Lines: what is no text is named, and a row with a slip in it is an error that says where."""

import json

import pytest

from lightning_itm import ImageTextDataset
from lightning_itm.data import read_pairs


def write(folder, name, content, encoding="utf-8"):
    path = folder / "val2014" / name
    path.write_bytes(content.encode(encoding))
    return path


def pairs_of(dataset):
    images = [image.name for image in dataset.images]
    return [
        (images[image_id], text) for image_id, text in zip(dataset.text_image_id.tolist(), dataset.texts, strict=True)
    ]


class TestTables:
    def test_rows_with_one_image_share_it(self, folder):
        # As Excel saves it: with a byte-order mark.
        path = write(folder, "a.csv", '\ufeffimage,text\r\n0.png,"one, and"\r\n\r\n1.png,two\r\n./0.png,"th\nree"\r\n')
        assert pairs_of(read_pairs(path)) == [("0.png", "one, and"), ("0.png", "th\nree"), ("1.png", "two")]

    def test_words_that_stand_for_nothing_elsewhere_are_texts(self, folder):
        path = write(folder, "a.csv", 'image,text\n0.png,None\n1.png,null\n2.png,NA\n3.png,5" nail\n')
        assert read_pairs(path).texts == ["None", "null", "NA", '5" nail']

    @pytest.mark.parametrize("ending", ["csv", "tsv"])
    @pytest.mark.parametrize("sign", [",", "\t", "|", ";"])
    def test_the_header_tells_the_delimiter(self, folder, sign, ending):
        others = ",\t|;".replace(sign, "")
        path = write(folder, f"a.{ending}", f"filepath{sign} number{sign} title\n0.png{sign}7{sign}a{others}b\n")
        assert read_pairs(path, image_column="filepath", text_column="title").texts == [f"a{others}b"]

    def test_a_delimiter_that_is_given(self, folder):
        path = write(folder, "a.csv", "image:text\n0.png:one\n")
        assert read_pairs(path, delimiter=":").texts == ["one"]
        with pytest.raises(ValueError, match=r"the header of .*a\.csv to have 'image' and 'text', .* \['image:text'\]"):
            read_pairs(path)
        for wrong in ("", "::", '"'):
            with pytest.raises(ValueError, match=f"`delimiter` to be one sign, such as ';', got {wrong!r}"):
                ImageTextDataset.from_csv(path, folder, delimiter=wrong)

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    def test_encodings_that_are_told_by_the_file(self, folder, encoding):
        path = write(folder, "a.csv", "image,text\n0.png,a café\n", encoding)
        assert read_pairs(path).texts == ["a café"]
        assert read_pairs(path, encoding=encoding).texts == ["a café"]

    def test_an_encoding_that_must_be_given(self, folder):
        path = write(folder, "a.csv", "image,text\r\n0.png,a dog\r\n1.png,a café\r\n", "cp1252")
        with pytest.raises(ValueError, match=r'utf-8, got the byte 0xe9 in line 3, at byte 36 .* `encoding="cp1252"`'):
            read_pairs(path)
        assert read_pairs(path, encoding="cp1252").texts == ["a dog", "a café"]
        with pytest.raises(
            ValueError, match=r"encoding ascii, got the byte 0xe9 in line 3, .*Name the one that it is in"
        ):
            read_pairs(path, encoding="ascii")
        with pytest.raises(ValueError, match=r"`encoding` to be one that Python knows, such as 'cp1252', got 'cp-0'"):
            read_pairs(path, encoding="cp-0")

    @pytest.mark.parametrize("text", ["", "  ", '" \n"'])
    def test_an_empty_cell_is_left_out_with_its_image(self, folder, text):
        path = write(folder, "a.csv", f"image,text\n0.png,one\n1.png,{text}\n0.png,{text}\n2.png,two\n")
        with pytest.warns(
            UserWarning, match=r"2 times, first in line 3: .*\. So 1 of 3 images have no caption"
        ) as said:
            found = read_pairs(path)
        assert len(said) == 1
        assert pairs_of(found) == [("0.png", "one"), ("2.png", "two")]

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ("0.png,a dog, a cat\n", r"line 2 .* to have 2 cells, as the header \['image', 'text'\] has, got 3: \['0"),
            ("0.png,one\n1.png\n", r"line 3 .* to have 2 cells, .* got 1: \['1\.png'\]\. Put double quotes around"),
            ('0.png,one\n1.png,"a dog\n2.png,two\n', r"in line 3: unexpected end of data\. A cell that begins with"),
            ('0.png,"a dog\n1.png,"a cat\n', "in line 2: ',' expected after '\"'"),
            ('0.png,"a dog\n1.png,a cat\n2.png,5"\n', r"from line 2 .*a\.csv on, got a cell .* '1\.png,a cat'\. Close"),
            ('0.png,"one" and two\n', "in line 2: ',' expected after '\"'"),
            (",one\n", "Expected the image in line 2 of .* to be a path, got ''"),
            ("", "at least one image with a caption in .*, found none"),
            ("0.png,\n", "found none; what is no text is left out as a caption, 1 times, first in line 2: ''"),
        ],
    )
    def test_rows_with_a_slip(self, folder, rows, message):
        path = write(folder, "a.csv", f"image,text\n{rows}")
        with pytest.raises(ValueError, match=message):
            read_pairs(path)

    @pytest.mark.parametrize("header", ["", "file,caption", "image,text,text", '"image,text', "image"])
    def test_headers_without_both_columns(self, folder, header):
        path = write(folder, "a.csv", f"{header}\n0.png,one\n")
        with pytest.raises(ValueError, match=r"a\.csv to have 'image' and 'text', each once, got the columns \["):
            read_pairs(path)

    def test_wrong_image_root(self, folder):
        path = write(folder, "a.csv", "image,text\n0.png,one\n")
        with pytest.raises(FileNotFoundError, match=r"nowhere.0\.png, found none\. Is `image_root` nowhere right"):
            read_pairs(path, "nowhere")


class TestJsonl:
    def test_a_text_or_several(self, folder):
        lines = [{"image": "0.png", "text": "one"}, {"image": "1.png", "text": ["two", "three"]}]
        path = write(folder, "a.jsonl", "\ufeff" + "\n\n".join(map(json.dumps, lines)) + "\n")
        assert read_pairs(path).texts == ["one", "two", "three"]

    @pytest.mark.parametrize("text", ["null", "NaN", "3", '{"en": "a dog"}', "[]", '""', "true", r'"half \ud83d"'])
    def test_what_is_no_text(self, folder, text):
        path = write(folder, "a.jsonl", f'{{"image":"0.png","text":"a"}}\n{{"image":"1.png","text":{text}}}\n')
        with pytest.warns(
            UserWarning, match=r"In .*a\.jsonl, what is no text is left out .*, 1 times, first in line 2: "
        ):
            assert pairs_of(read_pairs(path)) == [("0.png", "a")]
        path = write(folder, "b.jsonl", f'{{"image":"0.png","text":["a",{text},"b"]}}\n')
        with pytest.warns(UserWarning, match=r"1 times, first in line 1: .* So 0 of 1 images"):
            assert pairs_of(read_pairs(path)) == [("0.png", "a"), ("0.png", "b")]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"image":"1.png","te', r"line 2 of .*a\.jsonl to be JSON, got: Unterminated string"),
            ("[" * 100_000, "line 2 of .* to be JSON, got: "),
            ('{"image":"1.png","text":"b","text":"c"}', "line 2 .* got: the key 'text' twice in one object"),
            ('["1.png", "b"]', r"line 2 of .* to be an object with 'image' and 'text', got \['1\.png', 'b'\]"),
            ('{"image":"1.png","caption":"b"}', r"got the columns \['image', 'caption'\]\. Name yours"),
            ('{"image":["1.png"],"text":"b"}', r"the image in line 2 of .* to be a path, got \['1\.png'\]"),
            ('{"image":null,"text":"b"}', "the image in line 2 of .* to be a path, got None"),
        ],
    )
    def test_lines_with_a_slip(self, folder, line, message):
        path = write(folder, "a.jsonl", f'{{"image":"0.png","text":"a"}}\n{line}\n')
        with pytest.raises(ValueError, match=message):
            read_pairs(path)

    def test_an_encoding_that_must_be_given(self, folder):
        path = write(folder, "a.jsonl", '{"image":"0.png","text":"a café"}\n', "cp1252")
        with pytest.raises(ValueError, match=r"got the byte 0xe9 in line 1, at byte 30 of the file"):
            read_pairs(path)
        assert read_pairs(path, encoding="cp1252").texts == ["a café"]
