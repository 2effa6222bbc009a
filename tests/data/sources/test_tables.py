"""Tables as people have them: damaged, of several kinds, beside what a library leaves."""

import io
import json
import os
import pathlib
import pickle
import random
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hybrid_flax.data.images import UnreadableImageError
from hybrid_flax.data.sources import open_source, table_scan, tables
from tests.data.test_formats import content, jpeg, look_through_here, table, write_arrow


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch, request):
    """Starting a process takes half a second: only tests `of_process` do what is done in use."""
    if "of_process" not in request.fixturenames:
        monkeypatch.setattr(tables, "_look_through", look_through_here)


@pytest.fixture
def of_process():
    pass


def opened(path, **options):
    return open_source("hugging_face", str(path), "train", **options)


def write_parquet(file, rows, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, file, **options)


# ------------------------------------------------------------------------------------- damage


def stream_bytes(rows) -> bytes:
    file = io.BytesIO()
    with pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=2)
    return file.getvalue()


def file_bytes(rows, **options) -> bytes:
    file = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(**options)
    with pa.ipc.new_file(file, rows.schema, options=options) as writer:
        writer.write_table(rows, max_chunksize=2)
    return file.getvalue()


def parquet_bytes(rows, **options) -> bytes:
    file = io.BytesIO()
    pq.write_table(rows, file, row_group_size=2, **options)
    return file.getvalue()


def looked_through(files):
    """What the program says of files: read, refused or died; it is begun anew after a death."""
    said = []
    while len(said) < len(files):
        request = {"files": list(map(str, files[len(said) :])), "image": "", "label": ""}
        ended = subprocess.run(
            [sys.executable, "-P", table_scan.__file__],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=120,
        )
        lines = [json.loads(line) for line in ended.stdout.splitlines()]
        said += ["refused" if "error" in line else "read" for line in lines]
        if len(said) < len(files):
            assert ended.returncode < 0, ended.stderr.decode()
            said.append("died")
    return said


def flip(data: bytes, rng: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found[: rng.randrange(len(found))] if rng.random() < 0.1 else found)


def trial(tmp_path, count):
    """(verdicts on damaged files, number of those believed that cannot be read in this process)"""
    rng = random.Random(0)
    wholes = {
        "arrow": (stream_bytes(table(6)), file_bytes(table(6))),
        "parquet": (parquet_bytes(table(6)), parquet_bytes(table(6), write_page_checksum=True)),
    }
    files = []
    for ending, kinds in wholes.items():
        for number in range(count):
            files.append(tmp_path / f"{number}.{ending}")
            files[-1].write_bytes(flip(kinds[number % 2], rng))
    said = looked_through(files)
    assert set(said) <= {"read", "refused", "died"}
    return said


def test_flipped_bits_are_read_or_refused(tmp_path):
    said = trial(tmp_path, 60)
    assert said.count("refused") > 20
    assert said.count("read") > 20


@pytest.mark.slow
def test_flipped_bits_are_read_or_refused_many_times(tmp_path):
    assert len(trial(tmp_path, 1500)) == 3000


def test_a_file_at_which_pyarrow_dies_is_named(tmp_path, monkeypatch, of_process):
    write_arrow(tmp_path / "train-0.arrow", table(2))
    write_arrow(tmp_path / "train-1.arrow", table(2))
    program = tmp_path / "table_scan.py"
    text = pathlib.Path(table_scan.__file__).read_text()
    program.write_text(
        text.replace("    parquet =", "    if '1.arrow' in path: os.abort()\n    parquet =")
    )
    monkeypatch.setattr("hybrid_flax.data.sources.tables.__file__", str(tmp_path / "tables.py"))
    with pytest.raises(ValueError, match=r"cannot read .*train-1.arrow: pyarrow ended .*Abort"):
        opened(tmp_path)


