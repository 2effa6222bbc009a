import jax
import numpy as np
import pytest

import convert
from hybrid_flax.errors import InputError
from hybrid_flax.opened import find_images, open_model
from tests import trained
from tests.parity import GOLDEN, load


def test_a_run_is_opened_with_its_own_settings(tmp_path):
    opened = open_model(None, trained.write(tmp_path), "", "", given=())
    assert opened.image_size == 32
    assert opened.class_name(3) == "3"
    assert opened.step == 5
    pixels = np.full((1, 32, 32, 3), 128, np.uint8)
    assert jax.eval_shape(opened.model, opened.input(pixels)).shape == (1, 10)


@pytest.mark.slow
def test_a_released_file_is_opened_with_imagenets_names(tmp_path):
    import torch

    state = convert.to_state_dict(load(GOLDEN / "stm" / "unified_convnext_micro.json").model)
    file = tmp_path / "unified_convnext_micro.pth"
    torch.save({"model": {key: torch.tensor(array) for key, array in state.items()}}, file)
    opened = open_model(None, "", "unified_convnext_micro", str(file))
    assert opened.image_size == 224
    assert opened.transform.crop_fraction == 0.875
    assert opened.class_name(0).startswith("tench")
    assert opened.title == "unified_convnext_micro, unified_convnext_micro.pth"


def test_a_file_of_class_names_has_one_for_each(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("zero\none\n")
    workdir = trained.write(tmp_path / "run")
    with pytest.raises(
        InputError, match="names.txt has 2 names: expected one a line for each of the model's 10"
    ):
        open_model(None, workdir, "", "", given=(), class_file=str(file))
    file.write_text("\n".join(f"number {i}" for i in range(10)))
    opened = open_model(None, workdir, "", "", given=(), class_file=str(file))
    assert opened.class_name(9) == "number 9"


def test_images_are_found_once(tmp_path):
    folder = trained.photos(tmp_path / "digits")
    found = find_images(f"{folder},{folder}/digit1.png")
    assert [file[-10:] for file in found] == ["digit0.png", "digit1.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no .jpeg, .jpg"):
        find_images(str(tmp_path / "empty"))
