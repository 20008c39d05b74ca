import { describe, expect, test, vi } from 'vitest';
import { lowestPriority } from '../../engine/protocol.ts';
import { defaultSampling } from '../../engine/sampling.ts';
import { type EngineParts, start, startEngine } from '../fixtures/fake-engine-parts.ts';
import { generateAlone } from '../fixtures/generate-alone.ts';

const text = (value: string) => new TextEncoder().encode(value);
/** The scripted model spells `words` after a prompt of `numPromptTokens`. */
const spell = (parts: EngineParts, numPromptTokens: number, words: string) => {
  parts.runtime.script = (position) => words.charCodeAt(position - numPromptTokens + 1);
};

/** Nothing is held, and the books add up. */
function expectNothingHeld({ arena, blocks, engine, fatal, tiers }: EngineParts) {
  arena.check();
  blocks.check([]);
  expect(fatal).toEqual([]);
  expect(blocks.numHeldPages).toBe(0);
  expect([engine.numRunning, engine.numWaiting]).toEqual([0, 0]);
  expect(tiers.statuses().every(({ inFlight }) => inFlight === 0)).toBe(true);
}

/** Resolves when every sequence's blocks are back. */
const idle = (parts: EngineParts) => vi.waitFor(() => expectNothingHeld(parts), { interval: 1 });

describe('a sequence', () => {
  test('gives the tokens that it gives alone, computed whole', async () => {
    const parts = startEngine();
    const prompt = text('x'.repeat(70));
    const { tokens } = await start(parts, { promptTokens: prompt, params: { maxTokens: 40 } }).done;
    expect(tokens).toEqual(await generateAlone(prompt, { ...defaultSampling(), temperature: 0 }, null, 40));
    await idle(parts);
  });

  test('ends by length at max_tokens', async () => {
    const { tokens, last } = await start(startEngine(), { params: { maxTokens: 3 } }).done;
    expect([tokens.length, last.finishReason]).toEqual([3, 'length']);
  });

  test('ends at the end token, which is not in its text', async () => {
    const parts = startEngine();
    spell(parts, 5, 'ab\u00ffcd');
    const { text, tokens, last } = await start(parts, { prompt: 'hello', params: { ignoreEos: false } }).done;
    expect([text, tokens.length, last.finishReason, last.stopReason]).toEqual(['ab', 3, 'stop', null]);
  });

  test('goes past the end token while min_tokens are not there', async () => {
    const parts = startEngine();
    spell(parts, 5, 'ab\u00ff');
    const params = { ignoreEos: false, minTokens: 3, maxTokens: 3 };
    const { tokens } = await start(parts, { prompt: 'hello', params }).done;
    expect(tokens[2]).not.toBe(255);
  });

  test('ends at a stop string that crosses tokens, and sends nothing of it', async () => {
    const parts = startEngine();
    spell(parts, 5, 'one END two');
    const params = { maxTokens: 11, stopStrings: ['END'] };
    const { text, last, outputs } = await start(parts, { prompt: 'hello', params }).done;
    expect([text, last.finishReason, last.stopReason]).toEqual(['one ', 'stop', 'END']);
    expect(outputs.every((output) => !output.text.includes('E'))).toBe(true);
    await idle(parts);
  });

  test('sends what was held back for a stop string when it ends by length', async () => {
    const parts = startEngine();
    spell(parts, 5, 'one EN');
    const { text } = await start(parts, { prompt: 'hello', params: { maxTokens: 6, stopStrings: ['END'] } })
      .done;
    expect(text).toBe('one EN');
  });

  test('draws the same tokens again for the same seed, and others for another', async () => {
    const parts = startEngine();
    const run = (seed: bigint) => start(parts, { params: { temperature: 1, seed } }).done;
    const [a, b, c] = await Promise.all([run(1n), run(1n), run(2n)]);
    expect(a.tokens).toEqual(b.tokens);
    expect(a.tokens).not.toEqual(c.tokens);
  });

  test('carries logprobs of the chosen and the likeliest tokens', async () => {
    const { outputs, tokens } = await start(startEngine(), { params: { numLogprobs: 2, maxTokens: 2 } }).done;
    expect(outputs.map(({ logprobs }) => logprobs?.tokenId)).toEqual(tokens);
    expect(outputs[0]?.logprobs?.topIds.length).toBe(2);
  });

  test('without a maximum ends by length when the arena has no more for it', async () => {
    const parts = startEngine({ runtime: { numPages: 4 } });
    const { tokens, last } = await start(parts, { params: { maxTokens: null } }).done;
    expect([tokens.length, last.finishReason]).toEqual([4 * 16 - 5 + 1, 'length']);
    await idle(parts);
  });
});