@pytest.mark.parametrize("ending", ["arrow", "parquet"])
def test_tables_that_are_cut_are_refused(tmp_path, ending):
    whole = stream_bytes(table(6)) if ending == "arrow" else parquet_bytes(table(6))
    places = [len(whole) - 8, len(whole) // 2, 3, 0]
    if ending == "arrow":  # pyarrow takes the end of a batch for the end of the file
        assert pa.ipc.open_stream(whole[: places[0]]).read_all().num_rows == 6
    for place in places:
        (tmp_path / f"train-0.{ending}").write_bytes(whole[:place])
        with pytest.raises(ValueError, match=rf"train-0.{ending}"):
            opened(tmp_path)


def test_where_the_process_that_looks_cannot_start_it_is_said(tmp_path, monkeypatch, of_process):
    write_arrow(tmp_path / "train.arrow", table(2))
    monkeypatch.setattr("hybrid_flax.data.sources.tables.__file__", str(tmp_path / "tables.py"))
    with pytest.raises(
        ValueError, match=r"cannot read .*train.arrow: .* ended with 2: .*table_scan"
    ):
        opened(tmp_path)


def test_an_arrow_file_that_is_cut_while_it_is_used_gives_unreadable_images(tmp_path):
    write_arrow(tmp_path / "train.arrow", table(6))
    source = pickle.loads(pickle.dumps(opened(tmp_path)))
    os.truncate(tmp_path / "train.arrow", 100)
    for index in (0, 5):
        with pytest.raises(UnreadableImageError, match=r"train.arrow, row \d: the file has 100 by"):
            source.read(index)


def test_page_checksums_are_looked_at(tmp_path):
    images = parquet_bytes(table(2), write_page_checksum=True, compression="none")
    place = images.index(jpeg(10)) + 300
    (tmp_path / "train.parquet").write_bytes(images[:place] + b"?" + images[place + 1 :])
    with pytest.raises(ValueError, match=r"cannot read .*train.parquet .*(checksum|CRC)"):
        opened(tmp_path)


# --------------------------------------------------------------------------- files that disagree


def test_files_with_other_classes_are_refused_naming_both(tmp_path):
    write_parquet(tmp_path / "animals" / "train-0.parquet", table(2, names=("cat", "dog")))
    write_parquet(tmp_path / "plants" / "train-0.parquet", table(2, names=("oak", "rose")))
    with pytest.raises(
        ValueError,
        match=r"animals/train-0.parquet and .*plants/train-0.parquet are not of one dataset: class "
        r"names cat, dog \(2\) and oak, rose \(2\). Choose one subset.*--config.dataset.path=",
    ):
        opened(tmp_path)
    write_parquet(tmp_path / "plants" / "train-0.parquet", table(2, label="labels"))
    with pytest.raises(ValueError, match="label column label and labels"):
        opened(tmp_path)


def test_files_that_number_the_same_classes_otherwise_are_mapped_by_name(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", table(3))
    write_parquet(tmp_path / "train-1.parquet", table(3, names=("eel", "cat", "dog")))
    source = opened(tmp_path)
    assert source.class_names == ["cat", "dog", "eel"]
    assert source.labels.tolist() == [0, 1, 2, 2, 0, 1]


# ----------------------------------------------------------------------------- columns and types


def test_columns_named_otherwise_are_chosen(tmp_path):
    rows = table(4, label="kind", names=None).append_column("crop", table(4, 4)["image"])
    write_parquet(tmp_path / "train.parquet", rows)
    with pytest.raises(
        ValueError, match=r"no column is named label .*--config.dataset.label_column"
    ):
        opened(tmp_path)
    assert content(opened(tmp_path, label_column="kind"))[3] == (30, 0)
    source = opened(tmp_path, image_column="crop", label_column="kind")
    assert content(source)[0] == (40, 0)
    with pytest.raises(ValueError, match=r"no column is named photo \(image_column\)"):
        opened(tmp_path, image_column="photo", label_column="kind")
    with pytest.raises(ValueError, match=r"column kind holds int64; expected images as bytes"):
        opened(tmp_path, image_column="kind", label_column="kind")


def images(kind, values):
    return pa.array(values, kind)


@pytest.mark.parametrize("ending", ["arrow", "parquet"])
@pytest.mark.parametrize("kind", ["binary", "large", "struct", "list"])
def test_images_stored_in_other_ways(tmp_path, ending, kind):
    data = [jpeg(10 * i) for i in range(5)]
    column = {
        "binary": lambda: images(pa.binary(), data),
        "large": lambda: images(pa.large_binary(), data),
        "struct": lambda: images(pa.struct([("bytes", pa.binary())]), [{"bytes": x} for x in data]),
        "list": lambda: images(
            pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            [[{"bytes": x, "path": None}] for x in data],
        ),
    }[kind]()
    rows = pa.table({"image": column, "label": [0, 1, 0, 1, 0]})[1:]  # arrays with an offset
    if ending == "arrow":
        write_arrow(tmp_path / "train.arrow", rows)
    else:
        write_parquet(tmp_path / "train.parquet", rows, row_group_size=2)
    source = opened(tmp_path)
    assert content(source) == [(10, 1), (20, 0), (30, 1), (40, 0)]
    assert (source._places[0] is not None) == (ending == "arrow" and kind != "list")


def test_arrow_files_with_compressed_images_are_read_by_their_batches(tmp_path):
    (tmp_path / "train.arrow").write_bytes(file_bytes(table(5), compression="lz4"))
    source = opened(tmp_path)
    assert content(source) == [(10 * i, i % 3) for i in range(5)]
    assert source._places == [None]


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (pa.array(["0", "01", " 2"]), [0, 1, 2]),
        (pa.array([0.0, 1.0, 2.0]), [0, 1, 2]),
        (pa.array([2, 1, 0], pa.uint64()), [2, 1, 0]),
        (pa.array(["1", "0", "1"]).dictionary_encode(), [1, 0, 1]),
    ],
)
def test_labels_of_other_types_are_converted(tmp_path, labels, found):
    write_arrow(tmp_path / "train.arrow", table(3, names=None).set_column(1, "label", labels))
    assert opened(tmp_path).labels.tolist() == found


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (pa.array([0.5, 1, 2]), r"column label: the label is 0.5"),
        (pa.array([True, False, True]), "column label holds bool; expected class numbers"),
        (pa.array([[0], [1], [2]]), r"column label holds list<.*; expected class numbers"),
        (pa.array([0, 1, 2**63], pa.uint64()), "train.arrow"),
        (pa.array([0, 1, 10**9]), "row 2 has the label 1000000000"),
        (pa.array([0, 1, None]), "image number 2 has the label -1"),
        (pa.array(["0", "1", None]), "image number 2 has the label -1"),
    ],
)
def test_labels_that_are_none_are_quoted(tmp_path, labels, message):
    write_arrow(tmp_path / "train.arrow", table(3, names=None).set_column(1, "label", labels))
    with pytest.raises(ValueError, match=message):
        opened(tmp_path)


