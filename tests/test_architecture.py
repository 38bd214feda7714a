"""Rules of the code base that no other test would notice: who imports whom, sizes, and what is never executed."""

import ast
import importlib.util
import inspect
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.deepspeed_contract import PRIVATE_NAMES
from tests.support.worlds import PRELOAD

ROOT = Path(__file__).parents[1]
PRODUCT = ("data_pipeline", "evaluation", "model", "parallel", "pretrain", "slurm")
OTHER_FOLDERS = {"configs", "tests", "benchmarks", "docs", ".ci"}
# Of our own packages, what a file in each may import besides its own.
MAY_IMPORT = {
    "data_pipeline": set(),
    "parallel": set(),
    "model": {"parallel"},
    "pretrain": {"data_pipeline", "model", "parallel"},
    "evaluation": {"data_pipeline", "model", "parallel", "pretrain"},
    "slurm": {"model", "pretrain"},
}
PROGRAM = sorted((ROOT / "pretrain" / "cli").glob("*.py"))
MEGATRON = ROOT / "parallel" / "compat" / "megatron_core.py"
# Every group is made in the first and taken from its World; the others are the doors to megatron-core, and what
# DeepSpeed asks of a model-parallel unit.
DEEPSPEED_ADAPTER = ROOT / "parallel" / "zero" / "deepspeed_adapter.py"
KNOW_PARALLEL_STATE = [
    ROOT / "parallel" / "groups.py",
    ROOT / "parallel" / "compat" / "megatron.py",
    MEGATRON,
    DEEPSPEED_ADAPTER,
]
READS_PTH = ROOT / "model" / "hf" / "lit_gpt.py"  # the one file that reads pickles, of others, and executes none
SAFE_LOAD = "torch.load(weights_only=True)"
HEAVY = {"torch", "megatron", "deepspeed", "transformers", "matplotlib", "pyarrow", "numpy"}
MAX_FUNCTION_LINES, MAX_KERNEL_LINES, MAX_FILE_LINES = 80, 120, 500
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def product_files() -> list[Path]:
    return [path for folder in PRODUCT for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Full names of everything that a tree imports from sambalm, relative imports of a package resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "sambalm")


def package_of(path: Path) -> str:
    return ".".join(("sambalm", *path.relative_to(ROOT).parent.parts))


def wrong_imports(source: str, package: str) -> list[str]:
    """Imports that a file of a package must not make."""
    folder = package.split(".")[1]
    allowed = MAY_IMPORT[folder] | {folder}
    names = imported(ast.parse(source), package)
    return [name for name in names if (name.split(".")[1] not in allowed or name.startswith("sambalm.pretrain.cli"))]


def circle(sources: Mapping[str, tuple[str, str]]) -> list[str]:
    """Files that import each other, by their full names; imports inside functions count.

    Args:
        sources: of each file its package and its text.
    """
    files = TopologicalSorter()
    for name, (package, source) in sources.items():
        for target in imported(_at_run_time(ast.parse(source)), package):
            while target and target not in sources:
                target = target.rpartition(".")[0]  # a name in a file, or in a package's own file
            if target and target != name:
                files.add(name, target)
    try:
        files.prepare()
    except CycleError as error:
        return error.args[1]
    return []


def named_mixers(source: str, package: str) -> list[str]:
    """Imports of one kind of mixer by a file that is not the mixer's own: such a file should ask the registry."""
    own = ".".join(package.split(".")[:4])
    names = [name.split(".")[:4] for name in imported(ast.parse(source), package)]
    kinds = [name for name in names if name[:3] == ["sambalm", "model", "mixers"] and len(name) > 3]
    return [
        kind[3]
        for kind in kinds
        if kind[3] not in ("base", "context", "counts", "scan_counts", "step_sizes", "whole_heads")
        and ".".join(kind) != own
    ]


class _WithoutTypes(ast.NodeTransformer):
    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def _at_run_time(tree: ast.AST) -> ast.AST:
    """The tree without what only type checkers import."""
    return _WithoutTypes().visit(tree)


