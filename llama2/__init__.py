"""A reference Llama 2 in PyTorch whose operations are a backend of `gqa_kernels`."""

from llama2.config import PUBLISHED, ModelConfig
from llama2.kv_cache import KVCache
from llama2.model import Llama2

__all__ = ["PUBLISHED", "KVCache", "Llama2", "ModelConfig"]
