import { describe, expect, test } from 'vitest';
import { type AdapterFacts, adapterStatus } from '../../operator/adapter-status.ts';
import type { EngineAdapter } from '../../operator/engine-client.ts';
import type { Engine } from '../../operator/engines.ts';
import { loraAdapter } from './builders.ts';

const digest = 'sha256:wanted';

function held(parts: Partial<EngineAdapter> = {}): EngineAdapter {
  return {
    digest,
    names: ['sql'],
    tier: 'device',
    rank: 16,
    modules: ['q_proj'],
    kind: 'lora',
    bytes: 4096,
    since: 1_800_000_000.75,
    requests: 0,
    ...parts,
  };
}

function engine(pod: string, adapters: EngineAdapter[] = [held()]): Engine {
  return {
    pod,
    ip: '127.0.0.1',
    life: `${pod}/0`,
    askedAtMs: 0,
    isFresh: true,
    arena: { totalBytes: 1 << 30, adapterBytes: 4096 },
    hostArena: { totalBytes: 0 },
    adapters,
    names: new Map(adapters.flatMap((one) => one.names.map((name) => [name, one.digest]))),
    pins: new Map(),
  };
}

/** One copy, resident. */
function statusFor(parts: Partial<AdapterFacts> = {}) {
  return adapterStatus({
    adapter: loraAdapter(),
    before: undefined,
    baseModelExists: true,
    nameConflict: null,
    missingClaim: null,
    isWanted: true,
    names: ['sql'],
    digest,
    engines: [engine('one')],
    silence: null,
    numDesired: 1,
    numReady: 1,
    numPinned: 0,
    numWithoutRoom: 0,
    bytes: 4096,
    failures: [],
    now: new Date('2026-11-25T10:00:00Z'),
    ...parts,
  });
}

type Failure = AdapterFacts['failures'][number];

function failure(reason: Failure['reason'], message: string, call: Failure['call'] = 'load') {
  return { pod: 'one', name: 'sql', call, reason, message, retryAtMs: 0 };
}

test('says what the engines say', () => {
  expect(statusFor()).toEqual({
    observedGeneration: 1,
    digest,
    rank: 16,
    kind: 'lora',
    modules: ['q_proj'],
    bytes: 4096,
    desiredCopies: 1,
    readyCopies: 1,
    copies: '1/1',
    tier: 'device',
    placements: [{ pod: 'one', tier: 'device', since: '2027-01-15T08:00:00Z', digest }],
    conditions: [
      {
        type: 'Ready',
        status: 'True',
        reason: 'Resident',
        message: '1 of 1 copies are resident',
        lastTransitionTime: '2026-11-25T10:00:00Z',
        observedGeneration: 1,
      },
    ],
  });
});

describe('the reason', () => {
  const absent = { engines: [engine('one', [])], numReady: 0 };
  test.each<[string, string, Partial<AdapterFacts>]>([
    [
      'NameConflict',
      'the name sql is taken',
      { nameConflict: 'the name sql is taken', baseModelExists: false },
    ],
    ['BaseModelNotFound', 'no BaseModel tiny', { baseModelExists: false, engines: [], numDesired: 0 }],
    ['ClaimNotMounted', 'claim team-a', { missingClaim: 'team-a', numDesired: 0 }],
    ['NoEngineReady', 'No engine of BaseModel tiny', { engines: [], numDesired: 0, numReady: 0 }],
    ['NoEngineReady', 'the words', { engines: [], numDesired: 0, numReady: 0, silence: 'the words' }],
    ['NoRoom', 'about 4096 bytes each', { ...absent, numWithoutRoom: 1 }],
    ['Loading', '0 of 1 copies', absent],
    ['Refused', 'the words', { ...absent, failures: [failure('Refused', 'the words')] }],
    ['DigestMismatch', 'the words', { ...absent, failures: [failure('DigestMismatch', 'the words')] }],
    ['SourceUnavailable', 'the words', { ...absent, failures: [failure('SourceUnavailable', 'the words')] }],
    ['Loading', 'one: the words', { ...absent, failures: [failure(null, 'the words')] }],
    ['NoRoom', 'the words', { ...absent, numWithoutRoom: 1, failures: [failure('NoRoom', 'the words')] }],
  ])('is %s, with "%s"', (reason, message, facts) => {
    expect(statusFor(facts).conditions).toMatchObject([
      { status: 'False', reason, message: expect.stringContaining(message) },
    ]);
  });

  test('is what somebody must change before what passes', () => {
    const failures = [
      failure('SourceUnavailable', 'away'),
      failure('Refused', 'wrong'),
      failure(null, 'slow'),
    ];
    expect(statusFor({ ...absent, failures }).conditions).toMatchObject([{ reason: 'Refused' }]);
  });

  test('is no failure that is overcome', () => {
    const failures = [failure('SourceUnavailable', 'away')];
    expect(statusFor({ failures }).conditions).toMatchObject([{ reason: 'Resident' }]);
  });
});

