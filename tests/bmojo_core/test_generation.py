"""transformers' conventions: Auto classes, generate in all its modes, saved folders, pipeline."""

import copy

import peaky
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LogitsProcessor,
    MaxTimeCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

import bmojo_core
from bmojo_core.config import KINDS

NEW = 14
PLAIN = {"max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module", params=[*KINDS, "token"])
def model(request):
    if request.param == "token":
        return peaky.model(memory_update="token", position="rope")
    return peaky.model(request.param)


def greedy(model, row, count=NEW):
    """The slow loop: read everything again for every new token."""
    for _ in range(count):
        row = torch.cat([row, peaky.logits(model, row[None])[0, -1].argmax()[None]])
    return row


def left_padded(rows):
    """Rows of unequal length as one batch that ends in the same column, and its mask."""
    length = max(len(r) for r in rows)
    ids = torch.stack([torch.cat([torch.zeros(length - len(r)).long(), r]) for r in rows])
    mask = torch.stack(
        [torch.cat([torch.zeros(length - len(r)), torch.ones(len(r))]) for r in rows]
    )
    return ids, mask.long()


def test_greedy_is_the_slow_loop(model):
    prompt = peaky.ids(1, 9)
    got = model.generate(prompt, do_sample=False, **PLAIN)
    assert torch.equal(got[0], greedy(model, prompt[0]))
    assert torch.equal(model.generate(prompt, do_sample=False, use_cache=False, **PLAIN), got)


def test_rows_of_unequal_length_are_what_they_are_alone(model):
    rows = [peaky.ids(1, n, n)[0] for n in (3, 11, 7)]
    ids, mask = left_padded(rows)
    got = model.generate(ids, attention_mask=mask, do_sample=False, **PLAIN)
    for i, row in enumerate(rows):
        assert torch.equal(got[i, -len(row) - NEW :], greedy(model, row))


def test_sampling_is_the_slow_loop_with_the_same_seed(model):
    prompt = peaky.ids(2, 6)
    torch.manual_seed(5)
    got = model.generate(prompt, do_sample=True, top_k=0, temperature=1.3, **PLAIN)
    torch.manual_seed(5)
    rows = prompt
    for _ in range(NEW):
        probability = (peaky.logits(model, rows)[:, -1].float() / 1.3).softmax(-1)
        rows = torch.cat([rows, torch.multinomial(probability, 1)], 1)
    assert torch.equal(got, rows)


def test_beams_are_the_same_without_a_state(model):
    rows = [peaky.ids(1, n, n)[0] for n in (4, 9)]
    ids, mask = left_padded(rows)
    beams = dict(num_beams=4, num_return_sequences=2, do_sample=False, attention_mask=mask)
    got = model.generate(ids, **beams, **PLAIN)
    assert torch.equal(got, model.generate(ids, use_cache=False, **beams, **PLAIN))
    assert not torch.equal(got[0], got[1])


class Collect(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


class AfterTwo(StoppingCriteria):
    """Stop when a given token has been made twice."""

    def __init__(self, token, prompt):
        self.token, self.prompt = token, prompt

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, self.prompt :] == self.token).sum(1) >= 2


def test_streaming_and_stopping():
    model, prompt = peaky.model(), peaky.ids(1, 5)
    whole = greedy(model, prompt[0], 40)
    made = whole[5:].tolist()
    token = next(t for t in made if made.count(t) >= 2)
    stop = [i for i, t in enumerate(made) if t == token][1] + 1
    criteria = StoppingCriteriaList([AfterTwo(token, 5), MaxTimeCriteria(1000.0)])
    streamer = Collect()
    got = model.generate(
        prompt, do_sample=False, streamer=streamer, stopping_criteria=criteria,
        **PLAIN | {"max_new_tokens": 40},
    )  # fmt: skip
    assert torch.equal(got[0], whole[: 5 + stop])
    assert streamer.ended and streamer.tokens == got[0].tolist()
    until = model.generate(prompt, do_sample=False, **PLAIN | {"eos_token_id": made[0]})
    assert torch.equal(until[0], whole[:6])


