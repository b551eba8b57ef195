"""A reference Llama 2 in PyTorch whose operations are a backend of `gqa_kernels`."""

from llama2.cache.kv_cache import KVCache
from llama2.cache.paged_kv_cache import PagedKVCache
from llama2.config import PUBLISHED, ModelConfig
from llama2.generate import Generator
from llama2.model import Llama2
from llama2.requests import Request, Result
from llama2.serving import serve
from llama2.speculation import DraftModel, PromptLookup

__all__ = [
    "PUBLISHED",
    "DraftModel",
    "Generator",
    "KVCache",
    "Llama2",
    "ModelConfig",
    "PagedKVCache",
    "PromptLookup",
    "Request",
    "Result",
    "serve",
]