describe('the condition Pinned', () => {
  const wish = { adapter: loraAdapter({ pin: true }) };
  const refusal = failure('NoRoom', 'pins would leave too little', 'pin');
  const pinned = (facts: Partial<AdapterFacts>) =>
    statusFor({ ...wish, ...facts }).conditions!.find(({ type }) => type === 'Pinned');

  test('is not there without a wish, and goes with it', () => {
    const before = statusFor({ ...wish, numPinned: 1 });
    expect(before.conditions).toHaveLength(2);
    expect(statusFor({ before, numPinned: 1 }).conditions).toMatchObject([{ type: 'Ready' }]);
  });

  test.each<[string, string, string, Partial<AdapterFacts>]>([
    ['True', 'Pinned', '1 of 1 copies stay on the device', { numPinned: 1 }],
    ['True', 'Pinned', '1 of 1 copies', { numPinned: 1, failures: [refusal] }],
    ['False', 'Pinning', '0 of 1 copies', {}],
    ['False', 'Pinning', '0 of 0 copies', { engines: [], numDesired: 0, numReady: 0 }],
    ['False', 'Pinning', 'one: no answer', { failures: [failure(null, 'no answer', 'pin')] }],
    ['False', 'Pinning', '0 of 1 copies', { failures: [failure('NoRoom', 'no room')] }],
    ['False', 'NoRoom', 'one: pins would leave too little. Unpin', { failures: [refusal] }],
  ])('is %s for %s, with "%s"', (status, reason, message, facts) => {
    expect(pinned(facts)).toMatchObject({ status, reason, message: expect.stringContaining(message) });
  });

  test('leaves Ready alone: what cannot be pinned is served', () => {
    expect(statusFor({ ...wish, failures: [refusal] }).conditions).toMatchObject([
      { type: 'Ready', status: 'True', reason: 'Resident' },
      { type: 'Pinned', status: 'False' },
    ]);
    const loading = { numReady: 0, failures: [refusal] };
    expect(statusFor({ ...wish, ...loading }).conditions).toMatchObject([{ reason: 'Loading' }, {}]);
  });
});

describe('placements', () => {
  test('name the version that is served, be it the old one', () => {
    const old = held({ digest: 'sha256:old' });
    const status = statusFor({ engines: [engine('one', [old])], numReady: 0 });
    expect(status.placements).toMatchObject([{ pod: 'one', digest: 'sha256:old' }]);
    expect(status.copies).toBe('0/1');
  });

  test('name the old version while one of the names still has it', () => {
    const adapters = [held({ names: ['sql'] }), held({ digest: 'sha256:old', names: ['db'] })];
    const status = statusFor({ names: ['sql', 'db'], engines: [engine('one', adapters)], numReady: 0 });
    expect(status.placements).toMatchObject([{ digest: 'sha256:old' }]);
  });

  test('leave out what drains without a name', () => {
    expect(statusFor({ engines: [engine('one', [held({ names: [] })])] }).placements).toEqual([]);
  });

  test('say what is pinned, where the engine does', () => {
    const engines = [engine('one', [held({ pinned: true })]), engine('two', [held({ pinned: false })])];
    expect(statusFor({ engines }).placements).toMatchObject([{ pinned: true }, { pinned: false }]);
    expect(statusFor().placements![0]).not.toHaveProperty('pinned');
  });

  test('give the lowest tier', () => {
    const engines = [
      engine('one'),
      engine('two', [held({ tier: 'disk' })]),
      engine('three', [held({ tier: 'host' })]),
    ];
    expect(statusFor({ engines }).tier).toBe('disk');
  });
});

test('copies beyond the wanted ones, as in a move, are not counted as more than all', () => {
  expect(statusFor({ engines: [engine('one'), engine('two')], numReady: 2 })).toMatchObject({
    copies: '1/1',
    readyCopies: 2,
  });
});

test('what is known about a version stays while nobody has it, and goes with the version', () => {
  const before = statusFor();
  const gone = { before, engines: [], numReady: 0, numDesired: 0 };
  expect(statusFor(gone)).toMatchObject({ digest, rank: 16, bytes: 4096, placements: [] });
  expect(statusFor({ ...gone, digest: 'sha256:new' })).not.toHaveProperty('rank');
  expect(statusFor({ ...gone, digest: null })).not.toHaveProperty('digest');
});

test('an adapter that nobody asked for is not loaded, and that is said', () => {
  expect(statusFor({ isWanted: false, engines: [], numDesired: 0, numReady: 0 })).toMatchObject({
    copies: '0/0',
    conditions: [{ status: 'False', reason: 'NotAsked' }],
  });
});