def long_functions(source: str) -> list[str]:
    """Functions, decorators left out, over the limit; a GPU kernel, which cannot call much, has another."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, FUNCTIONS):
            is_kernel = "triton.jit" in map(ast.unparse, node.decorator_list)
            if node.end_lineno - node.lineno + 1 > (MAX_KERNEL_LINES if is_kernel else MAX_FUNCTION_LINES):
                found.append(node.name)
    return found


def parallel_state_imports(source: str) -> list[str]:
    """Imports of megatron-core's record of process groups, from wherever and however it is reached."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            found += [name for alias in node.names if "parallel_state" in (name := f"{module}.{alias.name}")]
        elif isinstance(node, ast.Attribute) and node.attr == "parallel_state":
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Constant) and node.value == "megatron.core.parallel_state":
            found.append(node.value)
    return found


def megatron_imports(source: str) -> list[str]:
    """Imports of megatron-core, statements and others."""
    nodes = list(ast.walk(ast.parse(source)))
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [
        name for node in imports for name in [getattr(node, "module", None), *(a.name for a in node.names)] if name
    ]
    names += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [name for name in names if name == "megatron" or name.startswith("megatron.")]


def deepspeed_uses(source: str) -> list[str]:
    """Imports of DeepSpeed, and uses of members that it keeps private or that are replaced, also by their names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in modules if name.split(".")[0] == "deepspeed"]
        elif isinstance(node, ast.Attribute) and node.attr in PRIVATE_NAMES:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            module = node.value.startswith("deepspeed.") and " " not in node.value
            found += [node.value] if module or node.value in PRIVATE_NAMES else []
    return found


def private_members(source: str) -> set[str]:
    """Members with a leading underscore of anything but the file's own objects."""
    attributes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    others = [node for node in attributes if not (isinstance(node.value, ast.Name) and node.value.id == "self")]
    return {node.attr for node in others if node.attr.startswith("_") and not node.attr.startswith("__")}


def executions(source: str) -> list[str]:
    """What would execute code out of a file: pickle in any form, and remote code."""
    return [name for name in unpicklers(source) if name != SAFE_LOAD]


def unpicklers(source: str) -> list[str]:
    """What `executions` finds, and calls of torch.load that say themselves that they execute nothing."""
    found, tree = [], ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    safe = [call.func for call in calls if "weights_only=True" in map(ast.unparse, call.keywords)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            found += [name for name in names if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "shelve")]
        elif isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            found += [f"{node.arg}={node.value.value}"]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            found += [SAFE_LOAD if node in safe else ast.unparse(node)]
    unsafe = ("weights_only=False", "trust_remote_code=True", "allow_pickle=True")
    return [name for name in found if "=" not in name or name in (*unsafe, SAFE_LOAD)]