describe('refusals', () => {
  test('names both numbers when the prompt is longer than the context', () => {
    expect(() => start(startEngine(), { promptTokens: new Int32Array(600) })).toThrow(
      'maximum context length is 512 tokens, but the prompt has 600 tokens',
    );
  });

  test('refuses a sequence that cannot fit into the arena even alone', () => {
    const parts = startEngine({ runtime: { numPages: 4 } });
    expect(() => start(parts, { params: { maxTokens: 60 } })).toThrow('needs room for 65 tokens');
    expectNothingHeld(parts);
  });

  test('counts its adapter and the pinned ones when it asks whether a sequence fits, and no other', async () => {
    const parts = startEngine({ runtime: { numPages: 6 } });
    const a = await parts.tiers.load('a', '/adapters/a-r2', false);
    await parts.tiers.load('b', '/adapters/b-r1', false, true);
    expect(() => start(parts, { adapter: a, params: { maxTokens: 50 } })).toThrow(
      'has room for 48 beside its adapters and the pinned ones',
    );
    const { tokens } = await start(parts, { params: { maxTokens: 70 } }).done;
    expect([tokens.length, a.device]).toEqual([70, null]);
  });

  test('refuses when the seats and the queue are full, with when to come back', () => {
    const parts = startEngine({ limits: { maxSequences: 2, maxWaiting: 1 } });
    for (let i = 0; i < 3; i++) start(parts);
    expect(() => start(parts)).toThrow(expect.objectContaining({ code: 'overloaded', retryAfterSeconds: 1 }));
  });

  test('tells a refused one to come back when the queue is done at the recent pace', async () => {
    let nowMs = 0;
    const parts = startEngine({ limits: { maxSequences: 1, maxWaiting: 5 }, now: () => nowMs });
    for (let i = 0; i < 4; i++) {
      await start(parts).done;
      nowMs += 2000;
    }
    for (let i = 0; i < 6; i++) start(parts);
    expect(() => start(parts)).toThrow(expect.objectContaining({ retryAfterSeconds: 6 * 2 }));
  });

  test('takes all choices of a request or none', () => {
    const parts = startEngine({ limits: { maxSequences: 2, maxWaiting: 1 } });
    const request = {
      promptTokens: text('hi'),
      params: defaultSampling(),
      adapters: [],
      onOutput: () => {},
    };
    expect(() => parts.engine.add([request, request, request, request])).toThrow('the queue holds 1');
    expect(parts.engine.numWaiting).toBe(0);
  });
});

describe('cancelling', () => {
  test('a waiting sequence takes it out of the queue', async () => {
    const parts = startEngine();
    const { handle, done } = start(parts);
    handle.cancel();
    expect((await done).last.finishReason).toBe('abort');
    expectNothingHeld(parts);
  });

  test('a sequence in a step gives its blocks back before the next step is planned', async () => {
    const parts = startEngine({ maxStepsInFlight: 1 });
    const gate = Promise.withResolvers<void>();
    const other = start(parts, { params: { maxTokens: 30 } });
    const { handle, done } = start(parts, {
      params: { maxTokens: 400 },
      onOutput: ({ finishReason }) => {
        if (!finishReason) parts.runtime.gate = gate.promise;
      },
    });
    await vi.waitFor(() => expect(handle.sequence.numOutputTokens).toBeGreaterThan(0), { interval: 1 });
    const numUsed = parts.blocks.numHeldPages;
    handle.cancel();
    await done;
    expect(parts.blocks.numHeldPages).toBe(numUsed);
    const numSteps = parts.runtime.steps.length;
    gate.resolve();
    await other.done;
    expect(parts.runtime.steps.slice(numSteps).every(({ numSequences }) => numSequences === 1)).toBe(true);
    await idle(parts);
  });

  test('twice says one last word', async () => {
    const parts = startEngine();
    const { handle, done } = start(parts);
    handle.cancel();
    handle.cancel();
    expect((await done).outputs.length).toBe(1);
  });
});

