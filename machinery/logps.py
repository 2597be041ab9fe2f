"""ln pi of what was said: of both responses of a pair, of all answers of a dialogue. Rows are packed, nothing is padded.

Dimension key: B pairs, T tokens of packed rows, V vocabulary, D hidden size, N scored tokens, H turns; a leading 2 is the
pair (y, y').
"""
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from machinery.files import BadInput
from machinery.ranks import add_up, bar, rank, world


def pair_logps(model, pairs, temperature=1.0):
    """ln pi(y|s) and ln pi(y'|s), summed over each response's tokens: (2, B) float32, differentiable.

    All pairs lie behind each other in one row, each as [s_h, y, y'] with y' blind to y and its positions restarted
    behind the prefix: the prefix is computed once and nothing is padded. Logits are those of softmax at the sampling
    temperature. Equal to a forward for each response alone."""
    logp_N, row_N, piece_N = scored_tokens(model, [pair_row(p) for p in pairs], temperature)
    owner_N = piece_N * len(pairs) + row_N
    return torch.zeros(2 * len(pairs), device=logp_N.device).index_add(0, owner_N, logp_N).view(2, -1)


def dialogue_logps(model, dialogues, temperature, tokens=16384):
    """ln pi of each answer's sampled tokens given all before it, summed over the answer: (N, H) float64, 0 where a
    dialogue has no such answer. One forward over a dialogue's ids gives all its turns; ranks share the dialogues."""
    number = {id(d): n for n, d in enumerate(dialogues)}
    logp_NH = torch.zeros(len(dialogues), max(len(d.spans) for d in dialogues), dtype=torch.float64)
    for micro, share in bar(micro_batches(dialogues, tokens, length=lambda d: len(d.ids)), "ln pi of dialogues", delay=3):
        with torch.no_grad():
            logp_N, row_N, turn_N = scored_tokens(model, [dialogue_row(d) for d in micro], temperature)
        if share:
            dialogue_N = torch.tensor([number[id(d)] for d in micro])[row_N.cpu()]
            logp_NH.index_put_((dialogue_N, turn_N.cpu()), logp_N.double().cpu(), accumulate=True)
    return add_up(logp_NH).numpy()


def old_logps(model, pairs, cfg):
    """ln pi_t of both responses of all pairs, (N, 2) float32: each rank computes its share in the batches of training, by
    the trainer's own forward, so that at step 0 the log-ratio is exactly 0 and every residual the reward difference."""
    model.train()  # the same code path as in training; there is no dropout to switch off
    number = {id(p): n for n, p in enumerate(pairs)}
    logp_N2 = torch.zeros(len(pairs), 2)
    for batch in bar(batches(len(pairs), cfg.batch_size), "ln pi of pairs", delay=3):
        for micro, share in micro_batches([pairs[i] for i in batch], cfg.micro_tokens):
            with torch.no_grad():
                logp_2B = pair_logps(model, micro, cfg.temperature).cpu()
            if share:
                logp_N2[[number[id(p)] for p in micro]] = logp_2B.T
    return add_up(logp_N2)


# ---------------------------------------------------------------------------------------------------------------
# Which pairs share a step, which share a forward
# ---------------------------------------------------------------------------------------------------------------


def batches(n, size, epochs=1, seed=0):
    """The pairs of each step. The first pass takes them in the order of the prompts, which is random already."""
    found = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(n) if epoch else np.arange(n)
        found += [order[i : i + size].tolist() for i in range(0, n, size)]
    return found


def pair_length(pair):
    return len(pair.prefix) + len(pair.y) + len(pair.y2)


def micro_batches(items, tokens, length=pair_length):
    """This rank's part of a batch, in forwards of at most `tokens`: [(items, share of the batch)].

    Every rank runs the same number of forwards, else FSDP would wait for ever: a rank with fewer repeats an item with
    share 0. FSDP takes the mean of gradients over ranks and Eq. 1 that over the batch, so shares over all ranks sum to
    the number of ranks."""
    plans = [split(items[r :: world()], tokens, length) for r in range(world())]
    mine = [(micro, len(micro) / len(items) * world()) for micro in plans[rank()]]
    return mine + [(items[:1], 0.0)] * (max(map(len, plans)) - len(mine))


