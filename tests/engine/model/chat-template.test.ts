import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { ChatTemplate, strftime } from '../../../engine/model/chat-template.ts';
import type { ChatMessage } from '../../../engine/openai.ts';
import { goldensFolder } from '../../fixtures/golden.ts';

const tokens = { bosToken: '<s>', eosToken: '</s>' };
const options = { tools: null, addGenerationPrompt: false, variables: {} };
const render = (template: string, messages: object[] = [], changes: object = {}) =>
  new ChatTemplate(template, tokens).render(messages as ChatMessage[], { ...options, ...changes });
const user = (content: unknown) => ({ role: 'user', content });

test.each(['smollm2', 'tiny/llama3', 'tiny/mistral', 'tiny/qwen2', 'tiny/qwen3', 'tiny/gemma3'])(
  'renders every conversation of %s as transformers does',
  (name) => {
    const golden = JSON.parse(readFileSync(join(goldensFolder, name, 'tokenize.json'), 'utf8'));
    const template = new ChatTemplate(golden.chatTemplate, { bosToken: '<|bos|>', eosToken: '<|end|>' });
    for (const { messages, addGenerationPrompt, rendered } of golden.chats) {
      expect(template.render(messages, { ...options, addGenerationPrompt })).toBe(rendered);
    }
  },
);

test('gives the template its tokens, the tools and the variables of the caller', () => {
  const template =
    '{{ bos_token }}{{ tools | length }}{{ enable_thinking }}{{ eos_token }}{{ add_generation_prompt }}';
  expect(
    render(template, [], { tools: [{}, {}], variables: { enable_thinking: 'x', add_generation_prompt: 7 } }),
  ).toBe('<s>2x</s>false');
});

describe('content', () => {
  const asText = '{% for message in messages %}{{ message.content }}{% endfor %}';
  const asParts =
    "{% for message in messages %}{% for part in message['content'] %}[{{ part.type }} {{ part.text }}]{% endfor %}{% endfor %}";
  const parts = [
    { type: 'text', text: 'a' },
    { type: 'text', text: 'b' },
  ];

  test('given as parts becomes text where the template writes text', () => {
    expect(render(asText, [user(parts)])).toBe('a\nb');
  });

  test('given as text becomes a part where the template goes over parts', () => {
    expect(render(asParts, [user('a')])).toBe('[text a]');
    expect(render(asParts, [user(parts)])).toBe('[text a][text b]');
  });

  test('stays text where the template knows both', () => {
    const both = `{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}${asParts}{% endif %}{% endfor %}`;
    expect(render(both, [user('a')])).toBe('a');
  });
});

test('gives the arguments of a call as an object', () => {
  const call = (text: string) => ({
    role: 'assistant',
    content: null,
    tool_calls: [{ function: { name: 'f', arguments: text } }],
  });
  const template =
    '{{ messages[0].tool_calls[0].function.arguments.city }}|{{ messages[0].content is none }}';
  expect(render(template, [call('{"city":"Ulm"}')])).toBe('Ulm|true');
  expect(render('{{ messages[0].tool_calls[0].function.arguments }}', [call('no json')])).toBe('no json');
});

describe("is refused as the request's fault", () => {
  const refusal = (template: string, messages: object[] = [], changes: object = {}) => {
    try {
      return render(template, messages, changes);
    } catch (error) {
      return error;
    }
  };
  test('when the template raises, with its words', () => {
    expect(refusal("{{ raise_exception('roles must\n alternate') }}")).toMatchObject({
      code: 'invalid_value',
      param: 'messages',
      message: "messages: the model's chat template refuses them: roles must alternate",
    });
  });

  test('when the template fails on the messages', () => {
    expect(refusal('{{ messages[0].content | no_such_filter }}', [user('a')])).toMatchObject({
      code: 'invalid_value',
    });
  });

  test('when a variable of the caller would replace a built-in that ends the template', () => {
    expect(refusal("{{ raise_exception('no') }}", [], { variables: { raise_exception: 'x' } })).toMatchObject(
      { message: expect.stringMatching(/no$/) },
    );
  });

  test('when it would make a list without end', () => {
    expect(refusal('{% for i in range(1000000000) %}x{% endfor %}')).toMatchObject({
      message: expect.stringMatching(/range: expected at most 100000 numbers/),
    });
  });

  test('when it takes too long', () => {
    const slow = '{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}';
    expect(refusal(slow)).toMatchObject({
      code: 'invalid_value',
      message: expect.stringMatching(/timed out/),
    });
  });
});

test('a text that is no template is refused when it is read', () => {
  expect(() => new ChatTemplate('{% for %}', tokens)).toThrow();
  expect(() => new ChatTemplate(' '.repeat(2 ** 20 + 1), tokens)).toThrow(/at most 1048576 characters/);
});

test('writes dates as Python does', () => {
  const date = new Date(2026, 0, 5, 15, 4, 9);
  expect(strftime(date, '%d %b %Y|%A %B %-d|%H:%M:%S %I %p %%|%y-%m')).toBe(
    '05 Jan 2026|Monday January %-d|15:04:09 03 PM %|26-01',
  );
});
