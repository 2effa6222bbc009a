"""The samples of one tar shard: images, and the class numbers that lie beside them."""

import collections
import logging
import os
import posixpath
from typing import BinaryIO, NamedTuple

from hybrid_flax.data.sources.base import IMAGE_SUFFIXES
from hybrid_flax.data.sources.labels import class_number
from hybrid_flax.data.sources.tar_members import Member, compression, members
from hybrid_flax.data.sources.walk import ENDING, HIDDEN
from hybrid_flax.errors import InputError
from hybrid_flax.text_files import parse_json

_LABEL_ENDINGS = ("cls", "label", "class", "target")
_LABEL_FIELDS = ("label", "labels", "cls", "class_id", "target", "class")  # in KEY.json
_LARGEST_LABEL = 1 << 20  # bytes of a member that says a label
_LINKS = 8  # followed, one to the next


class Parts(NamedTuple):
    """What the settings say of a sample's parts; empty: what is usual."""

    image: str  # ending
    label: str  # ending, or field of KEY.json

    def is_image(self, ending: str) -> bool:
        if self.image:
            return ending == self.image
        return f".{ending}".endswith(IMAGE_SUFFIXES)

    def is_label(self, ending: str) -> bool:
        return ending == "json" or ending in (
            (self.label.lower(),) if self.label else _LABEL_ENDINGS
        )

    def label_of(self, found: dict[str, bytes], where: str) -> int | None:
        """The class number that the members of a sample say; None if they say none.

        Args:
          found: {ending: content}.
          where: the sample's name without an ending.
        """
        for ending in (self.label.lower(),) if self.label else _LABEL_ENDINGS:
            if ending != "json" and ending in found:
                return class_number(found[ending].strip(b"\0"), f"{where}.{ending}")
        if "json" not in found:
            return None
        return self._in_json(found["json"], f"{where}.json")

    def _in_json(self, data: bytes, where: str) -> int | None:
        content = parse_json(data, where)
        if not isinstance(content, dict):
            return class_number(content, where)  # a number alone; names anything else
        for field in (self.label,) if self.label else _LABEL_FIELDS:
            if field in content:
                return class_number(content[field], f"{where}, field {field}")
        return None

    def expected(self, key: str) -> str:
        """Says where the class number of a sample may stand."""
        if self.label:
            return f"{key}.{self.label}, or {key}.json with a field {self.label}"
        return (
            f"{key}.cls, or {key}.json with {', '.join(_LABEL_FIELDS[:-1])} or {_LABEL_FIELDS[-1]}"
            "; other endings and fields: --config.dataset.label_column=NAME"
        )


