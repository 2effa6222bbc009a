import numpy as np
import pytest

from hybrid_flax.errors import InputError
from hybrid_flax.models.gramian.vit import GAViT
from hybrid_flax.weights.adapt import adapt

PATH = "params/trunk/positions"


def fitted(old, new):
    return adapt({PATH: old}, {PATH: np.zeros(new, np.float32)}, "x", GAViT.structure)[PATH]


def test_positions_in_a_row_are_resized_as_the_square_they_are(capsys):
    rows, columns = np.mgrid[:3, :3].astype(np.float32)
    found = fitted(np.stack([rows, columns], -1).reshape(9, 2), (25, 2))
    rows, columns = np.mgrid[:5, :5] / 2
    np.testing.assert_allclose(found.reshape(5, 5, 2), np.stack([rows, columns], -1), atol=1e-6)
    assert "1 learned position tables are resized" in capsys.readouterr().out


def test_positions_of_no_square_are_refused():
    with pytest.raises(InputError, match="1 of another shape or type"):
        fitted(np.zeros((8, 2), np.float32), (16, 2))
