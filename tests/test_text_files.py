import contextlib
import json
import os
import random

import pytest

from hybrid_flax import make_label_maps, preview_data
from hybrid_flax.data import prepare_imagenet
from hybrid_flax.data.sources import index_file
from hybrid_flax.errors import InputError
from hybrid_flax.text_files import check_local, parse_json, read_bytes, read_json, read_lines
from tests import tiny


@pytest.fixture
def file(tmp_path):
    return tmp_path / "given.txt"


def test_byte_order_marks_and_line_ends_are_no_text(file):
    file.write_bytes("\ufeffCafé 0\r\n\nb 1".encode())
    assert list(read_lines(file)) == [(1, "Café 0"), (2, ""), (3, "b 1")]
    file.write_bytes(b"")
    assert list(read_lines(file)) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a 0\nCafé 1\n".encode("latin-1"), r"given.txt, line 2: b'Caf\\xe9 1.*iconv -f latin1"),
        ("a 0\n".encode("utf-16"), r"given.txt, line 1: .*\(is it UTF-16\?\)"),
        (b"a 0\nb\0 1\n", "given.txt, line 2: a null byte"),
        (b"a" * (1 << 21), "given.txt: a line of more than 1048576 bytes"),
    ],
)
def test_what_is_no_text_in_utf8_is_refused_by_file_and_line(file, content, message):
    file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_lines(file))


def test_only_regular_files_are_opened(file, tmp_path):
    for name in (file, f"{file}\0"):
        with pytest.raises(InputError, match="given.txt.*(No such file|null byte)"):
            read_json(name)
    with pytest.raises(InputError, match="a folder; expected a regular file"):
        read_json(tmp_path)
    os.mkfifo(file)
    for read in (read_json, lambda file: list(read_lines(file)), lambda file: read_bytes(file, 9)):
        with pytest.raises(InputError, match="given.txt: a named pipe; expected a regular file"):
            read(file)
    (tmp_path / "link").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="link: a device"):
        read_bytes(tmp_path / "link", 9)


def test_a_file_that_is_too_large_is_not_read(file):
    file.write_bytes(b"12345")
    assert read_bytes(file, 5) == b"12345"
    with pytest.raises(InputError, match="given.txt: 5 bytes, where at most 4 are expected"):
        read_bytes(file, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no valid JSON"),
        (b'{"a": 1,', "no valid JSON: .*begins with"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5_000, "no valid JSON: Exceeds the limit"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'"\\ud800"', "half a surrogate pair"),
    ],
)
def test_what_is_no_json_is_refused_by_file(file, content, message):
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"given.txt.*{message}"):
        read_json(file)


def test_json_with_a_byte_order_mark_is_read(file):
    file.write_bytes("\ufeff".encode() + b'{"a": [1, 2.5, null, "\\ud83d\\ude00"]}')
    assert read_json(file) == {"a": [1, 2.5, None, "😀"]}


def test_damaged_json_is_read_or_refused():
    rng = random.Random(0)
    whole = json.dumps({"a": [1, 2.5e3, None, True, "é\ud83d\ude00"], "b": {"c": "\n"}}).encode()
    for _ in range(2_000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with contextlib.suppress(InputError):
            parse_json(bytes(data), "a file")


def test_urls_are_no_local_folders():
    for path in ("run", "/data/a:b", "C:/maps", "./gs://x", ""):
        check_local(path, "--out")
    for url in ("gs://bucket/maps", "file:///maps", "s3://b"):
        with pytest.raises(InputError, match=f"--out={url}: .*Give a local folder"):
            check_local(url, "--out")


@pytest.mark.parametrize(
    "program", ["make_label_maps", "prepare_imagenet", "preview_data", "index"]
)
def test_programs_that_write_with_local_paths_take_no_url(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = "gs://bucket/x"
    calls = {
        "make_label_maps": lambda: make_label_maps._check_out(url),
        "prepare_imagenet": lambda: prepare_imagenet.prepare({}, url),
        "preview_data": lambda: preview_data.inspect(tiny.get_config(), url),
        "index": lambda: index_file.load_or_make("a", url, "", "", dict, bool),
    }
    with pytest.raises(InputError, match="local folder"):
        calls[program]()
    assert not os.listdir(tmp_path)
