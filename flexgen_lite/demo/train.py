"""Train the demonstration's model from scratch, on records made on the fly.

    python -m flexgen_lite.demo.train --out DIR

Writes a Hugging Face model directory (OPT architecture, float16 weights) to DIR whenever the validation has
not fallen, and to `DIR.state.pt` what `--resume` goes on from after an interruption.
"""

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import OPTForCausalLM

from flexgen_lite.demo.batches import Batch, make_batches, training_batches
from flexgen_lite.demo.card import write_card
from flexgen_lite.demo.evaluate import measure
from flexgen_lite.demo.muon import Muon
from flexgen_lite.demo.network import build_model, save_model
from flexgen_lite.demo.recipe import Recipe
from flexgen_lite.demo.records import generate
from flexgen_lite.demo.tokenizer import build_tokenizer

# Shape suffixes: B records, T tokens, V vocabulary.

VALIDATION_SEED = 1


@dataclass
class Progress:
    """How far training has come."""

    step: int = 0
    elapsed_s: float = 0.0
    best: tuple[float, float] = (0.0, 0.0)


def build_optimizers(model: OPTForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices; AdamW for embeddings, norms and biases."""
    matrices = [p for p in model.model.decoder.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def logits_of(model: OPTForCausalLM, tokens_BT: Tensor) -> Tensor:
    """Return logits [B, T - 1, V]; padding is on the right, so the causal mask alone hides it."""
    inputs_BT = tokens_BT[:, :-1]
    logits: Tensor = model(input_ids=inputs_BT, attention_mask=torch.ones_like(inputs_BT), use_cache=False).logits
    return logits


def loss_of(model: OPTForCausalLM, batch: Batch, prompt_weight: float) -> Tensor:
    """Return the mean cross-entropy over answer tokens and, at `prompt_weight` each, prompt tokens."""
    targets_BT = batch.tokens_BT[:, 1:]
    weights_BT = batch.is_answer_BT[:, 1:] + prompt_weight * batch.is_prompt_BT[:, 1:]
    logits_BTV = logits_of(model, batch.tokens_BT)
    losses_BT = F.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, reduction="none")
    return (losses_BT * weights_BT).sum() / weights_BT.sum()


@torch.no_grad()
def validate(model: OPTForCausalLM, batches: list[Batch]) -> tuple[float, float]:
    """Return the shares of records and of answer tokens that greedy decoding gets right.

    A greedy answer is right when, fed the right answer, the model would choose each of its tokens: one
    forward pass tells.
    """
    num_right = num_records = num_right_tokens = num_tokens = 0
    for batch in batches:
        is_answer_BT = batch.is_answer_BT[:, 1:]
        is_right_BT = logits_of(model, batch.tokens_BT).argmax(-1) == batch.tokens_BT[:, 1:]
        num_right += int((is_right_BT | ~is_answer_BT).all(1).sum())
        num_records += len(batch.tokens_BT)
        num_right_tokens += int((is_right_BT & is_answer_BT).sum())
        num_tokens += int(is_answer_BT.sum())
    return num_right / num_records, num_right_tokens / num_tokens


def train(recipe: Recipe, out: Path, resume: bool) -> Progress:
    """Train to the recipe's last step, keeping the best weights in `out`."""
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer()
    model = build_model(recipe, tokenizer.get_vocab_size())
    optimizers = build_optimizers(model, recipe)
    validation = make_batches(tokenizer, generate(VALIDATION_SEED, recipe.validation_records, "held_out"), recipe.batch)
    state_path = out.with_name(out.name + ".state.pt")
    progress = load_state(state_path, model, optimizers) if resume else Progress()
    print(f"{sum(p.numel() for p in model.parameters())} parameters, from step {progress.step}", flush=True)

    started = time.monotonic() - progress.elapsed_s
    losses: list[float] = []
    for batch in training_batches(tokenizer, recipe.seed, recipe.batch, progress.step):
        if progress.step >= recipe.steps:
            break
        losses.append(take_step(model, optimizers, batch, recipe, progress.step))
        progress.step += 1
        if progress.step % recipe.validate_every and progress.step != recipe.steps:
            continue
        score = validate(model, validation)
        progress.elapsed_s = time.monotonic() - started
        print(
            f"step {progress.step}  {progress.elapsed_s:.0f} s  loss {sum(losses) / len(losses):.4f}  "
            f"held-out records {score[0]:.4f}  tokens {score[1]:.4f}",
            flush=True,
        )
        losses.clear()
        if score >= progress.best:
            progress.best = score
            save_model(model, tokenizer, out)
        save_state(state_path, model, optimizers, progress)
    return progress


def take_step(
    model: OPTForCausalLM, optimizers: list[torch.optim.Optimizer], batch: Batch, recipe: Recipe, step: int
) -> float:
    """Take one optimisation step and return its loss."""
    loss = loss_of(model, batch, recipe.prompt_loss_weight)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * recipe.lr_factor(step)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def save_state(path: Path, model: OPTForCausalLM, optimizers: list[torch.optim.Optimizer], progress: Progress) -> None:
    """Write all that `load_state` needs."""
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": asdict(progress),
    }
    torch.save(state, path)


def load_state(path: Path, model: OPTForCausalLM, optimizers: list[torch.optim.Optimizer]) -> Progress:
    """Restore weights and optimizers in place and return how far they had come."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer_state)
    return Progress(**state["progress"])


def facts_of(recipe: Recipe, progress: Progress) -> dict[str, int | float | str]:
    """Return what the model card says of the training; `flags` are those that change the recipe."""
    defaults = asdict(Recipe())
    changed = {name: value for name, value in asdict(recipe).items() if value != defaults[name]}
    flags = "".join(f" --{name.replace('_', '-')} {value}" for name, value in changed.items())
    model = build_model(recipe, build_tokenizer().get_vocab_size())
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return asdict(recipe) | {"flags": flags, "millions": millions, "minutes": progress.elapsed_s / 60}


def main() -> None:
    """Train, measure what was written, and write the model card."""
    parser = argparse.ArgumentParser(description="Train the demonstration's model from scratch.")
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--resume", action="store_true", help="go on from OUT.state.pt")
    for name, default in asdict(Recipe()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    arguments = vars(parser.parse_args())
    out, resume = arguments.pop("out"), arguments.pop("resume")
    recipe = Recipe(**arguments)
    progress = train(recipe, out, resume)
    result = measure(out)
    print(result)
    write_card(out, result, facts_of(recipe, progress))


if __name__ == "__main__":
    main()
