"""Models to start from, one file each. Any other NNX module works as well."""

from .attention import blocked_attention as blocked_attention
from .attention import cudnn_attention as cudnn_attention
from .attention import dot_product_attention as dot_product_attention
from .attention import splash_attention as splash_attention
from .convnet import ConvNet as ConvNet
from .decoder import DECODER_RULES as DECODER_RULES
from .decoder import Decoder as Decoder
from .decoder import DecoderConfig as DecoderConfig
from .encoder import ENCODER_RULES as ENCODER_RULES
from .encoder import Encoder as Encoder
from .encoder import EncoderConfig as EncoderConfig
from .encoder import exact_gelu as exact_gelu
from .mlp import MLP as MLP
from .pooling import first_token as first_token
from .pooling import mean_pool as mean_pool
from .pooling import sentence_embedding as sentence_embedding
from .pretrained import load_pretrained as load_pretrained
from .pretrained import save_pretrained as save_pretrained
from .resnet import ResNet as ResNet
from .resnet import ResNetConfig as ResNetConfig
from .rope import Rope as Rope
from .vit import VIT_RULES as VIT_RULES
from .vit import ViT as ViT
from .vit import ViTConfig as ViTConfig