describe('planning ahead', () => {
  /** No step ends before `open` is called. */
  function holdSteps(parts: EngineParts): () => void {
    const gate = Promise.withResolvers<void>();
    parts.runtime.gate = gate.promise;
    return gate.resolve;
  }
  const untilHandedIn = (parts: EngineParts, numSteps: number) =>
    vi.waitFor(() => expect(parts.runtime.steps.length).toBe(numSteps), { interval: 1 });

  test('hands a step in while the one before runs, and no third', async () => {
    const parts = startEngine();
    const open = holdSteps(parts);
    const { done } = start(parts, { prompt: 'x'.repeat(40) });
    await untilHandedIn(parts, 2);
    start(parts);
    await new Promise((resolve) => setTimeout(resolve, 5));
    expect(parts.runtime.steps.map(({ numTokens }) => numTokens)).toEqual([32, 8]);
    open();
    await done;
    await idle(parts);
  });

  test('takes in who comes while one step runs and nothing is left to plan', async () => {
    const parts = startEngine();
    const open = holdSteps(parts);
    start(parts, { params: { maxTokens: 1 } });
    await untilHandedIn(parts, 1);
    start(parts, { params: { maxTokens: 1 } });
    await untilHandedIn(parts, 2);
    open();
    await idle(parts);
  });

  test('knows the length ahead: no row is computed for nothing', async () => {
    const parts = startEngine();
    await Promise.all([3, 5, 8].map((maxTokens) => start(parts, { params: { maxTokens } }).done));
    await idle(parts);
    expect(parts.runtime.steps.map(({ numSequences }) => numSequences)).toEqual([3, 3, 3, 2, 2, 1, 1, 1]);
  });

  test('gives the seat of one that is to end by length to the next in the queue at once', async () => {
    const parts = startEngine({ limits: { maxSequences: 1 } });
    await Promise.all([start(parts, { params: { maxTokens: 2 } }).done, start(parts).done]);
    expect(parts.runtime.steps.length).toBe(2 + 8);
    await idle(parts);
  });

  test('throws away what was drawn after an end token', async () => {
    const parts = startEngine();
    spell(parts, 5, 'ab\u00ffcdefgh');
    const { tokens, outputs } = await start(parts, { prompt: 'hello', params: { ignoreEos: false } }).done;
    expect([tokens.length, outputs.length]).toEqual([3, 3]);
    await idle(parts);
    expect(parts.runtime.steps.length).toBe(4);
  });

  test('throws away what was drawn after a stop string', async () => {
    const parts = startEngine();
    spell(parts, 5, 'one two three');
    const params = { maxTokens: 13, stopStrings: ['two'] };
    const { tokens, text: said, outputs } = await start(parts, { prompt: 'hello', params }).done;
    expect([said, tokens.length, outputs.length]).toEqual(['one ', 7, 7]);
    await idle(parts);
    expect(parts.runtime.steps.length).toBeLessThanOrEqual(9);
  });

  test('bans end tokens up to min_tokens and not beyond', async () => {
    const parts = startEngine();
    parts.runtime.script = () => 255;
    const params = { ignoreEos: false, minTokens: 3 };
    const { tokens } = await start(parts, { params }).done;
    expect([tokens.length, tokens.indexOf(255)]).toEqual([4, 3]);
  });

  test('counts the token that is being drawn in penalties', async () => {
    const params = { ...defaultSampling(), temperature: 0, presencePenalty: 1, maxTokens: 20 };
    const { tokens } = await start(startEngine(), { params: { ...params, ignoreEos: true } }).done;
    expect(tokens).toEqual(await generateAlone(text('hello'), params, null, 20));
  });

  test('a cancelled sequence keeps its blocks until the steps that have it are over', async () => {
    const parts = startEngine();
    const open = holdSteps(parts);
    const other = start(parts, { params: { maxTokens: 30 } });
    const { handle, done } = start(parts, { prompt: 'x'.repeat(20), params: { maxTokens: 30 } });
    await untilHandedIn(parts, 2);
    const numUsed = parts.blocks.numHeldPages;
    handle.cancel();
    expect((await done).outputs.length).toBe(1);
    expect(parts.blocks.numHeldPages).toBe(numUsed);
    open();
    const { tokens } = await other.done;
    expect(tokens).toEqual(
      await generateAlone(text('hello'), { ...defaultSampling(), temperature: 0 }, null, 30),
    );
    expect(parts.runtime.steps.slice(2).every(({ numSequences }) => numSequences === 1)).toBe(true);
    await idle(parts);
  });

  test('a plan that preempts waits for the step that runs', async () => {
    const parts = startEngine({ runtime: { numPages: 4 } });
    const open = holdSteps(parts);
    // Their prompts fill the arena. The third step would have the third token of the first, which needs a page.
    const prompts = ['x'.repeat(31), 'y'.repeat(31)];
    const numHandedIn: number[] = [];
    const onOutput = () => void numHandedIn.push(parts.runtime.steps.length);
    const runs = prompts.map((prompt) => start(parts, { prompt, params: { maxTokens: 8 }, onOutput }));
    await untilHandedIn(parts, 2);
    open();
    for (const [i, run] of runs.entries()) {
      const alone = { ...defaultSampling(), temperature: 0 };
      expect((await run.done).tokens).toEqual(await generateAlone(text(prompts[i]!), alone, null, 8));
    }
    // When the first step was told, the second ran, and had all pages.
    expect(numHandedIn[0]).toBe(2);
    expect(await parts.metrics.registry.getSingleMetricAsString('vllm:num_preemptions_total')).toMatch(/ 1$/);
    await idle(parts);
  });

  test('a failed step fails its own sequences, and not those that the next step has besides', async () => {
    const parts = startEngine();
    const open = holdSteps(parts);
    const first = start(parts, {
      onOutput: () => {
        parts.runtime.failNextStep ??= new Error('boom');
      },
    });
    await untilHandedIn(parts, 2);
    const second = start(parts, { prompt: 'others' });
    open();
    expect((await first.done).last.error).toMatchObject({ code: 'step_failed' });
    // Telling the error has set it once more.
    parts.runtime.failNextStep = null;
    const { tokens, last } = await second.done;
    expect(last.finishReason).toBe('length');
    expect(tokens).toEqual(
      await generateAlone(text('others'), { ...defaultSampling(), temperature: 0 }, null, 8),
    );
    await idle(parts);
  });

  test('closing waits for both steps', async () => {
    const parts = startEngine();
    const open = holdSteps(parts);
    start(parts);
    await untilHandedIn(parts, 2);
    const closed = parts.engine.close();
    open();
    await closed;
    parts.runtime.close();
    expectNothingHeld(parts);
  });

  test('measures the gap between steps while there is work', async () => {
    const parts = startEngine();
    await start(parts, { params: { maxTokens: 5 } }).done;
    await idle(parts);
    await start(parts, { params: { maxTokens: 5 } }).done;
    await idle(parts);
    const { values } = await parts.metrics.registry.getSingleMetric('motet_step_gap_seconds')!.get();
    expect(
      values.find((value) => 'metricName' in value && value.metricName === 'motet_step_gap_seconds_count')
        ?.value,
    ).toBe(2 * 4);
  });
});

