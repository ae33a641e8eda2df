"""Tiny real text encoders with their tokenizers, written to a folder without a network."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel

WORDS = ("cat", "dog", "red", "blue", "fire", "truck", "noto", "style", "face", "a")


def tiny_bert(folder: Path) -> Path:
    """BertModel, 16 wide, two layers, with a WordPiece vocabulary of words and letters."""
    from transformers import BertConfig, BertModel

    letters = "abcdefghijklmnopqrstuvwxyz0123456789,"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocabulary += [
        token for letter in letters for token in (letter, "##" + letter) if token not in vocabulary
    ]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
    )
    _save(BertModel, config, folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return folder


def tiny_clip(folder: Path) -> Path:
    """CLIPTextModel, 16 wide, two layers, 77 positions, with byte-level BPE (vocab.json, merges.txt)."""
    from transformers import CLIPTextConfig, CLIPTextModel

    alphabet = sorted(ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in (w for w in WORDS if len(w) > 1):
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            merges.append((symbols[0], symbols[1]))
            symbols = [symbols[0] + symbols[1], *symbols[2:]]
    merges = list(dict.fromkeys(merges))
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        projection_dim=16,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
    )
    _save(CLIPTextModel, config, folder)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def tiny_t5(folder: Path) -> Path:
    """T5EncoderModel, 16 wide, two layers, with a unigram tokenizer.json of words and letters."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("▁" + word, -3.0) for word in WORDS] + [
        (letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz,"
    ]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    config = T5Config(vocab_size=len(pieces) + 5, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    _save(T5EncoderModel, config, folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_open_clip(folder: Path) -> Path:
    """open_clip's CLIP with towers 16 wide and 24 text positions; its own tokenizer needs no file."""
    from open_clip.model import CLIP

    text = {"context_length": 24, "width": 16, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


TINY = {"bert": tiny_bert, "clip": tiny_clip, "t5": tiny_t5, "open_clip": tiny_open_clip}


def _save(model_class: type, config: object, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
    model.save_pretrained(folder)
