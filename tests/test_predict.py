import csv
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pyarrow import parquet

from hybrid_flax import predict
from hybrid_flax.errors import InputError
from hybrid_flax.opened import open_model
from hybrid_flax.weights import bridge
from tests import trained

OPTIONS = dict.fromkeys(("model", "checkpoint", "class_names", "features"), "")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return trained.write(tmp_path_factory.mktemp("run"))


def test_every_image_has_a_row_and_unreadable_ones_say_why(workdir, tmp_path, capsys):
    images = trained.photos(tmp_path / "digits", 5)
    (tmp_path / "digits" / "broken.png").write_text("no image")
    table, features = f"{tmp_path}/out.csv", f"{tmp_path}/features.parquet"
    options = OPTIONS | {"images": images, "out": table, "features": features}
    assert predict.main(None, workdir, options, html=True, batch_size=2, given=()) == 0
    said = capsys.readouterr().out
    assert "5 of 6 images predicted by unified_convnext_micro, step 5 of" in said
    assert "warning: cannot read image" in said
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert len(rows) == 6
    broken = rows[0]
    assert broken["class1"] == ""
    assert "in none of the formats JPEG" in broken["error"]
    for row in rows[1:]:
        assert row["name1"] == row["class1"]
        shares = [float(row[f"probability{i}"]) for i in range(1, 6)]
        assert shares == sorted(shares, reverse=True)
        assert 0.3 < sum(shares) <= 1.00001
    page = (tmp_path / "out.html").read_text()
    assert page.count("data:image/png") == 5
    found = parquet.read_table(features).to_pydict()
    assert [image[-10:] for image in found["image"]] == [f"digit{i}.png" for i in range(5)]

    # Whatever the batch, an image has the same answer.
    arrays = OPTIONS | {"images": images, "out": table, "features": f"{tmp_path}/features.npy"}
    predict.main(None, workdir, arrays, batch_size=32, given=())
    again = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [row["class1"] for row in again] == [row["class1"] for row in rows]
    np.testing.assert_allclose(
        np.load(tmp_path / "features.npy"), found["features"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"out": ""}, "--out is missing: expected a file for the table"),
        ({"out": "/nowhere/out.csv"}, "--out=/nowhere/out.csv: there is no folder /nowhere"),
        ({"out": "/tmp"}, "--out=/tmp is a folder; expected a file"),
        ({"out": "gs://bucket/out.csv"}, "--out=gs://bucket/out.csv: it is written to with local"),
        ({"features": "x.txt"}, "--features=x.txt: expected a file that ends in .npy or .parquet"),
        ({"images": ""}, "--images is missing"),
    ],
)
def test_what_cannot_be_written_is_said(workdir, tmp_path, changed, message):
    options = OPTIONS | {"images": str(tmp_path), "out": f"{tmp_path}/out.csv"} | changed
    with pytest.raises(InputError, match=re.escape(message)):
        predict.main(None, workdir, options, given=())


def test_names_that_are_no_text_and_logits_that_are_no_numbers(workdir, tmp_path):
    photo = trained.photos(tmp_path / "digits", 1) + "/digit0.png"
    odd = os.path.join(tmp_path, os.fsdecode(b"caf\xe9<b>.png"))
    os.rename(photo, odd)
    options = OPTIONS | {"images": odd, "out": f"{tmp_path}/out.csv"}
    options["features"] = f"{tmp_path}/features.parquet"
    assert predict.main(None, workdir, options, html=True, given=()) == 0
    assert "caf\\udce9<b>.png" in (tmp_path / "out.csv").read_text()
    assert "caf\\udce9&lt;b&gt;.png" in (tmp_path / "out.html").read_text()
    opened = open_model(None, workdir, "", "", given=())
    weights = bridge.get_weights(opened.model)
    bridge.set_weights(opened.model, jax.tree.map(lambda x: x + jnp.nan, weights))
    (row,) = predict.predictions(opened, [odd])
    assert "its logits are NaN or infinite" in row.error


def test_images_none_of_which_can_be_read_are_an_error(workdir, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    options = OPTIONS | {"images": f"{tmp_path}/a.png", "out": f"{tmp_path}/out.csv"}
    with pytest.raises(
        InputError, match="none of the 1 images can be predicted. The first: cannot read image"
    ):
        predict.main(None, workdir, options, given=())
