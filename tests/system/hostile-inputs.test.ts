/**
 * Hostile files and requests against a real engine: each is refused with a clear 4xx that names the field, and the
 * engine serves on. Hostile base models end the start with one line. Built from the golden files of a small model.
 */
import { copyFile, cp, mkdtemp, open, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { goldensFolder } from '../fixtures/golden.ts';
import { cacheFolder, examplesFolder, smollm2Path } from '../fixtures/models.ts';
import {
  loadAdapterOver,
  postJson,
  type RunningProcess,
  runToEnd,
  startProcess,
} from '../fixtures/processes.ts';

// biome-ignore lint/suspicious/noExplicitAny: JSON that the tests break on purpose
type Config = Record<string, any>;

const modelFolder = join(goldensFolder, 'tiny/mistral');
const goodAdapter = join(modelFolder, 'adapter');

let engine: RunningProcess;
let scratch: string;
beforeAll(async () => {
  scratch = await mkdtemp(join(tmpdir(), 'motet-hostile-'));
  const args = ['--model', modelFolder, '--served-name', 'base', '--cache', cacheFolder, '--port', '0'];
  engine = await startProcess('engine', [...args, '--device-memory', '64MiB', '--max-lora-rank', '64']);
});
afterAll(async () => {
  expect(await engine.stop()).toBe(0);
  await rm(scratch, { recursive: true });
});

/** The engine still answers, and as it did before. */
async function expectServesOn(): Promise<void> {
  const { status, body } = await postJson(`${engine.url}/v1/completions`, {
    model: 'base',
    prompt: [5, 6, 7],
    max_tokens: 4,
    temperature: 0,
    ignore_eos: true,
  });
  expect(status).toBe(200);
  expect(body.usage.completion_tokens).toBe(4);
}

interface Safetensors {
  header: Config;
  data: Buffer;
}

function parse(bytes: Buffer): Safetensors {
  const length = Number(bytes.readBigUInt64LE(0));
  return { header: JSON.parse(bytes.subarray(8, 8 + length).toString()), data: bytes.subarray(8 + length) };
}

function serialize({ header, data }: Safetensors): Buffer {
  const json = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length));
  return Buffer.concat([length, json, data]);
}

type Change = {
  /** Must appear in the message. */
  names: RegExp;
  config?: (config: Config) => void;
  configText?: string;
  header?: (file: Safetensors, first: string) => void;
  bytes?: (bytes: Buffer) => Buffer;
};

const poison = (value: number) => (bytes: Buffer) => {
  const out = Buffer.from(bytes);
  const { header } = parse(out);
  const [name, tensor] = Object.entries(header).find(([key]) => key.endsWith('lora_A.weight'))!;
  const begin = 8 + Number(out.readBigUInt64LE(0)) + tensor.data_offsets[0];
  if (tensor.dtype === 'F32') out.writeFloatLE(value, begin + 4);
  else if (tensor.dtype === 'F16') out.writeUInt16LE(Number.isNaN(value) ? 0x7e00 : 0x7c00, begin + 4);
  else out.writeUInt16LE(Number.isNaN(value) ? 0x7fc0 : 0x7f80, begin + 4);
  expect(name).toBeTruthy();
  return out;
};

