"""Weights shared by the tests of input-varying realizations: random ones, and those of a layer."""

import numpy as np
import torch

from realization.sequences import AttentionWeights, MambaWeights, RmsNorm, SelectiveWeights


def random_selective(e: int, n: int, r: int, seed: int) -> SelectiveWeights:
    """A selective scan whose step sizes vary by about a factor of ten from token to token."""
    rng = np.random.default_rng(seed)
    return SelectiveWeights(
        P_up=rng.normal(size=(e, r)) / r**0.5,
        P_down=rng.normal(size=(r, e)) / e**0.5,
        P_B=rng.normal(size=(n, e)) / e**0.5,
        P_C=rng.normal(size=(n, e)) / e**0.5,
        A=-np.linspace(0.5, 2.0, n) * rng.uniform(0.8, 1.2, size=(e, 1)),
        D=rng.normal(size=e),
        bias=rng.normal(size=e) - 0.5,
    )


def random_attention(d: int, h: int, g: int, p: int, seed: int) -> AttentionWeights:
    """Attention with scores of order one."""
    rng = np.random.default_rng(seed)
    W_q, W_k, W_v = (rng.normal(size=(k * p, d)) / d**0.5 for k in (h, g, g))
    return AttentionWeights(W_q, W_k, W_v, rng.normal(size=(d, h * p)), h, g)


def double(parameter: torch.Tensor | None) -> np.ndarray | float:
    """A parameter as float64 numpy; 0 where a layer has none."""
    return 0.0 if parameter is None else parameter.detach().double().numpy()


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter drawn anew, in float64, so that nothing is a special value."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            shape = parameter.shape
            draw = torch.randn(shape, generator=generator, dtype=torch.float64)
            scale = shape[-1] ** -0.5 if parameter.ndim > 1 and "A_log" not in name else 0.5
            parameter.copy_(draw * scale)
    return module


def mamba_weights(layer: torch.nn.Module) -> MambaWeights:
    """The weights of bmojo_core.layers.mamba.Mamba."""
    W_x = double(layer.x_proj.weight)
    r, n = layer.dt_rank, layer.state_size
    scan = SelectiveWeights(
        P_up=double(layer.dt_proj.weight),
        P_down=W_x[:r],
        P_B=W_x[r : r + n],
        P_C=W_x[r + n :],
        A=-np.exp(double(layer.A_log)),
        D=double(layer.D),
        bias=double(layer.dt_proj.bias),
    )
    e = len(scan.D)
    return MambaWeights(
        W_in=double(layer.in_proj.weight),
        taps=double(layer.conv1d.weight)[:, 0],
        conv_bias=np.broadcast_to(double(layer.conv1d.bias), (e,)),
        scan=scan,
        W_out=double(layer.out_proj.weight),
        in_bias=double(layer.in_proj.bias),
        out_bias=double(layer.out_proj.bias),
    )


def attention_weights(projections: torch.nn.Module) -> AttentionWeights:
    """The weights of bmojo_core.layers.attention.Projections."""
    q, k, v, o = (
        double(getattr(projections, f"{name}_proj").weight) for name in ("q", "k", "v", "o")
    )
    p = projections.p
    return AttentionWeights(q, k, v, o, len(q) // p, len(k) // p)


def norm_weights(norm: torch.nn.Module) -> RmsNorm:
    """The weights of torch.nn.RMSNorm."""
    return RmsNorm(double(norm.weight), norm.eps)
