// A job whose files are in S3, and two gateways over one bucket.

import { expect, onTestFinished, test, vi } from 'vitest';
import { startFakeEngine } from '../../fixtures/fake-engine.ts';
import { startS3Server } from '../../fixtures/source-servers.ts';
import { begin, clientOf, echo, ended, gatewayWithBatches, line, linesOf } from './batches-setup.ts';

test('a job in a bucket is run by one of two gateways, and read at both', async () => {
  const server = await startS3Server(onTestFinished);
  server.put('jobs', {});
  vi.stubEnv('AWS_ENDPOINT_URL_S3', server.endpoint);
  vi.stubEnv('AWS_ACCESS_KEY_ID', server.keys.accessKeyId);
  vi.stubEnv('AWS_SECRET_ACCESS_KEY', server.keys.secretAccessKey);
  onTestFinished(() => void vi.unstubAllEnvs());
  const engine = await startFakeEngine({ script: echo });
  const [first, second] = await Promise.all(
    [0, 1].map(async () => clientOf(await gatewayWithBatches([engine], { store: 's3://jobs/of/motet' }))),
  );
  const { id } = await begin(
    first!,
    Array.from({ length: 50 }, (_, i) => line(`${i}`)),
  );
  const batch = await ended(second!, id);
  expect(batch.request_counts).toEqual({ total: 50, completed: 50, failed: 0 });
  expect(engine.received).toHaveLength(50);
  const output = await linesOf(second!, batch.output_file_id);
  expect(output.map(({ custom_id }) => Number(custom_id)).sort((a, b) => a - b)).toEqual([
    ...Array(50).keys(),
  ]);
  await second!.files.delete(batch.output_file_id!);
  expect((await first!.files.list()).data.map(({ purpose }) => purpose)).toEqual(['batch']);
});