const adapterChanges: Record<string, Change> = {
  'an empty weights file': { names: /safetensors/, bytes: () => Buffer.alloc(0) },
  'weights cut inside the header': { names: /header/, bytes: (b) => b.subarray(0, 100) },
  'weights cut inside the data': {
    names: /adapter_model\.safetensors|lora_/,
    bytes: (b) => b.subarray(0, b.length - 10),
  },
  'weights with bytes behind the data': {
    names: /safetensors/,
    bytes: (b) => Buffer.concat([b, Buffer.alloc(64)]),
  },
  'a header length beyond the file': {
    names: /header/,
    bytes: (b) => {
      const out = Buffer.from(b);
      out.writeBigUInt64LE(2n ** 40n, 0);
      return out;
    },
  },
  'a header length of 2^63': {
    names: /header/,
    bytes: (b) => {
      const out = Buffer.from(b);
      out.writeBigUInt64LE(2n ** 63n, 0);
      return out;
    },
  },
  'a header that is not JSON': {
    names: /header/,
    bytes: (b) => {
      const out = Buffer.from(b);
      out[8] = 0x58;
      return out;
    },
  },
  'a pickle instead of safetensors': {
    names: /header|safetensors/,
    bytes: () => Buffer.from('\x80\x02}q\x00(U\x01aK\x01u.'.repeat(20), 'latin1'),
  },
  'overlapping tensors': {
    names: /overlap|data_offsets/,
    header: ({ header }, first) => {
      const other = Object.keys(header).find(
        (key) =>
          key !== first && key !== '__metadata__' && header[key].shape.join() === header[first].shape.join(),
      )!;
      header[other].data_offsets = header[first].data_offsets;
    },
  },
  'offsets that go backwards': {
    names: /data_offsets/,
    header: ({ header }, first) => header[first].data_offsets.reverse(),
  },
  'negative offsets': {
    names: /data_offsets/,
    header: ({ header }, first) => {
      header[first].data_offsets[0] = -8;
    },
  },
  'a shape that does not match the bytes': {
    names: /shape|data_offsets|bytes/,
    header: ({ header }, first) => {
      header[first].shape[1] *= 2;
    },
  },
  'a shape whose product overflows': {
    names: /shape|data_offsets/,
    header: ({ header }, first) => {
      header[first].shape = [2 ** 40, 2 ** 40];
    },
  },
  'a dtype that adapters do not have': {
    names: /dtype/,
    header: ({ header }, first) => {
      header[first].dtype = header[first].dtype === 'F32' ? 'I32' : 'I16';
    },
  },
  'NaN weights': { names: /finite/, bytes: poison(Number.NaN) },
  'infinite weights': { names: /finite/, bytes: poison(Number.POSITIVE_INFINITY) },
  'A without B': {
    names: /lora_B/,
    header: (file, first) => {
      const other = first.replace('lora_A', 'lora_B');
      file.header[other.replace('layers.0', 'layers.0').replace('_proj', '_proj2')] = file.header[other];
      delete file.header[other];
    },
  },
  'a tensor of an unknown module': {
    names: /router_proj/,
    header: ({ header }, first) => {
      header[first.replace(/[a-z]+_proj|lm_head/, 'router_proj')] = header[first];
      delete header[first];
    },
  },
  'a layer that the base does not have': {
    names: /layers\.77|layer/,
    header: ({ header }, first) => {
      header[first.replace(/layers\.\d+/, 'layers.77')] = header[first];
      delete header[first];
    },
  },
  'weights of another base': { names: /shape/, bytes: (b) => b },
  'rank 0': {
    names: /\br\b|rank/,
    config: (config) => {
      config.r = 0;
    },
  },
  'a rank that is not a number': {
    names: /\br\b/,
    config: (config) => {
      config.r = 'eight';
    },
  },
  'a rank that the tensors do not have': {
    names: /rank|shape/,
    config: (config) => {
      config.r = 5;
      config.rank_pattern = {};
    },
  },
  'another PEFT method': {
    names: /peft_type/,
    config: (config) => {
      config.peft_type = 'IA3';
    },
  },
  'trained biases of the base': {
    names: /bias/,
    config: (config) => {
      config.bias = 'all';
    },
  },
  'modules saved whole': {
    names: /modules_to_save/,
    config: (config) => {
      config.modules_to_save = ['embed_tokens'];
    },
  },
  'an alpha that is not finite': {
    names: /lora_alpha/,
    configText: '{"peft_type":"LORA","r":3,"lora_alpha":1e999,"target_modules":["q_proj"]}',
  },
  'a config that is not JSON': { names: /adapter_config\.json/, configText: '{"peft_type": "LORA",' },
  'a config that is a list': { names: /adapter_config\.json/, configText: '[]' },
};

