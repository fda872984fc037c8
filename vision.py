"""The one place that imports torchvision, because that import can fail with a CPU build of torch.

torchvision's wheels from PyPI are built for a CUDA torch. With a CPU build of torch their compiled part does not load,
and `import torchvision` then fails with "operator torchvision::nms does not exist": it registers shape functions for
operators that were never declared. We need none of these operators, only data sets and weight files, so declaring their
schemas is enough. With a torch and a torchvision that match, the operators exist already and nothing is declared.
"""

import functools
import importlib
from types import ModuleType
from typing import Any

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def import_torchvision(module: str = "torchvision") -> ModuleType:
    """`torchvision` (or one of its modules), whatever torch it was built for."""
    try:
        return importlib.import_module(module)
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    declare_operators()
    return importlib.import_module(module)


@functools.cache  # declarations vanish when the library object is garbage-collected; the cache keeps it alive
def declare_operators() -> Any:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    return library
