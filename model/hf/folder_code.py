"""The Python files of an exported folder, which load in transformers without this package.

They are copies of the model's files, of the layers of exactly the pattern's mixers, and of what those import, under
flat names: transformers finds a folder's files by their lines `from .file import name` and by nothing else.
"""

import ast
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import sambalm.model.hf
import sambalm.model.ops.reference
from sambalm.model.registry import mixers_of

from .errors import HFError
from .mixers import fp32_tensors
from .names import hf_side

HF, OPERATIONS = sambalm.model.hf.__name__, sambalm.model.ops.reference.__name__
MODELING, LISTING, KERNELS = "modeling_samba", "mixers", "kernels"
SHARED = (MODELING, "configuration_samba", "layers", "operations", LISTING, KERNELS)  # of HF, what files may import

# What takes the place of `sambalm.model.hf.kernels`.
IN_TORCH_ALONE = '''"""The operations of every device, in PyTorch. The package sambalm has kernels for a GPU."""

from .operations import IN_TORCH, Operations


def operations_for(*_: object) -> Operations:
    """Returns what computes on any device."""
    return IN_TORCH
'''


def folder_code(pattern: str) -> dict[str, str]:
    """Returns the text of each file by its name.

    Raises:
        HFError: the file of a mixer's layer cannot be copied: it imports what `HFSide.module` does not allow.
    """
    names = {f"{HF}.{name}": name for name in SHARED}  # of each module that is copied, the file's without .py
    sides = {one: hf_side(one.letter) for one in mixers_of(pattern)}
    for one, side in sides.items():
        _add_name(names, side.module, "mixer_" + re.sub(r"\W", "_", one.name))
    files = {f"{LISTING}.py": _listing(pattern, names), f"{KERNELS}.py": IN_TORCH_ALONE}
    own_packages = {side.module.rpartition(".")[0] for side in sides.values()}
    waiting = [f"{HF}.{MODELING}", *(side.module for side in sides.values())]
    while waiting:
        module = waiting.pop()
        if f"{names[module]}.py" in files:
            continue
        source = _source(module)
        imports = list(_copied_imports(source, module, own_packages=own_packages))
        for _, target in imports:
            stem = target.rpartition(".")[2]
            _add_name(names, target, stem if target.startswith(f"{OPERATIONS}.") else f"{names[module]}_{stem}")
        files[f"{names[module]}.py"] = _flattened(source, [(line, names[target]) for line, target in imports])
        waiting += [target for _, target in imports]
    return files


def _add_name(names: dict[str, str], module: str, name: str) -> None:
    """Names the copy of a module, unless it has a name."""
    if module not in names and name in names.values():
        raise HFError(f"{module} and another file would both be {name}.py in an exported folder: rename one")
    names.setdefault(module, name)


def _listing(pattern: str, names: Mapping[str, str]) -> str:
    """Writes the file that takes the place of `sambalm.model.hf.mixers`."""
    sides = {one.letter: hf_side(one.letter) for one in mixers_of(pattern)}
    imports = sorted(f"from .{names[side.module]} import {side.layer}" for side in sides.values())
    layers = [f"    {letter!r}: {side.layer}," for letter, side in sides.items()]
    tensors = [f"    {letter!r}: {fp32_tensors(letter)!r}," for letter in sides]
    return "\n".join(
        [
            '"""The layers of the model, and which of their tensors are always fp32, by the letters of its pattern."""',
            "",
            *imports,
            "",
            *("LAYERS = {", *layers, "}"),
            *("FP32_TENSORS = {", *tensors, "}"),
            "",
            "layer_class = LAYERS.__getitem__",
            "fp32_tensors = FP32_TENSORS.__getitem__",
            "",
        ]
    )


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise HFError(f"the module {module}, which a mixer names for the Hugging Face format, has no Python file")
    return Path(spec.origin).read_text("utf-8")


def _copied_imports(source: str, module: str, *, own_packages: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yields the line, from 1, and the module of each import whose file is copied; others stay as they are.

    Args:
        own_packages: the packages of the mixers' layers, each of which may import files beside itself.
    """
    package = module.rpartition(".")[0]
    roots = {name.partition(".")[0] for name in (HF, *own_packages)}
    files, folders = {f"{HF}.{name}" for name in SHARED}, {OPERATIONS, *own_packages}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            targets = [importlib.util.resolve_name("." * node.level + (node.module or ""), package)]
        else:
            continue
        for target in targets:
            if target.partition(".")[0] not in roots:
                continue
            allowed = target in files or target.rpartition(".")[0] in folders
            if not allowed or isinstance(node, ast.Import):
                raise HFError(
                    f"{module} has `{ast.unparse(node)}`, of which an exported folder takes no copy: of sambalm "
                    f"and its own package it may only have lines `from MODULE import NAME`, MODULE being a file beside "
                    f"it, {HF}.layers or a file of {OPERATIONS}"
                )
            yield node.lineno, target


def _flattened(source: str, imports: Iterable[tuple[int, str]]) -> str:
    lines = source.splitlines(keepends=True)
    for number, name in imports:
        lines[number - 1] = re.sub(r"\bfrom\s+\S+\s+import\b", f"from .{name} import", lines[number - 1], count=1)
    return "".join(lines)