describe('preemption', () => {
  test('changes no token, and counts', async () => {
    const parts = startEngine({ runtime: { numPages: 8 } });
    const prompts = ['first prompt', 'second prompt', 'third prompt'].map(text);
    const params = { ...defaultSampling(), temperature: 1, seed: 5n, maxTokens: 60 };
    const outcomes = await Promise.all(
      prompts.map((promptTokens) => start(parts, { promptTokens, params }).done),
    );
    for (const [i, { tokens }] of outcomes.entries()) {
      expect(tokens).toEqual(await generateAlone(prompts[i]!, params, null, 60));
    }
    expect(await parts.metrics.registry.getSingleMetricAsString('vllm:num_preemptions_total')).not.toMatch(
      / 0$/,
    );
    await idle(parts);
  });
});

describe('a tenant with more than its share of the seats', () => {
  const of = (tenant: string) => ({ standing: { tenant, weight: 1, priority: 0 } });

  test('gives one to another within one step, and goes on to the same tokens', async () => {
    const parts = startEngine({ limits: { maxSequences: 2 } });
    const prompts = ['the first of many', 'the second of many', 'the third of many'];
    const flood = prompts.map((prompt) =>
      start(parts, { ...of('flood'), prompt, params: { maxTokens: 60 } }),
    );
    await vi.waitFor(() => expect(parts.runtime.steps.length).toBeGreaterThan(20), { interval: 1 });
    const numSteps = parts.runtime.steps.length;
    await start(parts, { ...of('quiet'), prompt: 'quiet', params: { maxTokens: 3 } }).done;
    // The two steps that were in flight or being planned, its three, and one more that was handed in before it was told.
    expect(parts.runtime.steps.length - numSteps).toBeLessThanOrEqual(6);
    const outcomes = await Promise.all(flood.map(({ done }) => done));
    expect(flood.map(({ handle }) => handle.sequence.numYields)).toEqual([0, 1, 0]);
    for (const [i, { tokens }] of outcomes.entries())
      expect(tokens).toEqual(
        await generateAlone(text(prompts[i]!), { ...defaultSampling(), temperature: 0 }, null, 60),
      );
    const yields = await parts.metrics.registry.getSingleMetric('motet_yields_total')!.get();
    expect(yields.values.map(({ labels, value }) => [labels.reason, value])).toEqual([
      ['priority', 0],
      ['share', 1],
    ]);
    await idle(parts);
  });
});