@pytest.mark.parametrize("path", product_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_product_file_keeps_the_rules(path):
    source = path.read_text(encoding="utf-8")
    if path not in PROGRAM:  # which alone knows every folder
        assert wrong_imports(source, package_of(path)) == []
    assert long_functions(source) == []
    assert executions(source) == []
    assert path == READS_PTH or unpicklers(source) == []
    assert path in KNOW_PARALLEL_STATE or parallel_state_imports(source) == []
    assert path == DEEPSPEED_ADAPTER or deepspeed_uses(source) == []
    assert path == MEGATRON or megatron_imports(source) == []
    assert len(source.splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (lambda source: wrong_imports(source, "sambalm.model"), "from sambalm.pretrain.config import RunConfig"),
        (lambda source: wrong_imports(source, "sambalm.model"), "import sambalm.data_pipeline.shards"),
        (lambda source: wrong_imports(source, "sambalm.model.hf"), "from ...data_pipeline import shards"),
        (lambda source: wrong_imports(source, "sambalm.parallel"), "def f():\n    from sambalm import model"),
        (lambda source: wrong_imports(source, "sambalm.data_pipeline"), "from sambalm.parallel.groups import World"),
        (lambda source: wrong_imports(source, "sambalm.pretrain"), "from sambalm.pretrain import cli"),
        (lambda source: wrong_imports(source, "sambalm.pretrain"), "from .cli import main"),
        (long_functions, "def f():\n" + "    x = 1\n" * 80),
        (parallel_state_imports, "from megatron.core import parallel_state"),
        (parallel_state_imports, "import megatron.core.parallel_state as state"),
        (parallel_state_imports, "from megatron.core.parallel_state import get_model_parallel_group"),
        (parallel_state_imports, "from sambalm.parallel.compat.megatron import parallel_state as state"),
        (parallel_state_imports, "from megatron import core\nstate = core.parallel_state"),
        (parallel_state_imports, "state = import_module('megatron.core.parallel_state')"),
        (megatron_imports, "import megatron.core as core"),
        (megatron_imports, "from megatron import core"),
        (megatron_imports, "import_module('megatron.core.enums')"),
        (deepspeed_uses, "import deepspeed"),
        (deepspeed_uses, "from deepspeed.runtime.zero import stage3"),
        (deepspeed_uses, "import_module('deepspeed.comm.torch')"),
        (deepspeed_uses, "norm = engine.optimizer._global_grad_norm"),
        (deepspeed_uses, "optimizer.bit16_groups_flat = []"),
        (deepspeed_uses, "mapping = getattr(parameter, '_hp_mapping', None)"),
        (executions, "import pickle"),
        (executions, "from pickle import loads"),
        (executions, "x = torch.load(path)"),
        (executions, "x = torch.load(path, weights_only=safe)"),
        (executions, "x = torch.load(path, weights_only=False)"),
        (executions, "load = torch.load"),
        (unpicklers, "x = torch.load(path, weights_only=True)"),
        (executions, "x = load(path, weights_only=False)"),
        (executions, "x = f(trust_remote_code=True)"),
        (executions, "x = np.load(path, allow_pickle=True)"),
    ],
)
def test_each_rule_finds_what_breaks_it(rule, source):
    assert rule(source) != []


@pytest.mark.parametrize(
    "source", ["from sambalm.parallel.groups import World", "from .ops import registry", "from . import config"]
)
def test_allowed_imports_pass(source):
    assert wrong_imports(source, "sambalm.model") == []


def test_the_loop_says_what_happens_and_leaves_the_rest_to_hooks():
    tree = ast.parse((ROOT / "pretrain" / "trainer.py").read_text(encoding="utf-8"))
    (fit,) = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS) and node.name == "fit"]
    assert fit.end_lineno - fit.lineno + 1 < 60


def test_the_contract_with_deepspeed_lists_what_the_adapter_uses_and_no_more():
    source = DEEPSPEED_ADAPTER.read_text(encoding="utf-8")
    tree = ast.parse(source)
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert used >= PRIVATE_NAMES
    assert private_members(source) <= PRIVATE_NAMES
    assert private_members("parameter._hp_mapping, self._own, optimizer._step()") == {"_hp_mapping", "_step"}


def heavy_modules(*imports: str) -> set[str]:
    """Which of the packages that take long to import a fresh process has after some imports."""
    script = f"import sys, {', '.join(imports)}; print(*{HEAVY!r} & {{name.split('.')[0] for name in sys.modules}})"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return set(printed.split())


def test_help_checks_of_a_config_and_plans_load_nothing_heavy():
    planner = [f"sambalm.pretrain.planner.{path.stem}" for path in (ROOT / "pretrain" / "planner").glob("[a-z]*.py")]
    assert len(planner) > 5
    assert heavy_modules("sambalm.pretrain.cli.app", "sambalm.pretrain.config_file", *planner) == set()
    assert heavy_modules("sambalm.pretrain.reporting.status", "sambalm.slurm.status") == set()
    assert heavy_modules("sambalm.pretrain.gradient_buckets") >= {"torch"}


def test_ranks_of_tests_preload_what_there_is():
    """Nobody would notice a name that is gone: every test would only take longer."""
    assert [name for name in PRELOAD if importlib.util.find_spec(name) is None] == []
    assert PRELOAD[-1] == "tests.support.frozen"


