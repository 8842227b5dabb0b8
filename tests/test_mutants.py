"""The mutants are what they are called, differ from the source, and cover what it is made of."""

import ast

import pytest

from tests.mutants import cpp, python
from tests.mutants.__main__ import ROOT, TESTS, files_of_tests

SOURCE = '''
def f(a, b, *, c: int = 2):
    """Returns 5 > 4."""
    if not a < b and c:
        raise ValueError(f"{a - 1}")
    self.x = b.clone()
    return min(a, key=1) + 1
'''


def test_each_kind_of_python_mutant():
    whats = [make().what for make in python.mutants(SOURCE)]
    for expected in (
        "a < b -> a <= b",
        "not a < b -> a < b",
        "not a < b and c -> not a < b or c",
        "not a < b and c -> c",
        "if not a < b and c -> if True",
        "if not a < b and c -> if False",
        "raise ValueError(f'{a - 1}') -> pass",
        "self.x = b.clone() -> pass",
        "b.clone() -> b",
        "min(a, key=1) -> max(a, key=1)",
        "min(a, key=1) -> min(a)",
        "min(a, key=1) + 1 -> min(a, key=1) - 1",
        "return min(a, key=1) + 1 -> return None",
        "2 -> 3",
    ):
        assert expected in whats
    assert not any("5" in what for what in whats)  # texts are no code
    assert not any(what.startswith("a - 1") for what in whats)


def test_each_kind_of_cpp_mutant():
    source = "bool f(int a) {\n  if (a >= 16.0 && !g(a)) {\n    x += 1.0;\n  }  // < 5\n}\n"
    found = [make() for make in cpp.mutants(source)]
    lines = {mutant.source.splitlines()[mutant.line - 1].strip() for mutant in found}
    for expected in (
        "if (a > 16.0 && !g(a)) {",
        "if (a >= 16.0 || !g(a)) {",
        "if (a >= 16.0 && g(a)) {",
        "if (a >= 16.5 && !g(a)) {",
        "if (true) {",
        "if (false) {",
        "x -= 1.0;",
        "x += 2.0;",
        "",
    ):
        assert expected in lines
    assert all(mutant.line in (2, 3) for mutant in found)


@pytest.mark.parametrize("file", TESTS)
def test_every_file_has_tests_and_its_mutants_differ_from_it(file):
    tests = files_of_tests(file)
    assert tests
    assert all((ROOT / path).is_file() for path in tests)
    source = (ROOT / file).read_text()
    module = cpp if file.endswith(".h") else python
    made = module.mutants(source)
    assert len(made) > 20
    plain = source if module is cpp else ast.unparse(ast.parse(source))
    for make in made[:: len(made) // 20]:
        mutant = make()
        assert mutant.source.strip() != plain.strip()
        assert 1 <= mutant.line <= source.count("\n")