describe('a sequence of the lowest priority', () => {
  const line = { standing: { tenant: 'jobs', weight: 1, priority: lowestPriority } };

  test('gives its seat to another within one step, and goes on to the same tokens', async () => {
    const parts = startEngine({ limits: { maxSequences: 1 } });
    const lineRun = start(parts, { ...line, prompt: 'a line of a batch', params: { maxTokens: 60 } });
    await vi.waitFor(() => expect(parts.runtime.steps.length).toBeGreaterThan(20), { interval: 1 });
    const numSteps = parts.runtime.steps.length;
    const online = start(parts, { prompt: 'online', params: { maxTokens: 3 } });
    await online.done;
    // The two steps that were in flight or being planned, its three, and one more that was handed in before it was told.
    expect(parts.runtime.steps.length - numSteps).toBeLessThanOrEqual(6);
    const { tokens } = await lineRun.done;
    expect(lineRun.handle.sequence.numYields).toBe(1);
    expect(tokens).toEqual(
      await generateAlone(text('a line of a batch'), { ...defaultSampling(), temperature: 0 }, null, 60),
    );
    await idle(parts);
  });

  test('ends although others come all the time', async () => {
    const parts = startEngine({ limits: { maxSequences: 2 } });
    const lineRun = start(parts, { ...line, params: { maxTokens: 40 } });
    let isDone = false;
    void lineRun.done.then(() => {
      isDone = true;
    });
    let numOnline = 0;
    const ask = async () => {
      while (!isDone && numOnline++ < 5_000) await start(parts, { params: { maxTokens: 2 } }).done;
    };
    await Promise.all(Array.from({ length: 6 }, ask));
    expect(isDone).toBe(true);
    expect(lineRun.handle.sequence.numYields).toBe(2);
    await idle(parts);
  });

  test('that is cancelled after it gave way leaves nothing behind', async () => {
    const parts = startEngine({ limits: { maxSequences: 1 } });
    const lineRun = start(parts, { ...line, params: { maxTokens: 400 } });
    await vi.waitFor(() => expect(parts.runtime.steps.length).toBeGreaterThan(3), { interval: 1 });
    const online = start(parts, { params: { maxTokens: 50 } });
    await vi.waitFor(() => expect(lineRun.handle.sequence.status).toBe('waiting'), { interval: 1 });
    lineRun.handle.cancel();
    expect((await lineRun.done).last.finishReason).toBe('abort');
    await online.done;
    await idle(parts);
  });
});