describe('adapters', () => {
  test.each(Object.entries(adapterChanges))('%s', async (title, change) => {
    const folder = await mkdtemp(join(scratch, 'adapter-'));
    const source = title === 'weights of another base' ? join(examplesFolder, 'dates') : goodAdapter;
    await cp(source, folder, { recursive: true });
    const weights = join(folder, 'adapter_model.safetensors');
    const configPath = join(folder, 'adapter_config.json');
    if (change.config) {
      const config = JSON.parse(await readFile(configPath, 'utf8'));
      change.config(config);
      await writeFile(configPath, JSON.stringify(config));
    }
    if (change.configText) await writeFile(configPath, change.configText);
    if (change.header) {
      const file = parse(await readFile(weights));
      change.header(file, Object.keys(file.header).find((key) => /layers\.0\..*lora_A\.weight$/.test(key))!);
      await writeFile(weights, serialize(file));
    }
    if (change.bytes) await writeFile(weights, change.bytes(await readFile(weights)));

    const { status, body } = await loadAdapterOver(engine.url, 'hostile', folder);
    expect(status, JSON.stringify(body)).toBe(400);
    expect(body.error.message).toMatch(change.names);
    expect(body.message).toBe(body.error.message);
    await expectServesOn();
  });

  test('a good adapter loads between all of these, and again after it was unloaded', async () => {
    for (let i = 0; i < 2; i++) {
      expect(await loadAdapterOver(engine.url, 'good', goodAdapter)).toMatchObject({ status: 200 });
      expect((await postJson(`${engine.url}/v1/unload_lora_adapter`, { lora_name: 'good' })).status).toBe(
        200,
      );
    }
  });

  test('a folder that is not there is 404, and a weights file with .bin only is named', async () => {
    expect((await loadAdapterOver(engine.url, 'x', join(scratch, 'nowhere'))).status).toBe(404);
    const folder = await mkdtemp(join(scratch, 'adapter-'));
    await copyFile(join(goodAdapter, 'adapter_config.json'), join(folder, 'adapter_config.json'));
    await writeFile(join(folder, 'adapter_model.bin'), 'pickle');
    const { status, body } = await loadAdapterOver(engine.url, 'x', folder);
    expect([400, 404]).toContain(status);
    expect(body.error.message).toMatch(/adapter_model\.(safetensors|bin)/);
  });
});

const completion = { model: 'base', prompt: 'hi', max_tokens: 2 };
const requests: Record<string, { path?: string; body: unknown; names: RegExp; status?: number }> = {
  'malformed JSON': { body: '{"model": "base", "prompt": ', names: /JSON/ },
  'an array': { body: [], names: /object|body/ },
  'a model that is a number': { body: { ...completion, model: 5 }, names: /model/ },
  'a model that nobody loaded': { body: { ...completion, model: 'nobody' }, names: /nobody/, status: 404 },
  'no prompt': { body: { model: 'base' }, names: /prompt/ },
  'a prompt of a wrong type': { body: { ...completion, prompt: { a: 1 } }, names: /prompt/ },
  'token ids outside the vocabulary': { body: { ...completion, prompt: [1, 99999999] }, names: /prompt/ },
  'negative token ids': { body: { ...completion, prompt: [-1] }, names: /prompt/ },
  'an empty prompt': { body: { ...completion, prompt: [] }, names: /prompt/ },
  'a prompt beyond the context': {
    body: { ...completion, prompt: Array(5000).fill(5) },
    names: /context|5000/,
  },
  'max_tokens of zero': { body: { ...completion, max_tokens: 0 }, names: /max_tokens/ },
  'max_tokens of 1e30': { body: { ...completion, max_tokens: 1e30 }, names: /max_tokens/ },
  'a negative temperature': { body: { ...completion, temperature: -1 }, names: /temperature/ },
  'top_p above 1': { body: { ...completion, top_p: 1.5 }, names: /top_p/ },
  'a thousand stop strings': { body: { ...completion, stop: Array(1000).fill('x') }, names: /stop/ },
  'n of a million': { body: { ...completion, n: 1e6 }, names: /\bn\b/ },
  'a logit bias outside the vocabulary': {
    body: { ...completion, logit_bias: { '99999999': 1 } },
    names: /logit_bias/,
  },
  'messages that are a string': {
    path: '/v1/chat/completions',
    body: { model: 'base', messages: 'hi' },
    names: /messages/,
  },
  'no messages': { path: '/v1/chat/completions', body: { model: 'base', messages: [] }, names: /messages/ },
  'a message without a role': {
    path: '/v1/chat/completions',
    body: { model: 'base', messages: [{ content: 'x' }] },
    names: /role/,
  },
  'an adapter name that is an object': {
    path: '/v1/load_lora_adapter',
    body: { lora_name: {}, lora_path: '/x' },
    names: /lora_name/,
  },
  'an adapter path with a NUL': {
    path: '/v1/load_lora_adapter',
    body: { lora_name: 'x', lora_path: '/tmp/\u0000x' },
    names: /lora_path/,
  },
  'detokenize with a wrong id': {
    path: '/detokenize',
    body: { model: 'base', tokens: [1e9] },
    names: /tokens/,
  },
};

