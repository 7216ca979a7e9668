"""Named pause points and broken builds, compiled into `toolfleet` as it is imported; the source has nothing of either.

A point is a place before or after one call in one function. Only the points that are armed are compiled in, so all
others cost nothing at all. A place that is not there, or not once, is an error that names the point: whoever moves the
code hears of it, from tests/chaos/test_weaving.py at the latest.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import CodeType, ModuleType
from typing import Literal

PACKAGE = "toolfleet"
HOOK = "__chaos__"
"""What woven code calls, a global of each woven module."""

Where = Literal["before", "after"]
Action = Literal["stop", "kill"]


class WeavingError(Exception):
    """The source does not have the one place that was named."""


@dataclass(frozen=True, slots=True)
class Point:
    """A place at which a process can be stopped or killed: before or after a call in a function of a module.

    Attributes:
        module: without ``toolfleet.``.
        function: its qualified name.
        where: on which side of the call; awaiting it is part of the call.
        call: what is called, as in ``self._queue.publish``; it must occur once in the function.
        when: an expression over the function's names; the point is reached only where it is true.
    """

    module: str
    function: str
    where: Where
    call: str
    when: str | None = None


@dataclass(frozen=True, slots=True)
class Patch:
    """Text that is put in the place of other text, which must occur once in a function.

    Attributes:
        module: without ``toolfleet.``, or the name of a file of ``lua/``.
        function: its qualified name; empty for a file of ``lua/``, which is searched as a whole.
        old: as `ast.unparse` writes the function, so neither comments nor line breaks matter.
    """

    module: str
    function: str
    old: str
    new: str

    @property
    def of_lua(self) -> bool:
        """Whether it changes the function library in Redis."""
        return self.module.endswith(".lua")


@dataclass(frozen=True, slots=True)
class Armed:
    """What a process does when it reaches a point for the nth time, counted from 1: stop or kill itself."""

    point: str
    action: Action
    nth: int = 1


class Trap:
    """Counts how often points are reached, and acts.

    Args:
        armed: what happens where.
        hits: the file that gets ``<point> <pid>`` and a line end, synced to the disk, before the process acts.
    """

    def __init__(self, armed: Iterable[Armed], hits: Path | None) -> None:
        self._armed = {(one.point, one.nth): one.action for one in armed}
        self._hits = hits
        self._reached: Counter[str] = Counter()

    def reach(self, point: str) -> None:
        """The process is at a point."""
        self._reached[point] += 1
        action = self._armed.get((point, self._reached[point]))
        if action is None:
            return
        if self._hits is not None:
            self._note(f"{point} {os.getpid()}\n", self._hits)
        # To this thread: it is stopped before the call returns, and with it the whole process.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP if action == "stop" else signal.SIGKILL)

    @staticmethod
    def _note(line: str, hits: Path) -> None:
        file = os.open(hits, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(file, line.encode())
            os.fsync(file)
        finally:
            os.close(file)


class Hook:
    """What woven code finds under `HOOK`."""

    def __init__(self, trap: Trap, lua: Sequence[Patch]) -> None:
        self.reach = trap.reach
        self._lua = lua

    def after(self, point: str, value: object) -> object:
        """The value of the call that the point stands behind."""
        self.reach(point)
        return value

    def lua(self, name: str, text: str) -> str:
        """A file of the function library as this build has it."""
        return patched_lua(name, text, self._lua)


class Weaver(MetaPathFinder):
    """Finds the modules that are to be woven, compiled already.

    Raises:
        WeavingError: from the constructor, so a process with a point that is not there does not start.
    """

    def __init__(self, points: Mapping[str, Point], patches: Sequence[Patch], trap: Trap) -> None:
        self._hook = Hook(trap, [patch for patch in patches if patch.of_lua])
        self._code = {
            f"{PACKAGE}.{module}": compile(woven(module, points, patches), source_path(module), "exec")
            for module in {p.module for p in points.values()} | {p.module for p in with_lua(patches) if not p.of_lua}
        }

    def install(self) -> None:
        """Before any of the modules is imported."""
        if early := sorted(self._code.keys() & sys.modules.keys()):
            raise WeavingError(f"imported before they could be woven: {', '.join(early)}")
        sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of a woven module; None for all others."""
        if fullname not in self._code:
            return None
        file = source_path(fullname.removeprefix(f"{PACKAGE}."))
        loader = _Loader(fullname, str(file), self._code[fullname], self._hook)
        return importlib.util.spec_from_file_location(fullname, file, loader=loader)


