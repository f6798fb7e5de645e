"""The code can be read: limits on what a line, a function and a module hold, over the whole
package.

The figures are those of well-kept packages of the field. A formatter alone does not reach them:
unfold the thought, then format.
"""

import ast
import io
import statistics
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hessian_surgery_nb"
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "_modidx.py")
SOURCES = {p: p.read_text(encoding="utf-8") for p in FILES}
TREES = {p: ast.parse(source) for p, source in SOURCES.items()}

BRANCHES = (
    ast.If,
    ast.For,
    ast.While,
    ast.ExceptHandler,
    ast.IfExp,
    ast.comprehension,
    ast.Assert,
)


def everything(kind):
    return [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, kind)]


def docstring_lines(tree):
    "Numbers of the lines that docstrings stand on."
    lines = set()
    for owner in ast.walk(tree):
        if not isinstance(owner, (ast.Module, ast.ClassDef, ast.FunctionDef)) or not owner.body:
            continue
        first = owner.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            if isinstance(first.value.value, str):
                lines.update(range(first.lineno, first.end_lineno + 1))
    return lines


def code_lines(path):
    "Lines that are neither blank nor comment nor docstring."
    docs = docstring_lines(TREES[path])
    numbered = enumerate(SOURCES[path].splitlines(), 1)
    bare = [line.strip() for number, line in numbered if number not in docs]
    return sum(bool(line) and not line.startswith("#") for line in bare)


def complexity(function):
    "One, and one more for every way in which it can go on."
    nodes = list(ast.walk(function))
    choices = sum(len(node.values) - 1 for node in nodes if isinstance(node, ast.BoolOp))
    return 1 + choices + sum(isinstance(node, BRANCHES) for node in nodes)


def public_functions():
    for tree in TREES.values():
        for node in tree.body:
            members = node.body if isinstance(node, ast.ClassDef) else [node]
            for member in members:
                if not isinstance(member, ast.FunctionDef):
                    continue
                if member.name == "__init__" or not member.name.startswith("_"):
                    yield member


LINES = sum(code_lines(path) for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_line_fits_and_a_module_is_one_idea(path):
    long = [n for n, line in enumerate(SOURCES[path].splitlines(), 1) if len(line) > 100]
    assert long == [], "lines over 100 characters"
    assert code_lines(path) <= 450, "split the notebook: one idea, one module"


def test_no_semicolons():
    for path, source in SOURCES.items():
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        assert all(token.string != ";" for token in tokens if token.type == tokenize.OP), path


def test_one_thought_a_line():
    nodes = len(everything((ast.expr, ast.stmt)))
    assert nodes / LINES <= 6, "expressions and statements a line of code"


def test_values_that_have_nothing_to_do_with_each_other_are_assigned_one_by_one():
    found = [
        node
        for node in everything(ast.Assign)
        if isinstance(node.value, ast.Tuple)
        and any(isinstance(target, ast.Tuple) for target in node.targets)
    ]
    assert 1000 * len(found) / LINES <= 12, "tuple = tuple, a thousand lines"


def test_few_conditional_expressions():
    assert 1000 * len(everything(ast.IfExp)) / LINES <= 30, "a thousand lines"


def test_few_functions_go_many_ways():
    functions = everything(ast.FunctionDef)
    tangled = [f.name for f in functions if complexity(f) > 10]
    assert len(tangled) / len(functions) <= 0.05, tangled


def test_names_of_locals_are_words():
    lengths = [
        len(node.id)
        for function in everything(ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]
    assert statistics.mean(lengths) >= 4.5


def test_arguments_of_public_functions_have_types():
    untyped = [
        f"{function.name}({argument.arg})"
        for function in public_functions()
        for argument in (
            *function.args.posonlyargs,
            *function.args.args,
            *function.args.kwonlyargs,
        )
        if argument.annotation is None and argument.arg not in ("self", "cls")
    ]
    assert untyped == []
