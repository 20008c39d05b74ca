import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { startFakeEngine } from '../fixtures/fake-engine.ts';
import { batchSettings } from './batches/batches-setup.ts';
import { chatBody, gatewayFor } from './start-gateway.ts';

const readme = readFileSync(join(import.meta.dirname, '../../gateway/README.md'), 'utf8');

test('every metric is documented with its type, and nothing else is', async () => {
  const gateway = await gatewayFor([await startFakeEngine()], { batches: batchSettings() });
  const text = await (await fetch(`${gateway.url}/metrics`)).text();
  const exposed = [...text.matchAll(/^# TYPE (motet_\S+) (\S+)$/gm)].map(
    ([, name, type]) => `${name} ${type}`,
  );
  const documented = [...readme.matchAll(/^\| `(motet_\S+)` \| (\w+) \|/gm)].map(
    ([, name, type]) => `${name} ${type}`,
  );
  expect(documented.sort()).toEqual(exposed.sort());
});

test('refused keys, engines and tenants are counted outside of a cluster too', async () => {
  const engine = await startFakeEngine();
  const gateway = await gatewayFor([engine], { apiKeys: new Map([['team-a', 'key-0123456789abcdef']]) });
  await gateway.chat(chatBody());
  const text = await (await fetch(`${gateway.url}/metrics`)).text();
  for (const line of [
    'motet_gateway_auth_failures_total{reason="missing_api_key"} 1',
    'motet_gateway_auth_failures_total{reason="invalid_api_key"} 0',
    'motet_gateway_engines{base_model="",state="ready"} 1',
    'motet_gateway_tenants 1',
  ]) {
    expect(text.split('\n')).toContain(line);
  }
});
