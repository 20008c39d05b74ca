import { expect, test } from 'vitest';
import { type GrammarLibrary, Grammars } from '../../../engine/grammar/grammars.ts';
import type { GrammarSource } from '../../../engine/grammar/output-format.ts';
import { fakeText } from '../../fixtures/fake-text.ts';

/** A library whose compiling waits until it is let go, one after the other. */
function library() {
  const compiling: { text: string; end: (error?: Error) => void }[] = [];
  let numVocabularies = 0;
  let numCompiled = 0;
  const fake: GrammarLibrary = {
    async openVocabulary() {
      numVocabularies++;
      return {} as never;
    },
    compileGrammar: (_vocabulary, _kind, text) =>
      new Promise((resolve, reject) => {
        numCompiled++;
        const end = (error?: Error) => (error ? reject(error) : resolve({ text } as never));
        compiling.push({ text, end });
      }),
  };
  const grammars = new Grammars({ library: fake, tokens: fakeText, now: () => 0, onCompiled: () => {} });
  return {
    grammars,
    compiling,
    get numVocabularies() {
      return numVocabularies;
    },
    get numCompiled() {
      return numCompiled;
    },
  };
}

const source = (text: string): GrammarSource => ({ kind: 'regex', text, field: 'guided_regex' });
const settled = () => new Promise((resolve) => setImmediate(() => setImmediate(resolve)));

/** Lets everything compile until nothing waits. */
async function compileAll({ compiling }: ReturnType<typeof library>) {
  await settled();
  for (let next = compiling.shift(); next; next = compiling.shift()) {
    next.end();
    await settled();
  }
}

test('a text is compiled once, however many ask for it', async () => {
  const parts = library();
  const all = [source('a'), source('a'), source('a')].map((s) => parts.grammars.get(s));
  await compileAll(parts);
  const [first, ...others] = await Promise.all(all);
  for (const other of others) expect(other).toBe(first);
  expect(await parts.grammars.get(source('a'))).toBe(first);
  expect([parts.numCompiled, parts.numVocabularies]).toEqual([1, 1]);
});

test('what was refused names the field, and is tried again', async () => {
  const parts = library();
  const refused = expect(parts.grammars.get(source('('))).rejects.toMatchObject({
    code: 'invalid_value',
    param: 'guided_regex',
    message: 'guided_regex: expected one that outputs can be made to follow, got: no end',
  });
  await settled();
  parts.compiling.shift()!.end(Object.assign(new Error('no end'), { code: 'grammar_invalid' }));
  await refused;
  expect(parts.grammars.numKept).toBe(0);
  const again = parts.grammars.get(source('('));
  await compileAll(parts);
  await again;
  expect(parts.numCompiled).toBe(2);
});

test('two compile at once; of those that wait, more than 64 are refused', async () => {
  const parts = library();
  const all = Array.from({ length: 66 }, (_, i) => parts.grammars.get(source(`a${i}`)));
  await settled();
  expect(parts.compiling).toHaveLength(2);
  await expect(parts.grammars.get(source('b'))).rejects.toMatchObject({ code: 'overloaded' });
  await compileAll(parts);
  await Promise.all(all);
});

test('keeps 256, and the one that was longest unused leaves', async () => {
  const parts = library();
  const get = async (text: string) => {
    const grammar = parts.grammars.get(source(text));
    await compileAll(parts);
    return grammar;
  };
  for (let i = 0; i < 256; i++) await get(`a${i}`);
  await get('a0');
  await get('b');
  expect(parts.grammars.numKept).toBe(256);
  const { numCompiled } = parts;
  await get('a0');
  expect(parts.numCompiled).toBe(numCompiled);
  await get('a1');
  expect(parts.numCompiled).toBe(numCompiled + 1);
});

test('long texts are kept within 4 MiB of them', async () => {
  const parts = library();
  for (let i = 0; i < 20; i++) {
    const grammar = parts.grammars.get(source(`${i}`.padEnd(256 * 1024, 'a')));
    await compileAll(parts);
    await grammar;
  }
  expect(parts.grammars.numKept).toBe(16);
});
