"""A compiled training step in a file: made where there is time, loaded where a slice waits.

A line of JSON, then the program as JAX writes it, which is a pickle: whoever writes the file runs
code wherever it is loaded. It is loaded if it is what was saved, and if what it was made of and for
is what is here.
"""

import hashlib
import json
import logging
import os
import pathlib
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from hybrid_flax.errors import InputError
from hybrid_flax.run.compilation_cache import processor
from hybrid_flax.run.compiling import Load
from hybrid_flax.run.storage.entries import write_whole
from hybrid_flax.text_files import check_local
from hybrid_flax.versions import numerics

_FORMAT = "hybrid_flax program 1"


def fingerprint(lowered: jax.stages.Lowered, mesh: Mesh) -> dict[str, Any]:
    """What a compiled program depends on, by name; JSON can hold it.

    Args:
      mesh: of the devices it runs on, here or elsewhere.
    """
    devices = list(mesh.devices.flat)
    client = devices[0].client
    return {
        "program": hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16],
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "compiler": client.platform_version,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "mesh": dict(mesh.shape),
        "order of devices": [_place(device) for device in devices],
        "processor": processor() if client.platform == "cpu" else "any",
        **{f"setting {name}": value for name, value in numerics().items()},
    }


def _place(device: jax.Device) -> list[int]:
    return [device.id, device.process_index, *getattr(device, "coords", ())]


def save(file: str, compiled: jax.stages.Compiled, about: dict[str, Any]) -> int:
    """Writes a program with its fingerprint; how many bytes it has.

    Raises:
      InputError: the file cannot be written, or this compiler's programs cannot be saved.
    """
    check_local(file, "--save")
    try:
        program, _, _ = serialize_executable.serialize(compiled)
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise InputError(
            f"--save={file}: programs of this compiler cannot be saved ({error})"
        ) from error
    head = {"format": _FORMAT, "sha256": hashlib.sha256(program).hexdigest(), "made of": about}
    try:
        write_whole(os.path.abspath(file), json.dumps(head).encode() + b"\n" + program)
    except OSError as error:
        raise InputError(f"--save={file}: cannot write it: {error.strerror or error}") from error
    return len(program)


def check_file(file: str) -> None:
    """Raises InputError if `--program` names no regular file."""
    check_local(file, "--program")
    if not os.path.isfile(file):
        raise InputError(
            f"--program={file}: no such file. Make it with python -m hybrid_flax.plan --save=, or "
            "leave the flag out: then the step is compiled"
        )


def load(
    file: str, lowered: jax.stages.Lowered, mesh: Mesh
) -> tuple[jax.stages.Compiled | None, str]:
    """(the program of a file, or None; why not).

    Args:
      lowered: the step that it has to be.
      mesh: of the devices it runs on.
    """
    try:
        about = os.stat(file)
        if about.st_uid not in (os.geteuid(), 0) or about.st_mode & 0o022:
            return None, "others may write to it, and it is code"
        head, _, program = pathlib.Path(file).read_bytes().partition(b"\n")
    except OSError as error:
        return None, error.strerror or str(error)
    try:
        said = json.loads(head)
        made_of, sha256 = said["made of"], said["sha256"]
        known = said["format"] == _FORMAT
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        return None, "it is no saved program of this version, or it is damaged"
    if hashlib.sha256(program).hexdigest() != sha256:
        return None, "it is damaged"
    here = fingerprint(lowered, mesh)
    if not isinstance(made_of, dict) or made_of != here:
        return None, _differences(made_of if isinstance(made_of, dict) else {}, here)
    devices = list(mesh.devices.flat)
    try:
        return serialize_executable.deserialize_and_load(
            program, lowered.in_tree, lowered.out_tree, devices[0].client, devices
        ), ""
    except Exception as error:  # of any kind: it is the compiler's own form
        return None, f"it cannot be loaded ({type(error).__name__}: {str(error)[:300]})"


def _differences(made_of: dict[str, Any], here: dict[str, Any]) -> str:
    changed = [name for name in here if made_of.get(name) != here[name]]
    shown = [f"{name}: there {made_of.get(name)!r}, here {here[name]!r}"[:300] for name in changed]
    return "it was made for something else (" + "; ".join(shown) + ")"


def saved(file: str, mesh: Mesh) -> Load | None:
    """What looks for a step in a file, and says why it is not used; None without a file."""

    def look(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str] | None:
        found, why = load(file, lowered, mesh)
        if found is None:
            logging.warning("--program=%s is not used: %s. The step is compiled", file, why)
            return None
        return found, file

    return look if file else None
