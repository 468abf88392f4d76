"""Pretrained weights in and out.

`_families`, `_vision` and `_gguf` say which model a file describes, `_tables` which
tensor is which parameter, `_convert` finds what does not fit and fills the module;
`_kinds` is what they have in common.
"""

from ._load import load_pretrained as load_pretrained
from ._load import pretrained_config as pretrained_config
from ._load import save_pretrained as save_pretrained