@pytest.mark.parametrize("form", [stream_bytes, file_bytes])
def test_a_file_without_rows_is_no_matter_beside_others(tmp_path, form):
    (tmp_path / "train-0.arrow").write_bytes(form(table(2)[:0]))
    (tmp_path / "train-1.arrow").write_bytes(form(table(2)))
    assert content(opened(tmp_path)) == [(0, 0), (10, 1)]


def test_a_row_count_beyond_the_file_is_not_believed():
    with pytest.raises(table_scan.Unfit, match="1000000 rows in 500 bytes: it is damaged"):
        table_scan._check_rows([10**6], 500)


# ------------------------------------------------------------------------- files and identity


def test_few_parquet_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("hybrid_flax.data.sources.tables.FILES_AT_ONCE", 3)
    monkeypatch.setattr("hybrid_flax.data.sources.tables._KEPT_ROW_GROUPS", 1)
    for i in range(8):
        write_parquet(tmp_path / f"train-{i}.parquet", table(1, i, names=None))
    source = opened(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for i in np.random.default_rng(0).permutation(8):
        assert source.read(int(i)).data == jpeg(10 * int(i))
        assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_identity_stays_when_a_dataset_moves_and_changes_with_its_files(tmp_path):
    write_arrow(tmp_path / "a" / "train-0.arrow", table(2))
    first = opened(tmp_path / "a").identity()
    (tmp_path / "a").rename(tmp_path / "b")
    assert opened(tmp_path / "b").identity() == first
    (tmp_path / "b" / "train-0.arrow").rename(tmp_path / "b" / "train-1.arrow")
    assert opened(tmp_path / "b").identity() != first
    assert len(first) == 16
