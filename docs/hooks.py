"""What mkdocs does beyond its own: measured results as pages, and Sphinx roles in docstrings."""

from __future__ import annotations

import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import fused_losses.integrations.huggingface  # inspection finds what is imported
import fused_losses.integrations.mmengine
import fused_losses.integrations.timm  # noqa: F401
from fused_losses import LOSSES

RESULTS = "benchmarks/results"
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./(?:README|CONTRIBUTING)\.md[^)]*\)")
_SECTION = re.compile(r"^<!-- (?P<file>[A-Z]+\.md): (?P<heading>.+) -->$", re.M)
_ROLE = re.compile(r":(?:class|data|func|meth|mod):`~?([^`]+)`")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds pictures and reports of the benchmarks, which live outside of docs/."""
    root = Path(config.config_file_path).parent / RESULTS
    for path in sorted(root.rglob("*")):
        if path.suffix in (".md", ".png"):
            name = f"results/{path.relative_to(root).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, config: MkDocsConfig, **_: object) -> str:
    """Lists the losses of the registry, brings in sections of other files, makes links right in the site.

    ``<!-- FILE: HEADING -->`` stands for that section of a file outside of docs/, which readers of the repository find
    behind the link above it. In the site that link is mere text.
    """
    modules = "\n".join(f"        - {entry.module.__name__}" for entry in LOSSES.values())
    markdown = markdown.replace("        - EVERY_ROW_LOSS", modules)
    root = Path(config.config_file_path).parent
    markdown = _SECTION.sub(lambda match: _section(root / match["file"], match["heading"]), markdown)
    return _OUTSIDE.sub(r"\1", markdown).replace(f"](../{RESULTS}/", "](results/")


def _section(path: Path, heading: str) -> str:
    """The text under a heading of the second level, with links as from docs/."""
    _, _, after = path.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    if not after:
        raise ValueError(f"{path} has no section {heading!r}")
    return after.partition("\n## ")[0].replace("](docs/", "](")


class Roles(griffe.Extension):
    """``:func:`name` `` in a docstring becomes code."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Called for everything that was loaded."""
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)
