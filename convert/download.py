"""Fetches released checkpoints from where their authors publish them."""

import hashlib
import os
import pathlib

from convert.containers import describe
from convert.transfer import NETWORK_ERRORS, Record, fetch, record_of
from hybrid_flax.errors import InputError
from hybrid_flax.models.info import ModelInfo


def cache_folder() -> pathlib.Path:
    """Returns the folder for downloads: $HYBRID_FLAX_CACHE, by default ~/.cache/hybrid_flax.

    Raises:
      InputError: the variable is not set, and there is no home directory.
    """
    folder = os.environ.get("HYBRID_FLAX_CACHE") or "~/.cache/hybrid_flax"
    try:
        return pathlib.Path(folder).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"no home directory is known for {folder}; set HYBRID_FLAX_CACHE to a folder for "
            "downloads"
        ) from error


def download(name: str, info: ModelInfo, folder: pathlib.Path | None = None) -> pathlib.Path:
    """The path of a model's release file, downloaded unless it is there already.

    An interrupted download is continued where it stopped, if the server says that the file is still
    the same. Size and SHA-256 of what was downloaded are kept beside it (`.download.json`); a file
    that is there is compared with them, and with the published SHA-256.

    Args:
      name: of the model, for messages.
      info: its `model_info`.
      folder: default `cache_folder()`.

    Raises:
      InputError: no weights were released or no direct link to them is published; the server
        refuses, breaks off, sends a web page or does not speak HTTP; the folder cannot be written
        to; the file does not have its checksum.
    """
    if not info.release_file:
        raise InputError(f"no weights of {name} were released; see {info.release_page}")
    folder = cache_folder() if folder is None else folder
    target = folder / info.release_file
    by_hand = (
        f"get {info.release_file} from {info.release_page} by hand and save it as {target}, or "
        "give its path"
    )
    try:
        if target.exists():
            _check_there(target, info)
            return target
        if not info.download_url:
            raise InputError(
                f"the authors publish no direct link to the weights of {name}: {by_hand}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".part")
        record = fetch(info.download_url, partial)
        _check_new(partial, info, record)
        partial.rename(target)
        record.write(target)
        record_of(partial).unlink(missing_ok=True)
    except NETWORK_ERRORS as error:
        raise InputError(
            f"{info.download_url} cannot be downloaded ({error}); run this again to continue, or "
            f"{by_hand}"
        ) from error
    except OSError as error:
        raise InputError(
            f"{folder} cannot hold {info.release_file} ({error}); set HYBRID_FLAX_CACHE to a "
            "folder that you can write to"
        ) from error
    return target


def _check_new(partial: pathlib.Path, info: ModelInfo, record: Record) -> None:
    """Keeps no web page, and nothing with another checksum than the published one."""
    with open(partial, "rb") as file:
        head = file.read(512)
        file.seek(0)
        record.size = partial.stat().st_size
        record.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    wrong = ""
    if not head or "web page" in describe(head, partial) or "LFS" in describe(head, partial):
        wrong = f"{describe(head, partial)}; see {info.release_page}"
    elif info.sha256 and record.sha256 != info.sha256:
        wrong = f"the file has sha256 {record.sha256}, published is {info.sha256}"
    if wrong:
        partial.unlink()
        record_of(partial).unlink(missing_ok=True)
        raise InputError(
            f"{info.download_url}: {wrong}. It was deleted; run this again, and tell us if it "
            "stays so"
        )


def _check_there(target: pathlib.Path, info: ModelInfo) -> None:
    """Compares a file that is there with what is published of it, or was when it came."""
    if not target.is_file():
        raise InputError(f"{target} is not a file; move it away")
    record = Record.read(target)
    known = {"published": info.sha256, "of the download": record.sha256 if record else ""}
    if not any(known.values()):
        return  # put there by hand
    size = target.stat().st_size
    if record and size != record.size and not info.sha256:
        raise InputError(
            f"{target} has {size:,} bytes, downloaded were {record.size:,}: delete it and "
            f"{record_of(target).name} to download it again"
        )
    with open(target, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    whose, expected = next((whose, value) for whose, value in known.items() if value)
    if found != expected:
        raise InputError(
            f"{target} has sha256 {found}, {whose} is {expected}: it is damaged or another file. "
            "Delete it to download it again"
        )
