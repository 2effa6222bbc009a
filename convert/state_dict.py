"""PyTorch state_dicts in and out of our models: strict both ways, exact to the bit.

The rules of a family, `rules.Rules`, lie in the file of this folder that is called as its own in
`hybrid_flax/models/`.
"""

import importlib
import importlib.util
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from convert.keys import Renamed, code_base, release_keys
from convert.official import Official
from convert.rules import Pairs, Rules, rename
from convert.tensors import shorten, to_arrays
from hybrid_flax.errors import InputError
from hybrid_flax.models import registry
from hybrid_flax.models.backbone import Backbone
from hybrid_flax.weights import bridge
from hybrid_flax.weights.differences import summary
from hybrid_flax.weights.paths import flatten, unflatten

# Our axes → PyTorch's, by the end of our path and by rank.
_KERNELS = {2: "i o -> o i", 4: "h w i o -> o i h w"}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
    "count": "num_batches_tracked",
}
_IN_JAX = {"f": jnp.float32, "i": jnp.int32}


class _Entry(NamedTuple):
    path: str  # in our weights, the collection first
    axes: tuple[int, ...]  # transposes our array into PyTorch's order
    ordered: tuple[int, ...]  # its shape then
    shape: tuple[int, ...]  # in PyTorch: the same, with axes of length 1 between
    dtype: np.dtype  # in PyTorch

    def export(self, array: np.ndarray) -> np.ndarray:
        array = np.asarray(array).transpose(self.axes).reshape(self.shape)
        return np.ascontiguousarray(array, self.dtype).reshape(self.shape)

    def read(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.ordered).transpose(np.argsort(self.axes))


def load_state_dict(model: Backbone, state: Mapping[str, np.ndarray]) -> None:
    """Fills a model, in place, with the arrays of a PyTorch state_dict.

    Prefixes of wrapped models and timm's names are understood, see `keys.release_keys`; what was
    done with the keys is printed.

    Args:
      model: from `create_model`; it may be abstract (`bridge.abstract`).
      state: {key: array} as `load_checkpoint` returns it; PyTorch tensors are taken too. Buffers
        that follow from the architecture (relative position indices) may be left out. A model
        without a classifier (`num_classes=0`) takes none, which is printed.

    Raises:
      InputError: counting the missing, unexpected, mis-shaped and unusable keys, with some of each;
        the model is unchanged then.
    """
    table, buffers = _table(model), _rules(model).derived_buffers(model)
    found = _release_keys(model, table, buffers, state)
    classifier = _classifier_keys(model) - table.keys()
    unneeded = sorted(classifier & found.state.keys()) if model.num_classes == 0 else []
    state = {key: array for key, array in found.state.items() if key not in unneeded}
    unusable, weights = [], {}
    for key, array in state.items():
        if key in buffers:
            if array.shape != buffers[key].shape or not np.array_equal(array, buffers[key]):
                unusable.append(
                    f"{key}: {array.dtype} {array.shape} differs from the one that this model's "
                    f"image size implies, {buffers[key].shape}"
                )
        elif key in table:
            entry = table[key]
            if array.shape != entry.shape:
                unusable.append(f"{key}: file {array.shape}, model {entry.shape}")
            elif not _widens(array.dtype, entry.dtype):
                unusable.append(
                    f"{key}: {array.dtype} does not fit into {entry.dtype} without loss"
                )
            else:
                weights[entry.path] = jnp.array(entry.read(array), _IN_JAX[entry.dtype.kind])
    for key, entry in table.items():  # files from before PyTorch 0.4.1 have no counters
        if key not in state and entry.dtype.kind == "i":
            weights[entry.path] = jnp.zeros(entry.shape, jnp.int32)
    missing = [key for key, e in table.items() if e.path not in weights and key not in state]
    unexpected = [shorten(key) for key in state if key not in table and key not in buffers]
    if missing or unexpected or unusable:
        known = any(key in table or key in buffers for key in state)
        whose = code_base(state) or "of another code base"
        hint = f" ({found.note})" if found.note else ""
        hint += "" if known else f". None of its keys is known: these are {whose}"
        raise InputError(
            f"this state_dict does not fit {type(model).__name__} as it was built (variant, "
            f"num_classes, image_size); nothing was loaded{hint}\n"
            + summary(missing, unexpected, unusable)
        )
    if unneeded:
        print(f"the classifier is left out, for num_classes=0: {', '.join(unneeded[:3])}")
    if found.note:
        print(found.note)
    bridge.set_weights(model, unflatten(weights))


