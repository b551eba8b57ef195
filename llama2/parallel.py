"""One model on several processes: tensor parallelism and FSDP, on the dimensions of a device mesh.

    mesh = init_device_mesh("cuda", (4, 2), mesh_dim_names=("dp", "tp"))
    parallelize(model, mesh)

Tensor parallelism splits heads, columns of the feed-forward layers and the vocabulary among the
ranks: each rank computes its own heads and columns, and two all-reduces per layer add the results
up. Shoeybi et al. 2019, arXiv:1909.08053. FSDP shards parameters, gradients and optimiser states,
and gathers a layer's parameters when the layer runs. Rajbhandari et al. 2019, arXiv:1910.02054.

The model's ops see plain local tensors, on any backend.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.utils import get_total_norm
from torch.utils.checkpoint import checkpoint

from llama2.decoder import AnyDecoder, Decoder
from llama2.model import Llama2
from llama2.targets import count_predictions

DATA, TENSOR = "dp", "tp"  # names of mesh dimensions


def parallelize(
    model: AnyDecoder,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype | None = None,
    recompute_layers: bool = False,
    reshard_after_forward: bool = True,
) -> AnyDecoder:
    """Shards `model` in place over `mesh` and returns it.

    On "tp", all ranks take the same tokens and return the same logits; `generate` works. On "dp",
    each rank takes its own tokens; the model can train and compute logits, but not generate. Make
    the optimiser afterwards, from the new parameters.

    Args:
        model: on the mesh's device, with the same weights on every rank; or on the meta device, to
            get memory by `to_empty` and weights from a checkpoint.
        mesh: its dimensions are "dp", "tp", or both in this order.
        param_dtype: with "dp", the dtype that layers compute in; parameters, gradients and
            optimiser states keep their dtype; gradients are summed in float32.
        recompute_layers: store only the input of each layer and recompute the layer in the backward
            pass.
        reshard_after_forward: with "dp", free a layer's parameters after the forward pass and
            gather them again for the backward pass.
    Raises:
        ValueError: the dimensions have other names; "tp" does not divide the heads or the
            intermediate size; `param_dtype` without "dp"; weights differ between ranks; tied
            embeddings are on the meta device, as `to_empty` would untie them.
    """
    names = mesh.mesh_dim_names
    if names not in ((DATA,), (TENSOR,), (DATA, TENSOR)):
        raise ValueError(f"mesh: expected dimensions ('dp',), ('tp',) or ('dp', 'tp'); got {names}")
    if param_dtype is not None and DATA not in names:
        raise ValueError(
            "param_dtype: expected None without 'dp', as layers then compute in the model's "
            f"dtype; got {param_dtype}"
        )
    if not model.embed_tokens.weight.is_meta:
        _check_same_weights(model, mesh)
    elif model.config.tie_word_embeddings:
        raise ValueError(
            "model: expected tied word embeddings on a real device; got the meta device"
        )
    if TENSOR in names:
        _shard_tensors(model, mesh[TENSOR])
    if recompute_layers:
        for layer in model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if DATA in names:
        sums = None if param_dtype is None else torch.float32
        shard = partial(
            fully_shard,
            mesh=mesh[DATA],
            reshard_after_forward=reshard_after_forward,
            mp_policy=MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=sums),
        )
        for layer in model.layers:
            shard(layer)
        shard(model)
        if isinstance(model, Llama2):  # a second forward method that needs gathered weights
            register_fsdp_forward_method(model, "log_probs_at")
    return model


@torch.no_grad()
def _check_same_weights(model: Decoder, mesh: DeviceMesh) -> None:
    """Raises ValueError if weights differ between ranks; no rank copies its weights to the
    others."""
    total = sum(parameter.sum(dtype=torch.float64) for parameter in model.parameters())
    bounds = torch.stack([total, -total])
    for group in mesh.get_all_groups():
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group)
    if not bounds[0].equal(-bounds[1]):
        raise ValueError(
            "model: expected the same weights on every rank, from one seed or one checkpoint; got "
            f"sums between {-bounds[1].item()} and {bounds[0].item()}"
        )


def _shard_tensors(model: Decoder, mesh: DeviceMesh) -> None:
    """Shards parameters over "tp". Norms and the head of a `ScalarModel` stay plain parameters,
    which with their gradients are the same on every rank."""
    size = mesh.size()
    for name in ("num_q_heads", "num_kv_heads", "intermediate_size"):
        value = getattr(model.config, name)
        if value % size:
            raise ValueError(f"{name}: expected a multiple of tp ({size}); got {value}")
    whole = Replicate()
    projections = {
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
        # One DTensor for all projections that read it, so that their gradients are added before the
        # all-reduce.
        "self_attn": PrepareModuleInput(
            input_layouts=(whole, None, None, None, None),
            desired_input_layouts=(whole, None, None, None, None),
        ),
        "mlp": PrepareModuleInput(input_layouts=(whole, None), desired_input_layouts=(whole, None)),
    }
    plan = {f"layers.*.{name}": style for name, style in projections.items()}
    plan["embed_tokens"] = RowwiseParallel(input_layouts=whole)
    if isinstance(model, Llama2):
        plan["lm_head"] = ColwiseParallel(output_layouts=whole)
    # Every rank has the weights, so nothing is broadcast from the first.
    parallelize_module(model, mesh, plan, src_data_rank=None)
    if model.config.tie_word_embeddings:  # sharding untied them
        model.lm_head.weight = model.embed_tokens.weight
    for layer in model.layers:
        layer.self_attn.num_q_heads //= size
        layer.self_attn.num_kv_heads //= size


def loss(
    model: Llama2,
    tokens: Tensor,
    mesh: DeviceMesh,
    *,
    num_valid: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Returns this rank's share of `Llama2.loss` over the tokens of all ranks of "dp", whatever
    number each predicts: the loss is the mean of the shares, and the gradients after FSDP's
    reduction are its gradients."""
    if DATA not in mesh.mesh_dim_names:
        return model.loss(tokens, num_valid=num_valid, cu_seqlens=cu_seqlens)
    count = count_predictions(tokens, num_valid=num_valid, cu_seqlens=cu_seqlens)
    dist.all_reduce(count, group=mesh.get_group(DATA))
    count = count / mesh[DATA].size()  # FSDP takes the mean of the ranks' gradients
    return model.loss(tokens, num_valid=num_valid, cu_seqlens=cu_seqlens, num_predictions=count)


def mean(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """Returns the mean of a tensor over the ranks of "dp"."""
    value = value.detach().clone()
    if DATA in mesh.mesh_dim_names:
        dist.all_reduce(value, group=mesh.get_group(DATA))
        value /= mesh[DATA].size()
    return value


@torch.no_grad()
def grad_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Returns the norm of all gradients, which are sharded over one mesh or several: a scalar, the
    same on every rank."""
    norms = [get_total_norm(group) for group in _by_mesh(gradients).values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack(norms))


def _by_mesh(tensors: Iterable[Tensor]) -> dict[DeviceMesh | None, list[Tensor]]:
    groups = defaultdict(list)
    for x in tensors:
        groups[getattr(x, "device_mesh", None)].append(x)
    return groups
