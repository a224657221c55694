"""Reading, and writing so that a file is whole or what it was before."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.files import read_contents
from system.errors import InputError


def read_json(path: Path, remedy: str):
    try:
        return json.loads(read_contents(str(path), remedy))
    except (ValueError, RecursionError):
        raise InputError(f"{path}: broken JSON; {remedy}") from None


def read_object(path: Path, remedy: str, **kinds: type) -> dict:
    """The object in a JSON file; InputError unless it has fields of these kinds."""
    found = read_json(path, remedy)
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a JSON object; {remedy}")
    for name, kind in kinds.items():
        if not isinstance(found.get(name), kind):
            raise InputError(f"{path}: {name!r} is missing or broken; {remedy}")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What write_tensors wrote."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path}: cannot be read ({reason}); put it back, or begin again with --restart"
        ) from None


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    move_into_place(beside, path)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside)
    move_into_place(beside, path)


def move_into_place(beside: Path, target: Path) -> None:
    """Renames a file or a folder of files, once the disk has all of it."""
    for path in beside.iterdir() if beside.is_dir() else [beside]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if beside.is_dir():
        remove(target)
    os.replace(beside, target)


def remove(path: Path) -> None:
    """A file, a folder, or a link alone and not what it leads to; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def named(folder: Path, pattern: str) -> list[Path]:
    """What lies in a folder under a name of this pattern, sorted; other names are not a run's."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if re.fullmatch(pattern, path.name))
