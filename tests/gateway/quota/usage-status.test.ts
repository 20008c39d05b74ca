import { expect, onTestFinished, test } from 'vitest';
import { ApiError } from '../../../crds/api.ts';
import type { Tenant } from '../../../crds/types.ts';
import type { TenantUsage } from '../../../gateway/quota/tenant-usage.ts';
import { maxEntries, nextUsage, type UsageStatus, UsageWriter } from '../../../gateway/quota/usage-status.ts';
import { tenant } from '../resources.ts';
import { until } from '../start-gateway.ts';

const intervalMs = 60_000;
const now = new Date('2026-01-01T12:00:00Z');
const agoS = (seconds: number) => new Date(now.getTime() - seconds * 1000).toISOString().replace('.000', '');
const used = (fields: Partial<TenantUsage> = {}): TenantUsage => ({
  requestsPerMinute: 6,
  tokensPerMinute: 600,
  inFlight: 1,
  rejected: {},
  ...fields,
});
const entry = (name: string, ageS: number, fields: Partial<TenantUsage> = {}) => ({
  name,
  time: agoS(ageS),
  ...used(fields),
});
const status = (...gateways: UsageStatus['gateways']): UsageStatus => ({
  ...{ requestsPerMinute: 0, tokensPerMinute: 0, inFlight: 0, rejectedPerMinute: 0 },
  gateways,
});
const next = (before: UsageStatus | undefined, own: TenantUsage | undefined) =>
  nextUsage(before, 'me', own, intervalMs, now);

test('an entry is added to those of others, and the sums are of all', () => {
  const other = entry('other', 30, { rejected: { timeout: 1, queue_full: 2 } });
  expect(next(status(other), used({ rejected: { queue_full: 4 } }))).toEqual({
    requestsPerMinute: 12,
    tokensPerMinute: 1200,
    inFlight: 2,
    rejectedPerMinute: 7,
    gateways: [{ name: 'me', time: agoS(0), ...used({ rejected: { queue_full: 4 } }) }, other],
  });
});

test.each<[string, UsageStatus | undefined, TenantUsage | undefined]>([
  ['nothing was used and nothing is said', undefined, undefined],
  ['of others alone', status(entry('other', 100)), undefined],
  ['the same is said already', status(entry('me', 60)), used()],
  [
    'the same, its reasons in another order',
    status(entry('me', 60, { rejected: { timeout: 1, queue_full: 2 } })),
    used({ rejected: { queue_full: 2, timeout: 1 } }),
  ],
])('nothing is written when %s', (_, before, own) => {
  expect(next(before, own)).toBeNull();
});

test('what stays the same is written again before others would take it out', () => {
  expect(next(status(entry('me', 89)), used())).toBeNull();
  expect(next(status(entry('me', 91)), used())?.gateways).toEqual([entry('me', 0)]);
});

test('an entry goes when its gateway counts nothing any more, and one that nobody renews', () => {
  const other = entry('other', 179);
  expect(next(status(entry('me', 60), other), undefined)?.gateways).toEqual([other]);
  expect(next(status(entry('other', 181)), undefined)).toEqual(status());
});

test('the newest entries are kept when there are more than a status holds', () => {
  const others = Array.from({ length: maxEntries }, (_, i) => entry(`other-${i}`, i));
  const { gateways } = next(status(...others), used())!;
  expect(gateways).toHaveLength(maxEntries);
  expect(gateways.map(({ name }) => name)).toContain('me');
  expect(gateways.map(({ name }) => name)).not.toContain(`other-${maxEntries - 1}`);
});

/** A writer over tenants in memory, whose writes the test refuses or lets pass. */
function writerOf(names: string[], answer: (name: string, count: number) => Error | null) {
  const tenants = new Map<string, Tenant>(names.map((name) => [name, tenant(name)]));
  const written: string[] = [];
  const tried: string[] = [];
  const errors: Error[] = [];
  const writer = new UsageWriter({
    gateway: 'me',
    intervalMs,
    tenants: { list: () => [...tenants.values()], get: (name) => tenants.get(name) },
    async write({ metadata }, usage) {
      const name = metadata.name!;
      tried.push(name);
      const refusal = answer(name, tried.filter((one) => one === name).length);
      if (refusal !== null) throw refusal;
      written.push(name);
      tenants.set(name, { ...tenants.get(name)!, status: { usage } });
    },
    onError: (error) => void errors.push(error),
    gapMs: 0,
    retryMs: 1,
  });
  onTestFinished(() => writer.close());
  const use = (...of: string[]) => writer.note(new Map(of.map((name) => [name, used()])));
  return { writer, tenants, written, tried, errors, use };
}

const conflict = new ApiError(409, 'Conflict', 'the object has been modified');

test('a round writes each tenant that used something, and none again that says so already', async () => {
  const { written, use } = writerOf(['a', 'b', 'idle'], () => null);
  use('a', 'b');
  await until(
    () => written.length,
    (count) => count === 2,
  );
  await until(
    () => {
      use('a', 'b', 'idle');
      return written.length;
    },
    (count) => count === 3,
  );
  expect([...written].sort()).toEqual(['a', 'b', 'idle']);
});

test('a write that came second is tried again at the end of the round, and not for ever', async () => {
  const { written, tried, errors, use } = writerOf(['a', 'b', 'never'], (name, count) =>
    (name === 'a' && count === 1) || name === 'never' ? conflict : null,
  );
  use('a', 'b', 'never');
  await until(
    () => tried.filter((name) => name === 'never').length,
    (count) => count === 3,
  );
  expect(written.sort()).toEqual(['a', 'b']);
  expect(errors).toEqual([]);
});

test('a tenant that is gone is passed over, what is refused is told, and the rest is written', async () => {
  const { written, errors, use } = writerOf(['gone', 'refused', 'good'], (name) => {
    if (name === 'gone') return new ApiError(404, 'NotFound', 'not found');
    return name === 'refused' ? new ApiError(403, 'Forbidden', 'not allowed') : null;
  });
  use('gone', 'refused', 'good');
  await until(
    () => [written.length, errors.length],
    ([good, bad]) => good === 1 && bad === 1,
  );
  expect(errors[0]!.message).toBe('not allowed');
});

test('an API server that does not answer ends the round; the next begins anew', async () => {
  let isAway = true;
  const { written, tried, errors, use } = writerOf(['a', 'b', 'c'], () =>
    isAway ? new Error('away') : null,
  );
  use('a', 'b', 'c');
  await until(
    () => errors.length,
    (count) => count === 1,
  );
  expect(tried).toHaveLength(1);
  isAway = false;
  await until(
    () => {
      use('a', 'b', 'c');
      return written.length;
    },
    (count) => count === 3,
  );
  expect(written.sort()).toEqual(['a', 'b', 'c']);
});

test('a closed writer writes nothing', async () => {
  const { writer, tried, use } = writerOf(['a'], () => null);
  await writer.close();
  use('a');
  await writer.close();
  expect(tried).toEqual([]);
});
