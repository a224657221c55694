"""The command line, made from a dataclass of options.

The comment above a field is its help text, "# ---- name" begins a group of options, and a
Literal type names the choices. default() gives a field another default for tiny models, and its
range.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import math
import operator
import re
import typing
from pathlib import Path

from system.errors import InputError
from system.files import read_object

# The bounds that a field may have, and how a message names them.
BOUNDS = {
    "least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "most": (operator.le, "at most"),
}


def default(real, tiny=None, least=None, above=None, most=None):
    """A field's default, perhaps another one for tiny models, and the bounds of its values."""
    known = {"tiny": tiny, "least": least, "above": above, "most": most}
    return dataclasses.field(
        default=real, metadata={key: value for key, value in known.items() if value is not None}
    )


def check_ranges(options) -> None:
    """InputError unless every number is finite and within the bounds of its field."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{flag(field.name)} {value}: must be a finite number")
        for bound, (holds, words) in BOUNDS.items():
            limit = field.metadata.get(bound)
            if limit is not None and not holds(value, limit):
                raise InputError(f"{flag(field.name)} {value}: must be {words} {limit}")


def parse(options: type, argv: list[str] | None, description: str, reads: dict[str, list[str]]):
    """An instance of `options` from the words of the command line.

    reads: method -> the options it reads, of those that only some methods read. An option given to
    a method that does not read it is refused.
    """
    given = vars(make_parser(options, description, reads).parse_args(argv))
    given = {name: value for name, value in given.items() if value is not None}
    method = given.get("method", options.method)
    for name in given:
        readers = [other for other in reads if name in reads[other]]
        if readers and method not in readers:
            raise InputError(
                f"{flag(name)} is not read by --method {method}, only by {', '.join(readers)}; "
                "leave it out"
            )
    is_tiny = chosen_preset(given, options) == "tiny"
    values = {}
    for field in dataclasses.fields(options):
        usual = field.metadata.get("tiny", field.default) if is_tiny else field.default
        values[field.name] = given.get(field.name, usual)
    return options(**values)


def chosen_preset(given: dict, options: type) -> str:
    """real or tiny: as given, otherwise by stepagent_preset in the model's config.json."""
    chosen = given.get("preset", options.preset)
    if chosen != "auto":
        return chosen
    model = given.get("model", options.model)
    config = Path(model, "config.json")
    if model == "tiny":
        return "tiny"
    if not config.is_file():
        return "real"
    return read_object(config, "download the model again").get("stepagent_preset", "real")


def make_parser(options: type, description: str, reads: dict) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=description,
        allow_abbrev=False,
        formatter_class=functools.partial(raw, max_help_position=28, width=100),
    )
    kinds = typing.get_type_hints(options)
    fields = {field.name: field for field in dataclasses.fields(options)}
    for title, helps in documented(options).items():
        group = parser.add_argument_group(title)
        for name, text in helps.items():
            field, kind = fields[name], kinds[name]
            notes = [] if field.default == "" else [f"default: {field.default}"]
            if "tiny" in field.metadata:
                notes.append(f"tiny: {field.metadata['tiny']}")
            readers = [method for method in reads if name in reads[method]]
            if readers and len(readers) <= len(reads) // 2:
                notes.append(f"only {', '.join(readers)}")
            choices = list(reads) if name == "method" else typing.get_args(kind)
            words = {"choices": choices} if choices else {"metavar": kind.__name__.upper()}
            if kind is bool:
                # A bare flag is true.
                words |= {"type": boolean, "nargs": "?", "const": True}
            elif not choices:
                words |= {"type": kind}
            if notes:
                text += f" ({'; '.join(notes)})"
            help_text = text.replace("%", "%%")
            group.add_argument(flag(name), help=help_text, **words)
    return parser


def documented(options: type) -> dict[str, dict[str, str]]:
    """Group -> field -> help text, from the comments in the class's source."""
    groups: dict[str, dict[str, str]] = {}
    comment: list[str] = []
    for line in inspect.getsource(options).splitlines():
        line = line.strip()
        if line.startswith("# ---- "):
            current = groups.setdefault(line.removeprefix("# ---- "), {})
        elif line.startswith("# "):
            comment.append(line.removeprefix("# "))
        elif found := re.match(r"(\w+): ", line):
            current[found[1]] = " ".join(comment)
            comment = []
    return groups


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"
