"""Which lane a run waited for, and what would help. Pure logic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

WORTH_TELLING = 1.05  # times as fast
BUSY = 0.7  # a lane with such a share is what the others wait for
MOST_TOLD = 3  # changes
ADVICE = {
    "disk": "weights come from the disk as fast as it gives them: more RAM keeps more layers there, and more sequences "
    "at once (KV cache) share each load",
    "host-to-device": "layers go to the GPU as fast as the bus takes them: a larger GPU budget keeps more layers "
    "there, and more sequences at once share each copy",
    "compute": "the products take the time, so the processor is used: on a CPU, bfloat16 where it has instructions for "
    "it, or a GPU, would help",
    "attention": "attention reads the KV cache as fast as memory gives it: 16-bit weights halve it, kv_dtype int8 once "
    "more, and more cores or memory channels read it faster",
    "device-to-host": "results come back from the GPU as fast as the bus takes them: larger micro-batches may help",
}


def verdict(shares: Mapping[str, float], changes: Sequence[tuple[str, float]] = ()) -> str:
    """One or two sentences.

    Args:
        shares: of the passes' time in which each lane was busy.
        changes: what would change it, and how many times as fast it was predicted to be with that.
    """
    if not any(shares.values()):
        return "No pass has ended in this trace."
    ranked = sorted(shares.items(), key=lambda item: item[1], reverse=True)
    (lane, share), others = ranked[0], [f"{name} {value:.0%}" for name, value in ranked[1:] if value >= 0.005]
    rest = f" ({', '.join(others)})" if others else ""
    helps = [(name, factor) for name, factor in changes if factor >= WORTH_TELLING][:MOST_TOLD]
    would = ", ".join(f"{name}{'' if i else ' would give'} {factor:.1f} x" for i, (name, factor) in enumerate(helps))
    if share < BUSY:
        text = f"No lane is the bottleneck: the busiest, {lane}, worked {share:.0%} of the time{rest}."
        would = would or "more sequences at once, or more micro-batches, let them overlap"
        return f"{text} The lanes wait for each other: {would}."
    text = f"The bottleneck is {lane}, busy {share:.0%} of the time{rest}"
    if would:
        return f"{text}: {would}."
    none = ", ".join(name for name, _ in changes)
    return f"{text}: {ADVICE[lane]}" + (f"; none of {none} would help much." if none else ".")
