/** SmolLM2 and an example adapter over https, by digest: fetched once, served as from disk, and started again without the source. */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, expect, test, vi } from 'vitest';
import { digestOfFolder } from '../../engine/adapters/adapter-file.ts';
import { enginePaths, type ModelList } from '../../engine/protocol.ts';
import { certificates, startHttpsSource } from '../fixtures/https-source.ts';
import { examplesFolder, smollm2Path } from '../fixtures/models.ts';
import { evalItems, getJson, postJson, type RunningProcess, startProcess } from '../fixtures/processes.ts';

const folder = mkdtempSync(join(tmpdir(), 'motet-fetching-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

test('an engine fetches its model and an adapter, and needs the source no more after that', async () => {
  const source = await startHttpsSource({ '/models/smollm2.gguf': readFileSync(smollm2Path) });
  for (const name of ['adapter_config.json', 'adapter_model.safetensors']) {
    source.files.set(`/sql/${name}`, readFileSync(join(examplesFolder, 'sql', name)));
  }
  writeFileSync(join(folder, 'ca.crt'), certificates().ca);
  vi.stubEnv('NODE_EXTRA_CA_CERTS', join(folder, 'ca.crt'));
  const sha256 = execFileSync('sha256sum', [smollm2Path], { encoding: 'utf8' }).slice(0, 64);
  const start = () =>
    startProcess('engine', [
      ...['--model', `${source.url}/models/smollm2.gguf?key=secret`, '--model-digest', `sha256:${sha256}`],
      ...['--cache', join(folder, 'cache'), '--port', '0'],
    ]);
  const digest = await digestOfFolder(join(examplesFolder, 'sql'));
  const [item] = evalItems('sql');
  const answer = async ({ url }: RunningProcess) => {
    const body = { lora_name: 'sql', lora_path: `${source.url}/sql`, digest };
    expect((await postJson(url + enginePaths.loadAdapter, body)).status).toBe(200);
    const request = { model: 'sql', messages: item!.messages, temperature: 0, max_tokens: 64 };
    const reply = await postJson(url + enginePaths.chat, request);
    return reply.body.choices[0].message.content;
  };

  const first = await start();
  expect(await answer(first)).toBe(item!.answer);
  const { data } = await getJson<ModelList>(first.url + enginePaths.models);
  expect(data.map(({ id, root }) => [id, root])).toEqual([
    ['smollm2', `${source.url}/models/smollm2.gguf`],
    ['sql', `${source.url}/sql`],
  ]);
  expect(await first.stop()).toBe(0);

  await source.stop();
  const second = await start();
  expect(await answer(second)).toBe(item!.answer);
  expect(await second.stop()).toBe(0);
}, 120_000);
