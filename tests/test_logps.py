"""Log-probs of pairs in one row, against references that share no code with them."""
from collections import Counter

from helpers import plain_logits, random_pairs, row_logps
import pytest
import torch

from machinery import logps
from machinery.logps import micro_batches, pair_logps
from refuel import Pair


@pytest.fixture
def model(model):
    return logps.attend_in_pairs(model)


def slow_logps(model, pairs, temperature):
    """Token by token: one forward for each response token, on the plain causal sequence before it."""
    logp_2B = torch.zeros(2, len(pairs))
    for b, pair in enumerate(pairs):
        for row, response in enumerate((pair.y, pair.y2)):
            for t, token in enumerate(response):
                logits_V = plain_logits(model, pair.prefix + response[:t])[-1]
                logp_2B[row, b] += torch.log_softmax(logits_V / temperature, -1)[token]
    return logp_2B


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_pair_logps_equal_a_token_by_token_loop(model, temperature):
    """Bugs by name: shifted mask, end token outside the mask, log-probs at another temperature."""
    pairs = random_pairs(6, longest=12)
    assert torch.allclose(pair_logps(model, pairs, temperature), slow_logps(model, pairs, temperature), atol=1e-5)
    assert not torch.allclose(pair_logps(model, pairs, temperature), pair_logps(model, pairs, 0.9), atol=1e-2)


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_packed_rows_equal_separate_rows_gradients_too(model, temperature):
    pairs = random_pairs(12)
    weight = torch.randn(2, 12, generator=torch.Generator().manual_seed(3))
    packed, separate = pair_logps(model, pairs, temperature), row_logps(model, pairs, temperature)
    assert packed.dtype == torch.float32 and torch.allclose(packed, separate, atol=1e-5)
    parameters = list(model.parameters())
    one = torch.autograd.grad((packed * weight).sum(), parameters)
    two = torch.autograd.grad((separate * weight).sum(), parameters)
    for a, b in zip(one, two):
        assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max())


def test_a_response_is_blind_to_its_twin_and_to_its_neighbours_in_the_row(model):
    pairs = random_pairs(5)
    logp_2B = pair_logps(model, pairs)
    for row, name in ((0, "y2"), (1, "y")):
        changed = [p._replace(**{name: [7] * len(getattr(p, name))}) for p in pairs]
        assert torch.allclose(pair_logps(model, changed)[row], logp_2B[row], atol=1e-5)
    assert torch.allclose(pair_logps(model, [pairs[0]]), logp_2B[:, :1], atol=1e-5)


def varlen_by_its_docstring(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """torch's varlen_attn, which a CPU has not: of each piece the queries are the last ones of its keys."""
    out, (left, right) = [], window_size
    assert right == 0 and enable_gqa and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    for q, k, v in zip(*(x.split(n.diff().tolist()) for x, n in zip((query, key, value), (cu_seq_q, cu_seq_k, cu_seq_k)))):
        assert len(q) <= max_q and len(k) <= max_k
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        sees = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        if left >= 0:
            sees = sees.triu(len(k) - len(q) - left)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~sees, -torch.inf).softmax(-1), v))
    return torch.cat(out)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("attend", [logps.piece_by_piece, logps.in_one_call])
def test_attention_of_a_packed_row_equals_dense_attention_under_its_mask(monkeypatch, attend, window):
    """With fewer key-value heads than query heads, empty responses and gradients; the mask by one rule a token."""
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", varlen_by_its_docstring)
    lengths, g = ((5, 3, 4), (2, 1, 0), (4, 0, 0), (1, 2, 6)), torch.Generator().manual_seed(0)
    owner = [(i, branch) for i, pair in enumerate(lengths) for branch in range(3) for _ in range(pair[branch])]
    position = [t for s, y, y2 in lengths for t in (*range(s + y), *range(s, s + y2))]
    T = len(owner)
    sees = torch.tensor([[t <= s and b == a and d in (0, c) and position[s] - position[t] < (window or T)
                          for t, (b, d) in enumerate(owner)] for s, (a, c) in enumerate(owner)])  # fmt: skip
    q, k, v = (torch.randn(1, heads, T, 16, generator=g).requires_grad_() for heads in (4, 2, 2))
    scores = (q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.3).masked_fill(~sees, -torch.inf)
    dense = (scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2)
    ours = attend(q, k, v, lengths, 0.3, window)
    assert torch.allclose(ours, dense, atol=1e-6)
    up = torch.randn(ours.shape, generator=g)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), up) for x in (ours, dense))):
        assert torch.allclose(a, b, atol=1e-5)
    through, _ = logps.pair_attention(None, q, k, v, None, lengths, scaling=0.3, sliding_window=window)
    assert torch.allclose(through, dense, atol=1e-6)


def test_a_model_with_another_attention_is_refused(model):
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="attend_in_pairs"):
        pair_logps(model, random_pairs(2))


def test_only_sampled_tokens_are_in_the_loss(model):
    """Bug by name: user tokens in the loss. Another prefix's tokens are conditioned on, never scored."""
    pair = random_pairs(1)[0]
    _, _, _, where, target, _, owner = logps.pack([logps.pair_row(pair)])
    assert target.tolist() == pair.y + pair.y2 and owner.tolist() == [0] * len(pair.y) + [1] * len(pair.y2)
    assert where.min() == len(pair.prefix) - 1


def test_blocked_logps_equal_autograds(monkeypatch):
    monkeypatch.setitem(logps.SelectedLogps.BLOCK, "cpu", (3, 4))  # of 8 tokens and 11 words
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(8, 5, generator=g, requires_grad=True), torch.randn(11, 5, generator=g).requires_grad_()
    target, up = torch.randint(11, (8,), generator=g), torch.randn(8, generator=g)
    ours = logps.SelectedLogps.apply(hidden, weight, target, 0.8)
    theirs = torch.log_softmax(hidden @ weight.T / 0.8, -1).gather(1, target[:, None])[:, 0]
    assert torch.allclose(ours, theirs, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight), up) for x in (ours, theirs))):
        assert torch.allclose(a, b, atol=1e-5)


def test_no_tensor_of_all_tokens_by_the_vocabulary_lives(model, monkeypatch):
    monkeypatch.setitem(logps.SelectedLogps.BLOCK, "cpu", (16, 30))
    pairs, kept = random_pairs(40), []
    tokens = sum(len(p.y) + len(p.y2) for p in pairs)

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        pair_logps(model, pairs).sum().backward()
    assert tokens > 100 and (tokens, 96) in kept and not any(40 in shape and shape != (40, 96) for shape in kept)


def test_micro_batches_keep_to_the_budget_and_every_rank_has_as_many(monkeypatch):
    pairs = random_pairs(23)
    seen, counts = Counter(), set()
    for r in range(4):
        monkeypatch.setattr(logps, "world", lambda: 4)
        monkeypatch.setattr(logps, "rank", lambda r=r: r)
        micros = micro_batches(pairs, 100)
        counts.add(len(micros))
        for micro, share in micros:
            assert share in (0, 4 * len(micro) / 23)  # FSDP takes the mean over the four
            assert logps.pack([logps.pair_row(p) for p in micro])[0].numel() <= 100 or len(micro) == 1
            seen.update({id(p): 1 for p in micro if share})
    assert len(counts) == 1 and len(seen) == 23 and set(seen.values()) == {1}


def test_lengths_of_a_pair_are_counted_once():
    assert logps.pair_length(Pair([1, 2], [3], [4, 5], (0, 0), 1, 1)) == 5