describe('requests', () => {
  test.each(Object.entries(requests))(
    '%s',
    async (_title, { path = '/v1/completions', body, names, status = 400 }) => {
      const reply = await postJson(`${engine.url}${path}`, body);
      expect(reply.status, JSON.stringify(reply.body)).toBe(status);
      expect(reply.body.error.message).toMatch(names);
      await expectServesOn();
    },
  );

  test('bad UTF-8', async () => {
    const body = Buffer.concat([
      Buffer.from('{"model":"base","prompt":"'),
      Buffer.from([0xff, 0xfe, 0xc3]),
      Buffer.from('"}'),
    ]);
    const response = await fetch(`${engine.url}/v1/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body,
    });
    expect(response.status).toBe(400);
    expect(((await response.json()) as { error: { message: string } }).error.message).toMatch(/UTF-8/);
    await expectServesOn();
  });

  test('a body of 64 MiB', async () => {
    const body = `{"model":"base","prompt":"${'x'.repeat(64 << 20)}"}`;
    const response = await fetch(`${engine.url}/v1/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body,
    }).catch(() => null);
    // The engine may close the connection before all of it was sent.
    if (response) expect(response.status).toBe(413);
    await expectServesOn();
  });
});

describe('base models', () => {
  /** The first megabytes of a real GGUF hold its whole header; what follows is not needed to refuse it. */
  const headBytes = 3 << 20;
  async function ggufHead(): Promise<Buffer> {
    const file = await open(smollm2Path);
    const { buffer } = await file.read(Buffer.alloc(headBytes), 0, headBytes, 0);
    await file.close();
    return buffer;
  }
  const edited = (edit: (bytes: Buffer) => void) => (bytes: Buffer) => {
    edit(bytes);
    return bytes;
  };
  const cases: Record<string, { change: (bytes: Buffer) => Buffer; names: RegExp }> = {
    'an empty file': { change: () => Buffer.alloc(0), names: /GGUF|size|bytes|magic/i },
    'another file type': { change: () => Buffer.from('PK\x03\x04'.repeat(100)), names: /magic|GGUF/ },
    'a version from the future': { change: edited((b) => b.writeUInt32LE(99, 4)), names: /version/ },
    '2^60 tensors': { change: edited((b) => b.writeBigUInt64LE(2n ** 60n, 8)), names: /tensor/ },
    '2^60 metadata entries': {
      change: edited((b) => b.writeBigUInt64LE(2n ** 60n, 16)),
      names: /metadata|key/,
    },
    'a first key of 2^50 bytes': {
      change: edited((b) => b.writeBigUInt64LE(2n ** 50n, 24)),
      names: /key|length|string/,
    },
    'tensors beyond the end of the file': { change: (b) => b, names: /tensor|token_embd/ },
  };
  test.each(Object.entries(cases))('%s ends the start with one line', async (_title, { change, names }) => {
    const folder = await mkdtemp(join(scratch, 'gguf-'));
    const path = join(folder, 'model.gguf');
    await writeFile(path, change(await ggufHead()));
    const { code, stderr } = await runToEnd('engine', ['--model', path, '--cache', folder, '--port', '0']);
    expect(code).toBe(2);
    expect(stderr.trim().split('\n')).toHaveLength(1);
    expect(stderr).toMatch(names);
  });

  test.each([
    ['hidden_size', (c: Config) => (c.hidden_size = 0)],
    ['num_attention_heads', (c: Config) => (c.num_attention_heads = 'two')],
    ['num_key_value_heads|numKvHeads', (c: Config) => (c.num_key_value_heads = 7)],
    ['vocab_size|vocabSize', (c: Config) => (c.vocab_size = 2 ** 40)],
    ['num_hidden_layers', (c: Config) => (c.num_hidden_layers = 1e9)],
    ['rope', (c: Config) => (c.rope_scaling = { rope_type: 'magic', factor: 2 })],
    [
      'model_type|architectures',
      (c: Config) => Object.assign(c, { model_type: 'gpt_neo', architectures: ['GPTNeo'] }),
    ],
  ])('a config.json with a wrong %s ends the start with one line that names it', async (name, change) => {
    const folder = await mkdtemp(join(scratch, 'hf-'));
    await cp(modelFolder, folder, { recursive: true });
    const config = JSON.parse(await readFile(join(folder, 'config.json'), 'utf8'));
    change(config);
    await writeFile(join(folder, 'config.json'), JSON.stringify(config));
    const { code, stderr } = await runToEnd('engine', ['--model', folder, '--cache', folder, '--port', '0']);
    expect(code, stderr).toBe(2);
    expect(stderr.trim().split('\n')).toHaveLength(1);
    expect(stderr).toMatch(new RegExp(name));
  });
});
