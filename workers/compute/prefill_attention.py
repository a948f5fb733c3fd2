"""Attention of a prompt's own tokens, on whatever device they are.

Shapes: H query heads, G key/value heads, R = H / G, T query tokens, S key tokens, B query rows of a block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from flexgen_lite.workers.compute.attention_call import AttentionCall

BLOCK_ROWS = 128


def prepare(device: torch.device, dtype: torch.dtype) -> None:
    """Loads what prompt_attention will need, so that its memory shows before the plan is made.

    On a CPU that is numba and the kernel: 0.35 s and 35 MiB, beside 68 MiB of files that the attention workers map too.
    Where the kernel is not in numba's cache yet, it is compiled, which takes 5 s.
    """
    if device.type == "cpu":
        from flexgen_lite.workers.compute import prefill_cpu, workspace

        prefill_cpu.prepare(dtype)
        workspace.prepare()


def prompt_attention(call: AttentionCall, spans: Sequence[tuple[int, int]], out_THE: torch.Tensor) -> None:
    """Attention of whole prompts to themselves; writes their rows of `out_THE`, which is contiguous.

    spans: (first row, number of rows) of each prompt among the T rows of `call`.
    """
    if call.attention_chunk is not None:  # each chunk is as a prompt of its own
        spans = [
            (row + begin, min(call.attention_chunk, count - begin))
            for row, count in spans
            for begin in range(0, count, call.attention_chunk)
        ]
    if call.query_BHTD.device.type == "cpu":
        from flexgen_lite.workers.compute import prefill_cpu  # numba, which nothing needs on a GPU

        if prefill_cpu.serves(call):
            prefill_cpu.attend(call, spans, out_THE)
            return
    for row, num_rows in spans:
        rows = slice(row, row + num_rows)
        out_THE[rows] = causal_attention(call, rows, call.key_BGTD[0, :, rows], call.value_BGTE[0, :, rows])


def causal_attention(
    call: AttentionCall, rows: slice, keys_GSD: torch.Tensor, values_GSE: torch.Tensor
) -> torch.Tensor:
    """Attention of `call`'s query rows, which are the last of the S tokens whose keys and values are given, by PyTorch.

    Returns `[T, H, E]`. Blocks of query rows meet only the keys that they may see, so the causal half that is masked
    is never computed. Scores are float32.
    """
    if call.attention_chunk is not None:
        return _by_chunks(call, call.attention_chunk, rows, keys_GSD, values_GSE)
    if _is_plain(call, values_GSE.shape[1]) and values_GSE.shape[1] == call.query_BHTD[0, 0, rows].shape[0]:
        return _plain_attention(call, rows, keys_GSD, values_GSE)
    q_HTD = call.query_BHTD[0, :, rows]
    heads, tokens, _ = q_HTD.shape
    groups, total, value_dim = values_GSE.shape
    ratio = heads // groups
    q_GRTD = q_HTD.view(groups, ratio, tokens, -1) if q_HTD.is_contiguous() else q_HTD.unflatten(0, (groups, ratio))
    out_THE = q_HTD.new_empty((tokens, heads, value_dim))
    past = total - tokens
    for first in range(0, tokens, BLOCK_ROWS):
        last = min(first + BLOCK_ROWS, tokens)
        low = 0 if call.sliding_window is None else max(0, past + first + 1 - call.sliding_window)
        high = past + last
        q_GMD = q_GRTD[:, :, first:last].flatten(1, 2) * call.scaling
        scores_GMS = torch.matmul(q_GMD, keys_GSD[:, low:high].transpose(1, 2)).float()
        if call.softcap is not None:
            scores_GMS.div_(call.softcap).tanh_().mul_(call.softcap)
        scores_GRBS = scores_GMS.unflatten(1, (ratio, last - first))
        positions_B = torch.arange(past + first, high, device=q_HTD.device)
        _mask(scores_GRBS, positions_B, low, call.sliding_window)
        weights_GRBS = _softmax(scores_GRBS, call.sinks_H)
        out_GME = torch.matmul(weights_GRBS.flatten(1, 2).to(values_GSE.dtype), values_GSE[:, low:high])
        out_THE[first:last] = out_GME.unflatten(1, (ratio, last - first)).flatten(0, 1).transpose(0, 1)
    return out_THE


def _by_chunks(
    call: AttentionCall, size: int, rows: slice, keys_GSD: torch.Tensor, values_GSE: torch.Tensor
) -> torch.Tensor:
    """Each row sees the tokens of its own chunk of `size` alone."""
    plain, total, parts = dataclasses.replace(call, attention_chunk=None), keys_GSD.shape[1], []
    begin = past = total - (rows.stop - rows.start)
    while begin < total:
        first = begin // size * size
        end = min(first + size, total)
        some = slice(rows.start + begin - past, rows.start + end - past)
        parts.append(causal_attention(plain, some, keys_GSD[:, first:end], values_GSE[:, first:end]))
        begin = end
    return torch.cat(parts)


def _is_plain(call: AttentionCall, total: int) -> bool:
    """Whether PyTorch's own attention computes the call, and better.

    On a CPU it is slow in 16 bits, and builds all T x S scores where keys and values differ in width.
    """
    query = call.query_BHTD
    windowed = call.sliding_window is not None and call.sliding_window < total
    same_width = query.shape[-1] == call.value_BGTE.shape[-1]
    fast = query.device.type != "cpu" or (query.dtype == torch.float32 and same_width)
    return fast and not windowed and call.softcap is None and call.sinks_H is None


def _plain_attention(
    call: AttentionCall, rows: slice, keys_GSD: torch.Tensor, values_GSE: torch.Tensor
) -> torch.Tensor:
    out_BHTE = scaled_dot_product_attention(
        call.query_BHTD[:, :, rows],
        keys_GSD[None],
        values_GSE[None],
        is_causal=True,
        scale=call.scaling,
        enable_gqa=keys_GSD.shape[0] != call.query_BHTD.shape[1],
    )
    return out_BHTE[0].transpose(0, 1)


def _mask(scores_GRBS: torch.Tensor, positions_B: torch.Tensor, low: int, window: int | None) -> None:
    """Hides later tokens, and those that have left the window; touches only the columns where that can happen."""
    size = positions_B.shape[0]
    width = scores_GRBS.shape[-1]
    columns_S = torch.arange(low, low + width, device=positions_B.device)
    diagonal = width - size
    hidden_BS = columns_S[None, diagonal:] > positions_B[:, None]
    scores_GRBS[..., diagonal:].masked_fill_(hidden_BS, float("-inf"))
    if window is not None and width > window - size:
        hidden_BS = columns_S[None] <= positions_B[:, None] - window
        scores_GRBS.masked_fill_(hidden_BS, float("-inf"))


def _softmax(scores_GRBS: torch.Tensor, sinks_H: torch.Tensor | None) -> torch.Tensor:
    """Softmax over S; a sink is one more logit per head that takes its share and gives nothing."""
    if sinks_H is None:
        return torch.softmax(scores_GRBS, dim=-1)
    groups, ratio, rows, _ = scores_GRBS.shape
    sinks_GRB1 = sinks_H.float().view(groups, ratio, 1, 1).expand(groups, ratio, rows, 1)
    return torch.softmax(torch.cat([scores_GRBS, sinks_GRB1], dim=-1), dim=-1)[..., :-1]
