"""Fetches released checkpoints from where their authors publish them."""

import hashlib
import http.client
import os
import pathlib
import shutil
import ssl
import urllib.error
import urllib.request

from tqdm import tqdm

from hybrid_flax.errors import InputError
from hybrid_flax.models.info import ModelInfo

_TIMEOUT = 60  # seconds without a byte
_CHUNK = 1 << 20
_NETWORK_ERRORS = (  # most are kinds of OSError, which is also what the disk raises
    urllib.error.URLError,
    TimeoutError,
    ConnectionError,
    ssl.SSLError,
    http.client.HTTPException,
)


def cache_folder() -> pathlib.Path:
    """Returns the folder for downloads: $HYBRID_FLAX_CACHE, by default ~/.cache/hybrid_flax."""
    folder = os.environ.get("HYBRID_FLAX_CACHE") or "~/.cache/hybrid_flax"
    return pathlib.Path(folder).expanduser()


def download(name: str, info: ModelInfo, folder: pathlib.Path | None = None) -> pathlib.Path:
    """The path of a model's release file, downloaded unless it is there already.

    An interrupted download is continued where it stopped.

    Args:
      name: of the model, for messages.
      info: its `model_info`.
      folder: default `cache_folder()`.

    Raises:
      InputError: no weights were released or no direct link to them is published; the server
        refuses, breaks off or does not speak HTTP; the folder cannot be written to; the file does
        not have the published checksum.
    """
    if not info.release_file:
        raise InputError(f"no weights of {name} were released; see {info.release_page}")
    folder = cache_folder() if folder is None else folder
    target = folder / info.release_file
    by_hand = (
        f"get {info.release_file} from {info.release_page} by hand and save it as {target}, or "
        "give its path"
    )
    partial = target.with_name(target.name + ".part")
    try:
        if target.exists():
            return target
        if not info.download_url:
            raise InputError(
                f"the authors publish no direct link to the weights of {name}: {by_hand}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        _fetch(info.download_url, partial)
        if info.sha256:
            _check(partial, info)
        partial.rename(target)
    except _NETWORK_ERRORS as error:
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


def _fetch(url: str, partial: pathlib.Path) -> None:
    """Downloads to `partial`, continuing it where the server can."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return  # it was complete
        raise
    with response:
        if response.status != 206:  # the server starts over
            have = 0
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        needed = 0 if total is None else total - have
        free = shutil.disk_usage(partial.parent).free
        if needed > free:
            raise InputError(
                f"{partial.parent} has {free:,} bytes free, the file needs {needed:,}; set "
                "HYBRID_FLAX_CACHE to a folder on a larger disk"
            )
        with (
            open(partial, "ab" if have else "wb") as file,
            tqdm(
                desc=partial.stem, total=total, initial=have, unit="B", unit_scale=True,
                disable=None,
            ) as bar,
        ):  # fmt: skip
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    size = partial.stat().st_size
    if total is not None and size != total:
        raise ConnectionError(f"it broke off after {size:,} of {total:,} bytes")


def _check(partial: pathlib.Path, info: ModelInfo) -> None:
    with open(partial, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != info.sha256:
        partial.unlink()
        raise InputError(
            f"{info.download_url}: the file has sha256 {found}, published is {info.sha256}. It was "
            "deleted; run this again, and tell us if it stays so"
        )
