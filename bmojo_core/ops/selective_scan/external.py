"""mamba-ssm's CUDA selective scan behind our signature, for comparisons and for those who have it.

Its layout puts time last: u, delta, z (b, d, l) and B, C (b, n, l). It has no initial state.
"""

from torch import Tensor


def selective_scan_mamba_ssm(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output (b, l, d) and last state (b, d, n) from `mamba_ssm`; see `selective_scan`.

    Raises
    ------
    ValueError
        If `initial_state` is given, or `u` is float64: that kernel takes neither.
    ImportError
        If mamba-ssm is not installed.
    """
    if initial_state is not None:
        raise ValueError('initial_state is given; backend "mamba_ssm" allows only None')
    if u.element_size() == 8:
        raise ValueError(f'u has dtype {u.dtype}; backend "mamba_ssm" takes float32 or narrower')
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        raise ImportError('backend "mamba_ssm" needs the package mamba-ssm (bmojo[gpu])') from error
    sequences = (None if t is None else t.transpose(1, 2) for t in (u, delta, B, C, z))
    u_t, delta_t, B_t, C_t, z_t = sequences
    y, last_state = selective_scan_fn(
        u_t,
        delta_t.to(u.dtype),
        A.float(),
        B_t.to(u.dtype),
        C_t.to(u.dtype),
        D=None if D is None else D.float(),
        z=None if z_t is None else z_t.to(u.dtype),
        delta_bias=None if delta_bias is None else delta_bias.float(),
        delta_softplus=delta_softplus,
        return_last_state=True,
    )
    return y.transpose(1, 2), last_state.float()
