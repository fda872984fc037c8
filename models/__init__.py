"""The networks: so far only MobileNetV2 for 32x32 images."""

from models.mobilenetv2_cifar import Architecture, MobileNetV2, multiply_adds, skeleton

__all__ = ["Architecture", "MobileNetV2", "multiply_adds", "skeleton"]
