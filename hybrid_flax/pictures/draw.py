"""The pictures of each kind, for one image: what `hybrid_flax.analysis` finds, with captions.

A caption says model, layer, definition and scale. Scales are those of a panel alone, or of one
image's panels, never of other images in a batch.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array
from PIL import Image

from hybrid_flax.analysis import attention as looks
from hybrid_flax.analysis import cam, gramian, layers, receptive_field, sampling, slot_maps
from hybrid_flax.errors import InputError
from hybrid_flax.models.backbone import Backbone
from hybrid_flax.models.glnet import GLNet
from hybrid_flax.models.gramian.network import GramianNet
from hybrid_flax.models.unified import Unified
from hybrid_flax.pictures.canvas import (
    Panel,
    Pixels,
    colour_classes,
    figure,
    heat,
    marked,
    mosaic,
    picture_panel,
    principal,
)

MEDOIDS, HEADS = 4, 4  # slots, and heads, that a picture shows


class Subject(NamedTuple):
    """What is looked at."""

    model: Backbone
    title: str  # of the model, for captions
    image: Array  # [1, H, W, 3], normalised
    pixels: Pixels  # the same, uint8
    place: tuple[float, float]  # of the image that queries are at: fractions of height and width
    layers: tuple[str, ...] | None  # chosen by name; None: some of each stage
    class_number: int  # that CAMs explain
    class_name: str


class Picture(NamedTuple):
    """A picture with a name for its file."""

    kind: str
    layer: str
    image: Image.Image


def default_kinds(model: Backbone) -> list[str]:
    """What is worth a look first, by family."""
    if isinstance(model, GLNet):
        return ["slots", "attention", "cam"]
    if isinstance(model, GramianNet):
        return ["attention", "gram", "cam"]
    if isinstance(model, Unified):
        own = {"internimage": "offsets", "convnext": "erf"}
        return [own.get(model.variant.mixer, "attention"), *(["cam"] if model.num_classes else [])]
    return ["attention", "cam"] if model.num_classes else ["attention"]


def draw(kind: str, subject: Subject) -> list[Picture]:
    """Makes the pictures of a kind, one of `KINDS`.

    Raises InputError for an unknown kind, one that the model has not, or layers that are not there.
    """
    if kind not in KINDS:
        raise InputError(f"--what={kind}: expected some of {', '.join(KINDS)}")
    return KINDS[kind](subject)


def _of_each_stage(paths: Sequence[str], kind_of: Callable[[str], str]) -> list[str]:
    """The last layer of every stage and kind."""
    last: dict[tuple[str, str], str] = {}
    for path in paths:
        stage = re.match(r"(?:trunk/)?(?:stages|heads)/(\d+)", path)
        place = re.sub(r"stripes\d", "", path)
        key = (stage[0] if stage else "", kind_of(path) + ("1" if path != place else ""))
        last.pop(key, None)
        last[key] = path
    return [path for path in paths if path in last.values()]


def _slots(subject: Subject) -> list[Picture]:
    found = slot_maps.slots(subject.model, subject.image)
    chosen = _chosen(subject, list(found), "slots", lambda path: "")
    pictures = []
    for path in chosen:
        shares = found[path][0]
        largest = float(shares.max())
        distances = slot_maps.slot_distances(shares, smallest=float(shares.min()), largest=largest)
        start = slot_maps.first_medoids(distances, MEDOIDS)
        medoids = np.sort(slot_maps.k_medoids(distances, start))
        winners = shares.argmax(0)
        panels = [
            picture_panel(subject.pixels, "the image"),
            colour_classes(
                winners,
                subject.pixels,
                f"slot with the largest share; {len(np.unique(winners))} of {len(shares)} win",
                len(shares),
            ),
            *(
                heat(shares[slot], subject.pixels, f"slot {slot}", limits=(0, largest))
                for slot in medoids
            ),
            heat(mosaic(shares), None, f"all {len(shares)} slots by row", limits=(0, largest)),
        ]
        caption = (
            f"{subject.title}. Slots of {path}: the share of a slot at each place, softmax over "
            f"the slots. Shown are the {MEDOIDS} medoids of the {len(shares)} maps (Euclidean "
            "distance, deterministic start). One scale for all panels of this image, from 0 to its "
            f"largest share, {largest:.3g}; an even share is {1 / len(shares):.3g}."
        )
        pictures.append(Picture("slots", path, figure(panels, caption, columns=7)))
    return pictures


def _chosen(subject: Subject, paths: Sequence[str], what: str, kind_of) -> list[str]:
    if subject.layers is not None:
        return layers.check_all_layers(subject.layers, paths, what)
    return _of_each_stage(paths, kind_of)


_EXPLAINED = {
    "windows": "softmax inside the window of the marked place",
    "shifted windows": "softmax inside the shifted window, put back to where it lies; masked pairs "
    "are not drawn",
    "global query": "the query is a place of the image-wide query map; each window answers with a "
    "softmax of its own, and windows are weighed by their log-sum-exp, so that all places sum to "
    "1 (a definition of this project, the paper has none)",
    "halo": "softmax over the block's neighbourhood",
    "linear": "W = t·relu(q)·relu(k) / max(sum, 100) with the layer's own temperature t: W times "
    "the values is exactly what the layer gives",
    "all places": "softmax over all keys",
}


def _attention(subject: Subject) -> list[Picture]:
    found = looks.attention_layers(subject.model, subject.image, subject.layers)
    paths = list(found)
    if subject.layers is None:
        paths = [path for path in paths if not path.endswith("slot_attn")] or paths
        paths = _of_each_stage(paths, lambda path: found[path].kind)
    return [Picture("attention", path, _attention_figure(subject, found[path])) for path in paths]


def _attention_figure(subject: Subject, layer: looks.Attention) -> Image.Image:
    pixels, heads = subject.pixels, layer.weights.shape[2]
    if layer.path.endswith("slot_attn"):  # slots have no place: the matrix itself
        return _slot_attention(subject, layer)
    height, width = looks.query_size(layer)
    row = min(int(subject.place[0] * height), height - 1)
    column = min(int(subject.place[1] * width), width - 1)
    maps = [looks.attended_from(layer, 0, head, row, column) for head in range(heads)]
    given = np.mean([looks.received(layer, 0, head) for head in range(heads)], axis=0)
    first = picture_panel(pixels, "the image, and the place that looks")
    if layer.has_own_token:
        first = picture_panel(pixels, "the image")
    else:
        y = (row + 0.5) * pixels.shape[0] / height - 0.5
        x = (column + 0.5) * pixels.shape[1] / width - 0.5
        first = marked(first, [(x, y, 6, "red")], pixels.shape)
    panels = [first, heat(np.mean(maps, axis=0), pixels, f"where it looks, mean of {heads} heads")]
    if heads > 1:
        panels += [heat(maps[head], pixels, f"head {head}") for head in range(min(heads, HEADS))]
    if not layer.has_own_token:
        panels.append(heat(given, pixels, "how much each place is looked at"))
    who = (
        f"Class token of {layer.path}; what it gives itself, "
        f"{layer.weights[0, 0, :, 0, 0].mean():.2g}, is left out"
        if layer.has_own_token
        else f"Attention of {layer.path} ({layer.kind}) from place ({row}, {column}) of a "
        f"{height}×{width} map"
    )
    caption = (
        f"{subject.title}. {who}: {_EXPLAINED[layer.kind]}. The scale of each panel stands below "
        "it, in brackets."
    )
    return figure(panels, caption, columns=7)


def _slot_attention(subject: Subject, layer: looks.Attention) -> Image.Image:
    mean = layer.weights[0, 0].mean(0)
    panels = [
        picture_panel(subject.pixels, "the image"),
        heat(mean, None, "slot (row) looks at slot (column), mean of heads"),
    ]
    caption = f"{subject.title}. Attention among the slots of {layer.path}, which have no place."
    return figure(panels, caption)


def _offsets(subject: Subject) -> list[Picture]:
    found = sampling.sampling_points(subject.model, subject.image)
    paths = _chosen(subject, list(found), "deformable convolution", lambda path: "")
    everything, pictures = list(found), []
    height = subject.pixels.shape[0]
    for path in paths:
        points = found[path]
        rows, columns = points[0].shape[1:3]
        stride = height / rows
        row = min(int(subject.place[0] * rows), rows - 1)
        column = min(int(subject.place[1] * columns), columns - 1)
        places, weights = (each[0, row, column].reshape(-1, *each.shape[5:]) for each in points)
        sets = [("one layer", places, weights / points[1].shape[3])]
        index = everything.index(path)
        before = everything[index - 1] if index else ""
        if before and found[before][0].shape[1:3] == (rows, columns):
            through = sampling.composed(points, found[before], 0, row, column)
            sets.append((f"composed with {before}", *through))
        centre = sampling.to_image(np.array([column, row], float), stride)
        panels = []
        for name, xy, share in sets:
            panel = picture_panel(subject.pixels, f"{name}: {len(xy)} points, larger is heavier")
            dots = [
                (*sampling.to_image(each, stride), 1 + 7 * np.sqrt(w / share.max()), "yellow")
                for each, w in zip(xy, share, strict=True)
            ]
            panels.append(marked(panel, [*dots, (*centre, 4, "red")], subject.pixels.shape))
        far = sampling.spread(points)
        caption = (
            f"{subject.title}. Where {path} reads for the red place ({row}, {column}) of its "
            f"{rows}×{columns} map, all groups. Over all places: mean distance "
            f"{far.distance:.2f} places ({far.distance * stride:.1f} pixels of the image), "
            f"weighted {far.weighted_distance:.2f}; {100 * far.outside:.1f} % of the points lie "
            "outside of the map, where they read 0."
        )
        pictures.append(Picture("offsets", path, figure(panels, caption)))
    return pictures


def _cam(subject: Subject) -> list[Picture]:
    pixels, model = subject.pixels, subject.model
    height, width = pixels.shape[:2]
    pictures = []
    for layer in subject.layers or (layers.classified_map(model),):
        found = [
            cam.grad_cam(model, subject.image, subject.class_number, layer, by_place=by_place)
            for by_place in (False, True)
        ]
        panels = [picture_panel(pixels, "the image")]
        for raw, name in zip(found, ("Grad-CAM", "HiResCAM"), strict=True):
            large = cam.resized(raw, height, width)[0]
            panels.append(heat(large, pixels, f"{name}, with its sign", signed=True))
        if layer == model.dense_map:
            dense = np.asarray(layers.compiled(_dense_logits, model, [subject.image]))
            panels.append(
                heat(dense[0, ..., subject.class_number], pixels, "logits of places", signed=True)
            )
        caption = (
            f"{subject.title}. What speaks for {subject.class_name} (red) and against it (blue) in "
            f"the map {layer}: channels weighted by the derivative of the logit, its mean over the "
            "places (Grad-CAM) or that of each place (HiResCAM); bilinear. Scales in brackets, "
            "symmetric."
        )
        pictures.append(Picture("cam", layer, figure(panels, caption)))
    return pictures


def _dense_logits(model: Backbone, images):
    return model.dense_logits(images)


def _erf(subject: Subject) -> list[Picture]:
    height, width = subject.pixels.shape[:2]
    pictures = []
    for layer in subject.layers or layers.stage_maps(subject.model):
        scores = receptive_field.effective_receptive_field(subject.model, subject.image, layer)
        plain, usual = (
            receptive_field.area_ratios(each)
            for each in (scores, receptive_field.logarithmic(scores))
        )
        panels = [
            picture_panel(subject.pixels, "the image"),
            heat(np.sqrt(scores), None, "contributions, square root"),
            heat(receptive_field.logarithmic(scores), None, "RepLKNet's log10(1 + x) / largest"),
        ]
        caption = (
            f"{subject.title}. Effective receptive field of the middle of {layer}, from this image "
            f"of {height}×{width} pixels. Share of the image in the smallest square that holds "
            f"more than 20, 50, 99 % of all: {_ratios(plain)} of the contributions themselves, "
            f"which no scale changes; {_ratios(usual)} as RepLKNet measures it."
        )
        pictures.append(Picture("erf", layer, figure(panels, caption)))
    return pictures


def _ratios(found) -> str:
    return ", ".join("none" if found[t] is None else f"{found[t][1]:.3f}" for t in (0.2, 0.5, 0.99))


def _gram(subject: Subject) -> list[Picture]:
    found = gramian.gramian_similarity(subject.model, subject.image)
    panels = [
        picture_panel(subject.pixels, "the image"),
        *(
            heat(maps[0], subject.pixels, head, signed=True, limits=(-1, 1))
            for head, maps in found.items()
        ),
    ]
    caption = (
        f"{subject.title}. Cosine of each place's vector to the middle place's, of the map that a "
        "head makes its Gramian of: a definition of this project, for the Gramian itself has no "
        "places."
    )
    return [Picture("gram", "heads", figure(panels, caption))]


def _features(subject: Subject) -> list[Picture]:
    names = subject.layers or layers.stage_maps(subject.model)
    panels = [picture_panel(subject.pixels, "the image")]
    for layer in names:
        found = np.asarray(layers.compiled(_map_of, subject.model, [subject.image], layer))[0]
        panels.append(Panel(principal(found, subject.pixels), f"{layer}, {found.shape[:2]}"))
    caption = (
        f"{subject.title}. The first three principal components of each map over this image's "
        "places, as red, green and blue, each from its 1st to its 99th percentile: colours of "
        "different panels have nothing to do with each other."
    )
    return [Picture("features", "stages", figure(panels, caption))]


def _map_of(model: Backbone, images, layer: str):
    return layers.value_of(model, images, layer)[0]


KINDS: dict[str, Callable[[Subject], list[Picture]]] = {
    "slots": _slots,
    "attention": _attention,
    "offsets": _offsets,
    "cam": _cam,
    "erf": _erf,
    "gram": _gram,
    "features": _features,
}
