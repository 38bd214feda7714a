"""Whether what the docs name exists: files, anchors, tests, commands, make targets, config keys and exit codes."""

import re
import shlex
import typing
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from typer.main import get_command

from sambalm.pretrain.cli.app import app
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.config_file import RENAMED
from sambalm.pretrain.errors import EXIT_CODES, ExitCode

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")),
]
PRODUCT = ("data_pipeline", "evaluation", "model", "parallel", "pretrain", "slurm")
IGNORED = {".git", ".venv", "runs", "build", "__pycache__"}
# Files that CONTRIBUTING.md asks a reader to write, and files of other projects.
NOT_OURS = ("model/mixers/rwkv", "runtime/", "tiktoken_ext/")
SOURCE_SUFFIXES = (".py", ".md", ".sh", ".sbatch", ".cu", ".cuh", ".env")
FILE_ENDINGS = {"bin", "idx", "json", "jsonl", "md", "model", "py", "safetensors", "txt", "yaml"}

Rule = Callable[[str, str], list[str]]


def repository_paths() -> set[str]:
    """Files and folders of the checkout, from its root; folders end with a slash."""
    found = set()
    folders = [ROOT]
    while folders:
        for path in folders.pop().iterdir():
            if path.name in IGNORED or path.name.endswith((".egg-info", "_cache")) or path.is_symlink():
                continue
            name = str(path.relative_to(ROOT))
            found.add(f"{name}/" if path.is_dir() else name)
            folders += [path] if path.is_dir() else []
    return found


PATHS = repository_paths()
TOP_FOLDERS = {path for path in PATHS if path.count("/") == 1 and path.endswith("/")}
TEST_NAMES = {
    name
    for path in ROOT.glob("tests/**/*.py")
    for name in re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.M)
}
COMMAND = get_command(app)


def page_text(name: str) -> str:
    """A page; of the changelog what is not released."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return text.split("\n## ")[1] if name == "CHANGELOG.md" else text


def code(text: str) -> Iterator[str]:
    """Code spans, and the lines of code blocks with continued ones joined."""
    for number, part in enumerate(re.split(r"^```.*$", text, flags=re.M)):
        if number % 2:
            yield from part.replace("\\\n", " ").strip("\n").split("\n")
        else:
            yield from (span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", part))


def spans(text: str) -> list[str]:
    """Code spans outside of code blocks."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose)]


def is_there(path: str) -> bool:
    """Whether a path, or a part of one from some folder on, is in the checkout; stars stand for anything."""
    plain = path.removesuffix("/")
    return any(
        fnmatch(known, pattern) for known in (p.removesuffix("/") for p in PATHS) for pattern in (plain, f"*/{plain}")
    )


def wrong_paths(text: str, _: str) -> list[str]:
    """Code spans that look like files of the project and are none."""
    named = [span for span in spans(text) if re.fullmatch(r"\.?[\w*-]+(?:[./][\w*-]+)*/?", span)]
    top = tuple(TOP_FOLDERS)
    candidates = [n for n in named if n.startswith(top) or n.endswith(SOURCE_SUFFIXES)]
    return [name for name in candidates if not name.startswith(NOT_OURS) and not is_there(name)]


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def wrong_links(text: str, page: str) -> list[str]:
    """Links to files or anchors that are not there."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            found.append(target)
    return found


def wrong_tests(text: str, _: str) -> list[str]:
    """Test functions that are not there."""
    names = [name for span in code(text) for name in re.findall(r"(?<![\w/])(test_\w+)(?!\w*\.py)\b", span)]
    return [name for name in names if name not in TEST_NAMES]


def invocations(text: str) -> Iterator[list[str]]:
    """The words after `sambalm` or `-m sambalm.pretrain.cli`, up to what the shell would take for the command's end."""
    for line in code(text):
        for found in re.finditer(r"(?:(?<![\w./])|(?<=/bin/))sambalm(?:\.pretrain\.cli)? ([^;|&#]*)", line):
            try:
                yield shlex.split(found[1])
            except ValueError:  # a quotation mark that belongs to prose
                yield found[1].split()


def wrong_commands(text: str, _: str) -> list[str]:
    """Commands of the program and their options that are not there."""
    found = []
    for words in invocations(text):
        command: Any = COMMAND
        rest = list(words)
        while hasattr(command, "commands") and rest and not rest[0].startswith("-") and rest[0] != "...":
            name = rest.pop(0)
            if name not in command.commands:
                found.append(f"sambalm {name}")
                break
            command = command.commands[name]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        options = [word.partition("=")[0] for word in rest if word.startswith("--")]
        found += [f"{' '.join(words)}: {option}" for option in options if option not in known]
    return found


def wrong_make_targets(text: str, _: str) -> list[str]:
    """Targets that the Makefile lacks."""
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = [name for line in code(text) for name in re.findall(r"(?:^|[ (])make ((?:[A-Z_]+=\S+ )*[a-z][\w-]*)", line)]
    return [name for name in named if name.split()[-1] not in targets]


def section_keys() -> dict[str, set[str]]:
    """The keys of each section of a run's configuration, former names too."""
    sections = {}
    for name, field in RunConfig.model_fields.items():
        kinds = [kind for kind in (field.annotation, *typing.get_args(field.annotation)) if isinstance(kind, type)]
        sections[name] = {key for kind in kinds if issubclass(kind, BaseModel) for key in kind.model_fields}
    return {name: keys | RENAMED.get(name, {}).keys() for name, keys in sections.items() if keys}


