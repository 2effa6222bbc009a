"""Downloads, against a server of the test's own."""

import dataclasses
import hashlib
import http.server
import threading

import pytest

import hybrid_flax
from convert.download import download

CONTENT = bytes(range(256)) * 4096  # 1 MiB


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; the path says how badly."""

    def do_GET(self):
        self.server.ranges.append(self.headers.get("Range"))
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
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        breaks_off = self.path.startswith("/truncated") and not start
        self.wfile.write(CONTENT[start : len(CONTENT) // 3 if breaks_off else None])

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


def fetch(server, tmp_path, where, **changes):
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
    assert list(path.parent.iterdir()) == [path]


def test_a_broken_download_is_continued(server, tmp_path):
    with pytest.raises(
        ValueError, match=r"broke off after 349,525 of 1,048,576 bytes.*run this ag"
    ):
        fetch(server, tmp_path, "truncated")
    path = fetch(server, tmp_path, "truncated")
    assert server.ranges == ["bytes=349525-"]
    assert path.read_bytes() == CONTENT


def test_a_server_without_ranges_starts_over(server, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "weights.pth.part").write_bytes(b"x" * 1000)
    assert fetch(server, tmp_path, "no-ranges").read_bytes() == CONTENT


def test_a_complete_partial_file_is_taken(server, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "weights.pth.part").write_bytes(CONTENT)
    assert fetch(server, tmp_path, "good").read_bytes() == CONTENT


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


def test_no_server_at_all(server, tmp_path):
    url = "http://127.0.0.1:1/weights.pth"
    with pytest.raises(ValueError, match="cannot be downloaded .*refused"):
        fetch(server, tmp_path, "good", download_url=url)
    assert not (tmp_path / "cache" / "weights.pth").exists()