def test_no_files_import_each_other():
    sources = {
        ".".join((package_of(path), path.stem)).removesuffix(".__init__"): (package_of(path), path.read_text("utf-8"))
        for path in product_files()
    }
    assert circle(sources) == []


def test_files_that_import_each_other_are_found():
    package, late = "sambalm.model", "def f():\n    from .b import g"
    sources = {f"{package}.a": (package, late), f"{package}.b": (package, "from sambalm.model.a import f")}
    assert set(circle(sources)) == set(sources)
    assert circle(sources | {f"{package}.b": (package, "import torch")}) == []


def test_the_program_imports_ours_only_inside_functions():
    """But for its own parts, which keep the same rule."""
    found = 0
    for tree in (ast.parse(path.read_text(encoding="utf-8")) for path in PROGRAM):
        functions = (node for node in ast.walk(tree) if isinstance(node, FUNCTIONS))
        inside = {id(node) for function in functions for node in ast.walk(function)}
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        ours = [node for node in imports if list(imported(node, "sambalm.pretrain.cli"))]
        found += len(ours)
        outside = [ast.unparse(node) for node in ours if id(node) not in inside]
        assert [line for line in outside if not line.startswith("from sambalm.pretrain.cli")] == []
    assert found > 5


def test_only_the_model_config_knows_kinds_of_mixers():
    """It has the keys of the first three, which are older than `model.mixers`; everything else asks the registry."""
    for path in product_files():
        if path != ROOT / "model" / "config.py":
            assert named_mixers(path.read_text("utf-8"), package_of(path)) == [], path
    assert named_mixers("from sambalm.model.mixers.mamba.layer import MambaLayer", "sambalm.pretrain") != []


def test_every_product_folder_is_a_package_and_is_linked_for_the_installation():
    linked = [*PRODUCT, "configs"]  # which the package brings along
    assert sorted(link.name for link in (ROOT / ".src" / "sambalm").iterdir()) == sorted(linked)
    assert all((ROOT / ".src" / "sambalm" / name).resolve() == ROOT / name for name in linked)
    assert all((path.parent / "__init__.py").is_file() for path in product_files())


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a copy without git's list of files")
def test_top_level_folders_are_the_agreed_ones():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {path.split("/")[0] for path in tracked.splitlines() if "/" in path and not path.startswith(".")} | {".ci"}
    assert top <= set(PRODUCT) | OTHER_FOLDERS
    assert set(PRODUCT) <= top


@pytest.mark.slow
def test_a_rank_starts_without_the_compiler():
    """PyTorch's compiler takes seconds to import, and runs on the CPU never need it."""
    code = "import sys, sambalm.pretrain.trainer; assert not {'torch._dynamo', 'torch._inductor'} & set(sys.modules)"
    code += "; assert 'deepspeed.runtime.zero.muon.original_muon' in sys.modules"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def public_errors() -> list[tuple[str, str]]:
    """Module and name of every error of the product that other files may raise."""
    trees = ((path, ast.parse(path.read_text(encoding="utf-8"))) for path in product_files())
    return [
        (".".join(("sambalm", *path.relative_to(ROOT).with_suffix("").parts)), node.name)
        for path, tree in trees
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and not node.name.startswith("_")
        if any(ast.unparse(base).endswith(("Error", "Exception")) for base in node.bases)
    ]


@pytest.mark.parametrize(("module", "name"), public_errors())
def test_an_error_comes_whole_out_of_another_process(module, name):
    """multiprocessing.Pool waits for ever for one that cannot be made again."""
    kind = getattr(importlib.import_module(module), name)
    parameters = list(inspect.signature(kind).parameters.values()) if "__init__" in vars(kind) else []
    needed = [one for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    named = [one.name for one in parameters if one.default is one.empty and one.kind is one.KEYWORD_ONLY]
    error = kind("a sentence", *[7] * (len(needed) - 1), **dict.fromkeys(named, 7))
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), vars(found)) == (kind, "a sentence", vars(error))
