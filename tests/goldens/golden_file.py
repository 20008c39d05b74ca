"""Writes one golden case: `<case>.json` says what was asked, `<case>.bin` what the reference answered.

The layout is described in README.md beside this file and is the same for every reference (transformers, llama.cpp).
"""
import json
import os
import random

import numpy as np

NUM_TOP = 32
NUM_FIXED = 16


def fixed_ids(vocab_size, seed=20261124):
    """The vocabulary ids whose logits are stored at every position, so that the far tail is compared too."""
    return sorted(random.Random(seed).sample(range(vocab_size), NUM_FIXED))


def summarize(logits, fixed):
    """Reduces logits [positions, vocabulary] f32 to what is stored: argmax, logsumexp, top ids and logits, fixed logits.

    Equal logits are ordered by the lower id, as argmax does. logsumexp is summed in float64 and stored in float32.
    """
    logits = np.asarray(logits, dtype=np.float32)
    top_ids = np.argsort(-logits, axis=1, kind="stable")[:, :NUM_TOP].astype(np.int32)
    wide = logits.astype(np.float64)
    peak = wide.max(axis=1, keepdims=True)
    return {
        "argmax": logits.argmax(axis=1).astype(np.int32),
        "logsumexp": (peak[:, 0] + np.log(np.exp(wide - peak).sum(axis=1))).astype(np.float32),
        "top_ids": top_ids,
        "top_logits": np.take_along_axis(logits, top_ids, axis=1),
        "fixed_logits": np.ascontiguousarray(logits[:, fixed]),
    }


def write_case(folder, case, sequences, logits, vocab_size, about):
    """Writes the two files of a case.

    sequences: [{"adapter": name or None, "ids": [...], ...}]; logits: one [len(ids), vocab_size] array per sequence;
    about: further fields for the JSON, such as the reference and its versions.
    """
    fixed = fixed_ids(vocab_size)
    parts = [summarize(rows, fixed) for rows in logits]
    for sequence, rows in zip(sequences, logits, strict=True):
        assert rows.shape == (len(sequence["ids"]), vocab_size), (rows.shape, len(sequence["ids"]), vocab_size)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, case + ".bin"), "wb") as file:
        for field, dtype in [("argmax", "<i4"), ("logsumexp", "<f4"), ("top_ids", "<i4"), ("top_logits", "<f4"),
                             ("fixed_logits", "<f4")]:
            file.write(np.concatenate([part[field] for part in parts]).astype(dtype).tobytes())
    write_json(os.path.join(folder, case + ".json"), {
        "case": case,
        **about,
        "vocabSize": vocab_size,
        "numPositions": sum(len(sequence["ids"]) for sequence in sequences),
        "numTop": NUM_TOP,
        "numFixed": NUM_FIXED,
        "fixedIds": fixed,
        "sequences": sequences,
    })
    print(f"{case}: {len(sequences)} sequences, {sum(len(s['ids']) for s in sequences)} positions", flush=True)


def write_json(path, value):
    """JSON with one line per element of each list at the top level, so that a change shows up as a small diff."""
    lines = []
    for key, item in value.items():
        if isinstance(item, list) and item and not isinstance(item[0], (int, str)):
            rows = ",\n".join("    " + json.dumps(row, ensure_ascii=True) for row in item)
            lines.append(f"  {json.dumps(key)}: [\n{rows}\n  ]")
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(item, ensure_ascii=True)}")
    with open(path, "w", encoding="utf-8") as file:
        file.write("{\n" + ",\n".join(lines) + "\n}\n")
