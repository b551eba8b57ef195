"""Which kernel a call runs: the portable one, or one for an architecture.

The choice depends on the architecture, dtype, head_dim and options alone, never on lengths, so that
a row has the same bits in every batch.
"""

from torch import Tensor

from gqa_kernels.ops.attention import forward
from gqa_kernels.ops.attention.call import Call
from gqa_kernels.runtime import hopper_configs, target


def launch_forward(
    call: Call, *, need_lse: bool, need_residue: bool, unmeasured: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, lse, residue) of a prepared call, as `forward.launch_forward`.

    Args:
        unmeasured: also take a kernel that was never measured on a GPU, if it covers the call.
    """
    q = call.q
    with target.device_of(q):
        config = hopper_config(call, hopper_configs.HOPPER_FORWARD, unmeasured=unmeasured)
        if config is None or q.numel() == 0 or call.k.numel() == 0:
            return forward.launch_forward(call, need_lse=need_lse, need_residue=need_residue)
        # Late: whatever becomes of `triton.experimental`, the portable kernels can be imported.
        from gqa_kernels.ops.attention.hopper import forward as hopper

        num_sms = target.current().num_sms
        return hopper.launch_forward(
            call, config, num_sms, need_lse=need_lse, need_residue=need_residue
        )


def hopper_config(
    call: Call, table: tuple[hopper_configs.Row, ...], *, unmeasured: bool
) -> hopper_configs.Row | None:
    """The configuration of a kernel for Hopper; None if it does not cover the call.

    Args:
        table: `HOPPER_FORWARD`, `HOPPER_BACKWARD` or `SPECIALIZED_DKDV`.
    """
    if any(option is not None for option in call[5:9]):
        return None
    q = call.q
    row = hopper_configs.hopper_config(
        table, target.current().arch, q.element_size(), q.shape[-1], unmeasured
    )
    has_window = call.window_left is not None or call.window_right not in (None, 0)
    if row is None or not (has_window or call.softcap is not None or call.packed):
        return row
    if not isinstance(row, hopper_configs.HopperConfig):
        return None
    covered = not has_window or call.softcap is None or row.capped_windows
    return row if covered and (row.options_measured or unmeasured) else None
