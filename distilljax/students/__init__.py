"""Students: made of a teacher or fresh, and what is put beside them to be trained.

Functions take modules and return modules; the dataclasses that are named after what
they make do the same in a config.
"""

from .._in_place import Projected as Projected
from .depth import keep_layers as keep_layers
from .importance import Importance as Importance
from .importance import measure_importance as measure_importance
from .lora import add_lora as add_lora
from .lora import merge_lora as merge_lora
from .made import Made as Made
from .made import ParameterTable as ParameterTable
from .projection import Projection as Projection
from .quantization import drift as drift
from .quantization import fake_quantize as fake_quantize
from .quantization import quantize_weights as quantize_weights
from .scratch import from_checkpoint as from_checkpoint
from .scratch import from_scratch as from_scratch
from .scratch import projected_embedding as projected_embedding
from .scratch import sliced_embedding as sliced_embedding
from .specs import Copied as Copied
from .specs import FakeQuantized as FakeQuantized
from .specs import KeptLayers as KeptLayers
from .specs import LoRA as LoRA
from .specs import Pretrained as Pretrained
from .specs import QuantizedTeacher as QuantizedTeacher
from .specs import SlicedWidth as SlicedWidth
from .specs import Untrained as Untrained
from .specs import WithEmbedding as WithEmbedding
from .width import slice_width as slice_width
