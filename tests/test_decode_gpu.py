"""The benchmark of decoding on a GPU: what it makes of its times; the times themselves need one."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import MistralForCausalLM, StaticCache

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import decode_gpu


@pytest.mark.parametrize(("ours", "met"), [(3.3, True), (3.4, False)])
def test_the_fastest_of_each(ours, met):
    def row(kind, **times):
        return {"kind": kind, "batch": 1, "context": 32768, **times}

    rows = [row("bmojo", eager_ms=50.0, graph_ms=ours), row("hybrid", error="no room")]
    rows.append(row("mistral", eager_ms=10.0, static_ms=20.0, graph_ms=11.0, unmasked_ms=5.0,
                    compiled_ms=7.0))  # fmt: skip
    assert decode_gpu.compare(rows) == [
        {"kind": "bmojo", "batch": 1, "context": 32768, "over_mistral": round(10 / ours, 2),
         "bar": 3.0, "met": met, "over_unmasked": round(5 / ours, 2),
         "over_compiled": round(7 / ours, 2)}
    ]  # fmt: skip


def test_a_batch_is_halved_until_it_fits():
    # 30 layers, keys and values, 16 heads of 64, two bytes: 4 GB a row at 32768 tokens
    fits = {memory: decode_gpu.batch_that_fits("370m", 32, 32768, memory * 10**9)
            for memory in (1, 20, 80, 152)}  # fmt: skip
    assert fits == {1: 1, 20: 4, 80: 16, 152: 32}


def test_without_its_mask_a_full_cache_gives_mistrals_own_logits():
    torch.manual_seed(0)
    model = MistralForCausalLM(decode_gpu._mistral("tiny")).eval()
    ids, found = torch.randint(256, (2, 12)), []
    for attention in ("sdpa", "sdpa_without_mask"):
        cache = StaticCache(config=model.config, max_cache_len=12)
        model.set_attn_implementation("sdpa")
        with torch.no_grad():
            model(ids[:, :11], past_key_values=cache, use_cache=True)
            model.set_attn_implementation(attention)
            found.append(model(ids[:, 11:], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(*found)