def wrong_keys(text: str, _: str) -> list[str]:
    """Keys `section.key` that the configuration lacks."""
    keys = section_keys()
    named = re.compile(rf"(?<![\w./\"-])({'|'.join(keys)})\.([a-z]\w*)(?![\w/(])")
    pairs = [match.groups() for line in code(text) for match in named.finditer(line)]
    return [f"{section}.{key}" for section, key in pairs if key not in keys[section] | FILE_ENDINGS]


RULES: list[Rule] = [wrong_paths, wrong_links, wrong_tests, wrong_commands, wrong_make_targets, wrong_keys]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page, rule):
    assert rule(page_text(page), page) == []


@pytest.mark.parametrize(
    ("rule", "wrong", "right"),
    [
        (wrong_paths, "`parallel/state.py`", "`parallel/groups.py`"),
        (wrong_paths, "`configs/clusters/*.yaml`", "`configs/clusters/*.env`"),
        (wrong_paths, "`flat_gradients.py`", "`zero/gradients.py`"),
        (wrong_paths, "`model/opz/`", "`model/ops/`"),
        (wrong_links, "[x](docs/nothing.md)", "[x](docs/design.md)"),
        (wrong_links, "[x](docs/design.md#nothing)", "[x](docs/design.md#canonical-tensors)"),
        (wrong_links, "[x](#nothing)", "[x](#the-demo)"),
        (wrong_tests, "`test_that_nobody_wrote`", "`test_any_pattern_is_causal`"),
        (wrong_tests, "`tests/x.py::test_that_nobody_wrote`", "`tests/test_docs.py`"),
        (wrong_commands, "`sambalm trane`", "`sambalm train`"),
        (wrong_commands, "```\nsambalm data tokenise x\n```", "```\nsambalm data preprocess x\n```"),
        (wrong_commands, "`sambalm plan x --gpu 3`", "`sambalm plan x --gpus 3`"),
        (
            wrong_commands,
            "```\ntorchrun -m sambalm.pretrain.cli train x \\\n  --wurld-size 2\n```",
            "```\ntorchrun -m sambalm.pretrain.cli train x \\\n  --world-size 2\n```",
        ),
        (wrong_make_targets, "`make tests`", "`make test`"),
        (wrong_make_targets, "```\nX=1 make A=b nothing\n```", "```\nX=1 make A=b demo\n```"),
        (wrong_keys, "`train.step`", "`train.steps`"),
        (wrong_keys, "```\nsambalm train x data.trein=y\n```", "```\nsambalm train x data.train=y\n```"),
    ],
)
def test_each_rule_finds_what_is_wrong_and_lets_the_rest_pass(rule, wrong, right):
    assert rule(wrong, "README.md") != []
    assert rule(right, "README.md") == []


def test_the_pages_name_enough_to_be_checked():
    """A rule that no longer recognises anything would pass every page."""
    texts = [page_text(page) for page in PAGES]
    assert sum(len(list(invocations(text))) for text in texts) > 30
    assert sum(len(re.findall(r"\]\(", text)) for text in texts) > 20
    assert len(section_keys()) > 5


def named_in_the_map(text: str) -> list[str]:
    """Paths that README.md's map names, folders with a slash at their end.

    An entry stands at two spaces a level, with two spaces after its name. What is said of a file may name others of its
    folder, which count as named.
    """
    block = text.split("## Where things are")[1].split("```")[1].strip("\n")
    named: list[str] = []
    parents = [""]
    for line in block.split("\n"):
        entry = re.match(r"( {0,8})([^ ]+)  ", line)
        if not entry:
            continue  # goes on with what is said of the entry before
        parents = parents[: len(entry[1]) // 2 + 1]
        folder, name = "".join(parents), entry[2]
        named.append(folder + name)
        if name.endswith("/"):
            parents.append(name)
        else:
            named += [folder + other for other in re.findall(r"(?<![\w/.])\w+\.py\b", line[entry.end() :])]
    return named


def badly_mapped(text: str) -> list[str]:
    """What the map names and is not there, and product files that it covers not once: themselves or by a folder."""
    named = named_in_the_map(text)
    leaves = [name for name in named if not any(other != name and other.startswith(name) for other in named)]
    files = [path for path in PATHS if path.split("/")[0] in PRODUCT and path.endswith(".py")]
    files = [path for path in files if not path.endswith(("__init__.py", "__main__.py"))]
    unclear = [path for path in files if sum(path == leaf or path.startswith(leaf) for leaf in leaves) != 1]
    return [name for name in named if name not in PATHS] + unclear


def test_the_map_names_every_product_file_or_its_folder_once():
    assert badly_mapped((ROOT / "README.md").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda text: text.replace("  samba.py ", "  simba.py "), {"model/simba.py", "model/samba.py"}),
        (lambda text: text.replace("\nslurm/ ", "\nsledge/"), {"sledge/", "slurm/agent.py"}),
        (lambda text: text.replace("  samba.py ", "  samba.py  samba.py: "), {"model/samba.py"}),
    ],
)
def test_a_wrong_map_is_noticed(change, complaint):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert change(text) != text
    assert complaint <= set(badly_mapped(change(text)))


def test_the_table_of_exit_codes_is_the_programs():
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*) \| (.*) \|$", text, re.M)
    assert {int(code): (meaning, launchers) for code, meaning, launchers in rows} == {
        int(code): (row.meaning, str(row.launchers)) for code, row in EXIT_CODES.items()
    }
    assert len(rows) == len(ExitCode)
