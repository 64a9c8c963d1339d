"""torch.compile against eager, forward and backward, without graph breaks; run as a script.

A process of its own: the checks of signatures that tests switch on cannot be traced.
"""

import copy

import peaky
import torch


def traced(module):
    """Traced whole, backward too; not lowered to C++, so that no compiler is needed."""
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def check_layer(**changes) -> None:
    """One B'MOJO layer: outputs to 1e-5, gradients to 1e-4."""
    layer = peaky.model(dtype=torch.float32, key_kernel=3, **changes).model.layers[0]
    other = copy.deepcopy(layer)
    h = torch.randn(2, 19, 16, generator=torch.Generator().manual_seed(0))
    got, want = traced(layer)(h)[0], other(h)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    got.square().sum().backward()
    want.square().sum().backward()
    for (name, a), b in zip(layer.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=name)


def check_model(kind: str) -> None:
    """A whole model: logits to 1e-5 of the largest."""
    model, tokens = peaky.model(kind, dtype=torch.float32), peaky.ids(2, 21)
    want = peaky.logits(model, tokens)
    with torch.no_grad():
        got = traced(model)(tokens, use_cache=False, output_hidden_states=False).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max(), kind


if __name__ == "__main__":
    check_layer(memory_update="chunk")
    check_layer(memory_update="token", wiring="parallel")
    check_layer(fading="scalar_decay", ssm_head_dim=8)
    for kind in ("transformer", "hybrid", "bmojo"):
        check_model(kind)
    print("compiled equals eager")
