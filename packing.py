"""ln pi(y_h | s_h) for both of a pair: the prefix once, pairs in one row.

Dimension key: B pairs, T tokens of packed pairs, V vocabulary, D hidden size, N response tokens; a leading 2 is the
pair (y, y').
"""
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from files import rank, world


def pair_logps(model, pairs, temperature=1.0):
    """ln pi(y|s) and ln pi(y'|s), summed over each response's tokens: (2, B) float32, differentiable.

    All pairs lie behind each other in one row, each as [s_h, y, y'] with y' blind to y and its positions restarted
    behind the prefix: the prefix is computed once and nothing is padded. Logits are those of softmax at the sampling
    temperature. Equal to a forward for each response alone."""
    forward = getattr(model, "token_logps", None) or partial(token_logps, model)
    *packed, owner_N = pack(pairs, next(model.parameters()).device)
    logp_N = forward(*packed, temperature)
    return torch.zeros(2 * len(pairs), device=logp_N.device).index_add(0, owner_N, logp_N).view(2, -1)


def pair_length(pair):
    return len(pair.prefix) + len(pair.y) + len(pair.y2)


def pack(pairs, device="cpu"):
    """Token ids and positions of the row, the lengths of its pieces, and where the responses' tokens are.

    Returns ids_1T, position_1T, lengths [(of s_h, of y, of y') of each pair], where_N (the position whose hidden state
    predicts the token), target_N (the token), owner_N (0..B-1 for y, B..2B-1 for y').

    >>> ids, position, lengths, where, target, owner = pack([Pair([5, 6], [7], [8, 9], (0, 0), 1, 1)])
    >>> ids, position, lengths, where, target, owner          # tensors as lists
    [[5, 6, 7, 8, 9]], [[0, 1, 2, 2, 3]], [(2, 1, 2)], [1, 1, 3], [7, 8, 9], [0, 1, 1]
    """
    ids, position, lengths, where, target, owner = ([] for _ in range(6))
    for i, pair in enumerate(pairs):
        s, y, y2 = lengths_i = len(pair.prefix), len(pair.y), len(pair.y2)
        last = len(ids) + s - 1  # the prefix's last token predicts the first token of both responses
        ids += pair.prefix + pair.y + pair.y2
        position += [*range(s + y), *range(s, s + y2)]
        lengths.append(lengths_i)
        where += [last + k for k in range(y)] + [last] * bool(y2) + [last + y + k for k in range(1, y2)]
        target += pair.y + pair.y2
        owner += [i] * y + [len(pairs) + i] * y2
    ids_T, position_T, *rest = (torch.tensor(x, device=device) for x in (ids, position, where, target, owner))
    return ids_T[None], position_T[None], lengths, *rest


def attend_in_pairs(model):
    """The transformers model, with pair_attention as its attention."""
    from transformers import AttentionInterface

    AttentionInterface.register("pairs", pair_attention)
    model.set_attn_implementation("pairs")
    return model