def split(items, tokens, length):
    """First fit decreasing into groups of at most `tokens`; an item that is longer goes alone."""
    groups, sizes = [], []
    for item in sorted(items, key=length, reverse=True):
        room = (n for n, size in enumerate(sizes) if size + length(item) <= tokens)
        n = next(room, None)
        if n is None:
            groups.append([item])
            sizes.append(length(item))
        else:
            groups[n].append(item)
            sizes[n] += length(item)
    return groups


# ---------------------------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """Ids behind each other, y2 blind to y; of the scored pieces (start, end) in prefix + y + y2."""

    prefix: list
    y: list
    y2: list
    pieces: list


def pair_row(pair):
    s, y, y2 = len(pair.prefix), len(pair.y), len(pair.y2)
    return Row(pair.prefix, pair.y, pair.y2, [(s, s + y), (s + y, s + y + y2)])


def dialogue_row(dialogue):
    return Row(dialogue.ids, [], [], dialogue.spans)


def scored_tokens(model, rows, temperature):
    """ln pi of every scored token, and whose it is: logp_N, row_N (number of the row), piece_N (number of its piece)."""
    forward = getattr(model, "token_logps", None) or partial(token_logps, model)
    *packed, row_N, piece_N = pack(rows, next(model.parameters()).device)
    return forward(*packed, temperature), row_N, piece_N


def pack(rows, device="cpu"):
    """Token ids and positions of the one row that a forward sees, its pieces, and where the scored tokens are.

    Returns ids_1T, position_1T, lengths [(of s_h, of y, of y') of each row], where_N (the position whose hidden state
    predicts the token), target_N (the token), row_N, piece_N.

    >>> ids, position, lengths, where, target, row, piece = pack([Row([5, 6], [7], [8, 9], [(2, 3), (3, 5)])])
    >>> ids, position, lengths, where, target, row, piece          # tensors as lists
    [[5, 6, 7, 8, 9]], [[0, 1, 2, 2, 3]], [(2, 1, 2)], [1, 1, 3], [7, 8, 9], [0, 0, 0], [0, 1, 1]
    """
    ids, position, lengths = [], [], []
    where, target, row_of, piece_of = [], [], [], []
    for number, row in enumerate(rows):
        start, own = len(ids), row.prefix + row.y + row.y2
        s, y, y2 = len(row.prefix), len(row.y), len(row.y2)
        ids += own
        position += [*range(s + y), *range(s, s + y2)]
        lengths.append((s, y, y2))
        for piece, (first, end) in enumerate(row.pieces):
            before = list(range(first - 1, end - 1))
            if before and first == s + y:
                before[0] = s - 1  # the prefix's last token predicts the first token of both responses
            where += [start + t for t in before]
            target += own[first:end]
            row_of += [number] * (end - first)
            piece_of += [piece] * (end - first)
    ids_T, position_T, *rest = (torch.tensor(x, device=device) for x in (ids, position, where, target, row_of, piece_of))
    return ids_T[None], position_T[None], lengths, *rest


# ---------------------------------------------------------------------------------------------------------------
# The forward
# ---------------------------------------------------------------------------------------------------------------


def attend_in_pairs(model):
    """The transformers model, with pair_attention as its attention."""
    from transformers import AttentionInterface

    AttentionInterface.register("pairs", pair_attention)
    model.set_attn_implementation("pairs")
    return model


PASSED_ALONG = {"position_ids", "use_cache", "is_causal", "output_attentions"}  # what changes nothing here


def pair_attention(module, query, key, value, attention_mask, lengths=None, scaling=None, dropout=0.0,
                   sliding_window=None, **more):  # fmt: skip
    """Attention of pack's row, (1, heads, T, head_dim): each pair for itself, [s_h, y] causal, y' on s_h and causal on
    itself, both within the layer's window if it has one. Nothing is computed that is not used, and there is no mask of the
    whole row. Dropout is left out: ln pi is no random number."""
    strange = [name for name, value in more.items() if value is not None and name not in PASSED_ALONG]
    if attention_mask is not None:
        strange.append("attention_mask")
    if strange:  # soft caps, sinks, biases of positions: left out they would change ln pi unseen
        raise BadInput(f"its attention wants {', '.join(strange)}")
    if lengths is None:
        raise BadInput("its attention is not told the lengths")
    fits = query.is_cuda and query.dtype == torch.bfloat16 and query.shape[3] <= 128  # flash attention's kernel
    attend = in_one_call if fits else piece_by_piece
    return attend(query, key, value, tuple(lengths), scaling, sliding_window), None


