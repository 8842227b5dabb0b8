"""Mutants of Python source."""

import ast
from collections.abc import Callable, Iterator

from . import Mutant

Change = tuple[ast.AST, Callable[[], None]]  # the shown node, and a function that changes it

_OPERATORS = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd},
}
_NAMES = {"min": "max", "any": "all", "minimum": "maximum", "amin": "amax"}
_NAMES |= {there: here for here, there in _NAMES.items()}
_COPIES = {"clone", "copy", "deepcopy", "detach"}


def mutants(source: str) -> list[Callable[[], Mutant]]:
    """All mutants, in the order of the lines."""
    changes = list(_changes(ast.parse(source)))
    order = sorted(range(len(changes)), key=lambda i: changes[i][0].lineno)
    return [lambda i=i: _mutant(source, i) for i in order]


def _mutant(source: str, number: int) -> Mutant:
    tree = ast.parse(source)
    node, change = list(_changes(tree))[number]
    line, before = node.lineno, _shown(node)
    change()
    return Mutant(line, f"{before} -> {_shown(node)}", ast.unparse(ast.fix_missing_locations(tree)))


def _shown(node: ast.AST) -> str:
    if isinstance(node, (ast.If, ast.While)):
        return f"if {ast.unparse(node.test)}"
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 90 else text[:87] + "..."


def _changes(tree: ast.Module) -> Iterator[Change]:
    for node in _walked(tree):
        yield from _changes_of(node)


def _walked(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that run, without annotations, decorators, docstrings and messages."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _passed_over(child):
                yield from _walked(child)


def _passed_over(node: ast.AST) -> bool:
    # zip(strict=True) checks lists of the code itself. No input can make their lengths differ.
    return isinstance(node, (ast.JoinedStr, ast.Import)) or (
        isinstance(node, ast.keyword) and node.arg == "strict"
    )


def _changes_of(node: ast.AST) -> Iterator[Change]:
    match node:
        case ast.Compare():
            for i, op in enumerate(node.ops):
                yield node, lambda i=i, op=op: node.ops.__setitem__(i, _OPERATORS[type(op)]())
        case ast.BoolOp():
            yield node, lambda: setattr(node, "op", _OPERATORS[type(node.op)]())
            for i in range(len(node.values)):
                yield node, lambda i=i: node.values.pop(i)
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
            yield node, lambda: _become(node, node.operand)
        case ast.BinOp() if type(node.op) in _OPERATORS:
            yield node, lambda: setattr(node, "op", _OPERATORS[type(node.op)]())
        case ast.If() | ast.IfExp():
            for value in (True, False):
                yield node, lambda value=value: setattr(node, "test", ast.Constant(value))
        case ast.Constant(value=bool()):
            yield node, lambda: setattr(node, "value", not node.value)
        case ast.Constant(value=int() | float()):
            yield node, lambda: setattr(node, "value", node.value + 1)
        case ast.Call():
            yield from _changes_of_call(node)
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Delete():
            yield node, lambda: _become(node, ast.Pass())
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield node, lambda: _become(node, ast.Pass())
        case ast.Return() if node.value is not None and not _is_none(node.value):
            yield node, lambda: setattr(node, "value", ast.Constant(None))
        case ast.Continue() | ast.Break():
            yield node, lambda: _become(node, ast.Pass())


def _changes_of_call(node: ast.Call) -> Iterator[Change]:
    for i in [i for i, keyword in enumerate(node.keywords) if not _passed_over(keyword)]:
        yield node, lambda i=i: node.keywords.pop(i)
    function = node.func
    name = {ast.Name: "id", ast.Attribute: "attr"}.get(type(function))
    called = getattr(function, name) if name else None
    if called in _NAMES:
        yield node, lambda: setattr(function, name, _NAMES[called])
    if called in _COPIES:
        copied = function.value if name == "attr" and not node.args else (node.args or [None])[0]
        if copied is not None:
            yield node, lambda: _become(node, copied)


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _become(node: ast.AST, other: ast.AST) -> None:
    fields = dict(vars(other))
    node.__class__ = other.__class__
    vars(node).clear()
    vars(node).update(fields)