def release_state(model: Backbone, state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A state_dict by the keys of the model's release, however its file calls them.

    Raises:
      InputError: it holds several models.
    """
    buffers = _rules(model).derived_buffers(model)
    return _release_keys(model, _table(model), buffers, state).state


def to_state_dict(model: Backbone) -> dict[str, np.ndarray]:
    """The model as the state_dict its authors' code loads: same keys, layouts, dtypes and bits."""
    flat = flatten(bridge.get_weights(model))
    state = {key: entry.export(flat[entry.path]) for key, entry in _table(model).items()}
    return state | dict(_rules(model).derived_buffers(model))


def model_from_state_dict(
    name: str, state: Mapping[str, np.ndarray], *, image_size: int | None = None
) -> tuple[Backbone, int]:
    """A model with as many classes as a state_dict has, filled with it; and their number.

    Args:
      name: of the model.
      state: as for `load_state_dict`.
      image_size: pixels; default: that of its position tables, or where they do not show it, the
        released model's own.

    Raises:
      InputError: unknown name, or the state_dict does not fit.
    """

    def build(num_classes: int, size: int | None) -> Backbone:
        return bridge.abstract(
            lambda: registry.create_model(
                name, num_classes=num_classes, image_size=size, dtype="float32", rngs=None
            )
        )

    model = build(1000, image_size)
    renamed = release_state(model, state)
    num_classes = classifier_width(model, renamed)
    if image_size is None:
        released = model.image_size
        image_size = own_image_size(model, renamed, lambda size: build(num_classes, size))
        if image_size != released:
            print(f"by their position tables, these weights are for {image_size} pixels")
    if (num_classes, image_size) != (1000, model.image_size):
        model = build(num_classes, image_size)
    load_state_dict(model, state)
    return model, num_classes


def own_image_size(
    model: Backbone, state: Mapping[str, np.ndarray], build: Callable[[int], Backbone]
) -> int:
    """The image size that a state_dict is for, by the shapes of its tables of positions.

    Args:
      model: of the same architecture, of any size: what is returned where no other fits better.
      state: by the release's keys.
      build: makes the model of another size.
    """
    here = _shapes_by_size(model)
    differ = {
        key: (state[key].shape, shape)
        for key, shape in here.items()
        if key in state and len(state[key].shape) == len(shape) and state[key].shape != shape
    }
    here_size = model.image_size
    assert isinstance(here_size, int)  # as releases are
    tried = {here_size}
    for theirs, ours in itertools.islice(differ.values(), _TABLES):
        for size in _sizes(theirs, ours, here_size):
            if size in tried:
                continue
            tried.add(size)
            try:
                shapes = _shapes_by_size(build(size))
            except InputError:  # of a size that the family cannot be built for
                continue
            if all(state[key].shape == shapes.get(key) for key in here if key in state):
                return size
    return here_size


_TABLES = 8  # that are looked at for an image size
_LARGEST = 1024  # pixels: what follows from windows grows with the fourth power


def _shapes_by_size(model: Backbone) -> dict[str, tuple[int, ...]]:
    """{key: shape} of what has another shape at another image size."""
    tables = {key: e.shape for key, e in _table(model).items() if "position" in e.path}
    return tables | {key: a.shape for key, a in _rules(model).derived_buffers(model).items()}


def _sizes(theirs: tuple[int, ...], ours: tuple[int, ...], size: int) -> Iterator[int]:
    """Image sizes that a table's shape may come from: it may be a side of a map, a number of
    places or windows, or (2w - 1)² for windows of w places."""
    for their, our in zip(theirs, ours, strict=True):
        if their != our and min(their, our) > 0:
            for ratio in (
                (their**0.5 + 1) / (our**0.5 + 1),
                their / our,
                (their / our) ** 0.5,
            ):
                if abs(ratio * size - round(ratio * size)) < 0.01 and ratio * size <= _LARGEST:
                    yield round(ratio * size)


def classifier_width(model: Backbone, state: Mapping[str, np.ndarray]) -> int:
    """The number of classes a state_dict was trained for; the model's own if it cannot be told.

    Args:
      model: of the right family and variant, with any number of classes.
    """
    for key, entry in _table(model).items():
        if model.structure.is_classifier(entry.path) and entry.path.endswith("/bias"):
            return len(state[key]) if key in state and np.ndim(state[key]) == 1 else entry.shape[0]
    raise InputError(
        f"{type(model).__name__} has no classifier: no parameter's path fits "
        f"{model.structure.classifier!r}, the `classifier` of its structure"
    )


def _classifier_keys(model: Backbone) -> set[str]:
    """What classifiers of the model's class are called, by its release and by timm."""
    rules, keys = _rules(model), set[str]()
    for part in model.structure.classifier.split("|"):
        for number in range(_HEADS) if r"\d+" in part else (0,):
            for leaf in ("kernel", "bias"):
                path = part.replace(r"\d+", str(number)) + leaf
                keys.add(_key(path, _for(model, rules.renames)))
    timm = {rename(key, rules.timm) for key in keys} if rules.timm else set[str]()
    return keys | timm


_HEADS = 16  # classifiers of one model, at most


def layer_names(model: Backbone) -> dict[str, str]:
    """{our path of a layer: the official path}, for layers that own a parameter themselves."""
    names: dict[str, str] = {}
    for key, entry in _table(model).items():
        _, path = entry.path.split("/", 1)
        if "/" in path and "." in key:
            names.setdefault(path.rpartition("/")[0], key.rpartition(".")[0])
    return names


def official_model(model: Backbone, name: str) -> Official:
    """Finds the place in the authors' repository that makes the model.

    Raises:
      InputError: there is no official code for it.
    """
    official = _rules(model).official
    if name not in official:
        raise InputError(f"there is no official code of {name} to compare with")
    return official[name]


def _release_keys(model, table, buffers, state) -> Renamed:
    arrays = to_arrays(state, "this state_dict")
    shapes = {key: entry.shape for key, entry in table.items()}
    return release_keys(arrays, shapes, buffers, _rules(model).timm)


def _rules(model: Backbone) -> Rules:
    kind = type(model)
    family = kind.__module__.removeprefix("hybrid_flax.models.").split(".")[0]
    known: Mapping[type[Backbone], Rules] = {}
    if importlib.util.find_spec(f"convert.{family}"):
        known = importlib.import_module(f"convert.{family}").RULES
    if kind not in known:
        raise InputError(
            f"there are no conversion rules for {kind.__name__}: convert/{family}.py, RULES, has "
            f"some for {', '.join(kind.__name__ for kind in known) or 'none'}"
        )
    return known[kind]


def _for(model: Backbone, pairs: Pairs | Callable[[Any], Pairs]) -> Pairs:
    return pairs(model) if callable(pairs) else pairs


def _table(model: Backbone) -> dict[str, _Entry]:
    """{release key: where it goes in our model}, one entry for every weight."""
    rules, table = _rules(model), dict[str, _Entry]()
    renames, layouts = _for(model, rules.renames), _for(model, rules.layouts)
    for path, leaf in flatten(bridge.get_weights(model)).items():
        _, ours = path.split("/", 1)
        key = _key(ours, renames)
        axes, shape = _layout(ours, leaf.shape, layouts)
        if key in table:
            raise AssertionError(f"the rules map both {table[key].path} and {path} to {key}")
        integer = jnp.issubdtype(leaf.dtype, jnp.integer)
        ordered = tuple(leaf.shape[axis] for axis in axes)
        table[key] = _Entry(path, axes, ordered, shape, np.dtype("i8" if integer else leaf.dtype))
    return table


def _key(path: str, renames: Pairs) -> str:
    """What a release calls our path, without its collection."""
    *stem, name = rename(path, renames).split("/")
    return ".".join([*stem, _LEAVES.get(name, name)])


def _layout(path: str, shape: tuple[int, ...], layouts) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(axes that transpose our array into PyTorch's, PyTorch's shape)"""
    axes = next((axes for pattern, axes in layouts if re.search(pattern, path)), None)
    if axes is None and not path.endswith("/kernel"):
        return tuple(range(len(shape))), shape
    ours, theirs = (side.split() for side in (axes or _KERNELS[len(shape)]).split("->"))
    lengths = dict(zip(ours, shape, strict=True)) | {"1": 1}
    order = tuple(ours.index(letter) for letter in theirs if letter != "1")
    return order, tuple(lengths[letter] for letter in theirs)


def _widens(source: np.dtype, target: np.dtype) -> bool:
    """Whether every value of `source` is exactly a value of `target`, of the same kind."""
    kinds = (jnp.floating, jnp.integer)
    same_kind = any(jnp.issubdtype(source, k) and jnp.issubdtype(target, k) for k in kinds)
    return same_kind and np.can_cast(source, target, "safe")
