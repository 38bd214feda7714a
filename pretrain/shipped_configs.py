"""The configs that the package brings, by names such as `samba_421m` and `paper/mamba_1.3b`."""

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from sambalm.pretrain.errors import ConfigError

FOLDER = Path(__file__).parents[1] / "configs"
ENDING = ".yaml"


def config_file(path: Path) -> Path:
    """Returns the file of a config: the path itself where there is one, and else the shipped config of that name.

    Raises:
        ConfigError: there is neither.
    """
    if path.exists():
        return path
    name = path.as_posix().removesuffix(ENDING)
    names = sorted(shipped_names())
    if name in names:
        return FOLDER / f"{name}{ENDING}"
    close = get_close_matches(name, names, n=1)
    known = f"did you mean {close[0]}?" if close else "such names are samba_421m and paper/llama3_1.6b"
    where = "" if path.is_absolute() else f" in {Path.cwd()}"
    raise ConfigError(
        f"cannot read the config {path}: No such file{where}, and the package brings none of that name ({known})"
    )


def shipped_names() -> Iterator[str]:
    """Yields the names of runs that the package brings; descriptions of devices are none."""
    for file in FOLDER.rglob(f"*{ENDING}"):
        if file.parent.name != "devices":
            yield file.relative_to(FOLDER).as_posix().removesuffix(ENDING)
