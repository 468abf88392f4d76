"""Pretrained weights in and out.

`_families` and `_gguf` say which decoder a file describes, `_tables` which tensor is
which parameter, `_convert` finds what does not fit and fills the module.
"""

from ._load import load_pretrained as load_pretrained
from ._load import save_pretrained as save_pretrained