class Scan:
    """Reads through one shard. `left_out` counts what is not used, by reason."""

    def __init__(self, shard: str, parts: Parts, skip: bool):
        self.left_out = collections.Counter[str]()
        self._shard, self._parts, self._skip = shard, parts, skip
        self._damaged = False
        self._files: dict[str, Member] = {}  # what links may lead to
        self._links: dict[str, Member] = {}
        self._images: dict[str, Member] = {}  # by key
        self._labels: dict[str, dict[str, bytes]] = collections.defaultdict(dict)
        self._beside: dict[str, list[str]] = collections.defaultdict(list)  # other endings

    def samples(self) -> list[tuple[Member, int]]:
        """(where the image lies, its label) of every sample."""
        try:
            with open(self._shard, "rb") as stream:
                self._read(stream)
        except OSError as error:
            raise InputError(f"cannot read {self._shard}: {error}") from error
        found = []
        for key, image in self._images.items():
            beside = self._labels.pop(key, {})
            label = self._parts.label_of(beside, f"{self._shard}: {key}")
            if label is not None:
                found.append((image, label))
            elif self._damaged:
                self.left_out["images of damaged tar files whose class number is lost"] += 1
            else:
                raise InputError(self._no_label(key, image, [*beside, *self._beside[key]]))
        lonely = [key for key, texts in self._labels.items() if set(texts) - {"json"}]
        if lonely:
            self.left_out["class numbers without an image"] += len(lonely)
        return found

    def _no_label(self, key: str, image: Member, beside: list[str]) -> str:
        return (
            f"{self._shard}: image {image.name} has no class number; expected "
            f"{self._parts.expected(key)}. Beside it: "
            + (", ".join(f"{key}.{ending}" for ending in beside[:5]) or "nothing")
        )

    def _read(self, stream: BinaryIO) -> None:
        kind = compression(stream.read(8))
        if kind:
            raise InputError(
                f"cannot read {self._shard} as a tar file: it is compressed ({kind}). Compressed "
                "tar files have no random access: unpack them to plain .tar"
            )
        size = os.fstat(stream.fileno()).st_size
        for member in members(stream, 0, size, self._damage):
            member = member._replace(name=posixpath.normpath(member.name))
            if member.kind == "file":
                self._files[member.name] = member
                self._take(stream, member)
            elif member.kind in ("hard link", "symbolic link"):
                self._links[member.name] = member
            elif member.kind != "folder":
                what = "a sparse file (tar -S)" if member.kind == "sparse" else "no regular file"
                self._take_not(member, f"is stored as {what}: pack it as an ordinary file")
        for link in self._links.values():
            self._follow(stream, link)
        if self._damaged and not self._files:
            raise InputError(f"{self._shard}: nothing in it can be read as members of a tar file")

    def _damage(self, place: int, reason: str) -> None:
        text = f"{self._shard} is damaged at byte {place}: {reason}"
        if not self._skip:
            start = f"cannot read {self._shard} as a tar file: " if not place else ""
            raise InputError(
                f"{start}{text}. Get it anew; --config.dataset.on_unreadable=skip uses what is "
                "whole in it"
            )
        self._damaged = True
        self.left_out["damaged places of tar files"] += 1
        logging.warning("%s; what is whole behind it is used", text)

    def _take(self, stream: BinaryIO, member: Member) -> None:
        """Keeps an image, or reads a label."""
        sample = self._of_interest(member.name)
        if sample is None:
            return
        key, ending = sample
        if self._parts.is_image(ending):
            if key in self._images:
                raise InputError(
                    f"{self._shard}: {self._images[key].name} and {member.name} belong to one "
                    "sample, which must have one image; say which ending is the image's: "
                    "--config.dataset.image_column=ENDING"
                )
            self._images[key] = member
        elif self._parts.is_label(ending) and (ending != "json" or member.size <= _LARGEST_LABEL):
            self._labels[key][ending] = self._text(stream, member, ending in self._labels[key])
        else:
            self._beside[key].append(ending)
            self.left_out[ENDING] += 1

    def _text(self, stream: BinaryIO, member: Member, twice: bool) -> bytes:
        if twice:
            raise InputError(f"{self._shard}: there are two members {member.name}")
        if member.size > _LARGEST_LABEL:
            raise InputError(
                f"{self._shard}: {member.name} has {member.size} bytes, and is to hold a class "
                "number"
            )
        stream.seek(member.offset)
        return stream.read(member.size)

    def _of_interest(self, name: str) -> tuple[str, str] | None:
        """(key, ending) of a member that may belong to a sample; counts what does not."""
        if any(part.startswith(".") for part in name.split("/")) or "__MACOSX" in name.split("/"):
            self.left_out[HIDDEN] += 1
            return None
        folder, base = posixpath.split(name)
        key, _, ending = base.partition(".")
        return posixpath.join(folder, key), ending.lower()

    def _take_not(self, member: Member, why: str) -> None:
        """Refuses, or counts, a part of a sample that cannot be read."""
        sample = self._of_interest(member.name)
        if sample is None or not (
            self._parts.is_image(sample[1]) or self._parts.is_label(sample[1])
        ):
            return
        if not self._skip:
            raise InputError(f"{self._shard}: {member.name} {why}")
        self.left_out["members that are sparse, links to nowhere or no files"] += 1
        self._damaged = True
        logging.warning("%s: %s %s; it is left out", self._shard, member.name, why)

    def _follow(self, stream: BinaryIO, link: Member) -> None:
        """Takes the member that a link leads to, under the link's name."""
        found = link
        for _ in range(_LINKS):
            target = found.target
            if found.kind == "symbolic link":
                target = posixpath.join(posixpath.dirname(found.name), target)
            target = posixpath.normpath(target)
            if target in self._files:
                self._take(stream, self._files[target]._replace(name=link.name))
                return
            if target not in self._links:
                break
            found = self._links[target]
        self._take_not(link, f"is a {link.kind} to {link.target}, which is not in the tar file")
