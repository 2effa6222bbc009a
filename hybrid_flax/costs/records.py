"""Benchmark records: where something was measured, and how it is written down."""

import argparse
import json
import os
import pathlib
import platform
from typing import Any

import jax

from hybrid_flax.errors import InputError
from hybrid_flax.versions import versions


def record(*packages: str) -> dict[str, Any]:
    """Says machine, device and versions, of these packages too."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": jax.devices()[0].device_kind,
        "versions": versions(*packages),
    }


def check_file(flag: str, path: pathlib.Path | None) -> None:
    """Raises InputError, before anything is measured, if the figures could not be written there."""
    if path and not path.parent.is_dir():
        raise InputError(f"{flag}={path}: there is no folder {path.parent}; make it first")


def save(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes JSON that people can compare."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def positive(text: str) -> int:
    """Reads a whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)
