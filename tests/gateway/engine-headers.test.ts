import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, onTestFinished, test } from 'vitest';
import { keyHeaders, tokenFileHeaders, withSender } from '../../gateway/engine-headers.ts';

test('shows the key that was configured, or nothing', () => {
  expect(keyHeaders('a-key')()).toEqual({ authorization: 'Bearer a-key' });
  expect(keyHeaders(null)()).toEqual({});
});

test('shows a token that was replaced in its file, and the last one while there is no file', () => {
  const folder = mkdtempSync(join(tmpdir(), 'motet-'));
  onTestFinished(() => rmSync(folder, { recursive: true, force: true }));
  const file = join(folder, 'token');
  let nowMs = 0;
  writeFileSync(file, 'first\n');
  const headers = tokenFileHeaders(file, () => nowMs);
  expect(headers()).toEqual({ authorization: 'Bearer first' });
  writeFileSync(file, 'second');
  nowMs += 60_000;
  expect(headers()).toEqual({ authorization: 'Bearer second' });
  rmSync(file);
  nowMs += 60_000;
  expect(headers()).toEqual({ authorization: 'Bearer second' });
});

test('names the gateway beside whatever it shows', () => {
  let given: Record<string, string> = { authorization: 'Bearer first' };
  const headers = withSender('me', () => given);
  expect(headers()).toEqual({ authorization: 'Bearer first', 'x-motet-sender': 'me' });
  given = { authorization: 'Bearer second' };
  expect(headers()).toEqual({ authorization: 'Bearer second', 'x-motet-sender': 'me' });
});

test('a token file that is not there is an error at the start', () => {
  expect(() => tokenFileHeaders('/nowhere/token')).toThrow('ENOENT');
});
