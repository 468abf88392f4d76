"""Models to start from, one file each. Any other NNX module works as well."""

from .convnet import ConvNet as ConvNet
from .mlp import MLP as MLP
