import { expect, test } from 'vitest';
import type { LoraAdapter } from '../../crds/types.ts';
import { AdapterVersions } from '../../operator/adapter-versions.ts';
import { loraAdapter } from './builders.ts';

const sql = loraAdapter();
const other = (source: LoraAdapter['spec']['source']) => loraAdapter({ source });

test('a digest in the spec is the version', () => {
  const adapter = other({ uri: 'https://models.example/sql', digest: 'sha256:1' });
  expect(new AdapterVersions().wanted(adapter, undefined)).toBe('sha256:1');
});

test('without one the first load tells, and it holds for that source alone', () => {
  const versions = new AdapterVersions();
  expect(versions.wanted(sql, undefined)).toBeNull();
  expect(versions.learn(sql, 'd1', 10)).toBe(true);
  expect(versions.wanted(sql, undefined)).toBe('d1');
  expect(versions.wanted(other({ uri: 'file:///motet/adapters/v2' }), undefined)).toBeNull();
});

test('what an operator before this one learned is believed for the spec that it was about', () => {
  expect(new AdapterVersions().wanted(sql, { observedGeneration: 1, digest: 'd1' })).toBe('d1');
  expect(new AdapterVersions().wanted(sql, { observedGeneration: 0, digest: 'd1' })).toBeNull();
});

test('newer content is the version from then on, older content is not', () => {
  const versions = new AdapterVersions();
  versions.learn(sql, 'd1', 10);
  expect(versions.learn(sql, 'd2', 20)).toBe(true);
  expect(versions.wanted(sql, undefined)).toBe('d2');
  expect(versions.learn(sql, 'd1', 15)).toBe(true);
  expect(versions.wanted(sql, undefined)).toBe('d2');
});

test('content that was there before does not come back: engines that disagree would take turns for ever', () => {
  const versions = new AdapterVersions();
  versions.learn(sql, 'd1', 10);
  versions.learn(sql, 'd2', 20);
  expect(versions.learn(sql, 'd1', 30)).toBe(false);
  expect(versions.wanted(sql, undefined)).toBe('d2');
});

test('an adapter that is gone is forgotten', () => {
  const versions = new AdapterVersions();
  versions.learn(sql, 'd1', 10);
  versions.retain(new Set());
  expect(versions.wanted(sql, undefined)).toBeNull();
});