def piece_by_piece(query, key, value, lengths, scaling, window):
    """(1, T, heads, head_dim) by a call for each [s, y] and each y'."""
    attend = partial(scaled_dot_product_attention, scale=scaling)
    groups = query.shape[1] // key.shape[1]  # query heads for each key-value head
    pieces = [n for s, y, y2 in lengths for n in (s + y, y2)]
    q, k, v = (x.split(pieces, dim=2) for x in (query, key, value))
    out = []

    def attend_to(q_n, n, seen):  # no fused kernel has a mask and shares heads
        k_t, v_t = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in seen)
        return attend(q_n, k_t, v_t, attn_mask=visible(n, k_t.shape[2], window, query.device))

    for i, (s, y, y2) in enumerate(lengths):
        first, twin = 2 * i, 2 * i + 1
        if window and s + y > window:
            out.append(attend_to(q[first], s + y, (k[first], v[first])))
        else:
            out.append(attend(q[first], k[first], v[first], is_causal=True, enable_gqa=groups > 1))
        if y2:
            out.append(attend_to(q[twin], y2, [torch.cat([x[first][:, :, :s], x[twin]], dim=2) for x in (k, v)]))
    return torch.cat(out, dim=2).transpose(1, 2)


def in_one_call(query, key, value, lengths, scaling, window):
    """The same by one call of flash attention for all pieces of the row: y' is given the keys and values of its prefix
    once more, and the kernel's causal mask ends at a piece's last key."""
    from torch.nn.attention.varlen import varlen_attn

    key_K, ends_q, ends_k, most_q, most_k = varlen_layout(lengths, query.device)
    q_Thd, k_Thd, v_Thd = (x[0].transpose(0, 1) for x in (query, key, value))
    return varlen_attn(q_Thd, k_Thd.index_select(0, key_K), v_Thd.index_select(0, key_K), ends_q, ends_k, most_q, most_k,
                       scale=scaling, window_size=(window - 1 if window else -1, 0), enable_gqa=True)[None]  # fmt: skip


@lru_cache(maxsize=2)
def varlen_layout(lengths, device):
    """Of the pieces, [s, y] and y' if it has tokens: where the keys lie that each sees (K,), where its queries and its
    keys end, beginning with 0, and the most queries and keys of one. Kept, since every layer asks.

    >>> varlen_layout(((2, 1, 2),), "cpu")            # tensors as lists
    [0, 1, 2, 0, 1, 3, 4], [0, 3, 5], [0, 3, 7], 3, 4
    """
    keys, queries, seen, start = [], [], [], 0
    for s, y, y2 in lengths:
        twin, start = start + s + y, start + s + y + y2
        keys += range(twin - s - y, twin)
        queries.append(s + y)
        seen.append(s + y)
        if y2:
            keys += [*range(twin - s - y, twin - y), *range(twin, start)]
            queries.append(y2)
            seen.append(s + y2)
    ends_q, ends_k = (torch.tensor([0, *np.cumsum(n)], dtype=torch.int32, device=device) for n in (queries, seen))
    return torch.tensor(keys, device=device), ends_q, ends_k, max(queries), max(seen)


def visible(n, total, window, device):
    """What each of the last n of `total` tokens sees, (n, total): itself and all before it, the last `window` at most.

    >>> visible(2, 4, 2, "cpu")            # as numbers
    [[0, 1, 1, 0], [0, 0, 1, 1]]
    """
    seen = torch.ones(n, total, dtype=torch.bool, device=device).tril(total - n)
    return seen.triu(total - n - window + 1) if window else seen


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
    a GPU's block (128 MB) is large enough that launch overhead is negligible; estimated, not measured."""

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
