/** Adapters that requests have merged: made once and kept, within bounds, and gone with what they were made of. */
import { existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { hostname, tmpdir } from 'node:os';
import { join } from 'node:path';
import { pino } from 'pino';
import { describe, expect, onTestFinished, test, vi } from 'vitest';
import type { AdapterTiers } from '../../engine/adapters/adapter-tiers.ts';
import { alone, compose, voiceOf } from '../../engine/adapters/composition.ts';
import { Merges, type MergesOptions, mergeProblem } from '../../engine/adapters/merges.ts';
import {
  type AdapterList,
  adaptersHeader,
  enginePaths,
  type MergeRule,
  mergeHeader,
} from '../../engine/protocol.ts';
import { purgeAdapter } from '../../engine/purge.ts';
import { type EngineParts, prompt, start, startEngine } from '../fixtures/fake-engine-parts.ts';
import { greedyAlone } from '../fixtures/generate-alone.ts';
import { serveFake } from '../fixtures/serve-fake.ts';

const ties: MergeRule = { method: 'ties', density: 0.5, majoritySign: 'total' };
const nobodyLeaves = new AbortController().signal;

function tempFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), 'motet-merges-'));
  onTestFinished(() => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

/** What the fake adapter reader says of a folder. */
const digestOf = (folder: string) => `sha256:${Buffer.from(folder).toString('hex')}`;

/** Makes merges of nothing, when the gate is open; each is of 100 bytes. */
async function openMerges(tiers: AdapterTiers, options: Partial<MergesOptions> = {}) {
  const folder = tempFolder();
  const made: string[] = [];
  const aborted: string[] = [];
  const gates: PromiseWithResolvers<void>[] = [];
  const script = { isGated: false, gates, made, aborted };
  const merges = await Merges.open({
    tiers,
    folder,
    maxBytes: 1_000,
    async make({ members, rule, out }, signal) {
      const what = `${rule.method} of ${members.map(({ folder, weight }) => `${folder}@${weight}`).join(' ')}`;
      if (script.isGated) {
        const gate = Promise.withResolvers<void>();
        gates.push(gate);
        signal.addEventListener('abort', () => gate.reject(signal.reason));
        await gate.promise.catch((reason) => {
          aborted.push(what);
          throw reason;
        });
      }
      made.push(what);
      return { digest: digestOf(out), sizeBytes: 100 };
    },
    log: pino({ level: 'silent' }),
    now: () => performance.now(),
    ...options,
  });
  return { merges, folder, script };
}

async function withMerges(names: string[], options: Partial<MergesOptions> = {}) {
  const parts = startEngine();
  for (const name of names) await parts.tiers.load(name, `/${name}-r1`, false);
  return { parts, ...(await openMerges(parts.tiers, options)) };
}

const sumOf = ({ tiers }: Pick<EngineParts, 'tiers'>, weights: Record<string, number>) =>
  compose(Object.entries(weights).map(([name, weight]) => ({ adapter: tiers.get(name)!, weight })));

describe('a merge', () => {
  test('is made once for all who ask for it together, in any order of names, and then kept', async () => {
    const { parts, merges, script } = await withMerges(['a', 'b']);
    const results: string[] = [];
    merges.onRequest = (result) => results.push(result);
    const holds = await Promise.all([
      merges.hold(sumOf(parts, { a: 1, b: 0.5 }), ties, nobodyLeaves),
      merges.hold(sumOf(parts, { b: 0.5, a: 1 }), ties, nobodyLeaves),
    ]);
    const again = await merges.hold(sumOf(parts, { b: 0.5, a: 1 }), { ...ties }, nobodyLeaves);
    expect(script.made).toEqual(['ties of /a-r1@1 /b-r1@0.5']);
    expect(results).toEqual(['made', 'made', 'kept']);
    const { adapter } = again;
    expect(holds.map((hold) => hold.adapter)).toEqual([adapter, adapter]);
    expect(merges.find(sumOf(parts, { a: 1, b: 0.5 }), ties)).toBe(adapter);
    expect([adapter.names.size, adapter.device, merges.numKept, merges.numBytes]).toEqual([0, null, 1, 100]);
  });

  test('is another one with other weights, another rule or other adapters', async () => {
    const { parts, merges, script } = await withMerges(['a', 'b', 'c']);
    for (const [weights, rule] of [
      [{ a: 1, b: 1 }, ties],
      [{ a: 1, b: 0.5 }, ties],
      [{ a: 1, c: 1 }, ties],
      [
        { a: 1, b: 1 },
        { ...ties, density: 0.25 },
      ],
      [
        { a: 1, b: 1 },
        { ...ties, majoritySign: 'frequency' },
      ],
      [
        { a: 1, b: 1 },
        { ...ties, method: 'dare_ties' },
      ],
    ] as [Record<string, number>, MergeRule][]) {
      await merges.hold(sumOf(parts, weights), rule, nobodyLeaves);
    }
    expect([script.made.length, merges.numKept]).toEqual([6, 6]);
  });

  test('answers as the adapter that it is, with KV of its own, and comes back when it has left the device', async () => {
    const { parts, merges } = await withMerges(['a', 'b']);
    const { adapter } = await merges.hold(sumOf(parts, { a: 1, b: 1 }), ties, nobodyLeaves);
    const ask = async (adapters = alone(adapter)) => {
      const { handle, done } = start(parts, { promptTokens: prompt(64), adapters });
      const { tokens } = await done;
      return { tokens, cached: handle.sequence.numCachedTokens };
    };
    const expected = await greedyAlone(prompt(64), 8, [{ path: adapter.file.path, weight: 1 }]);
    expect(await ask()).toEqual({ tokens: expected, cached: 0 });
    expect(await ask()).toEqual({ tokens: expected, cached: 48 });
    expect((await ask(sumOf(parts, { a: 1, b: 1 }))).cached).toBe(0);
    expect(parts.tiers.residency.evictWaiting()).toBe(true);
    expect(adapter.device).toBe(null);
    expect((await ask()).tokens).toEqual(expected);
    expect(parts.fatal).toEqual([]);
  });

  test('is a voice that is found by its own digest and those of its adapters', async () => {
    const { parts, merges } = await withMerges(['a', 'b']);
    const { adapter } = await merges.hold(sumOf(parts, { a: 1, b: -1 }), ties, nobodyLeaves);
    expect(voiceOf(alone(adapter))).toBe([adapter.digest, digestOf('/a-r1'), digestOf('/b-r1')].join('+'));
  });
});

describe('who waits for a merge', () => {
  test('waits in a line that is bounded, since one is made at a time', async () => {
    const { parts, merges, script } = await withMerges(['a', 'b'], { maxQueued: 1 });
    script.isGated = true;
    const hold = (weight: number) => merges.hold(sumOf(parts, { a: 1, b: weight }), ties, nobodyLeaves);
    const [first, second] = [hold(1), hold(2)];
    await vi.waitFor(() => expect(script.gates).toHaveLength(1));
    await expect(hold(3)).rejects.toMatchObject({ code: 'too_many_loads' });
    script.gates[0]!.resolve();
    await first;
    await vi.waitFor(() => expect(script.gates).toHaveLength(2));
    script.gates[1]!.resolve();
    await second;
  });

  test('waits for a bounded time, and finds it made when it comes again', async () => {
    const { parts, merges, script } = await withMerges(['a', 'b'], { waitMs: 5 });
    script.isGated = true;
    const members = sumOf(parts, { a: 1, b: 1 });
    await expect(merges.hold(members, ties, nobodyLeaves)).rejects.toMatchObject({
      code: 'merge_not_ready',
      retryAfterSeconds: 10,
    });
    await vi.waitFor(() => expect(script.gates).toHaveLength(1));
    script.gates[0]!.resolve();
    await vi.waitFor(() => expect(merges.find(members, ties)).toBeDefined());
    expect(script.aborted).toEqual([]);
  });

  test('may leave: what nobody waits for any more is not made, and what somebody does is', async () => {
    const { parts, merges, script, folder } = await withMerges(['a', 'b']);
    script.isGated = true;
    const members = sumOf(parts, { a: 1, b: 1 });
    const [one, other] = [new AbortController(), new AbortController()];
    const holds = [merges.hold(members, ties, one.signal), merges.hold(members, ties, other.signal)];
    await vi.waitFor(() => expect(script.gates).toHaveLength(1));
    one.abort();
    await expect(holds[0]).rejects.toMatchObject({ code: 'merge_not_ready' });
    expect(script.aborted).toEqual([]);
    other.abort();
    await expect(holds[1]).rejects.toMatchObject({ code: 'merge_not_ready' });
    await vi.waitFor(() => expect(readdirSync(folder)).toEqual([]));
    expect([script.aborted.length, merges.numKept]).toEqual([1, 0]);

    const third = merges.hold(members, ties, nobodyLeaves);
    await vi.waitFor(() => expect(script.gates).toHaveLength(2));
    script.gates[1]!.resolve();
    await third;
  });

  test('hears why it cannot be made, and what was begun is gone', async () => {
    const { parts, merges, folder } = await withMerges(['a', 'b'], {
      make: async () => {
        throw new Error('the disk is full');
      },
    });
    await expect(merges.hold(sumOf(parts, { a: 1, b: 1 }), ties, nobodyLeaves)).rejects.toThrow(
      'disk is full',
    );
    expect([readdirSync(folder), merges.numKept]).toEqual([[], 0]);
  });
});

describe('merges that are kept', () => {
  test.each([
    ['number', { maxMerges: 2 }],
    ['bytes', { maxBytes: 250 }],
  ])('have a bounded %s: the least recently used leave, with their files', async (_what, bounds) => {
    const { parts, merges, folder } = await withMerges(['a', 'b'], bounds);
    const hold = (weight: number) => merges.hold(sumOf(parts, { a: 1, b: weight }), ties, nobodyLeaves);
    const find = (weight: number) => merges.find(sumOf(parts, { a: 1, b: weight }), ties);
    for (const weight of [1, 2, 1, 3]) (await hold(weight)).letGo();
    expect([find(1), find(2), find(3)].map((adapter) => adapter !== undefined)).toEqual([true, false, true]);
    await merges.settle();
    expect(readdirSync(folder)).toHaveLength(2);
    expect([...parts.tiers.adapters]).toHaveLength(4);
  });

  test('stay while they are held, and their files while a sequence has them', async () => {
    const { parts, merges, folder } = await withMerges(['a', 'b'], { maxMerges: 1 });
    const hold = (weight: number) => merges.hold(sumOf(parts, { a: 1, b: weight }), ties, nobodyLeaves);
    const first = await hold(1);
    const second = await hold(2);
    expect(merges.numKept).toBe(2);
    const { done } = start(parts, { adapters: alone(first.adapter) });
    first.letGo();
    first.letGo();
    expect([merges.numKept, readdirSync(folder).length]).toEqual([1, 2]);
    const { tokens } = await done;
    expect(tokens).toHaveLength(8);
    await vi.waitFor(() => expect(readdirSync(folder)).toHaveLength(1));
    second.letGo();
    expect(merges.numKept).toBe(1);
  });

  test.each([
    ['unloaded', ({ tiers }: EngineParts) => tiers.unload('a')],
    ['replaced', ({ tiers }: EngineParts) => tiers.load('a', '/other-r1', true)],
  ])('go when one of their adapters is %s', async (_how, remove) => {
    const { parts, merges, folder } = await withMerges(['a', 'b', 'c']);
    for (const weights of [
      { a: 1, b: 1 },
      { b: 1, c: 1 },
    ] as Record<string, number>[])
      (await merges.hold(sumOf(parts, weights), ties, nobodyLeaves)).letGo();
    await remove(parts);
    expect(merges.numKept).toBe(1);
    expect(merges.find(sumOf(parts, { b: 1, c: 1 }), ties)).toBeDefined();
    await merges.settle();
    expect(readdirSync(folder)).toHaveLength(1);
  });

  test('are not made of what is gone meanwhile', async () => {
    const { parts, merges, script } = await withMerges(['a', 'b']);
    script.isGated = true;
    const hold = merges.hold(sumOf(parts, { a: 1, b: 1 }), ties, nobodyLeaves);
    await vi.waitFor(() => expect(script.gates).toHaveLength(1));
    parts.tiers.unload('b');
    await expect(hold).rejects.toMatchObject({ code: 'adapter_not_loaded', param: 'adapters' });
    expect([merges.numKept, [...parts.tiers.adapters].length]).toEqual([0, 1]);
  });

  test('go with all KV when one of their adapters is purged, and their sequences end', async () => {
    const { parts, merges, folder } = await withMerges(['a', 'b']);
    const hold = await merges.hold(sumOf(parts, { a: 1, b: 1 }), ties, nobodyLeaves);
    const begun = Promise.withResolvers<void>();
    const { done } = start(parts, {
      promptTokens: prompt(40),
      adapters: alone(hold.adapter),
      params: { maxTokens: 400 },
      onOutput: () => begun.resolve(),
    });
    hold.letGo();
    await begun.promise;
    const sources = { adapters: { purge: async () => 0 } } as never;
    const report = await purgeAdapter({ ...parts, merges, sources }, digestOf('/a-r1'));
    expect((await done).last.error).toMatchObject({ code: 'adapter_purged' });
    expect(report.kvBytes.device).toBeGreaterThan(0);
    expect([...parts.tiers.adapters].map(({ names }) => [...names])).toEqual([['b']]);
    expect([merges.numKept, readdirSync(folder)]).toEqual([0, []]);
    parts.arena.check();
    expect(parts.fatal).toEqual([]);
  });

  test('need no folder before one is made, and what an engine that died left in it is removed', async () => {
    const { parts } = await withMerges(['a', 'b']);
    const folder = join(tempFolder(), 'cache', 'merges');
    const opened = await openMerges(parts.tiers, { folder });
    expect(existsSync(folder)).toBe(false);
    await opened.merges.hold(sumOf(parts, { a: 1, b: 1 }), ties, nobodyLeaves);
    const dead = join(folder, `.0abc.${encodeURIComponent(hostname())}.999999999.0123456789ab.tmp`);
    mkdirSync(dead);
    await openMerges(parts.tiers, { folder });
    expect([existsSync(dead), readdirSync(folder).length]).toEqual([false, 1]);
  });

  test('leave no files behind when the engine ends', async () => {
    const { parts, merges, folder, script } = await withMerges(['a', 'b']);
    await merges.hold(sumOf(parts, { a: 1, b: 1 }), ties, nobodyLeaves);
    script.isGated = true;
    const hold = merges.hold(sumOf(parts, { a: 1, b: 2 }), ties, nobodyLeaves);
    await vi.waitFor(() => expect(script.gates).toHaveLength(1));
    await Promise.all([merges.close(), expect(hold).rejects.toMatchObject({ code: 'draining' })]);
    expect([existsSync(folder), readdirSync(folder)]).toEqual([true, []]);
  });
});

test('adapters of different ranks, with DoRA or biases cannot be merged, and are named', () => {
  const adapter = (rank: number, kind = 'lora', biasOffsetBytes = -1) =>
    ({ file: { kind, modules: [{ layer: 0, target: 'q_proj', rank, biasOffsetBytes }] } }) as never;
  const problemOf = (...adapters: never[]) =>
    mergeProblem(adapters.map((one, i) => ({ name: 'ab'[i]!, adapter: one })));
  expect(problemOf(adapter(4), adapter(4, 'rslora'))).toBe(null);
  expect(problemOf(adapter(4), adapter(8))).toBe(
    'expected adapters of one rank, but a has 4 and b 8 in q_proj of layer 0',
  );
  expect(problemOf(adapter(4), adapter(4, 'dora'))).toContain('b is of kind dora');
  expect(problemOf(adapter(4, 'lora', 64), adapter(4))).toContain('trained biases, but a has some');
});

describe('over HTTP', () => {
  const body = {
    model: 'whatever',
    prompt: 'hello',
    max_tokens: 4,
    temperature: 0,
    adapters: [
      { name: 'a', weight: 1 },
      { name: 'b', weight: 0.5 },
    ],
    adapters_merge: { method: 'ties', density: 0.25 },
  };

  async function serve() {
    let opened: Awaited<ReturnType<typeof openMerges>>;
    const served = await serveFake({
      merges: async (tiers) => {
        opened = await openMerges(tiers);
        return opened.merges;
      },
    });
    for (const path of ['/a-r1', '/b-r1', '/c-r2']) await served.tiers.load(path.slice(1, 2), path, false);
    const metric = async (name: string) => {
      const text = await (await served.get(enginePaths.metrics)).text();
      return Number(text.match(new RegExp(`^${name.replace(/[{}]/g, '\\$&')}.*? (\\S+)$`, 'm'))?.[1]);
    };
    return { ...served, ...opened!, metric };
  }

  test('a body has adapters merged, and so has a header; a stream and embeddings too', async () => {
    const served = await serve();
    const { adapters, adapters_merge, ...plain } = body;
    const headers = { [adaptersHeader]: 'b=0.5,a=1', [mergeHeader]: 'ties; density=0.25' };
    const answers = [
      await served.post(enginePaths.completions, body),
      await served.post(enginePaths.completions, plain, { headers }),
      await served.post(enginePaths.completions, { ...plain, stream: true }, { headers }),
      await served.post(enginePaths.embeddings, { adapters, adapters_merge, input: ['x', 'y'] }),
    ];
    expect(answers.map(({ status }) => status)).toEqual([200, 200, 200, 200]);
    const [first, second] = (await Promise.all(answers.slice(0, 2).map((one) => one.json()))) as {
      model: string;
      choices: unknown;
    }[];
    expect(first).toMatchObject({ model: 'whatever' });
    expect(second!.choices).toEqual(first!.choices);
    expect(await answers[2]!.text()).toContain('[DONE]');
    expect(served.script.made).toEqual(['ties of /a-r1@1 /b-r1@0.5']);
    const list = (await (await served.get(enginePaths.adapters)).json()) as AdapterList;
    expect(list.merges).toBe(true);
    expect(list.data.find(({ merge }) => merge)).toMatchObject({
      names: [],
      merge: {
        rule: 'ties; density=0.25; majority-sign=total',
        members: [
          { digest: digestOf('/a-r1'), weight: 1 },
          { digest: digestOf('/b-r1'), weight: 0.5 },
        ],
      },
    });
    const models = await (await served.get(enginePaths.models)).text();
    expect(models).not.toContain('merge');
  });

  test('linear is the sum, and one adapter is itself: neither is made', async () => {
    const served = await serve();
    const linear = { ...body, adapters_merge: { method: 'linear' } };
    const one = { ...body, adapters: [{ name: 'a', weight: 1 }] };
    for (const each of [linear, one])
      expect((await served.post(enginePaths.completions, each)).status).toBe(200);
    expect(served.script.made).toEqual([]);
  });

  test.each([
    [{ adapters_merge: { method: 'slerp' } }, {}, 'adapters_merge.method: expected one of linear, ties'],
    [
      { adapters_merge: { method: 'ties', density: 0 } },
      {},
      'adapters_merge.density: expected a number above 0',
    ],
    [{ adapters_merge: { method: 'linear', density: 0.5 } }, {}, 'adapters_merge.density: expected none'],
    [
      { adapters_merge: { method: 'dare_linear', majority_sign: 'total' } },
      {},
      'adapters_merge.majority_sign: expected none',
    ],
    [
      { adapters_merge: { method: 'ties', majority_sign: 'most' } },
      {},
      'adapters_merge.majority_sign: expected one of',
    ],
    [{ adapters_merge: 'ties' }, {}, 'adapters_merge: expected an object'],
    [{ adapters: undefined }, {}, 'adapters_merge: expected adapters beside it'],
    [{}, { [adaptersHeader]: 'a=1,b=1' }, `adapters_merge: expected ${mergeHeader} beside ${adaptersHeader}`],
    [{}, { [adaptersHeader]: 'a=1,b=1', [mergeHeader]: 'ties; x=1' }, `${mergeHeader}: expected METHOD`],
    [{}, { [mergeHeader]: 'ties' }, `${mergeHeader}: expected ${adaptersHeader} beside it`],
    [
      { adapters: [...body.adapters, { name: 'c', weight: 1 }] },
      {},
      'adapters_merge: expected adapters of one rank, but a has 1 and c 2',
    ],
  ])('%j is refused by name (%#)', async (fields, headers, message) => {
    const served = await serve();
    const answer = await served.post(
      enginePaths.completions,
      { ...body, ...fields },
      { headers: headers as never },
    );
    expect(answer.status).toBe(400);
    expect(((await answer.json()) as { message: string }).message).toContain(message);
    expect(served.script.made).toEqual([]);
  });

  test('an engine that keeps no merges says so', async () => {
    const served = await serveFake();
    for (const path of ['/a-r1', '/b-r1']) await served.tiers.load(path.slice(1, 2), path, false);
    const answer = await served.post(enginePaths.completions, body);
    expect([answer.status, await answer.text()]).toEqual([400, expect.stringContaining('no --merge-cache')]);
    expect(await (await served.get(enginePaths.adapters)).json()).not.toHaveProperty('merges');
  });

  test('a client that hangs up ends what is made for it alone', async () => {
    const served = await serve();
    served.script.isGated = true;
    const client = new AbortController();
    const answer = served.post(enginePaths.completions, body, { signal: client.signal });
    answer.catch(() => {});
    await vi.waitFor(() => expect(served.script.gates).toHaveLength(1));
    client.abort();
    await vi.waitFor(() => expect(served.script.aborted).toHaveLength(1));
  });

  test('metrics are there from the start, and count', async () => {
    const served = await serve();
    expect(await served.metric('motet_merge_requests_total{result="made"')).toBe(0);
    for (let i = 0; i < 3; i++) await served.post(enginePaths.completions, body);
    expect(await served.metric('motet_merge_requests_total{result="made"')).toBe(1);
    expect(await served.metric('motet_merge_requests_total{result="kept"')).toBe(2);
    expect(await served.metric('motet_merge_seconds_count')).toBe(1);
    expect(await served.metric('motet_merges{')).toBe(1);
    expect(await served.metric('motet_merge_bytes')).toBe(100);
  });
});
