"""RMSNorm for Hugging Face's `kernels` package, which exchanges the layers that it has names for.

    from gqa_kernels.integrations import hub_kernels
    from kernels import Mode, kernelize, use_kernel_mapping

    with use_kernel_mapping(hub_kernels.mapping(), inherit_mapping=False):
        model = kernelize(model, device="cuda", mode=Mode.TRAINING | Mode.TORCH_COMPILE)

Transformers names its norms "RMSNorm" where it takes the installed release of `kernels` (5.23: from
0.18.2, below 0.19); each instance in the model then gets the forward below, and `kernelize` with an
empty mapping gives the originals back. Without such a release nothing has a name, and `kernelize`
changes nothing and says nothing.
A name is all that `kernels` goes by: of the 141 classes named so in 5.23, some (Olmo 2 and 3,
GPT-OSS, Nemotron-H) round once, after the weight, and get Llama's order all the same, other values
in 16 bits. `gqa_kernels.patch` looks, does the same and more, and needs no such package.
"""

from torch import Tensor, nn

from gqa_kernels.ops.norm import rms_norm


class RMSNorm(nn.Module):
    """`kernels` takes its forward only: weight and variance_epsilon are the exchanged module's."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class _Repository:
    """What `kernels` loads a layer from; this one is here already."""

    layer_name = "RMSNorm"

    def load(self) -> type[nn.Module]:
        return RMSNorm

    def __str__(self) -> str:
        return f"{RMSNorm.__module__}.{RMSNorm.__name__}"


def mapping() -> dict[str, dict[str, _Repository]]:
    """For `kernels.use_kernel_mapping`. On the CPU the kernel runs in Triton's interpreter, or
    raises."""
    return {"RMSNorm": {device: _Repository() for device in ("cuda", "cpu")}}
