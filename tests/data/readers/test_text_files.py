import io

import pytest

from lightning_itm.data.readers.text_files import decode_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_each_kind_of_line_end_becomes_a_line_feed(encoding):
    data = "a\r\nb\rc\nd\n\r\r\né\r".encode(encoding)
    assert decode_text(data, encoding) == "a\nb\nc\nd\n\n\né\n" == io.TextIOWrapper(io.BytesIO(data), encoding).read()


def test_another_encoding():
    with pytest.raises(UnicodeError, match="byte 0xe9 in position 1"):
        decode_text(b"a\xe9")
