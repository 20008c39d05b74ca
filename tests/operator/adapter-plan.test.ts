import { describe, expect, test } from 'vitest';
import { type EngineNames, isResident, planSteps, type WantedAdapter } from '../../operator/adapter-plan.ts';

function wanted(id: string, parts: Partial<WantedAdapter> = {}): WantedAdapter {
  return { id, names: [id], digest: `digest-of-${id}`, pods: ['one'], isPinned: false, ...parts };
}

function engine(
  pod: string,
  names: Record<string, string> = {},
  pins: Record<string, boolean> = {},
): EngineNames {
  return { pod, names: new Map(Object.entries(names)), pins: new Map(Object.entries(pins)) };
}

/** E.g. `load sql on one: missing`. */
function stepsFor(adapters: WantedAdapter[], engines: EngineNames[]): string[] {
  return planSteps(adapters, engines).map(
    ({ do: what, name, pod, reason }) => `${what} ${name} on ${pod}: ${reason}`,
  );
}

const held = { sql: 'digest-of-sql' };

test('a world that is as it should be needs nothing', () => {
  expect(stepsFor([wanted('sql')], [engine('one', held), engine('two')])).toEqual([]);
});

describe('a load', () => {
  test('is for a name that is missing', () => {
    expect(stepsFor([wanted('sql')], [engine('one')])).toEqual(['load sql on one: missing']);
  });

  test('is for each name that is missing', () => {
    const adapter = wanted('sql', { names: ['sql', 'db'] });
    expect(stepsFor([adapter], [engine('one', held)])).toEqual(['load db on one: missing']);
  });

  test('replaces another version in place', () => {
    expect(stepsFor([wanted('sql')], [engine('one', { sql: 'old' })])).toEqual([
      'load sql on one: another version',
    ]);
  });

  test('finds out what is at a source that nobody knows', () => {
    expect(stepsFor([wanted('sql', { digest: null })], [engine('one', held)])).toEqual([
      'load sql on one: unknown version',
    ]);
  });

  test('of a first copy comes before those of second ones', () => {
    const adapters = [
      wanted('a', { pods: ['one', 'two'] }),
      wanted('b', { pods: ['two', 'one'] }),
      wanted('c', { pods: ['one', 'two'] }),
    ];
    const engines = [engine('one', { c: 'digest-of-c' }), engine('two')];
    expect(stepsFor(adapters, engines)).toEqual([
      'load a on one: missing',
      'load b on two: missing',
      'load a on two: missing',
      'load b on one: missing',
      'load c on two: missing',
    ]);
  });

  test('waits for an engine that did not answer', () => {
    expect(stepsFor([wanted('sql', { pods: ['away'] })], [engine('one')])).toEqual([]);
  });
});

describe('an unload', () => {
  test('is for a name that nobody wants, and comes before loads', () => {
    expect(stepsFor([wanted('sql')], [engine('one', { stray: 'x' })])).toEqual([
      'unload stray on one: nobody wants it',
      'load sql on one: missing',
    ]);
  });

  test('of a move comes after the load', () => {
    const adapter = wanted('sql', { pods: ['two'] });
    expect(stepsFor([adapter], [engine('one', held), engine('two')])).toEqual(['load sql on two: missing']);
    expect(stepsFor([adapter], [engine('one', held), engine('two', held)])).toEqual([
      'unload sql on one: moved',
    ]);
  });

  test('of a move waits for every copy, in the wanted version', () => {
    const adapter = wanted('sql', { pods: ['two', 'three'] });
    const old = engine('two', { sql: 'old' });
    for (const two of [engine('two'), old]) {
      const steps = stepsFor([adapter], [engine('one', held), two, engine('three', held)]);
      expect(steps.filter((step) => step.startsWith('unload'))).toEqual([]);
    }
    const steps = stepsFor([adapter], [engine('one', held), engine('two', held), engine('three', held)]);
    expect(steps).toEqual(['unload sql on one: moved']);
  });

  test('of a move waits while an engine that should hold it does not answer', () => {
    expect(stepsFor([wanted('sql', { pods: ['away'] })], [engine('one', held)])).toEqual([]);
  });

  test('is not for an adapter without a place: it stays where it is', () => {
    expect(stepsFor([wanted('sql', { pods: [] })], [engine('one', held)])).toEqual([]);
  });
});

describe('a pin', () => {
  const pinned = { 'digest-of-sql': true };
  const unpinned = { 'digest-of-sql': false };

  test('is set on what is there, wherever it is', () => {
    const engines = [engine('one', held, unpinned), engine('two', held, unpinned)];
    expect(stepsFor([wanted('sql', { isPinned: true, pods: ['one', 'two'] })], engines)).toEqual([
      'pin sql on one: to be pinned',
      'pin sql on two: to be pinned',
    ]);
  });

  test('waits until every name has the wanted version', () => {
    const old = engine('one', { sql: 'old' }, { old: false });
    expect(stepsFor([wanted('sql', { isPinned: true })], [old])).toEqual([
      'load sql on one: another version',
    ]);
  });

  test('that is there, and one that nobody wants, need nothing', () => {
    expect(stepsFor([wanted('sql', { isPinned: true })], [engine('one', held, pinned)])).toEqual([]);
    expect(stepsFor([wanted('sql')], [engine('one', held, unpinned)])).toEqual([]);
  });

  test('that nobody wants any more goes', () => {
    expect(stepsFor([wanted('sql')], [engine('one', held, pinned)])).toEqual([
      'pin sql on one: not to be pinned',
    ]);
  });

  test('of one of two adapters with the same content is enough, whatever the order', () => {
    const both = { sql: 'digest-of-sql', copy: 'digest-of-sql' };
    const plain = wanted('sql');
    const keen = wanted('copy', { digest: 'digest-of-sql', isPinned: true });
    for (const adapters of [
      [plain, keen],
      [keen, plain],
    ]) {
      expect(stepsFor(adapters, [engine('one', both, unpinned)])).toEqual(['pin copy on one: to be pinned']);
      expect(stepsFor(adapters, [engine('one', both, pinned)])).toEqual([]);
    }
  });

  test('is not asked of an engine that knows none', () => {
    expect(stepsFor([wanted('sql', { isPinned: true })], [engine('one', held)])).toEqual([]);
  });
});

test('an adapter is resident where all its names have its version, and nowhere while that is unknown', () => {
  const two = wanted('sql', { names: ['sql', 'db'] });
  expect(isResident(two, engine('one', held))).toBe(false);
  expect(isResident(two, engine('one', { ...held, db: 'digest-of-sql' }))).toBe(true);
  expect(isResident(wanted('sql', { digest: null }), engine('one', held))).toBe(false);
});
