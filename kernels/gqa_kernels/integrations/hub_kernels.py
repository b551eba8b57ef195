"""RMSNorm for Hugging Face's `kernels` package, which replaces layers by name.

    from gqa_kernels.integrations import hub_kernels
    from kernels import Mode, kernelize, use_kernel_mapping

    with use_kernel_mapping(hub_kernels.mapping(), inherit_mapping=False):
        model = kernelize(model, device="cuda", mode=Mode.TRAINING | Mode.TORCH_COMPILE)

Transformers names its norms "RMSNorm" if it supports the installed release of `kernels` (5.23: from
0.18.2, below 0.19). Each instance in the model then gets the forward below; `kernelize` with an
empty mapping restores the originals. With another release, layers have no names, and `kernelize`
changes nothing without a message.
`kernels` looks at names only: of the 141 classes with this name in 5.23, some (Olmo 2 and 3,
GPT-OSS, Nemotron-H) round once, after the weight, but get Llama's order, which gives other values
in 16 bits. `gqa_kernels.patch` checks what each layer computes, replaces more ops, and does not
need the package.
"""

from torch import Tensor, nn

from gqa_kernels.ops.norm import rms_norm


class RMSNorm(nn.Module):
    """`kernels` uses only the forward; weight and variance_epsilon are the replaced module's."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class _Repository:
    """The interface from which `kernels` loads a layer; this one is a local class."""

    layer_name = "RMSNorm"

    def load(self) -> type[nn.Module]:
        return RMSNorm

    def __str__(self) -> str:
        return f"{RMSNorm.__module__}.{RMSNorm.__name__}"


def mapping() -> dict[str, dict[str, _Repository]]:
    """The mapping for `kernels.use_kernel_mapping`. On the CPU the kernel runs in Triton's
    interpreter, or raises if that is off."""
    return {"RMSNorm": {device: _Repository() for device in ("cuda", "cpu")}}
