"""The one place that imports torchvision, because that import can fail beside a CPU build of torch.

torchvision's wheels from PyPI are built for a CUDA torch. Beside a CPU torch their compiled part does not load, and
then `import torchvision` stops at "operator torchvision::nms does not exist": it registers shape functions for
operators that were never declared. We need none of these operators, only data sets and weight files, so declaring
their schemas is enough. With a torch and a torchvision that match, the operators exist already and nothing is
declared.
"""

import importlib
from types import ModuleType

SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def import_torchvision(module: str = "torchvision") -> ModuleType:
    """`torchvision` (or one of its modules), whatever torch it was built for."""
    try:
        return importlib.import_module(module)
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    import torch

    for schema in SCHEMAS.values():
        # The library object must live as long as the process; a dropped one takes its declarations back.
        _KEEP.append(torch.library.Library("torchvision", "FRAGMENT"))
        _KEEP[-1].define(schema)
    return importlib.import_module(module)


_KEEP: list = []
