import { describe, expect, test } from 'vitest';
import {
  explainTools,
  parseToolUse,
  ToolCallReader,
  type ToolForm,
  toolFormOf,
  toolGrammar,
} from '../../../engine/grammar/tool-calls.ts';

const tool = (name: string, parameters: object = { type: 'object' }) => ({
  type: 'function',
  function: { name, parameters },
});

/** What a reader makes of a text, as one message: its content and calls, however the text is cut. */
function read(form: ToolForm, text: string, pieceLength = text.length) {
  const reader = new ToolCallReader(form);
  let content = '';
  const calls: [name: string, args: string][] = [];
  const take = (parts: ReturnType<ToolCallReader['push']>) => {
    for (const part of parts) {
      if ('content' in part) content += part.content;
      else if ('id' in part) calls.push([part.name, '']);
      else calls[part.call]![1] += part.arguments;
    }
  };
  for (let i = 0; i < text.length; i += pieceLength) take(reader.push(text.slice(i, i + pieceLength)));
  take(reader.finish());
  return { content, calls };
}

describe('the form of calls', () => {
  test.each([
    ['{% if tools %}<tools>{{ tools }}</tools> say <tool_call>', 'hermes'],
    ['{% for t in tools %}{{ t }}{% endfor %}[TOOL_CALLS]', 'mistral'],
    ['{% if tools %}{"name": f, "parameters": {}}', 'llama3'],
    ['{{ messages }}', 'hermes'],
  ])('is what the template teaches: %s', (template, form) => {
    expect(toolFormOf(template)).toBe(form);
  });
});

describe('reading', () => {
  const args = '{"a": "}\\"]{", "b": [1, {"c": "</tool_call>"}]}';
  const cases: [ToolForm, string, { content: string; calls: [string, string][] }][] = [
    ['hermes', 'Just text, a < b.', { content: 'Just text, a < b.', calls: [] }],
    [
      'hermes',
      `I look.\n<tool_call>\n{"name": "f", "arguments": ${args}}\n</tool_call>\n<tool_call>\n{"name": "g.h-i", "arguments": {}}\n</tool_call>`,
      {
        content: 'I look.\n',
        calls: [
          ['f', args],
          ['g.h-i', '{}'],
        ],
      },
    ],
    [
      'mistral',
      `[TOOL_CALLS][{"name": "f", "arguments": ${args}}, {"name": "g", "arguments": {}}]`,
      {
        content: '',
        calls: [
          ['f', args],
          ['g', '{}'],
        ],
      },
    ],
    ['llama3', `{"name": "f", "parameters": ${args}}`, { content: '', calls: [['f', args]] }],
    [
      'llama3',
      'No {"name": "f", "parameters": {}}',
      { content: 'No {"name": "f", "parameters": {}}', calls: [] },
    ],
    // Cut by max_tokens.
    ['hermes', '<tool_call>\n{"name": "f", "arguments": {"a": 1', { content: '', calls: [['f', '{"a": 1']] }],
    ['hermes', 'a <tool', { content: 'a <tool', calls: [] }],
  ];
  test.each(cases)('%s: %s', (form, text, expected) => {
    for (const pieceLength of [1, 2, 3, 7, text.length])
      expect(read(form, text, pieceLength)).toEqual(expected);
  });

  test('text goes out as soon as it cannot begin a call', () => {
    const reader = new ToolCallReader('hermes');
    expect(reader.push('one <')).toEqual([{ content: 'one ' }]);
    expect(reader.push('b> <tool_')).toEqual([{ content: '<b> ' }]);
    expect(reader.push('x')).toEqual([{ content: '<tool_x' }]);
  });

  test('ids differ, and are short where templates want them short', () => {
    const ids = ['hermes', 'mistral'].map((form) => {
      const trigger = form === 'hermes' ? '<tool_call>\n' : '[TOOL_CALLS][';
      const parts = new ToolCallReader(form as ToolForm).push(`${trigger}{"name": "f", "arguments": {`);
      return (parts[0] as { id: string }).id;
    });
    expect(ids[0]).toMatch(/^call_[0-9a-f]{24}$/);
    expect(ids[1]).toMatch(/^[0-9a-z]{9}$/);
  });
});

