import { expect, test } from 'vitest';
import { maxGrammarCharacters, parseOutputFormat } from '../../../engine/grammar/output-format.ts';

const schema = { type: 'object' };
const named = (fields: object) => ({ response_format: { type: 'json_schema', json_schema: fields } });

test.each([
  [{}, null],
  [{ response_format: { type: 'text' } }, null],
  [{ response_format: { type: 'json_object' } }, ['json_schema', 'response_format']],
  [named({ name: 'a', schema, strict: true }), ['json_schema', 'response_format.json_schema.schema']],
  [{ guided_json: schema }, ['json_schema', 'guided_json']],
  [{ guided_json: '{"type":"object"}' }, ['json_schema', 'guided_json']],
  [{ guided_regex: 'a+' }, ['regex', 'guided_regex']],
  [{ guided_choice: ['a', '"b"'] }, ['lark', 'guided_choice']],
  [{ guided_grammar: 'start: "a"' }, ['lark', 'guided_grammar']],
  [{ structured_outputs: { json: schema } }, ['json_schema', 'structured_outputs.json']],
  [
    { structured_outputs: { json_object: true, regex: null } },
    ['json_schema', 'structured_outputs.json_object'],
  ],
])('%j asks for a form', (body, expected) => {
  const source = parseOutputFormat(body);
  expect(source && [source.kind, source.field]).toEqual(expected);
});

test('choices become the strings of a grammar', () => {
  expect(parseOutputFormat({ guided_choice: ['a', '"b"\n'] })!.text).toBe('start: "a" | "\\"b\\"\\n"');
});

test("white space is bounded, whatever the caller's schema says to the library", () => {
  for (const given of [schema, { ...schema, 'x-guidance': { lenient: true } }]) {
    const { text } = parseOutputFormat({ guided_json: given })!;
    expect(JSON.parse(text)['x-guidance']).toEqual({ whitespace_pattern: expect.stringContaining('{1,') });
  }
});

test.each([
  [{ response_format: 'json' }, 'response_format: expected an object, got "json"'],
  [
    { response_format: { type: 'xml' } },
    'response_format.type: expected text, json_object or json_schema, got "xml"',
  ],
  [
    { response_format: { type: 'json_schema' } },
    'response_format.json_schema: expected an object, got nothing',
  ],
  [named({ schema }), /^response_format\.json_schema\.name: expected 1 to 64/],
  [named({ name: 'a' }), /^response_format\.json_schema\.schema: expected a JSON schema/],
  [{ guided_json: '{' }, 'guided_json: expected a JSON schema, got "{"'],
  [{ guided_regex: 7 }, 'guided_regex: expected a string, got 7'],
  [{ guided_choice: [] }, 'guided_choice: expected 1 to 1024 strings, none empty, got a list of 0'],
  [{ guided_choice: ['a', ''] }, /^guided_choice: expected 1 to 1024 strings/],
  [{ structured_outputs: {} }, /^structured_outputs: expected exactly one of/],
  [{ structured_outputs: { json: schema, regex: 'a' } }, /^structured_outputs: expected exactly one of/],
  [{ structured_outputs: { structural_tag: 'x' } }, /^structured_outputs\.structural_tag: only json/],
  [{ guided_regex: 'a', guided_choice: ['a'] }, 'guided_choice: expected none beside guided_regex'],
  [
    { guided_regex: 'a'.repeat(maxGrammarCharacters + 1) },
    /^guided_regex: expected at most 262144 characters/,
  ],
])('%j is refused', (body, message) => {
  expect(() => parseOutputFormat(body as Record<string, unknown>)).toThrow(message);
});
