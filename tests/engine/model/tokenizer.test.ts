import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { readBaseModel } from '../../../engine/model/base-model.ts';
import { loadTokenizer, type Tokenizer } from '../../../engine/model/tokenizer.ts';
import { goldensFolder } from '../../fixtures/golden.ts';
import { gemma3Path, smollm2Path } from '../../fixtures/models.ts';
import { seededRandom } from '../../fixtures/seeded-random.ts';
import { writeFolder } from '../../fixtures/source-files.ts';

interface TokenizeGolden {
  strings: { text: string; ids: number[] }[];
  chats: { rendered: string; ids: number[] }[];
}

/** Folder of the golden, and the model's file or folder. */
const models: [string, string][] = [
  ...['llama3', 'mistral', 'qwen2', 'qwen3', 'gemma3'].map((name): [string, string] => [
    `tiny/${name}`,
    join(goldensFolder, 'tiny', name),
  ]),
  ['smollm2', smollm2Path],
  ['gemma3-270m', gemma3Path],
];

function readTexts(golden: string): { text: string; ids: number[] }[] {
  const file = readFileSync(join(goldensFolder, golden, 'tokenize.json'), 'utf8');
  const { strings, chats } = JSON.parse(file) as TokenizeGolden;
  return [...strings, ...chats.map(({ rendered, ids }) => ({ text: rendered, ids }))];
}

const openTokenizer = async (path: string) => loadTokenizer((await readBaseModel(path)).tokenizer);

describe.each(models)('%s', (golden, path) => {
  test('encodes every string as the reference does', async () => {
    const tokenizer = await openTokenizer(path);
    for (const { text, ids } of readTexts(golden)) {
      expect(tokenizer.encode(text, { addSpecialTokens: false }), JSON.stringify(text)).toEqual(ids);
    }
  });

  test('decodes what it encodes, whole and token by token', async () => {
    const tokenizer = await openTokenizer(path);
    const composes = golden.includes('qwen');
    for (const { text, ids } of readTexts(golden)) {
      const expected = composes ? text.normalize('NFC') : text;
      expect(tokenizer.decode(ids, { skipSpecialTokens: false }), JSON.stringify(text)).toBe(expected);
      expect(pieces(tokenizer, ids).join(''), JSON.stringify(text)).toBe(expected);
    }
  });
});

function pieces(tokenizer: Tokenizer, ids: number[]): string[] {
  const detokenizer = tokenizer.createDetokenizer({ skipSpecialTokens: false });
  return [...ids.map((id) => detokenizer.push(id)), detokenizer.flush()];
}

