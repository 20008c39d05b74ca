#!/usr/bin/env python3
"""Makes tiny/<architecture>/: a random checkpoint as a Hugging Face folder, a PEFT adapter for it, and both their goldens.

  pip install -r tests/goldens/requirements.txt
  python tests/goldens/make_tiny.py [llama3 qwen2 ...]

They are small enough to keep in git and differ in everything that the model description has to say: rope scaling, biases,
QK-norm, sliding windows, norm placement, activation, tied heads, dtypes, shards. The config files are written here in the
forms that published checkpoints use, the older one (rope_theta, torch_dtype) and the newer (rope_parameters, dtype). All
weights are seeded; half a minute on one core.
"""
import argparse
import json
import os
import shutil
import zlib

import peft
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import texts
from golden_file import write_case, write_json

HERE = os.path.dirname(os.path.abspath(__file__))
VOCAB_SIZE = 512
LENGTHS = [1, 2, 33, 100]  # tokens per sequence: longer than the windows and than several KV blocks

# Matmul input sizes are multiples of 32, the group size of the quantised layouts.
SIZES = dict(vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=1024, rms_norm_eps=1e-5, attention_dropout=0.0, use_cache=True,
             bos_token_id=0, eos_token_id=1, pad_token_id=2)
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# GPT-2's word pattern splits on runs of digits; Llama 3 takes up to three, Qwen one by one.
LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

MODELS = {
    "llama3": dict(
        config=dict(SIZES, model_type="llama", architectures=["LlamaForCausalLM"], hidden_act="silu", attention_bias=False, mlp_bias=False,
                    tie_word_embeddings=False, torch_dtype="bfloat16", rope_theta=10000.0,
                    # At these numbers the wavelengths fall into all three ranges: kept, blended, stretched.
                    rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)),
        dtype=torch.bfloat16, num_shards=2, pattern=LLAMA3_PATTERN, adds_bos=True,
        lora=dict(r=3, lora_alpha=5, target_modules=ALL_LINEAR), lora_dtype=torch.float32),
    "qwen2": dict(
        config=dict(SIZES, model_type="qwen2", architectures=["Qwen2ForCausalLM"], hidden_act="silu", intermediate_size=96, tie_word_embeddings=True,
                    torch_dtype="bfloat16", rope_theta=1000000.0, use_sliding_window=False, sliding_window=1024, max_window_layers=2),
        dtype=torch.bfloat16, num_shards=1, pattern=QWEN2_PATTERN, adds_bos=False,
        lora=dict(r=6, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "k_proj", "v_proj"]), lora_dtype=torch.float16),
    "qwen3": dict(
        config=dict(SIZES, model_type="qwen3", architectures=["Qwen3ForCausalLM"], hidden_act="silu", head_dim=32, attention_bias=False,
                    tie_word_embeddings=True, dtype="float16", rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
                    use_sliding_window=False, sliding_window=None, layer_types=["full_attention", "full_attention"]),
        dtype=torch.float16, num_shards=1, pattern=QWEN2_PATTERN, adds_bos=False,
        lora=dict(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]), lora_dtype=torch.bfloat16),
    "mistral": dict(
        config=dict(SIZES, model_type="mistral", architectures=["MistralForCausalLM"], hidden_act="silu", num_attention_heads=2, num_key_value_heads=1,
                    head_dim=32, sliding_window=24, tie_word_embeddings=False, torch_dtype="bfloat16", rope_theta=10000.0),
        dtype=torch.bfloat16, num_shards=1, pattern=None, adds_bos=True,
        lora=dict(r=4, lora_alpha=6, lora_bias=True, target_modules=["q_proj", "o_proj", "up_proj", "lm_head"],
                  rank_pattern={"o_proj": 7, "layers.1.self_attn.q_proj": 2}, alpha_pattern={"o_proj": 9, "lm_head": 3}), lora_dtype=torch.bfloat16),
    "gemma3": dict(
        config=dict(SIZES, model_type="gemma3_text", architectures=["Gemma3ForCausalLM"], hidden_activation="gelu_pytorch_tanh", num_hidden_layers=3,
                    num_attention_heads=2, num_key_value_heads=1, head_dim=32, query_pre_attn_scalar=24, rms_norm_eps=1e-6, attention_bias=False,
                    tie_word_embeddings=True, torch_dtype="bfloat16", sliding_window=24, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                    rope_theta=1000000.0, rope_local_base_freq=10000.0, attn_logit_softcapping=None, final_logit_softcapping=None),
        dtype=torch.bfloat16, num_shards=1, pattern=None, adds_bos=True,
        lora=dict(r=5, lora_alpha=10, target_modules=ALL_LINEAR, layers_to_transform=[0, 2]), lora_dtype=torch.bfloat16),
}


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("names", nargs="*", default=list(MODELS))
    arguments.add_argument("--out", default=os.path.join(HERE, "tiny"))
    options = arguments.parse_args()
    torch.set_num_threads(1)
    for name in options.names:
        folder = os.path.join(options.out, name)
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        write_tokenizer(folder, MODELS[name])
        write_model(folder, name, MODELS[name])
        write_adapter(folder, name, MODELS[name])
        write_goldens(folder, name)


