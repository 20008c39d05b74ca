#!/usr/bin/env python3
"""transformers + PEFT as a peer of servers: static batches in which every row has its own adapter (`adapter_names=`).

  python peft_batches.py MODEL_FOLDER THREADS ADAPTER_FOLDER...

Prints {"ready": true} and then answers each line of standard input, {"prompts": [[id, ...], ...], "adapters": [index, ...],
"new": count}, by a line: {"first_ms": until all rows have a token, "last_ms": until they have all}.
"""
import json
import sys
import time

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, StoppingCriteria

folder, threads, adapters = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapters[0], adapter_name="a0")
for index, adapter in enumerate(adapters[1:], 1):
    model.load_adapter(adapter, adapter_name=f"a{index}")
model.eval()


class FirstToken(StoppingCriteria):
    """Is asked after every token, never stops, and keeps the time of the first."""

    def __init__(self):
        self.at = None

    def __call__(self, input_ids, scores, **kwargs):
        self.at = self.at or time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    ids = torch.tensor(job["prompts"])
    first = FirstToken()
    begin = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            adapter_names=[f"a{index}" for index in job["adapters"]],
            do_sample=False,
            max_new_tokens=job["new"],
            min_new_tokens=job["new"],
            eos_token_id=None,
            pad_token_id=1,
            stopping_criteria=[first],
        )
    end = time.perf_counter()
    assert out.shape[1] == ids.shape[1] + job["new"], f"expected {job['new']} new tokens, got {out.shape[1] - ids.shape[1]}"
    print(json.dumps({"first_ms": (first.at - begin) * 1000, "last_ms": (end - begin) * 1000}), flush=True)
