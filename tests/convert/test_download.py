"""Downloads, against a server of the test's own."""

import contextlib
import dataclasses
import fcntl
import hashlib
import http.server
import threading

import pytest

import hybrid_flax
from convert.download import cache_folder, download

CONTENT = bytes(range(256)) * 4096  # 1 MiB
BREAK_OFF = ("/truncated", "/changes", "/untagged", "/from-0")  # the first time


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; the path says how badly."""

    def do_GET(self):
        self.server.ranges.append(self.headers.get("Range"))
        if self.headers.get("Range"):
            assert self.headers.get("If-Range")
        start = 0
        if self.path.startswith("/refused"):
            return self.send_error(403)
        if self.path.startswith("/garbage"):
            return self.wfile.write(b"220 this is not HTTP\r\n")
        if self.headers.get("Range") and not self.path.startswith("/no-ranges"):
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.end_headers()
            return None
        content = CONTENT
        if self.path.startswith("/changes") and len(self.server.ranges) > 1:
            content, start = CONTENT[::-1], 0  # If-Range does not hold any more
        self.send_response(206 if start or self.path.startswith("/part") else 200)
        if self.path.startswith("/from-0"):
            start = 0
        self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        if self.path.startswith("/page"):
            self.send_header("Content-Type", "text/html; charset=utf-8")
            content = b"<!DOCTYPE html><html>Please log in"
        if not self.path.startswith("/untagged"):
            self.send_header("ETag", f'"{hash(content)}"')
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        breaks_off = self.path.startswith(BREAK_OFF) and len(self.server.ranges) == 1
        with contextlib.suppress(ConnectionError):  # it may have heard enough
            self.wfile.write(content[start : len(content) // 3 if breaks_off else None])

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.ranges = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(server, tmp_path, where, again=False, **changes):
    if not again:
        server.ranges.clear()
    url = f"http://127.0.0.1:{server.server_port}/{where}/weights.pth"
    info = dataclasses.replace(
        hybrid_flax.model_info("gcvit_b"),
        **{"release_file": "weights.pth", "download_url": url} | changes,
    )
    return download("gcvit_b", info, tmp_path / "cache")


def test_a_file_is_fetched_once(server, tmp_path):
    path = fetch(server, tmp_path, "good", sha256=hashlib.sha256(CONTENT).hexdigest())
    assert path == tmp_path / "cache" / "weights.pth"
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None]
    assert fetch(server, tmp_path, "good") == path
    assert server.ranges == []
    assert {file.name for file in path.parent.iterdir()} == {
        "weights.pth",
        "weights.pth.download.json",
    }


def test_what_is_there_is_compared_with_what_came(server, tmp_path):
    path = fetch(server, tmp_path, "good")
    data = bytearray(CONTENT)
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="has sha256 .*, of the download is .* Delete it to down"):
        fetch(server, tmp_path, "good")
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="has 1,048,575 bytes, downloaded were 1,048,576: delete"):
        fetch(server, tmp_path, "good")
    with pytest.raises(ValueError, match="has sha256 .*, published is 00000"):
        fetch(server, tmp_path, "good", sha256="0" * 64)
    path.unlink()
    assert fetch(server, tmp_path, "good").read_bytes() == CONTENT


def test_a_file_that_was_put_there_by_hand_is_taken(server, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "weights.pth").write_bytes(b"by hand")
    assert fetch(server, tmp_path, "good").read_bytes() == b"by hand"


@pytest.mark.parametrize("how", ["changes", "untagged", "from-0"])
def test_what_cannot_be_continued_is_fetched_anew(server, tmp_path, how):
    with pytest.raises(ValueError, match="broke off after 349,525 of 1,048,576 bytes"):
        fetch(server, tmp_path, how)
    got = fetch(server, tmp_path, how, again=True).read_bytes()
    assert got == (CONTENT[::-1] if how == "changes" else CONTENT)


def test_a_web_page_is_not_kept(server, tmp_path):
    with pytest.raises(ValueError, match=r"sends a web page \(text/html\) in place of the file"):
        fetch(server, tmp_path, "page")
    assert not (tmp_path / "cache" / "weights.pth").exists()


def test_two_processes_do_not_write_one_file(server, tmp_path):
    (tmp_path / "cache").mkdir()
    with open(tmp_path / "cache" / "weights.pth.part", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is downloading"):
            fetch(server, tmp_path, "good")
    assert fetch(server, tmp_path, "good").read_bytes() == CONTENT


def test_a_broken_download_is_continued(server, tmp_path):
    with pytest.raises(
        ValueError, match=r"broke off after 349,525 of 1,048,576 bytes.*run this ag"
    ):
        fetch(server, tmp_path, "truncated")
    path = fetch(server, tmp_path, "truncated", again=True)
    assert server.ranges == [None, "bytes=349525-"]
    assert path.read_bytes() == CONTENT


def test_a_server_without_ranges_starts_over(server, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "weights.pth.part").write_bytes(b"x" * 1000)
    assert fetch(server, tmp_path, "no-ranges").read_bytes() == CONTENT


def test_a_complete_partial_file_is_taken(server, tmp_path):
    path = fetch(server, tmp_path, "good")
    path.rename(f"{path}.part")
    record = path.with_name("weights.pth.download.json")
    record.rename(path.with_name("weights.pth.part.download.json"))
    assert fetch(server, tmp_path, "good").read_bytes() == CONTENT
    assert server.ranges == []


@pytest.mark.parametrize("record", ["", "[]", '{"url": 3}', '{"url": "x", "size": "many"}'])
def test_a_partial_file_of_unknown_origin_is_not_continued(server, tmp_path, record):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "weights.pth.part").write_bytes(b"x" * 1000)
    (tmp_path / "cache" / "weights.pth.part.download.json").write_text(record)
    assert fetch(server, tmp_path, "good").read_bytes() == CONTENT
    assert server.ranges == [None]


def test_a_wrong_file_is_deleted(server, tmp_path):
    with pytest.raises(
        ValueError, match="has sha256 [0-9a-f]{64}, published is 0+. It was deleted"
    ):
        fetch(server, tmp_path, "good", sha256="0" * 64)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_refusal_says_how_to_go_on_by_hand(server, tmp_path):
    with pytest.raises(ValueError, match="HTTP Error 403") as error:
        fetch(server, tmp_path, "refused")
    assert "get weights.pth from https://huggingface.co/nvidia/GCViT by hand" in str(error.value)
    assert str(tmp_path / "cache" / "weights.pth") in str(error.value)


def test_a_part_that_nobody_asked_for_is_refused(server, tmp_path):
    with pytest.raises(ValueError, match="answers with status 206"):
        fetch(server, tmp_path, "part")


def test_a_server_of_something_else(server, tmp_path):
    with pytest.raises(ValueError, match="/garbage/weights.pth cannot be downloaded .*220 this is"):
        fetch(server, tmp_path, "garbage")


def test_a_folder_that_cannot_be_written_to(server, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match="cache cannot hold weights.pth .*set HYBRID_FLAX_CACHE"):
        fetch(server, tmp_path, "good")
    (tmp_path / "cache").unlink()
    (tmp_path / "cache" / "weights.pth.part").mkdir(parents=True)
    with pytest.raises(ValueError, match="cache cannot hold weights.pth .*Is a directory"):
        fetch(server, tmp_path, "good")


def test_models_without_a_link_or_without_weights(server, tmp_path):
    with pytest.raises(ValueError, match="no direct link to the weights of gcvit_b: get weights"):
        fetch(server, tmp_path, "good", download_url="")
    with pytest.raises(ValueError, match="no weights of gcvit_b were released; see https://"):
        fetch(server, tmp_path, "good", release_file="")


def test_without_a_home_the_message_says_what_to_set(monkeypatch):
    monkeypatch.delenv("HYBRID_FLAX_CACHE", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(ValueError, match="no home directory is known.*set HYBRID_FLAX_CACHE"):
        cache_folder()


def test_no_server_at_all(server, tmp_path):
    url = "http://127.0.0.1:1/weights.pth"
    with pytest.raises(ValueError, match="cannot be downloaded .*refused"):
        fetch(server, tmp_path, "good", download_url=url)
    assert not (tmp_path / "cache" / "weights.pth").exists()
