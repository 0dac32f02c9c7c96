"""The words of records have one number each: a name that is given twice means the last one everywhere."""

import ast
from collections import Counter
from pathlib import Path

from tpcpu.kernels import record


def test_no_name_is_given_twice():
    found: Counter[str] = Counter()
    for statement in ast.parse(Path(record.__file__).read_text()).body:
        if isinstance(statement, ast.Assign):
            found.update(
                node.id
                for node in ast.walk(statement)
                if isinstance(node, ast.Name) and node.id.isupper() and isinstance(node.ctx, ast.Store)
            )
    assert found
    assert [name for name, count in found.items() if count > 1] == []
