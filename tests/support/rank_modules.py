"""What the processes of `ranks.run` need, imported once by the server that forks them."""

from gqa_kernels import interpreter

interpreter.enable()  # before Triton's first import

import contextlib  # noqa: E402

import pytest  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401
import torch.distributed.fsdp  # noqa: E402, F401
import torch.distributed.tensor.parallel  # noqa: E402, F401

import gqa_kernels.fused  # noqa: E402, F401

with contextlib.suppress(ImportError):  # not every environment has Transformers
    from transformers.models.llama import modeling_llama  # noqa: F401