class _Loader(importlib.machinery.SourceFileLoader):
    """Runs code that was woven; it never writes bytecode, which the next process would take for the source's."""

    def __init__(self, fullname: str, path: str, code: CodeType, hook: Hook) -> None:
        super().__init__(fullname, path)
        self._code = code
        self._hook = hook

    def get_code(self, fullname: str) -> CodeType:
        return self._code

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, HOOK, self._hook)
        super().exec_module(module)


LUA_READER = Patch(
    "services.background_jobs.redis_functions",
    "library",
    "f.read_text(encoding='utf-8')",
    f"{HOOK}.lua(f.name, f.read_text(encoding='utf-8'))",
)
"""Where Python reads the function library."""


def with_lua(patches: Sequence[Patch]) -> list[Patch]:
    """Patches of ``lua/`` need the place where it is read."""
    return [*patches, LUA_READER] if any(patch.of_lua for patch in patches) else list(patches)


def source_path(module: str) -> Path:
    """Of a module, named without ``toolfleet.``."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise WeavingError(f"{PACKAGE} is not installed")
    return Path(package.submodule_search_locations[0]).joinpath(*module.split(".")).with_suffix(".py")


def woven(module: str, points: Mapping[str, Point], patches: Sequence[Patch]) -> ast.Module:
    """A module with the points and patches that are meant for it."""
    tree = ast.parse(source_path(module).read_text(encoding="utf-8"))
    for patch in with_lua(patches):
        if patch.module == module:
            _replace(tree, patch)
    for name, point in points.items():
        if point.module == module:
            _insert(tree, name, point)
    return ast.fix_missing_locations(tree)


def patched_lua(name: str, text: str, patches: Sequence[Patch]) -> str:
    """A file of ``lua/`` with the patches that are meant for it."""
    for patch in patches:
        if patch.module == name:
            _once(text.count(patch.old), f"{patch.old!r} in lua/{name}")
            text = text.replace(patch.old, patch.new)
    return text


def _replace(tree: ast.Module, patch: Patch) -> None:
    function, body = _function(tree, patch.module, patch.function)
    text = ast.unparse(function)
    _once(text.count(patch.old), f"{patch.old!r} in {patch.module}:{patch.function}")
    body[body.index(function)] = ast.parse(text.replace(patch.old, patch.new)).body[0]


def _insert(tree: ast.Module, name: str, point: Point) -> None:
    function, _ = _function(tree, point.module, point.function)
    inserter = _Inserter(name, point)
    inserter.visit(function)
    _once(inserter.found, f"a call of {point.call} in {point.module}:{point.function}, for the point {name}")


def _once(count: int, what: str) -> None:
    if count != 1:
        raise WeavingError(f"there must be exactly one {what}; there are {count}. Was it moved or renamed?")


def _function(tree: ast.Module, module: str, qualified: str) -> tuple[ast.stmt, list[ast.stmt]]:
    """A function and the block that it stands in."""
    body: list[ast.stmt] = tree.body
    *outer, last = qualified.split(".")
    for name in [*outer, last]:
        named = [s for s in body if isinstance(s, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
        found = [s for s in named if s.name == name]
        _once(len(found), f"{qualified} in {module}")
        if name is last:
            return found[0], body
        body = found[0].body
    raise WeavingError(f"{module}: a function must have a name")


class _Inserter(ast.NodeTransformer):
    """Puts one point beside its call, as an expression: so it fits wherever a call does."""

    def __init__(self, name: str, point: Point) -> None:
        self._name = name
        self._point = point
        self.found = 0

    def visit_Await(self, node: ast.Await) -> ast.AST:
        if self._is_the_call(node.value):
            self.generic_visit(node.value)
            return self._beside(node)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        return self._beside(node) if self._is_the_call(node) else node

    def _is_the_call(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Call) and ast.unparse(node.func) == self._point.call

    def _beside(self, call: ast.expr) -> ast.expr:
        self.found += 1
        reach = _expression(f"{HOOK}.reach({self._name!r})")
        if self._point.when is not None:
            reach = ast.BoolOp(ast.And(), [_expression(self._point.when), reach])
        first = self._point.where == "before"
        pair = ast.Tuple([reach, call] if first else [call, reach], ast.Load())
        return ast.Subscript(pair, ast.Constant(1 if first else 0), ast.Load())


def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body