def write_tokenizer(folder, recipe):
    specials = ["<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=recipe["pattern"] is None)
    split = [pre_tokenizers.Split(Regex(recipe["pattern"]), "isolated", invert=False)] if recipe["pattern"] else []
    if recipe["pattern"] == QWEN2_PATTERN:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split + [byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [texts.PROSE, texts.PYTHON_CODE, texts.TYPESCRIPT_CODE, *texts.OTHER_LANGUAGES, *texts.SHORT]
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    if recipe["adds_bos"]:
        tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B", special_tokens=[("<|bos|>", 0)])
    tokenizer.save(os.path.join(folder, "tokenizer.json"), pretty=False)
    bos = "{{ bos_token }}" if recipe["adds_bos"] else ""
    dump(folder, "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|pad|>",
        "model_max_length": SIZES["max_position_embeddings"], "clean_up_tokenization_spaces": False,
        "chat_template": bos + "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] | trim }}<|end|>\n{% endfor %}"
                         "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"})
    # Read back through transformers, as a user would.
    reader = AutoTokenizer.from_pretrained(folder)
    encode = lambda text: reader(text, add_special_tokens=False).input_ids  # noqa: E731
    chats = []
    for chat in texts.CHAT_TEMPLATES:
        for add_generation_prompt in [False, True]:
            text = reader.apply_chat_template(chat["messages"], tokenize=False, add_generation_prompt=add_generation_prompt)
            chats.append({**chat, "addGenerationPrompt": add_generation_prompt, "rendered": text, "ids": encode(text)})
    write_json(os.path.join(folder, "tokenize.json"), {
        "reference": f"transformers {transformers.__version__}, tokenizer.json",
        "chatTemplate": reader.chat_template,
        "strings": [{"text": text, "ids": encode(text)} for text in texts.TOKENIZE],
        "chats": chats})


def write_model(folder, name, recipe):
    dump(folder, "config.json", recipe["config"])
    dump(folder, "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2})
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    generator = seeded(name, "weights")
    tensors = {}
    for key, parameter in model.named_parameters():  # a tied head is listed once, as the embedding
        noise = torch.randn(parameter.shape, generator=generator)
        if name == "gemma3" and "norm" in key:
            # Gemma multiplies by 1 + weight. Its embedding is scaled up by √hidden_size; norms after the blocks that are
            # as strong keep the tied head from answering every token with itself.
            value = noise * 0.2 + (1.5 if "post_" in key else 0.0)
        elif "norm" in key:
            value = noise * 0.2 + 1.0
        elif key.endswith("bias"):
            value = noise * 0.3
        elif "embed_tokens" in key or "lm_head" in key:
            value = noise * 0.25
        else:
            value = noise * (0.15 if "q_proj" in key or "k_proj" in key else 0.1)  # attention that prefers some positions
        tensors[key] = value.to(recipe["dtype"]).contiguous()
    save_shards(folder, tensors, recipe["num_shards"])


def save_shards(folder, tensors, num_shards):
    if num_shards == 1:
        save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        return
    keys, weight_map = sorted(tensors), {}
    for i in range(num_shards):
        part = keys[i * len(keys) // num_shards:(i + 1) * len(keys) // num_shards]
        file = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file({key: tensors[key] for key in part}, os.path.join(folder, file), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    dump(folder, "model.safetensors.index.json", {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map})


def write_adapter(folder, name, recipe):
    config = peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **recipe["lora"])
    model = peft.get_peft_model(load(folder), config)
    generator = seeded(name, "adapter")
    for key, parameter in model.named_parameters():
        if "lora_" not in key:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if "magnitude" in key:
            value = parameter.data * (1 + 0.1 * noise)
        elif "lora_A" in key:
            value = noise * 0.1
        else:  # B and its bias; far from zero, so that an adapter that is left out is noticed
            value = noise * 0.2
        parameter.data = value.to(recipe["lora_dtype"])
    model.peft_config["default"].base_model_name_or_path = f"motet-tiny/{name}"
    adapter = os.path.join(folder, "adapter")
    model.save_pretrained(adapter, save_embedding_layers=False)
    os.remove(os.path.join(adapter, "README.md"))
    with open(os.path.join(adapter, "adapter_config.json"), encoding="utf-8") as file:
        written = json.load(file)
    written["target_modules"].sort()  # PEFT writes a set, in another order every time
    dump(adapter, "adapter_config.json", written)


@torch.inference_mode()
def write_goldens(folder, name):
    about = {
        "model": f"tiny/{name}",
        "reference": "transformers + PEFT, float32, eager attention, stored weights widened to float32",
        "versions": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__, "peft": peft.__version__}}
    generator = seeded(name, "tokens")
    ids = [torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]
    for case, model in [("base", load(folder)), ("adapter", peft.PeftModel.from_pretrained(load(folder), os.path.join(folder, "adapter")).eval())]:
        logits = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float().numpy() for row in ids]
        sequences = [{"adapter": None if case == "base" else "adapter", "ids": row} for row in ids]
        write_case(folder, case, sequences, logits, VOCAB_SIZE, about)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def seeded(*what):
    return torch.Generator().manual_seed(zlib.crc32("/".join(what).encode()))


def dump(folder, file, value):
    with open(os.path.join(folder, file), "w", encoding="utf-8") as out:
        json.dump(value, out, indent=2)
        out.write("\n")


main()
