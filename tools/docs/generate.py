"""Writes the generated parts of the documentation: the configuration tables and the list of messages.

    python tools/docs/generate.py            # rewrites them
    python tools/docs/generate.py --check    # exits with 1 if one is not current

A generated part lies between `<!-- generated: NAME -->` and `<!-- end: NAME -->` in a page of docs/.
"""

import argparse
import ast
import dataclasses
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import comlora_trl  # noqa: E402
from comlora_trl.cli.sft import ComLoRAScriptConfig  # noqa: E402
from comlora_trl.cli.training import ComLoRAModelConfig  # noqa: E402

PACKAGE = ROOT / "comlora_trl"
# Headings of the configuration page, and the fields below each: names without "comlora_", or patterns with a "*"
GROUPS = {
    "Competition": ("k", "tournament", "rows", "learning_rate", "lora_*", "use_peft"),
    "Speed and memory": ("branch_chunk", "graphs"),
    "Tournament": ("branch*", "rung*"),
    "Losses of the paper": ("*_weight", "top_n", "annealing*", "noise", "equation_signs"),
    "Selector": ("selector*",),
    "Data": ("prompt", "validation_size"),
    "Winner": ("winner*", "overwrite_winner", "output_dir"),
    "Other": ("*",),
}
# Where a message comes from -> its heading on the troubleshooting page; the first that fits
PLACES = {
    "cli/tables": "Tables and plots",
    "cli/plot": "Tables and plots",
    "plots": "Tables and plots",
    "cli": "Command line",
    "training/config": "Configuration",
    "competition": "Configuration",
    "branches/kernels": "Configuration",
    "data": "Data",
    "training/data_checks": "Data",
    "training/hold_out": "Data",
    "demo": "Data",
    "training/export": "Checkpoints and export",
    "training/checkpoints": "Checkpoints and export",
    "training/sharding": "Checkpoints and export",
    "evaluation": "Evaluation",
    "winner": "Checkpoints and export",
    "": "Models, adapters and training",
}
ORDER = ("Command line", "Configuration", "Models, adapters and training", "Data", "Checkpoints and export")
ORDER += ("Evaluation", "Tables and plots")
LOGGED = {"warning", "warning_once", "info"}


def own_fields(config: type) -> Iterator[dataclasses.Field]:
    """Fields that a dataclass adds to its base, or gives another default."""
    bases = [base for base in config.__bases__ if dataclasses.is_dataclass(base)]
    inherited = {field.name: field for base in bases for field in dataclasses.fields(base)}
    for field in dataclasses.fields(config):
        known = inherited.get(field.name)
        if known is None or default_of(known) != default_of(field):
            yield field


def default_of(field: dataclasses.Field) -> object:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def configs() -> list[type]:
    """The public configurations, and those of the command line."""
    public = [getattr(comlora_trl, name) for name in comlora_trl.__all__]
    return [each for each in public if dataclasses.is_dataclass(each)]


def type_name(annotation: object) -> str:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return " or ".join(type_name(each) for each in typing.get_args(annotation))
    if annotation is type(None):
        return "None"
    return annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)


def belongs(name: str, patterns: tuple[str, ...]) -> bool:
    name = name.removeprefix("comlora_")
    return any(
        (pattern.endswith("*") and name.startswith(pattern[:-1]))
        or (pattern.startswith("*") and name.endswith(pattern[1:]))
        or name == pattern
        for pattern in patterns
    )


def field_table(fields: list[dataclasses.Field], hints: dict[str, object]) -> list[str]:
    lines = ["| Field | Type | Default | Description |", "|---|---|---|---|"]
    for field in fields:
        text = re.sub(r"\s+", " ", field.metadata.get("help", "")).replace("|", r"\|")
        default = f"`{default_of(field)!r}`".replace("|", r"\|")
        lines.append(f"| `{field.name}` | {type_name(hints[field.name])} | {default} | {text} |")
    return lines


def shared_bases() -> list[type]:
    """Dataclasses of this package that public configurations inherit and that are not public themselves."""
    found = [base for config in configs() for base in config.__mro__[1:] if dataclasses.is_dataclass(base)]
    return [
        base for base in dict.fromkeys(found) if base.__module__.startswith("comlora_trl") and base not in configs()
    ]


