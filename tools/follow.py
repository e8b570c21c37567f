"""Follow a parameter through the calls of the package, and count how far a reader has to go with it.

    python tools/follow.py src/tokenweight train.run:train:settings [--calls]

The walk begins at a function, and goes into each function of the package that receives the parameter, in the order in
which a reader meets the calls, as deep as they go. Classes are entered at `__init__`. A function receives the parameter
if it receives the parameter itself, an attribute or an item of it, an expression that is written with it, or a name for
one of these; but not what is looked up under it, as in `kinds[name]`. An object of one of the package's classes that is
made from it is followed too, whether a call makes it in place, or a function returns it and says so in its annotation.
What something else returns, a model that was loaded by its name or rows that were read from its folder, is a new thing,
and is not followed. Methods of objects are not followed either, except those of `self`.

    room     a file in which a function is visited
    stay     visits one after another in one room
    move     from one stay to the next: stays - 1
    climb    a move to a file on a higher floor, where a file stands above all files that it imports
    return   a stay in a room that was left before: stays - rooms

A function that is called twice is visited twice, and a recursive one once.

A second line counts the same between packages, which are then the rooms, with the layers of the import-linter contract
in the nearest pyproject.toml as their floors. It is left out where no contract orders these packages.
"""

import argparse
import ast
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

Function = ast.FunctionDef


class Place(NamedTuple):
    """A definition, and the module and the class it stands in."""

    module: str
    node: Function | ast.ClassDef | None
    owner: ast.ClassDef | None = None


class Package:
    """The definitions of a package, and what its names mean."""

    def __init__(self, root: Path) -> None:
        self.trees: dict[str, list[ast.stmt]] = {}
        self.names: dict[str, dict[str, tuple[str, str]]] = {}
        for path in sorted(root.rglob("*.py")):
            module = ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
            stub = path.with_suffix(".pyi")
            self.trees[module] = [node for file in (path, stub) if file.exists() for node in parsed(file)]
            self.names[module] = dict(imported(self.trees[module], module, path.name == "__init__.py"))

    def find(self, module: str, name: str) -> Place | None:
        """What a name means in a module: a definition, or a module (without a node); None where it is from outside."""
        for node in self.trees[module]:
            if isinstance(node, Function | ast.ClassDef) and node.name == name:
                return Place(module, node)
        origin, theirs = self.names[module].get(name, ("", ""))
        if origin != module and origin in self.trees and (found := self.find(origin, theirs)):
            return found
        return Place(f"{origin}.{theirs}", None) if f"{origin}.{theirs}" in self.trees else None

    def floors(self) -> dict[str, int]:
        """How many files stand under each."""
        found: dict[str, int] = {}

        def floor(module: str, above: tuple[str, ...] = ()) -> int:
            if module not in found and module not in above:
                places = (self.find(module, name) for name in self.names[module])
                under = {place.module for place in places if place} - {module}
                found[module] = 1 + max((floor(other, (*above, module)) for other in under), default=-1)
            return found.get(module, 0)

        for module in self.trees:
            floor(module)
        return found


def parsed(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text()).body


def imported(tree: list[ast.stmt], module: str, is_package: bool) -> Iterator[tuple[str, tuple[str, str]]]:
    """Names that a module imports, each with the module and the name it comes from."""
    for node in (node for statement in tree for node in ast.walk(statement)):
        if isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: None if is_package and node.level == 1 else -max(node.level - is_package, 1)]
            origin = ".".join([*parents, *filter(None, [node.module])]) if node.level else node.module or ""
            for alias in node.names:
                yield alias.asname or alias.name, (origin, alias.name)


@dataclass
class Walk:
    """The visits so far, and what each call in them returns of the parameter."""

    package: Package
    visits: list[tuple[str, str]] = field(default_factory=list)

    def visit(self, place: Place, held: frozenset[str], above: tuple = ()) -> bool:
        """Go into a function whose parameters `held` hold what is followed; whether it returns an object made of it."""
        module, function, owner = place
        if not isinstance(function, Function) or (place, held) in above:
            return False
        self.visits.append((module, f"{owner.name}.{function.name}" if owner else function.name))
        reader = Reader(self, place, set(held), (*above, (place, held)))
        for statement in function.body:
            reader.visit(statement)
        names = [name for node in ast.walk(function.returns or ast.Pass()) for name in named(node)]
        places = [self.package.find(module, name) for name in names]
        made = any(found is not None and isinstance(found.node, ast.ClassDef) for found in places)
        return made and reader.returned


