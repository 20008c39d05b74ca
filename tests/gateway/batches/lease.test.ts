import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, onTestFinished, test } from 'vitest';
import { FolderStore } from '../../../gateway/batches/folder-store.ts';
import { Lease, type Sighting } from '../../../gateway/batches/lease.ts';
import type { Store } from '../../../gateway/batches/store.ts';
import { until } from '../start-gateway.ts';

async function tempStore(): Promise<Store> {
  const folder = mkdtempSync(join(tmpdir(), 'motet-lease-'));
  onTestFinished(() => rmSync(folder, { recursive: true, force: true }));
  return FolderStore.open(folder);
}

/** A process that wants to own the job. */
function claimer(store: Store, owner: string, leaseMs = 200) {
  const sightings = new Map<string, Sighting>();
  return async () => {
    const lease = await Lease.claim(store, 'job/owners/', { owner, leaseMs }, sightings);
    if (lease !== null) onTestFinished(() => lease.end());
    return lease;
  };
}

test('of many who claim a job at once, one owns it', async () => {
  const store = await tempStore();
  const claims = await Promise.all(
    Array.from({ length: 5 }, (_, i) => claimer(store, `owner ${i}`, 60_000)()),
  );
  expect(claims.filter((lease) => lease !== null)).toHaveLength(1);
});

test('an owner that lives keeps it', async () => {
  const store = await tempStore();
  const lease = await claimer(store, 'first', 2_000)();
  const other = claimer(store, 'second', 2_000);
  expect(await other()).toBeNull();
  const read = async () =>
    String(await (await Array.fromAsync((await store.read('job/owners/00000001.json'))!))[0]);
  await until(read, (text) => JSON.parse(text).beat >= 2);
  expect(await other()).toBeNull();
  expect(lease!.lost.aborted).toBe(false);
});

test('one that shows no life for the time of a lease is followed by another', async () => {
  const store = await tempStore();
  const lease = await claimer(store, 'first')();
  await lease!.end();
  const other = claimer(store, 'second');
  expect(await other()).toBeNull();
  const next = await until(other, (lease) => lease !== null);
  expect(next!.number).toBe(2);
});

test('one that was only slow hears of it, and stops', async () => {
  const store = await tempStore();
  const lease = await claimer(store, 'first', 400)();
  await store.create(
    'job/owners/00000002.json',
    Buffer.from('{"owner":"second","beat":0,"isReleased":false}'),
  );
  await until(
    () => lease!.lost.aborted,
    (isLost) => isLost,
  );
});

test('one that cannot say that it lives stops before others take over', async () => {
  const store = await tempStore();
  let isBroken = false;
  const sometimes = new Proxy(store, {
    get(_, name: keyof Store) {
      if (isBroken && name === 'list') return () => Promise.reject(new Error('the disk is gone'));
      const value = store[name];
      return typeof value === 'function' ? value.bind(store) : value;
    },
  });
  const lease = await claimer(sometimes, 'first', 400)();
  isBroken = true;
  await until(
    () => lease!.lost.aborted,
    (isLost) => isLost,
  );
});

test('what is released is free at once', async () => {
  const store = await tempStore();
  const lease = await claimer(store, 'first', 60_000)();
  await lease!.release();
  expect((await claimer(store, 'second', 60_000)())!.number).toBe(2);
});
