"""A hook of MkDocs: pages from outside of docs/, and the tutorials that there are.

README.md is the site's first page. Pages link to each other as files of the repository do. This turns such links into
those of the site.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
# Pages that lie outside of docs/, by their names on the site.
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
}
# Tutorials to begin with; the others follow by name.
FIRST = ("index.md", "train-on-my-text.md")
# Files without a page, which the site brings as they are.
PLAIN = ("LICENSE", "NOTICE")
LINK = re.compile(r"(\]\()((?:\.\./)*)([^)#\s]+)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the navigation's entry for tutorials, or leave it out where there are none."""
    folder = Path(config.docs_dir) / "tutorials"
    pages = sorted(page.name for page in folder.glob("*.md"))
    pages.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    assert config.nav is not None
    for section in list(config.nav):
        if "Tutorials" in section:
            section["Tutorials"] = [f"tutorials/{name}" for name in pages]
            if not pages:
                config.nav.remove(section)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files from outside of docs/ to the site."""
    for name, source in OUTSIDE.items():
        files.append(File.generated(config, name, content=site_links((ROOT / source).read_text("utf-8"), folder="")))
    for source in PLAIN:
        files.append(File.generated(config, f"{source}.txt", content=(ROOT / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Turn a page's links to files outside of docs/ into links between pages."""
    if page.file.src_uri in OUTSIDE:
        return markdown
    return site_links(markdown, folder=f"docs/{page.file.src_uri}".rpartition("/")[0])


def site_links(markdown: str, *, folder: str) -> str:
    """Turn the repository's links into the site's.

    Args:
        markdown: a page's text.
        folder: where the page lies in the repository: "docs", a folder in it, or "" for the root.
    """
    named = {source: name for name, source in OUTSIDE.items()} | {source: f"{source}.txt" for source in PLAIN}
    depth = folder.count("/")  # folders between docs/ and the page

    def turned(match: re.Match[str]) -> str:
        start, ups, target = match.groups()
        outside = len(ups) // 3 > depth if folder else True
        if outside and target in named:
            return start + "../" * depth + named[target]
        return start + ups + (target if folder else target.removeprefix("docs/"))

    return LINK.sub(turned, markdown)
