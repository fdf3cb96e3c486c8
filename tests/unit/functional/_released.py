"""The balance formula of a released package, run without its imports: its file is read, and its functions compiled.

Packages that need a GPU, a compiler or another torch to be imported are installed beside, without what they depend on:

    pip install --no-deps --target build/peers megatron-core==0.16.1 ai2-olmo-core==3.0.0 nemo-automodel==0.7.0
    pip download --no-deps --no-build-isolation --no-binary :all: -d build deepspeed==0.19.8 megablocks==0.10.0
    (cd build; for file in *.tar.gz; do tar xzf $file; done)
    PYTHONPATH=build/peers:build/deepspeed-0.19.8:build/megablocks-0.10.0 python -m pytest tests/unit/functional
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

__all__ = ["released"]


def released(file: str, name: str, **names: Any) -> Any:
    """Function ``name`` (or ``Class.method``) of ``file``, which is looked for along sys.path; skips without it.

    Its neighbours in the file and ``names`` are all that it can call; types and decorators are left out.
    """
    found = next((path for folder in sys.path if (path := Path(folder) / file).is_file()), None)
    if found is None:
        pytest.skip(f"{file} is not installed (see tests/unit/functional/_released.py)")
    tree = ast.parse(found.read_text(encoding="utf-8"))
    owner, _, method = name.rpartition(".")
    body = next((node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner), tree.body)
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    for node in functions:
        node.decorator_list, node.returns = [], None
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            argument.annotation = None
    code = compile(ast.Module(functions, []), str(found), "exec")
    space: dict[str, Any] = {"torch": torch, "F": functional, "Tensor": torch.Tensor} | names
    exec(code, space)
    return space[method]
