"""The demonstration's model: an untrained OPT, and its model directory.

Shape suffixes: P positions, H hidden, F frequencies.
"""

import math
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM

from flexgen_lite.demo.recipe import Recipe
from flexgen_lite.demo.tokenizer import BOS_ID, EOS_ID, PAD_ID, save_tokenizer

MAX_TOKENS = 256
VOCAB_MULTIPLE = 32
SHORTEST_PERIOD, LONGEST_PERIOD = 4, 512
POSITION_SCALE = 0.03


def build_model(recipe: Recipe, vocab_size: int) -> OPTForCausalLM:
    """Build an untrained model.

    Its positions start as sinusoids: moving by a fixed offset is then a linear map, which copying needs.
    """
    config = OPTConfig(
        vocab_size=-(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        hidden_size=recipe.hidden,
        word_embed_proj_dim=recipe.hidden,
        num_hidden_layers=recipe.layers,
        ffn_dim=recipe.ffn,
        num_attention_heads=recipe.hidden // recipe.head,
        max_position_embeddings=MAX_TOKENS,
        do_layer_norm_before=True,
        dropout=0.0,
        bos_token_id=BOS_ID,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
    )
    model = OPTForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, pad_token_id=PAD_ID, eos_token_id=EOS_ID, do_sample=False, max_new_tokens=64
    )
    table_PH = model.model.decoder.embed_positions.weight
    positions_P1 = torch.arange(table_PH.shape[0], dtype=torch.float32)[:, None]
    periods_F = torch.logspace(math.log10(SHORTEST_PERIOD), math.log10(LONGEST_PERIOD), recipe.hidden // 2)
    angles_PF = positions_P1 * (2 * math.pi / periods_F)
    with torch.no_grad():
        table_PH.copy_(POSITION_SCALE * torch.cat([angles_PF.sin(), angles_PF.cos()], dim=1))
    return model


def save_model(model: OPTForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write a model directory with float16 weights, leaving `model` as it is."""
    half = OPTForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.to(torch.float16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, out, MAX_TOKENS)
