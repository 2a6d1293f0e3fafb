"""A pytest plugin, ``-p hide_optional``: nothing but torch and the test tools can be imported, as on machines where
packages cannot be installed. Used by test_gpu_check.py."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution
from typing import Any

HIDDEN = frozenset({"PIL", "expecttest", "lightning", "liger_kernel", "matplotlib", "quack", "sklearn"})


class Others:
    """All finders. For what is hidden `find_spec` returns None, as for any missing module."""

    def __init__(self, finders: Sequence[Any]) -> None:
        self.finders = finders

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.split(".")[0] in HIDDEN:
            return None
        specs = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in specs if spec is not None), None)

    def find_distributions(self, *arguments: Any) -> Iterable[Distribution]:
        for finder in self.finders:
            if hasattr(finder, "find_distributions"):
                yield from finder.find_distributions(*arguments)


sys.meta_path[:] = [Others(list(sys.meta_path))]
