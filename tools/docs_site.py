"""Hooks of mkdocs.yml: pages at the root of the repository are pages of the site, and links work in both places.

The pages stand where they are read on a code host; nothing is copied. README is the home page. The pages of the API are
made of the names that the packages offer in their `__init__.pyi`.
"""

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "recipes/README.md",
    "recipes/evidence/README.md",
    "benchmarks/README.md",
)
"""Pages outside docs/."""
SOURCE = ROOT / "src/tokenweight"
WEIGHTINGS = ("PPMI", "NPMI", "EXACT", "ESLM")
PACKAGES = ("method", "models", "data", "train", "evaluate", "plan", "view", "records")
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:)([^)\s#]*)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that stand outside docs/, and those of the API."""
    from mkdocs.structure.files import File

    for page in PAGES:
        files.append(File.generated(config, place(page), abs_src_path=str(ROOT / page)))
    files.append(File.generated(config, "api/tokenweight.md", content=overview()))
    for package in PACKAGES:
        files.append(File.generated(config, f"api/{package}.md", content=reference(package)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links that are right in the repository into links that are right in the site."""
    here = next((path for path in PAGES if place(path) == page.file.src_uri), f"docs/{page.file.src_uri}")
    return relinked(markdown, here, {file.src_uri for file in files})


def offered(stub: Path) -> dict[str, str]:
    """The names that a package offers, with the module of each; a name in capitals is a constant and left out."""
    nodes = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ImportFrom) and node.module]
    modules = {alias.name: str(node.module) for node in nodes for alias in node.names}
    return {
        name: modules[name] for name in sorted(modules) if name in WEIGHTINGS or not (name.isupper() or name[0] == "_")
    }


def overview() -> str:
    """The page of what `tokenweight` itself offers: links to the pages of its packages."""
    names = offered(SOURCE / "__init__.pyi").items()
    links = "".join(f"- [`{name}`][tokenweight.{package}.{name}]\n" for name, package in names)
    return f"# tokenweight\n\nWhat most programs need; the rest is in the packages.\n\n{links}"


def reference(package: str) -> str:
    """The page of a package: every name that it offers."""
    path, names = SOURCE / package, offered(SOURCE / package / "__init__.pyi")
    about = ast.get_docstring(ast.parse((path / "__init__.py").read_text())) or ""
    parts = [f"# tokenweight.{package}", about, *(f"::: tokenweight.{package}.{name}" for name in names)]
    if package == "train":
        parts += ["## tokenweight.train.trl", "::: tokenweight.train.trl"]
    return "\n\n".join(parts) + "\n"


def place(page: str) -> str:
    """Where a file of the repository stands in the site."""
    return "index.md" if page == "README.md" else page.removeprefix("docs/")


def relinked(markdown: str, here: str, known: set[str]) -> str:
    """Rewrite the relative links of a page.

    Args:
        markdown: text of the page.
        here: its path in the repository.
        known: what there is in the site. A link to any other file of the repository becomes plain text.

    Raises:
        ValueError: if a link leads nowhere.
    """

    def moved(link: re.Match[str]) -> str:
        image, text, target, anchor = link[1], link[2], link[3], link[4] or ""
        if not target:
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        if not (ROOT / path).exists():
            raise ValueError(f"{here}: link to {target}: no such file")
        if place(path) not in known:
            return text
        return f"{image}[{text}]({posixpath.relpath(place(path), posixpath.dirname(place(here)) or '.')}{anchor})"

    return _LINK.sub(moved, markdown)