def documented_configs() -> list[type]:
    """Every configuration that has a section of its own."""
    return [*shared_bases(), *configs(), ComLoRAScriptConfig, ComLoRAModelConfig]


def section(config: type, about: str) -> list[str]:
    """The heading of a configuration, a sentence, and its fields by topic."""
    hints, left = typing.get_type_hints(config), list(own_fields(config))
    lines = ["", f"## {config.__name__}", "", about, ""]
    for title, patterns in GROUPS.items():
        chosen = [field for field in left if belongs(field.name, patterns)]
        left = [field for field in left if field not in chosen]
        if chosen:
            heading = [f"**{title}**", ""] if len(list(own_fields(config))) > 3 else []
            lines += [*heading, *field_table(chosen, hints), ""]
    return lines


def configuration() -> str:
    """Every field of every configuration, by topic."""
    lines: list[str] = []
    for base in shared_bases():
        users = ", ".join(f"`{config.__name__}`" for config in configs() if base in config.__mro__)
        lines += section(base, f"The competition's own fields, in {users}.")
    for config in configs():
        bases = " and of ".join(f"`{base.__name__}`" for base in config.__bases__ if dataclasses.is_dataclass(base))
        changed = any(own_fields(config))
        lines += section(config, f"All fields of {bases}{', and with these defaults:' if changed else '.'}")
    lines += section(ComLoRAScriptConfig, "The commands only. Its folders lie in the working directory:")
    lines += section(ComLoRAModelConfig, "The commands only. It changes these defaults of TRL's `ModelConfig`:")
    return "\n".join(lines).strip() + "\n"


def text_of(node: ast.expr) -> str | None:
    """The text of a message; what is filled in is shown by its name in braces, or as "…"."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value) or "…" for value in node.values)
    if isinstance(node, ast.FormattedValue):
        value = node.value
        name = value.attr if isinstance(value, ast.Attribute) else value.id if isinstance(value, ast.Name) else ""
        return "{" + name + "}" if name and not name.isupper() else "…"
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [text_of(node.left), text_of(node.right)]
        return "".join(part or "…" for part in parts) if any(parts) else None
    return None


def messages() -> str:
    """Every error and warning that the package prints, by topic."""
    found: dict[str, list[str]] = {heading: [] for heading in ORDER}
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).with_suffix("").as_posix()
        heading = next(title for begin, title in PLACES.items() if place.startswith(begin))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            logged = isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "logger"
            if not (isinstance(node, ast.Raise) or (logged and name in LOGGED)):
                continue
            text = text_of(call.args[0])
            if text and len(text) > 20 and name not in ("AttributeError",):
                kind = "" if isinstance(node, ast.Raise) else f"{name.split('_')[0]}: "
                quoted = f"`` {kind}{text} ``" if "`" in text else f"`{kind}{text}`"
                found[heading].append(f"- {quoted.replace(chr(10), ' ')}")
    lines = [line for title, items in found.items() if items for line in ("", f"### {title}", "", *sorted(set(items)))]
    return "\n".join(lines).strip() + "\n"


PARTS = {"configuration": ("configuration.md", configuration), "messages": ("troubleshooting.md", messages)}


def rewritten(name: str) -> tuple[Path, str]:
    """The page of a generated part, and its text with the part as it should be.

    Raises:
        ValueError: the page has no such part.
    """
    page, make = PARTS[name]
    path = ROOT / "docs" / page
    begin, end = f"<!-- generated: {name} -->\n", f"<!-- end: {name} -->"
    head, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, ended, tail = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"{path} has no part between {begin.strip()} and {end}")
    return path, f"{head}{begin}\n{make()}\n{end}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if a part is not current")
    arguments = parser.parse_args()
    for name in PARTS:
        path, text = rewritten(name)
        if text == path.read_text(encoding="utf-8"):
            continue
        if arguments.check:
            sys.exit(f"error: {path} is not current: run python tools/docs/generate.py")
        path.write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