describe('a request', () => {
  test.each([
    [{}, null],
    [{ tools: [tool('f')], tool_choice: 'none' }, null],
    [{ tools: [], tool_choice: 'auto' }, null],
    [{ tools: [tool('f')] }, { choice: 'auto', isParallel: true }],
    [
      { tools: [tool('f')], parallel_tool_calls: false },
      { choice: 'auto', isParallel: false },
    ],
    [
      { tools: [tool('f')], tool_choice: 'required' },
      { choice: 'required', isParallel: true },
    ],
  ])('%j calls %j', (body, expected) => {
    const use = parseToolUse(body);
    if (expected === null) expect(use).toBeNull();
    else expect(use).toMatchObject(expected);
  });

  test('a named tool is the only one, called once', () => {
    const use = parseToolUse({
      tools: [tool('f'), tool('g')],
      tool_choice: { type: 'function', function: { name: 'g' } },
    });
    expect(use).toMatchObject({ choice: 'required', isParallel: false, tools: [{ name: 'g' }] });
  });

  test.each([
    [{ tool_choice: 'required' }, 'tools: expected at least one beside tool_choice, got null'],
    [{ tools: [tool('f')], tool_choice: 'any' }, /^tool_choice: expected none, auto, required/],
    [
      { tools: [tool('f')], tool_choice: { type: 'function', function: { name: 'h' } } },
      'tool_choice.function.name: expected the name of one of the tools, got "h"',
    ],
    [{ tools: [tool('f'), tool('f')] }, 'tools: expected one tool of a name, got "f"'],
    [{ tools: [{ type: 'custom' }] }, 'tools[0].type: expected function, got "custom"'],
    [{ tools: [tool('a b')] }, /^tools\[0\]\.function\.name: expected 1 to 64 letters/],
    [
      { tools: [tool('f', { type: 'array' })] },
      /^tools\[0\]\.function\.parameters: expected a JSON schema of type object/,
    ],
    [{ tools: Array.from({ length: 129 }, (_, i) => tool(`f${i}`)) }, /^tools: expected at most 128/],
    [{ tools: [tool('f')], parallel_tool_calls: 1 }, 'parallel_tool_calls: expected true or false, got 1'],
  ])('%j is refused', (body, message) => {
    expect(() => parseToolUse(body as Record<string, unknown>)).toThrow(message);
  });
});

test('a special token stands in the grammar by its id, since it is no text', () => {
  const use = parseToolUse({ tools: [tool('f')] })!;
  const { text } = toolGrammar(use, 'mistral', (word) => (word === '[TOOL_CALLS]' ? 5 : null));
  expect(text).toContain('begin: TEXT <[5]>');
  expect(toolGrammar(use, 'mistral', () => null).text).toContain('begin[lazy]: TEXT "[TOOL_CALLS]"');
});

test('a template without tools is told of them, of calls and of results in text', () => {
  const messages = [
    { role: 'system', content: 'Be kind.' },
    { role: 'user', content: 'Weather?' },
    {
      role: 'assistant',
      content: null,
      tool_calls: [{ id: '1', function: { name: 'f', arguments: '{"a": 1}' } }],
    },
    { role: 'tool', tool_call_id: '1', content: 'sunny' },
  ];
  const told = explainTools(messages, [tool('f')]);
  expect(told[0]!.content).toMatch(/^Be kind\.\n\n# Tools\n.+"name":"f".+<tool_call>/s);
  expect(told.slice(1)).toEqual([
    { role: 'user', content: 'Weather?' },
    { role: 'assistant', content: '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>' },
    { role: 'user', content: '<tool_response>\nsunny\n</tool_response>' },
  ]);
  expect(explainTools([{ role: 'user', content: 'x' }], [tool('f')])[0]!.role).toBe('system');
  expect(explainTools(messages.slice(0, 2), null)).toEqual(messages.slice(0, 2));
});
