"""How large the project is, and how its modules import each other: python tools/count.py [FOLDER]

Lines are those of files, blank ones and comments included. Rooms are modules other than `__init__`; arrows are imports
of one room by another, also by way of the names that a package lists; floors are the rooms on the longest chain of
imports, where a circle counts as one.
"""

import ast
import statistics
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

WEB = (".js", ".css", ".html", ".j2")


def files(folder: Path, *endings: str) -> list[Path]:
    """All files below a folder with one of the endings."""
    return sorted(path for path in folder.rglob("*") if path.suffix in endings)


def lines(paths: list[Path]) -> int:
    """Lines of all of them together."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def functions(paths: list[Path]) -> Iterator[tuple[str, int]]:
    """Name and lines of each function and method, decorators left out."""
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.name}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1


def packages(source: Path, tests: Path) -> list[tuple[str, int, int, int]]:
    """Name, files, lines, and lines of tests of each package, and of what stands beside them."""
    found = []
    for folder in sorted(path for path in source.iterdir() if (path / "__init__.py").is_file()):
        own = files(folder, ".py")
        found.append((folder.name, len(own), lines(own), lines(files(tests / folder.name, ".py"))))
    beside = sorted(source.glob("*.py"))
    covered = sum(covering for *_, covering in found)
    return [*found, ("(beside)", len(beside), lines(beside), lines(files(tests, ".py")) - covered)]


def exported(source: Path) -> dict[tuple[str, str], str]:
    """(package, name) -> module, of what `__init__.pyi` and `__init__.py` re-export."""
    found: dict[tuple[str, str], str] = {}
    for path in [*source.rglob("__init__.py"), *source.rglob("__init__.pyi")]:
        package = ".".join([source.name, *path.parent.relative_to(source).parts])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = f"{package}.{node.module}" if node.level else node.module
                found |= {(package, alias.asname or alias.name): module for alias in node.names}
    return found


def imports(source: Path) -> dict[str, set[str]]:
    """Which room imports which: the list of names of a package is looked through."""
    paths = {
        ".".join([source.name, *path.relative_to(source).with_suffix("").parts]): path
        for path in files(source, ".py")
        if path.name != "__init__.py"
    }
    names = exported(source)

    def room(module: str, name: str) -> str:
        while (module, name) in names and module not in paths:
            module = names[module, name]
        return f"{module}.{name}" if f"{module}.{name}" in paths else module

    arrows: dict[str, set[str]] = {}
    for module, path in paths.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported: set[str] = set()
        packages: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == source.name:
                imported |= {room(node.module, alias.name) for alias in node.names}
                packages |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        for node in ast.walk(tree):  # `models.Scorer`, where the package `models` was imported
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                imported.add(room(packages.get(node.value.id, ""), node.attr))
        arrows[module] = imported & paths.keys() - {module}
    return arrows


def floors(arrows: dict[str, set[str]]) -> int:
    """Rooms on the longest chain of imports; those of a circle share a floor."""

    @cache
    def reached(module: str) -> frozenset[str]:
        seen: set[str] = set()
        todo = [module]
        while todo:
            new = arrows[todo.pop()] - seen
            seen |= new
            todo += new
        return frozenset(seen)

    @cache
    def height(module: str) -> int:
        circle = {module} | {other for other in reached(module) if module in reached(other)}
        below = {target for one in circle for target in arrows[one]} - circle
        return 1 + max(map(height, below), default=0)

    return max(map(height, arrows))


def sized(root: Path, *endings: str) -> str:
    """Lines and files below a folder."""
    found = files(root, *endings)
    return f"{lines(found)} lines in {len(found)} files"


def main(root: Path) -> None:
    """Print a line for each package, and a line for each fact."""
    source, tests = root / "src/tokenweight", root / "tests"
    print(f"{'package':<12}{'files':>6}{'lines':>8}{'tests':>8}")
    for name, num, own, covering in packages(source, tests):
        print(f"{name:<12}{num:>6}{own:>8}{covering:>8}")
    python, arrows = files(source, ".py"), imports(source)
    sizes = [size for _, size in functions(python)]
    long = [f"{name} ({size})" for name, size in functions(python) if size > 50]
    most = max((len([*folder.glob("*.py")]), folder.relative_to(root)) for folder in {path.parent for path in python})
    facts = {
        "source, Python": sized(source, ".py"),
        "source, stubs": sized(source, ".pyi"),
        "source, web": sized(source, *WEB),
        "tests": sized(tests, ".py"),
        "benchmarks": sized(root / "benchmarks", ".py"),
        "recipes": sized(root / "recipes", ".yaml"),
        "docs": sized(root / "docs", ".md"),
        "README": f"{lines([root / 'README.md'])} lines",
        "most files in a folder": f"{most[0]} ({most[1]})",
        "median file": f"{statistics.median(lines([path]) for path in python):.0f} lines",
        "median function": f"{statistics.median(sizes):.0f} lines, of {len(sizes)}",
        "functions over 50 lines": f"{len(long)} {', '.join(long)}",
        "rooms, floors, arrows": f"{len(arrows)}, {floors(arrows)}, {sum(map(len, arrows.values()))}",
        "packages, floors, arrows": of_packages(arrows),
    }
    print()
    for name, fact in facts.items():
        print(f"{name:<26}{fact.strip()}")


def of_packages(arrows: dict[str, set[str]]) -> str:
    """Number, floors and arrows of packages, the second part of a module's name."""
    between: dict[str, set[str]] = {}
    for module, targets in arrows.items():
        own = module.split(".")[1]
        between.setdefault(own, set()).update(target.split(".")[1] for target in targets)
    between = {name: targets - {name} for name, targets in between.items()}
    return f"{len(between)}, {floors(between)}, {sum(map(len, between.values()))}"


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else ".").resolve())