test('tenants share the batch whatever they ask for', async () => {
  const parts = startEngine({ limits: { maxSequences: 2 } });
  const order: string[] = [];
  const ask = (tenant: string) => {
    const { done } = start(parts, { standing: { tenant, weight: 1, priority: 0 }, params: { maxTokens: 4 } });
    return done.then(() => order.push(tenant));
  };
  const flood = Array.from({ length: 20 }, () => ask('flood'));
  await Promise.all([...flood, ask('quiet'), ask('quiet')]);
  // Behind those that had their seats, and beside one of the flood each.
  expect(order.lastIndexOf('quiet')).toBeLessThan(8);
  await idle(parts);
});

describe('a failed step', () => {
  test('fails its sequences, and the engine goes on', async () => {
    const parts = startEngine();
    parts.runtime.failNextStep = new Error('boom');
    const { last } = await start(parts).done;
    expect(last.finishReason).toBe('error');
    expect(last.error).toMatchObject({ code: 'step_failed' });
    expect((await start(parts).done).last.finishReason).toBe('length');
    await idle(parts);
  });

  test('is fatal when the runtime is closed', async () => {
    const parts = startEngine();
    parts.runtime.close();
    start(parts);
    await vi.waitFor(() => expect(parts.fatal).toMatchObject([{ code: 'closed' }]), { interval: 1 });
  });
});

test('a listener that throws ends its own sequence and no other', async () => {
  const parts = startEngine();
  const other = start(parts, { params: { maxTokens: 20 } });
  start(parts, {
    params: { maxTokens: 400 },
    onOutput: () => {
      throw new Error('no');
    },
  });
  expect((await other.done).last.finishReason).toBe('length');
  await idle(parts);
  expect(parts.runtime.steps.length).toBeLessThan(40);
});

describe('draining', () => {
  test('refuses new sequences and resolves when the last one has said its last word', async () => {
    const parts = startEngine();
    let isDone = false;
    start(parts, { onOutput: ({ finishReason }) => (isDone = finishReason === 'length') });
    const drained = parts.engine.drain(10_000);
    expect(() => start(parts)).toThrow(expect.objectContaining({ code: 'draining' }));
    await drained;
    expect(isDone).toBe(true);
    expectNothingHeld(parts);
  });

  test('ends what is left when its time is up', async () => {
    const parts = startEngine();
    const gate = Promise.withResolvers<void>();
    parts.runtime.gate = gate.promise;
    const { done } = start(parts);
    await parts.engine.drain(1);
    expect((await done).last.error).toMatchObject({ code: 'draining' });
    gate.resolve();
    await parts.engine.close();
    expectNothingHeld(parts);
  });
});

describe('a batch', () => {
  test('mixes the base and any adapters', async () => {
    const parts = startEngine();
    const adapters = await Promise.all(
      ['a', 'b'].map((name) => parts.tiers.load(name, `/adapters/${name}-r1`, false)),
    );
    const voices = [null, ...adapters, null];
    const outcomes = await Promise.all(voices.map((adapter) => start(parts, { adapter }).done));
    const alone = { ...defaultSampling(), temperature: 0 };
    for (const [i, { tokens }] of outcomes.entries()) {
      expect(tokens).toEqual(await generateAlone(text('hello'), alone, voices[i]?.file.path ?? null, 8));
    }
    expect(parts.runtime.steps.some((step) => step.numSequences === 4 && step.numAdapters === 2)).toBe(true);
    await idle(parts);
  });

  test('never has more tokens or sequences than the limits', async () => {
    const parts = startEngine({ limits: { maxBatchTokens: 10, maxSequences: 3 } });
    await Promise.all(Array.from({ length: 9 }, () => start(parts, { prompt: 'x'.repeat(23) }).done));
    expect(Math.max(...parts.runtime.steps.map(({ numTokens }) => numTokens))).toBeLessThanOrEqual(10);
    expect(Math.max(...parts.runtime.steps.map(({ numSequences }) => numSequences))).toBeLessThanOrEqual(3);
  });
});
