// What llama.cpp computes for given token ids, through its C API. make_llama_cpp.py builds and runs it:
//   probe MODEL logits   KV FLASH IDS OUT   IDS: one sequence a line. OUT: f32 [positions, vocabulary] of all sequences
//   probe MODEL generate KV FLASH IDS N     prints N greedy tokens after each sequence, as text
//   probe MODEL tokenize STRINGS            STRINGS: u32 length, bytes, ... Prints one line of ids a string; adds no token
// KV is f16 or f32, the type of the KV cache; FLASH is auto or off. Every sequence is one batch on an empty cache.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "llama.h"

using Ids = std::vector<llama_token>;

[[noreturn]] static void fail(const std::string& what) {
  fprintf(stderr, "probe: %s\n", what.c_str());
  exit(1);
}

static std::vector<Ids> readIds(const char* path) {
  std::ifstream file(path);
  if (!file) fail(std::string("cannot read ") + path);
  std::vector<Ids> all;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    Ids ids;
    for (llama_token id; words >> id;) ids.push_back(id);
    all.push_back(ids);
  }
  return all;
}

// Appends `ids` at position `start` and asks for the logits of every one of them.
static void decode(llama_context* context, const Ids& ids, int start) {
  llama_batch batch = llama_batch_init(int(ids.size()), 0, 1);
  batch.n_tokens = int(ids.size());
  for (size_t i = 0; i < ids.size(); i++) {
    batch.token[i] = ids[i];
    batch.pos[i] = start + int(i);
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = 1;
  }
  if (llama_decode(context, batch)) fail("llama_decode refused a batch");
  llama_batch_free(batch);
}

static void writeLogits(llama_context* context, int vocab, const std::vector<Ids>& sequences, const char* path) {
  FILE* out = fopen(path, "wb");
  if (!out) fail(std::string("cannot write ") + path);
  for (const Ids& ids : sequences) {
    llama_memory_clear(llama_get_memory(context), true);
    decode(context, ids, 0);
    for (size_t i = 0; i < ids.size(); i++) fwrite(llama_get_logits_ith(context, int(i)), sizeof(float), vocab, out);
  }
  fclose(out);
}

static void generate(llama_context* context, const llama_vocab* vocab, const std::vector<Ids>& sequences, int count) {
  for (Ids ids : sequences) {
    llama_memory_clear(llama_get_memory(context), true);
    std::string text;
    for (int position = 0, i = 0; i < count; i++) {
      decode(context, ids, position);
      const float* logits = llama_get_logits_ith(context, int(ids.size()) - 1);
      const llama_token best = llama_token(std::max_element(logits, logits + llama_vocab_n_tokens(vocab)) - logits);
      if (llama_vocab_is_eog(vocab, best)) break;
      char piece[256];
      text.append(piece, std::max(0, llama_token_to_piece(vocab, best, piece, sizeof piece, 0, true)));
      position += int(ids.size());
      ids = {best};
    }
    printf("%s\n---\n", text.c_str());
  }
}

static void tokenize(const llama_vocab* vocab, const char* path) {
  std::ifstream file(path, std::ios::binary);
  for (uint32_t size; file.read(reinterpret_cast<char*>(&size), 4);) {
    std::string text(size, '\0');
    file.read(text.data(), size);
    Ids ids(size + 8);
    int count = llama_tokenize(vocab, text.data(), int(size), ids.data(), int(ids.size()), false, true);
    if (count < 0) fail("more tokens than bytes");
    for (int i = 0; i < count; i++) printf(i ? " %d" : "%d", ids[i]);
    printf("\n");
  }
}

int main(int argc, char** argv) {
  if (argc < 4) fail("see the head of llama_cpp_probe.cpp");
  const std::string mode = argv[2];
  llama_log_set([](ggml_log_level level, const char* text, void*) { if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr); }, nullptr);
  ggml_backend_load_all();
  llama_backend_init();
  llama_model_params modelParams = llama_model_default_params();
  modelParams.vocab_only = mode == "tokenize";
  llama_model* model = llama_model_load_from_file(argv[1], modelParams);
  if (!model) fail(std::string("cannot load ") + argv[1]);
  const llama_vocab* vocab = llama_model_get_vocab(model);
  if (mode == "tokenize") {
    tokenize(vocab, argv[3]);
    return 0;
  }
  if (argc < 7) fail("see the head of llama_cpp_probe.cpp");
  llama_context_params params = llama_context_default_params();
  params.n_ctx = params.n_batch = params.n_ubatch = 1024;
  params.n_threads = params.n_threads_batch = 1;
  params.type_k = params.type_v = strcmp(argv[3], "f32") ? GGML_TYPE_F16 : GGML_TYPE_F32;
  params.flash_attn_type = strcmp(argv[4], "off") ? LLAMA_FLASH_ATTN_TYPE_AUTO : LLAMA_FLASH_ATTN_TYPE_DISABLED;
  llama_context* context = llama_init_from_model(model, params);
  if (!context) fail("cannot make a context");
  const std::vector<Ids> sequences = readIds(argv[5]);
  if (mode == "logits") writeLogits(context, llama_vocab_n_tokens(vocab), sequences, argv[6]);
  else generate(context, vocab, sequences, atoi(argv[6]));
}