def test_generation_goes_on_from_a_state_and_returns_it():
    model, tokens = peaky.model(), peaky.ids(1, 20)
    whole = greedy(model, tokens[0])
    with torch.no_grad():
        cache = model(tokens[:, :12], use_cache=True).past_key_values
    out = model.generate(
        tokens, past_key_values=cache, do_sample=False, return_dict_in_generate=True, **PLAIN
    )
    assert torch.equal(out.sequences[0], whole)
    assert out.past_key_values is cache and cache.position.tolist() == [20 + NEW - 1]


def test_generation_from_embeddings():
    model, prompt = peaky.model(), peaky.ids(1, 8)
    embeddings = model.get_input_embeddings()(prompt)
    got = model.generate(inputs_embeds=embeddings, do_sample=False, **PLAIN)
    assert torch.equal(got[0], greedy(model, prompt[0])[8:])


class OnlyOdd(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.arange(0, peaky.VOCABULARY, 2), -torch.inf)


def test_logits_processors_and_scores():
    model = peaky.model()
    out = model.generate(
        peaky.ids(1, 8), do_sample=False, logits_processor=[OnlyOdd()], output_scores=True,
        return_dict_in_generate=True, **PLAIN,
    )  # fmt: skip
    assert (out.sequences[0, 8:] % 2 == 1).all() and len(out.scores) == NEW


@pytest.mark.parametrize("shard", ["50GB", "4KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_folder_is_the_same_model(tmp_path, shard, dtype):
    model = peaky.model(key_kernel=2, memory_projections="separate", position="rope", dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "4KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert type(again) is bmojo_core.BMojoForCausalLM and again.dtype == dtype
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    tokens = peaky.ids(2, 17)
    assert torch.equal(peaky.logits(model, tokens), peaky.logits(again, tokens))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is bmojo_core.BMojoConfig and config.hidden_size == 16
    assert type(AutoModel.from_pretrained(tmp_path)) is bmojo_core.BMojoModel


def test_auto_classes_build_from_a_configuration():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(peaky.model().config)
    assert type(model) is bmojo_core.BMojoForCausalLM
    assert torch.isfinite(peaky.logits(model.eval(), peaky.ids(1, 9))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(kind):
    plain = peaky.model(kind).train()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable()
    tokens = peaky.ids(2, 19)
    losses = [m(tokens, labels=tokens).loss for m in (plain, saving)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14, msg=name)


def test_hidden_states_are_the_stream():
    model, tokens = peaky.model(), peaky.ids(2, 9)
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True, use_cache=False)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(tokens))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)


def test_only_the_logits_asked_for():
    model, tokens = peaky.model(), peaky.ids(2, 9)
    full = peaky.logits(model, tokens)
    torch.testing.assert_close(peaky.logits(model, tokens, logits_to_keep=2), full[:, -2:])
    index = torch.tensor([1, 5])
    torch.testing.assert_close(peaky.logits(model, tokens, logits_to_keep=index), full[:, index])


def test_bfloat16_follows_float32():
    model = peaky.model(dtype=torch.float32)
    tokens = peaky.ids(2, 8)
    want = peaky.logits(model, tokens)
    got = peaky.logits(model.to(torch.bfloat16), tokens)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().mean() < 0.1 * want.abs().mean()


def test_meta_device_knows_the_shapes():
    with torch.device("meta"):
        model = bmojo_core.BMojoForCausalLM(peaky.model().config)
    model = model.to_empty(device="cpu")
    model.load_state_dict(peaky.model(dtype=torch.float32).state_dict())
    want = peaky.logits(peaky.model(dtype=torch.float32), peaky.ids(1, 12))
    assert torch.equal(peaky.logits(model.eval(), peaky.ids(1, 12)), want)


def test_pipeline(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = [chr(ord("a") + i) for i in range(peaky.VOCABULARY - 1)]
    words = {"<pad>": 0} | {letter: i + 1 for i, letter in enumerate(letters)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", padding_side="left"
    )
    peaky.model(dtype=torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path), device="cpu")
    prompts = ["a b c d e", "f g"]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = generate(prompts, batch_size=2, **options)
    for prompt, out in zip(prompts, together, strict=True):
        assert out[0]["generated_text"].startswith(prompt)
        assert out == generate(prompt, **options)