class Reader(ast.NodeVisitor):
    """Reads the body of a function in order: which names hold what is followed, and which calls receive it."""

    def __init__(self, walk: Walk, place: Place, held: set[str], above: tuple) -> None:
        self.walk, self.place, self.held, self.above = walk, place, held, above
        self.made: set[ast.Call] = set()
        self.returned = False

    def holds(self, node: ast.AST | None) -> bool:
        """Whether an expression is, or is written with, what is followed."""
        if node is None or isinstance(node, ast.Name):
            return node is not None and node.id in self.held
        if isinstance(node, ast.Call):
            return node in self.made or (isinstance(node.func, ast.Attribute) and self.holds(node.func.value))
        if isinstance(node, ast.Subscript):  # what is looked up by it is another thing
            return self.holds(node.value)
        return any(map(self.holds, ast.iter_child_nodes(node)))

    def name(self, target: ast.AST) -> None:
        self.held |= {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        if self.holds(node.value):
            for target in node.targets:
                if isinstance(target, ast.Name | ast.Tuple):
                    self.name(target)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        if self.holds(node.value):
            self.name(node.target)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        if self.holds(node.iter):
            self.name(node.target)
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.visit(node.iter)
        if self.holds(node.iter):
            self.name(node.target)
        for condition in node.ifs:
            self.visit(condition)

    def comprehend(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        for generator in node.generators:
            self.visit(generator)
        for part in (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,):
            self.visit(part)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = comprehend

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None:
            self.visit(node.value)
            self.returned |= self.holds(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        place = self.called(node.func)
        if place is None:
            return
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        received = self.received(node, place)
        of_class = place.owner is not None and isinstance(node.func, ast.Name)
        makes = bool(received) and self.walk.visit(place, frozenset(received), self.above)
        if makes or (of_class and any(map(self.holds, given))):
            self.made.add(node)

    def called(self, function: ast.expr) -> Place | None:
        """The function of the package that is called."""
        module, owner, package = self.place.module, self.place.owner, self.walk.package
        if isinstance(function, ast.Name):
            place = package.find(module, function.id)
        elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            if function.value.id in ("self", "cls") and owner is not None:
                place = Place(module, owner)
            else:
                place = package.find(module, function.value.id)
            if place is not None and place.node is None:
                place = package.find(place.module, function.attr)
            elif place is not None and isinstance(place.node, ast.ClassDef):
                return method(place, function.attr)
        else:
            place = None
        if place is not None and isinstance(place.node, ast.ClassDef):
            return method(place, "__init__") or Place(place.module, None, place.node)
        return place

    def received(self, call: ast.Call, place: Place) -> set[str]:
        """The parameters of a function that receive what is followed in a call."""
        if not isinstance(place.node, Function):
            return set()
        arguments = place.node.args
        positional = [one.arg for one in (*arguments.posonlyargs, *arguments.args)][place.owner is not None :]
        named = {*positional, *(one.arg for one in arguments.kwonlyargs)}
        found = set()
        for number, value in enumerate(call.args):
            if self.holds(value):
                rest = positional[number:] if isinstance(value, ast.Starred) else positional[number : number + 1]
                found.update(rest or [arguments.vararg.arg] if arguments.vararg else rest)
        for keyword in call.keywords:
            if self.holds(keyword.value):
                if keyword.arg in named:
                    found.add(keyword.arg)
                elif arguments.kwarg:
                    found.add(arguments.kwarg.arg)
        return found


def named(node: ast.AST) -> list[str]:
    """The names in a part of an annotation, which may be a text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.replace("|", " ").split()
    return [node.id] if isinstance(node, ast.Name) else []


def method(place: Place, name: str) -> Place | None:
    owner = place.node
    assert isinstance(owner, ast.ClassDef)
    found = (node for node in owner.body if isinstance(node, Function) and node.name == name)
    return next((Place(place.module, node, owner) for node in found), None)


def layers(root: Path) -> dict[str, int]:
    """The layer of each package of `root`, from below, by the import-linter contract of its project, if it has one."""
    file = next((file for folder in root.resolve().parents if (file := folder / "pyproject.toml").is_file()), None)
    settings = {} if file is None else tomllib.loads(file.read_text())
    contracts = settings.get("tool", {}).get("importlinter", {}).get("contracts", [])
    ordered: list[str] = next((one["layers"] for one in contracts if one.get("containers") == [root.name]), [])
    return {name.strip(): number for number, layer in enumerate(ordered[::-1]) for name in layer.split("|")}


def follow(root: Path, start: str) -> tuple[Package, Walk]:
    """The walk from `module:function:parameter` through the package in a folder."""
    module, function, parameter = start.split(":")
    package, (kind, _, name) = Package(root), function.rpartition(".")
    module = f"{root.name}.{module}"
    place = package.find(module, kind or name)
    begin = method(place, name) if kind and place is not None else place
    assert begin is not None, f"{start}: expected module:function:parameter or module:Class.method:parameter"
    walk = Walk(package)
    walk.visit(begin, frozenset([parameter]))
    return package, walk


class Count(NamedTuple):
    """How far a walk goes."""

    stays: int
    rooms: int
    climbs: int

    @classmethod
    def of(cls, names: Iterable[str], floors: Mapping[str, int]) -> "Count":
        """The count of visits to rooms with these names, in order."""
        stays = [name for name, _ in groupby(names)]
        return cls(len(stays), len({*stays}), sum(floors[after] > floors[before] for before, after in pairwise(stays)))

    @property
    def moves(self) -> int:
        return self.stays - 1

    def __str__(self) -> str:
        return f"{self.moves} moves, {self.climbs} climbs, {self.stays - self.rooms} returns"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("start", help="module:function:parameter, the module within the package")
    parser.add_argument("--calls", action="store_true", help="also list the visits")
    args = parser.parse_args()
    package, walk = follow(args.package, args.start)
    if args.calls:
        for room, visits in groupby(walk.visits, key=lambda visit: visit[0]):
            print(f"{room}: {', '.join(name for _, name in visits)}")
    rooms, ordered = [room for room, _ in walk.visits], layers(args.package)
    packages = [room.split(".")[1] for room in rooms]
    found = Count.of(rooms, package.floors())
    print(f"{args.start}: {found.stays} stays, {found.rooms} rooms in {len({*packages})} packages, {found}")
    if ordered.keys() >= {*packages}:
        between = Count.of(packages, ordered)
        print(f"between packages: {between.stays} stays, {between}")


if __name__ == "__main__":
    main()
