import os

import pytest

from hybrid_flax.data.sources.walk import join, subfolders, walk
from hybrid_flax.errors import InputError


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def found(folder, *suffixes):
    return [os.path.relpath(file, folder) for file in walk(str(folder), suffixes).files]


def test_endings_count_in_any_case_and_names_come_sorted(tmp_path):
    put(tmp_path, "b.PNG", "a/c.png", "a/b/d.Png", "a.jpg", "png")
    assert found(tmp_path, ".png") == ["a/b/d.Png", "a/c.png", "b.PNG"]
    assert walk(str(tmp_path), (".png",)).left_out == {"other endings": 2}


def test_hidden_names_and_leftovers_are_no_data_and_are_counted(tmp_path):
    put(tmp_path, "1.png", "._1.png", ".cache/2.png", "__MACOSX/1.png", "a/@eaDir/1.png")
    put(tmp_path, "data-0.arrow", "cache-01ab.arrow", "a/tmpx1.arrow")
    assert found(tmp_path, ".png", ".arrow") == ["1.png", "data-0.arrow"]
    assert walk(str(tmp_path), (".png", ".arrow")).left_out == {
        "names that begin with a dot": 2,
        "caches and leftovers of programs": 4,
    }


def test_only_regular_files_count_and_a_link_to_nothing_is_for_the_reader_to_name(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere")
    put(tmp_path, "elsewhere/a.png")
    (tmp_path / "b.png").symlink_to("elsewhere/a.png")
    assert found(tmp_path, ".png") == ["b.png", "elsewhere/a.png", "lost.png"]
    reasons = walk(str(tmp_path), (".png",)).reasons(str(tmp_path))
    assert reasons == {"not regular files (pipe.png …)": 2}


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    put(tmp_path, "data/cat/1.png", "more/2.png")
    (tmp_path / "data/cat/more").symlink_to("../../more")
    (tmp_path / "more/back").symlink_to("../data")
    (tmp_path / "data/self").symlink_to("self")
    assert found(tmp_path / "data", ".png") == ["cat/1.png", "cat/more/2.png"]
    assert walk(str(tmp_path / "data"), (".png",)).left_out["links in a circle"] == 1


def test_a_maze_of_links_takes_bounded_work(tmp_path):
    for level in range(40):
        put(tmp_path, f"{level}/a.png")
        for name in "bc":
            (tmp_path / f"{level}/{name}").symlink_to(f"../{level + 1}")
    assert len(found(tmp_path / "0", ".png")) < 1_000


def test_folders_as_deep_as_they_may_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(1_200):
        os.mkdir("a")
        os.chdir("a")
    open("1.png", "w").close()
    assert len(found(tmp_path, ".png")) == 1
    os.remove("1.png")
    for _ in range(1_200):  # what is left for pytest must not be deep
        os.chdir("..")
        os.rmdir("a")


def test_folders_that_cannot_be_listed_are_named(tmp_path):
    put(tmp_path, "file")
    for name in ("file", "nowhere"):
        with pytest.raises(InputError, match=f"the folder .*/{name}"):
            walk(str(tmp_path / name), (".png",))


def test_subfolders_leave_out_what_the_walk_leaves_out(tmp_path):
    put(tmp_path, "a/1.png", ".hidden/1.png", "__pycache__/1.png", "README")
    (tmp_path / "here").symlink_to(".")
    (tmp_path / "up").symlink_to("..")
    names, beside = subfolders(str(tmp_path))
    assert names == ["a"]
    assert [os.path.basename(file) for file in beside.files] == ["README"]
    assert sum(beside.left_out.values()) == 4


def test_walks_can_be_joined(tmp_path):
    put(tmp_path, "a/1.png", "a/x.txt", "b/2.png", "b/y.txt")
    joined = join(walk(str(tmp_path / name), (".png",)) for name in "ab")
    assert [os.path.relpath(file, tmp_path) for file in joined.files] == ["a/1.png", "b/2.png"]
    assert joined.reasons(str(tmp_path)) == {"other endings (a/x.txt …)": 2}