/** The alphabet of bytes as GPT-2 spells it, then the merges given, then special tokens. */
async function byteLevel(merges: [string, string][] = [], changes: object = {}): Promise<Tokenizer> {
  const alphabet = Array.from({ length: 256 }, (_, byte) => byte);
  const isPrintable = (byte: number) => (byte >= 33 && byte <= 126) || (byte >= 161 && byte !== 173);
  const hidden = alphabet.filter((byte) => !isPrintable(byte));
  const spelled = alphabet.map((byte) =>
    String.fromCharCode(isPrintable(byte) ? byte : 256 + hidden.indexOf(byte)),
  );
  const vocab = Object.fromEntries(
    [...spelled, ...merges.map((pair) => pair.join(''))].map((token, id) => [token, id]),
  );
  const folder = await writeFolder({
    'tokenizer.json': {
      added_tokens: [
        { id: 1000, content: '<s>', special: true },
        { id: 1001, content: '<s>>', special: true },
        { id: 1002, content: '<tool>', special: false, rstrip: true },
        { id: 1003, content: 'mask', special: true, single_word: true, lstrip: true },
      ],
      normalizer: null,
      pre_tokenizer: { type: 'ByteLevel', add_prefix_space: false, use_regex: true },
      post_processor: {
        type: 'TemplateProcessing',
        single: [{ SpecialToken: { id: '<s>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
        pair: [],
      },
      decoder: { type: 'ByteLevel' },
      model: { type: 'BPE', vocab, merges },
      ...changes,
    },
    'tokenizer_config.json': { bos_token: { content: '<s>' }, eos_token: '<s>>' },
  });
  return loadTokenizer({ kind: 'folder', path: folder });
}

const encode = (tokenizer: Tokenizer, text: string, options = {}) =>
  tokenizer.encode(text, { addSpecialTokens: false, ...options });

test('puts the begin token first only when asked', async () => {
  const tokenizer = await byteLevel();
  expect(tokenizer.encode('a')).toEqual([1000, 97]);
  expect(encode(tokenizer, 'a')).toEqual([97]);
  expect(tokenizer).toMatchObject({ bosToken: '<s>', eosToken: '<s>>', vocabSize: 1004 });
});

test('merges the earliest rule first, wherever the pair stands', async () => {
  const tokenizer = await byteLevel([
    ['b', 'c'],
    ['a', 'b'],
    ['a', 'bc'],
  ]);
  expect(encode(tokenizer, 'abcab')).toEqual([258, 257]);
});

describe('special tokens in the text', () => {
  test('are the longest of those that begin at one place', async () => {
    expect(encode(await byteLevel(), '<s>><s>')).toEqual([1001, 1000]);
  });

  test('stay text when they are not to be parsed, and other added tokens do not', async () => {
    const ids = encode(await byteLevel(), '<s><tool>', { parseSpecial: false });
    expect(ids).toEqual([60, 115, 62, 1002]);
  });

  test('take the blanks beside them where they say so', async () => {
    const tokenizer = await byteLevel();
    expect(encode(tokenizer, '<tool>  \n a')).toEqual([1002, 97]);
    expect(encode(tokenizer, 'a  mask b')).toEqual([97, 1003, 32, 98]);
  });

  test('of one word are not found inside another', async () => {
    expect(encode(await byteLevel(), 'unmask')).not.toContain(1003);
  });

  test('are left out of the text unless asked for', async () => {
    const tokenizer = await byteLevel();
    expect(tokenizer.decode([1000, 97, 1002, 1001])).toBe('a<tool>');
    expect(tokenizer.decode([1000, 97], { skipSpecialTokens: false })).toBe('<s>a');
  });
});

describe('the detokenizer', () => {
  test('never returns a part of a character', async () => {
    const tokenizer = await byteLevel();
    const ids = encode(tokenizer, 'é😀한');
    expect(pieces(tokenizer, ids)).toEqual(['', 'é', '', '', '', '😀', '', '', '한', '']);
  });

  test('gives what was held back when it is flushed, and is then as new', async () => {
    const detokenizer = (await byteLevel()).createDetokenizer();
    expect([detokenizer.push(0xe2), detokenizer.push(0x82), detokenizer.flush()]).toEqual(['', '', '\ufffd']);
    expect(detokenizer.push(97)).toBe('a');
  });

  test('keeps a byte order mark', async () => {
    const tokenizer = await byteLevel();
    expect(tokenizer.decode(encode(tokenizer, '\ufeffa'))).toBe('\ufeffa');
  });

  test('gives nothing for ids without a token', async () => {
    const tokenizer = await byteLevel();
    expect(tokenizer.decode([97, 500, 100_000, 98])).toBe('ab');
    expect(tokenizer.tokenBytes(500)).toEqual(new Uint8Array());
  });

  test('agrees with decoding all bytes at once, whatever the ids', async () => {
    const tokenizer = await byteLevel([['Ã', '©']]);
    const random = seededRandom(7);
    for (let round = 0; round < 200; round++) {
      const ids = Array.from({ length: 30 }, () => random.below(257));
      const bytes = Buffer.concat(ids.map((id) => tokenizer.tokenBytes(id)));
      expect(pieces(tokenizer, ids).join(''), `round ${round}`).toBe(
        new TextDecoder('utf-8', { ignoreBOM: true }).decode(bytes),
      );
    }
  });

  test('takes time in proportion to the tokens', async () => {
    const detokenizer = (await byteLevel()).createDetokenizer();
    // Continuation bytes only: nothing is complete, and yet nothing piles up.
    const begin = performance.now();
    for (let i = 0; i < 200_000; i++) detokenizer.push(0x80);
    expect(performance.now() - begin).toBeLessThan(5000);
  });
});

test('reads a lone surrogate as the replacement character', async () => {
  const tokenizer = await byteLevel();
  expect(encode(tokenizer, 'a\ud800')).toEqual(encode(tokenizer, 'a\ufffd'));
});

test('splits at what Unicode calls blanks and numbers, not JavaScript', async () => {
  // U+FEFF is a blank in JavaScript only; U+0085 is one in Unicode only.
  const tokenizer = await byteLevel([['Ġ', 'Ġ']]);
  expect(encode(tokenizer, '  \u0085')).toEqual([256, 0xc2, 0x85]);
  const digits = await byteLevel([['1', '2']], {
    pre_tokenizer: {
      type: 'Sequence',
      pretokenizers: [
        { type: 'Digits', individual_digits: true },
        { type: 'ByteLevel', add_prefix_space: false, use_regex: true },
      ],
    },
  });
  expect(encode(digits, '12')).toEqual([49, 50]);
});

test('puts a blank before a text that has none where the file asks for it', async () => {
  const pre_tokenizer = { type: 'ByteLevel', add_prefix_space: true, use_regex: true };
  const tokenizer = await byteLevel([], { pre_tokenizer });
  expect(encode(tokenizer, 'a')).toEqual([32, 97]);
  expect(encode(tokenizer, ' a')).toEqual([32, 97]);
});

test.each([
  [true, ['▁', '▁', 'a']],
  [false, ['▁▁', 'a']],
])('begins a word at each blank where Metaspace splits: %s', async (split, expected) => {
  const vocab = { '▁': 0, a: 1, '▁▁': 2 };
  const tokenizer = await byteLevel([], {
    pre_tokenizer: { type: 'Metaspace', prepend_scheme: 'always', split },
    decoder: { type: 'Metaspace', prepend_scheme: 'always' },
    model: { type: 'BPE', vocab, merges: [['▁', '▁']] },
  });
  expect(encode(tokenizer, '  a')).toEqual(expected.map((token) => vocab[token as keyof typeof vocab]));
  expect(tokenizer.decode(encode(tokenizer, 'a'))).toBe('a');
});

/** SentencePiece as GGUF holds it: scores instead of merges, bytes as tokens of their own. */
function sentencePiece(tokens: [string, number, number?][], metadata: object = {}): Promise<Tokenizer> {
  const bytes = Array.from({ length: 256 }, (_, byte): [string, number, number] => [
    `<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`,
    0,
    6,
  ]);
  const all: [string, number, number?][] = [
    ['<unk>', 0, 2],
    ['<s>', 0, 3],
    ['</s>', 0, 3],
    ...bytes,
    ...tokens,
  ];
  return loadTokenizer({
    kind: 'gguf',
    path: 'test.gguf',
    metadata: {
      'tokenizer.ggml.model': 'llama',
      'tokenizer.ggml.tokens': all.map(([token]) => token),
      'tokenizer.ggml.scores': Float64Array.from(all, ([, score]) => score),
      'tokenizer.ggml.token_type': Float64Array.from(all, ([, , type]) => type ?? 1),
      'tokenizer.ggml.bos_token_id': 1,
      'tokenizer.ggml.eos_token_id': 2,
      'tokenizer.ggml.unknown_token_id': 0,
      ...metadata,
    },
  });
}

describe('SentencePiece from GGUF', () => {
  const first = 3 + 256;
  const letters: [string, number][] = [
    ['▁', -10],
    ['a', -11],
    ['b', -12],
    ['c', -13],
  ];
  const idsOf = (...numbers: number[]) => numbers.map((n) => first + n);

  test('merges the pair whose whole has the highest score', async () => {
    const tokenizer = await sentencePiece([...letters, ['ab', -5], ['bc', -4], ['▁a', -6]], {
      'tokenizer.ggml.add_space_prefix': false,
    });
    expect(encode(tokenizer, 'abc')).toEqual(idsOf(1, 5));
  });

  test('merges the leftmost pair when two are equal', async () => {
    const tokenizer = await sentencePiece([...letters, ['aa', -5]], {
      'tokenizer.ggml.add_space_prefix': false,
    });
    expect(encode(tokenizer, 'aaa')).toEqual(idsOf(4, 1));
  });

  test('puts a blank before the text, and before text after a special token', async () => {
    const tokenizer = await sentencePiece([...letters, ['▁a', -6]]);
    expect(tokenizer.encode('a b')).toEqual([1, ...idsOf(4, 0, 2)]);
    expect(encode(tokenizer, 'a</s>a')).toEqual([...idsOf(4), 2, ...idsOf(4)]);
    expect(tokenizer.decode(tokenizer.encode('a b'))).toBe('a b');
  });

  test('spells characters that have no token in bytes', async () => {
    const tokenizer = await sentencePiece(letters, { 'tokenizer.ggml.add_space_prefix': false });
    expect(encode(tokenizer, 'é')).toEqual([3 + 0xc3, 3 + 0xa9]);
    expect(pieces(tokenizer, encode(tokenizer, 'aé'))).toEqual(['a', '', 'é', '']);
  });

  test('gives the same tokens where words may not be cut at blanks', async () => {
    const texts = ['a b  c', ' a', 'ab b ', '  ', 'a  b c  '];
    const plain = await sentencePiece([...letters, ['▁▁', -3], ['▁b', -4], ['ab', -5]], {
      'tokenizer.ggml.add_space_prefix': false,
    });
    // This token has a blank after a letter, so nothing is cut; it can never be merged.
    const uncut = await sentencePiece([...letters, ['▁▁', -3], ['▁b', -4], ['ab', -5], ['x▁y', -9]], {
      'tokenizer.ggml.add_space_prefix': false,
    });
    for (const text of texts) expect(encode(uncut, text), text).toEqual(encode(plain, text));
  });
});

describe('refuses by name', () => {
  const gguf = {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.tokens': ['a', 'b', 'ab'],
    'tokenizer.ggml.merges': ['a b'],
  };
  test.each([
    [
      'another model',
      { ...gguf, 'tokenizer.ggml.model': 'bert' },
      /tokenizer.ggml.model: expected gpt2 .*got "bert"/,
    ],
    [
      'no tokens',
      { 'tokenizer.ggml.model': 'gpt2' },
      /tokenizer.ggml.tokens: expected an array of strings, got nothing/,
    ],
    [
      'an unknown splitter',
      { ...gguf, 'tokenizer.ggml.pre': 'viking' },
      /tokenizer.ggml.pre: expected one of default, gpt-2.*got "viking"/,
    ],
    ['a splitter from the prototype', { ...gguf, 'tokenizer.ggml.pre': 'constructor' }, /tokenizer.ggml.pre/],
    [
      'a merge of one part',
      { ...gguf, 'tokenizer.ggml.merges': ['ab'] },
      /tokenizer.ggml.merges: expected two parts/,
    ],
    [
      'types of another length',
      { ...gguf, 'tokenizer.ggml.token_type': Float64Array.of(1) },
      /tokenizer.ggml.token_type: expected 3 types/,
    ],
    [
      'a begin token that is none',
      { ...gguf, 'tokenizer.ggml.bos_token_id': 3 },
      /tokenizer.ggml.bos_token_id: expected below 3, got 3/,
    ],
    [
      'scores of another length',
      { ...gguf, 'tokenizer.ggml.model': 'llama', 'tokenizer.ggml.scores': Float64Array.of(1) },
      /tokenizer.ggml.scores: expected 3 scores/,
    ],
  ])('in GGUF: %s', async (_name, metadata, message) => {
    await expect(loadTokenizer({ kind: 'gguf', path: 'x.gguf', metadata })).rejects.toMatchObject({
      code: 'tokenizer_invalid',
      message: expect.stringMatching(message),
    });
  });

  test.each([
    [
      'another model',
      { model: { type: 'WordPiece', vocab: {} } },
      /model: expected BPE with merges, got "WordPiece"/,
    ],
    ['another decoder', { decoder: { type: 'WordPiece' } }, /decoder: expected ByteLevel/],
    [
      'ids beyond all bounds',
      { model: { type: 'BPE', vocab: { a: 2 ** 40 }, merges: [] } },
      /id of token "a": expected an integer from 0/,
    ],
    [
      'merges of other things',
      { model: { type: 'BPE', vocab: {}, merges: [1] } },
      /model.merges: expected pairs of strings, got 1/,
    ],
  ])('in tokenizer.json: %s', async (_name, changes, message) => {
    await expect(byteLevel([], changes)).rejects.toMatchObject({
      code: 'tokenizer_invalid',
      message: expect.stringMatching(message),
    });
  });

  test('a folder with a SentencePiece file alone', async () => {
    const folder = await writeFolder({ 'tokenizer.model': 'x' });
    await expect(loadTokenizer({ kind: 'folder', path: folder })).rejects.toMatchObject({
      message: expect.stringMatching(/tokenizer.json: expected a file, got none/),
    });
  });
});
