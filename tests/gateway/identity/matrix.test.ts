// Who may do what: callers against names, paths and methods (matrix.ts), asked of a gateway with a real API server.

import { beforeAll, expect, test } from 'vitest';
import { installCrds } from '../../crds/install-crds.ts';
import { type ControlPlane, sharedControlPlane } from '../../fixtures/control-plane.ts';
import { batchSettings } from '../batches/batches-setup.ts';
import { adapterRoute, baseModel, loraAdapter, tenant } from '../resources.ts';
import { startCluster } from '../start-cluster.ts';
import { keyOf, runMatrix, tenants } from './matrix.ts';

let plane: ControlPlane;
beforeAll(async () => {
  plane = await sharedControlPlane();
  await installCrds(plane);
});

test('every caller may do what its Tenant gives it, and nothing else', { timeout: 120_000 }, async () => {
  const cluster = await startCluster(plane);
  await cluster.create(baseModel('base'));
  await cluster.create(loraAdapter('red-sql', { labels: { team: 'red', task: 'sql' } }));
  await cluster.create(loraAdapter('red-docs', { labels: { team: 'red', task: 'docs' } }));
  await cluster.create(loraAdapter('blue-sql', { labels: { team: 'blue', task: 'sql' } }));
  await cluster.create(adapterRoute('red-route', [{ adapter: 'blue-sql' }], { labels: { team: 'red' } }));
  for (const [name, { access }] of Object.entries(tenants)) {
    await cluster.setSecret(name, { key: keyOf(name) });
    await cluster.create(tenant(name, { access }));
  }
  await cluster.create(tenant('keyless', { access: { adapters: {}, baseModels: {}, routes: {} } }));
  const engine = await cluster.engine({ adapters: ['red-sql', 'red-docs', 'blue-sql', 'stowaway'] });
  const gateway = await cluster.gateway({ batches: batchSettings() });

  const { numCases, wrong } = await runMatrix(gateway, engine.fake, tenants);
  console.log(`${numCases} cases of the matrix`);
  expect(wrong).toEqual([]);
  expect(numCases).toBeGreaterThan(500);
});
