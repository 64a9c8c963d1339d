"""torch.compile against eager, forward and backward, without graph breaks; run as a script.

A process of its own: the checks of signatures that tests switch on cannot be traced.
"""

import copy

import peaky
import torch
from torch._dynamo.backends.debugging import aot_eager

from bmojo_core.decode_graph import step_in_place, sublayer_in_place, what_is_known
from bmojo_core.layers.rows import known


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


def check_autocast(**changes) -> None:
    """A layer whose weights stay in float32 and whose products are made in bfloat16."""
    layer = peaky.model(dtype=torch.float32, **changes).model.layers[0]
    h = torch.randn(2, 19, 16, generator=torch.Generator().manual_seed(0))
    compiled = traced(layer)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(compiled(h)[0], layer(h)[0], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(compiled(h[:, :1])[0], layer(h[:, :1])[0], rtol=1e-2, atol=1e-2)


def check_model(kind: str) -> None:
    """A whole model: logits to 1e-5 of the largest."""
    model, tokens = peaky.model(kind, dtype=torch.float32), peaky.ids(2, 21)
    want = peaky.logits(model, tokens)
    with torch.no_grad():
        got = traced(model)(tokens, use_cache=False, output_hidden_states=False).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max(), kind


def check_decode_step(kind: str, **changes) -> None:
    """A decode step sublayer by sublayer, as DecodeGraph has it compiled: state and logits.

    One graph serves all sublayers of a kind, as long as the host knows the same of the rows.
    """
    torch._dynamo.reset()
    graphs, met = [], set()

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    sublayer = torch.compile(sublayer_in_place, fullgraph=True, dynamic=False, backend=backend)
    model, tokens = peaky.model(kind, dtype=torch.float32, **changes).eval(), peaky.ids(3, 34)
    with torch.no_grad():
        plain = model(tokens[:, :22], use_cache=True).past_key_values
        placed = plain.map(torch.Tensor.clone)
        for t in range(22, 34):
            token = tokens[:, t : t + 1]
            want = model(token, past_key_values=plain, use_cache=True).logits[:, -1]
            what = what_is_known(model.config, placed, placed.position.tolist())
            met.add(what)
            with known(what):
                got = step_in_place(model, token, placed, sublayer)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for a, b in zip(plain.tensors(), placed.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(graphs) == len(met) * len(set(model.config.layer_types)), (kind, changes)


def check_what_is_known_shortens(kind: str = "bmojo") -> None:
    """A traced step whose rows are known does less than one that must expect anything."""
    model, tokens = peaky.model(kind, dtype=torch.float32).eval(), peaky.ids(2, 30)
    sizes = []

    def backend(graph, inputs):
        sizes[-1] += len(graph.graph.nodes)
        return aot_eager(graph, inputs)

    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
        full = what_is_known(model.config, cache, cache.position.tolist())
        for what in (None, full._replace(chunk_begins=False, window_full=True, memory_full=True)):
            torch._dynamo.reset()
            sizes.append(0)
            sublayer = torch.compile(sublayer_in_place, fullgraph=True, backend=backend)
            with known(what):
                step_in_place(model, tokens[:, :1], cache.map(torch.Tensor.clone), sublayer)
    assert sizes[1] < 0.8 * sizes[0], sizes


if __name__ == "__main__":
    check_layer(memory_update="chunk")
    check_layer(memory_update="token", wiring="parallel")
    check_layer(fading="scalar_decay", ssm_head_dim=8)
    check_autocast(memory_update="token")
    check_autocast(fading="scalar_decay", ssm_head_dim=8)
    for kind in ("transformer", "hybrid", "bmojo"):
        check_model(kind)
    for kind in ("hybrid", "bmojo_f", "bmojo"):
        check_decode_step(kind)
    check_decode_step("bmojo", memory_update="token", wiring="parallel")
    check_decode_step("bmojo", fading="scalar_decay", ssm_head_dim=8, key_kernel=3)
    check_decode_step("bmojo", selection="accumulated_attention", memory_gates=True)
    check_what_is_known_shortens()
    print("compiled equals eager")
