"""Reading, and writing so that a file is whole or what it was before."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from system.errors import InputError


def read_text(path: Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


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
        shutil.rmtree(target, ignore_errors=True)
    os.replace(beside, target)
