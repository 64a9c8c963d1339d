"""Sequence models as input-varying realizations.

    x_{t+1} = A(u_t) x_t + b(u_t),     y_t = rho(u_t, x_t)

========================  ====================================================================
`systems`                 the form itself: running it, nilpotency, reachability, observability
`attention`               A a block up-shift (eidetic): softmax and linear attention
`selective`               A diagonal (fading): Mamba's scan, its layer, its bilinear form
`hybrid`                  both: stacked layers, and B'MOJO-F's joint softmax
`trajectory`              what is left when the inputs are fixed: a linear time-varying system
`canonical`               exact changes of basis to companion form, and which are causal
`companions`              the exact causal window form; the frozen form, which is another system
========================  ====================================================================

Everything is float64 numpy, run token by token: written to be checked against, not to be fast.
"""

from realization.sequences.attention import (
    AttentionWeights,
    linear_attention,
    linear_attention_fir,
    rotation,
    up_shift,
    windowed_attention,
    windowed_linear_attention,
)
from realization.sequences.canonical import (
    FORMS,
    CanonicalForm,
    companion_column,
    controller_form,
    dependence,
    is_causal,
    observability_form,
    observer_form,
    reachability_form,
    sensitivity,
    time_reversed,
)
from realization.sequences.companions import (
    WindowedScan,
    WindowForm,
    block_companion,
    frozen_form,
    window_form,
)
from realization.sequences.hybrid import (
    Fading,
    RmsNorm,
    bmojo_f_layer,
    fading_attention,
    residual,
    stacked_hybrid,
)
from realization.sequences.selective import (
    MambaWeights,
    SelectiveWeights,
    augmented_input,
    bilinear_matrices,
    bilinear_scan,
    channel_trajectory,
    loading_prompt,
    mamba_layer,
    selective_scan,
)
from realization.sequences.systems import (
    InputVaryingSystem,
    Run,
    Series,
    System,
    Wrapped,
    nilpotency_index,
    observability_matrix,
    observable_rank,
    reachability_matrix,
    reachable_rank,
    state_size,
    transition,
)
from realization.sequences.trajectory import LinearTrajectory, time_invariant

__all__ = [
    "FORMS",
    "AttentionWeights",
    "CanonicalForm",
    "Fading",
    "InputVaryingSystem",
    "LinearTrajectory",
    "MambaWeights",
    "RmsNorm",
    "Run",
    "SelectiveWeights",
    "Series",
    "System",
    "WindowForm",
    "WindowedScan",
    "Wrapped",
    "augmented_input",
    "bilinear_matrices",
    "bilinear_scan",
    "block_companion",
    "bmojo_f_layer",
    "channel_trajectory",
    "companion_column",
    "controller_form",
    "dependence",
    "fading_attention",
    "frozen_form",
    "is_causal",
    "linear_attention",
    "linear_attention_fir",
    "loading_prompt",
    "mamba_layer",
    "nilpotency_index",
    "observability_form",
    "observability_matrix",
    "observable_rank",
    "observer_form",
    "reachability_form",
    "reachability_matrix",
    "reachable_rank",
    "residual",
    "rotation",
    "selective_scan",
    "sensitivity",
    "stacked_hybrid",
    "state_size",
    "time_invariant",
    "time_reversed",
    "transition",
    "up_shift",
    "window_form",
    "windowed_attention",
    "windowed_linear_attention",
]