def pair_attention(module, query, key, value, attention_mask, lengths, scaling=None, dropout=0.0, **kwargs):
    """Attention of pack's row, (1, heads, T, head_dim): each pair for itself, [s_h, y] causal, y' on s_h and causal on
    itself. Nothing is computed that nobody looks at, and no mask of the whole row exists."""
    attend = partial(scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    groups = query.shape[1] // key.shape[1]  # query heads for each key-value head
    pieces = [n for s, y, y2 in lengths for n in (s + y, y2)]
    q, k, v = (x.split(pieces, dim=2) for x in (query, key, value))
    out = []
    for i, (s, _, y2) in enumerate(lengths):
        first, twin = 2 * i, 2 * i + 1
        out.append(attend(q[first], k[first], v[first], is_causal=True, enable_gqa=groups > 1))
        if y2:
            seen = (torch.cat([x[first][:, :, :s], x[twin]], dim=2).repeat_interleave(groups, dim=1) for x in (k, v))
            mask = torch.ones(y2, s + y2, dtype=torch.bool, device=query.device).tril(s)
            out.append(attend(q[twin], *seen, attn_mask=mask))  # no fused kernel has a mask and shares heads
    return torch.cat(out, dim=2).transpose(1, 2), None


def token_logps(model, ids_1T, position_1T, lengths, where_N, target_N, temperature):
    """ln pi of the target tokens (N,): the body of a forward, then logits only where they are asked for."""
    if model.config._attn_implementation != "pairs":  # any other attention would pass over `lengths` without a word
        raise RuntimeError("this model does not attend in pairs: attend_in_pairs(model) first")
    out = model.model(input_ids=ids_1T, position_ids=position_1T, lengths=lengths, use_cache=False)
    hidden_ND = out.last_hidden_state[0].index_select(0, where_N)
    return SelectedLogps.apply(hidden_ND, model.lm_head.weight, target_N, temperature)


class SelectedLogps(torch.autograd.Function):
    """log_softmax(hidden @ weight.T / temperature)[target], in float32, a block of tokens by words at a time.

    Keeps the log-sum-exp of each token and computes the logits again in backward, so that no (N, V) tensor lives. A
    block of logits and the words' part of the weight stay in a processor's cache (8 MB, the best of nine sizes tried);
    a GPU's block (128 MB) is a size at which starting its kernels is no part of their time, by arithmetic."""

    BLOCK = {"cpu": (1024, 2048), "cuda": (1024, 32768)}  # tokens, words

    @staticmethod
    def blocks(hidden_ND, weight_VD, target_N, temperature):
        """(tokens c, words w, their logits, each token's target as a column of them, whether it lies among them)."""
        tokens, words = SelectedLogps.BLOCK[hidden_ND.device.type]
        for v in range(0, len(weight_VD), words):
            for i in range(0, len(target_N), tokens):
                c, w = slice(i, i + tokens), slice(v, v + words)
                logits_cw = (hidden_ND[c] @ weight_VD[w].T).float().div_(temperature)
                column_c = (target_N[c] - v).clamp(0, logits_cw.shape[1] - 1)
                yield c, w, logits_cw, column_c[:, None], (column_c + v == target_N[c]).float()

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, target_N, temperature):
        target_logit_N = hidden_ND.new_zeros(len(target_N), dtype=torch.float32)
        lse_N = torch.full_like(target_logit_N, -torch.inf)
        for c, _, logits_cw, column_c1, inside_c in SelectedLogps.blocks(hidden_ND, weight_VD, target_N, temperature):
            target_logit_N[c] += inside_c * logits_cw.gather(1, column_c1)[:, 0]
            lse_N[c] = torch.logaddexp(lse_N[c], logits_cw.logsumexp(-1))
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, lse_N)
        ctx.temperature = temperature
        return target_logit_N - lse_N

    @staticmethod
    def backward(ctx, grad_N):
        hidden_ND, weight_VD, target_N, lse_N = ctx.saved_tensors
        learns = ctx.needs_input_grad[1]  # setting two leaves the head as it is
        grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=torch.float32)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if learns else None
        for c, w, logits_cw, column_c1, inside_c in SelectedLogps.blocks(*ctx.saved_tensors[:3], ctx.temperature):
            p_cw = logits_cw.sub_(lse_N[c, None]).exp_()
            grad_cw = p_cw.neg_().scatter_add_(1, column_c1, inside_c[:, None])
            grad_cw = grad_cw.mul_(grad_N[c, None] / ctx.temperature).to(hidden_ND.dtype)
            add_product(grad_hidden_ND[c], grad_cw, weight_VD[w])
            if learns:
                add_product(grad_weight_VD[w], grad_cw.T, hidden_ND[c])
        return grad_hidden_ND.to(hidden_ND.dtype), grad_weight_VD.to(weight_VD.dtype) if learns else None, None, None


def add_product(sum_ik, a_ij, b_jk):
    """sum += a @ b, in place where the types allow it."""
    sum_ik.addmm_(a_ij, b_jk) if a_ij.dtype == sum_ik.dtype else sum_ik.add_(a_ij @ b_jk)


def micro_batches(pairs, tokens):
    """This rank's part of a batch, in forwards of at most `tokens`: [(pairs, share of the batch)].

    Every rank runs the same number of forwards, else FSDP would wait for ever: a rank with fewer repeats a pair with
    share 0. Shares over all ranks sum to 1."""
    plans = [split(pairs[r :: world()], tokens) for r in range(world())]
    mine = [(micro, len(micro) / len(pairs)) for micro in plans[rank()]]
    return mine + [(pairs[:1], 0.0)] * (max(map(len, plans)) - len(mine))


def split(pairs, tokens):
    """First fit decreasing into groups of at most `tokens`; a pair that is longer goes alone."""
    groups = []
    for pair in sorted(pairs, key=pair_length, reverse=True):
        room = (group for group in groups if sum(map(pair_length, group)) + pair_length(pair) <= tokens)
        if (group := next(room, None)) is None:
            groups.append(group := [])
        group.append(pair)
    return groups
