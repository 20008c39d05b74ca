/** SmolLM2 and example adapters from remote sources: fetched once, served as from disk, and started again without the source. */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, expect, onTestFinished, test, vi } from 'vitest';
import { digestOfFolder } from '../../engine/adapters/adapter-file.ts';
import { enginePaths, type ModelList } from '../../engine/protocol.ts';
import { startFakeHub } from '../fixtures/fake-hub.ts';
import { certificates, startHttpsSource } from '../fixtures/https-source.ts';
import { examplesFolder, smollm2Path } from '../fixtures/models.ts';
import { evalItems, getJson, postJson, type RunningProcess, startProcess } from '../fixtures/processes.ts';
import { startOciRegistry, startS3Server } from '../fixtures/source-servers.ts';

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

test('an engine takes its model from a bucket, and adapters from a registry and a hub', async () => {
  const filesOf = (name: string) =>
    ['adapter_config.json', 'adapter_model.safetensors'].map(
      (file) => [file, readFileSync(join(examplesFolder, name, file))] as const,
    );
  const bucket = await startS3Server(onTestFinished);
  bucket.put('models', { 'SmolLM2.gguf': readFileSync(smollm2Path) });
  const registry = await startOciRegistry(onTestFinished);
  const layers = filesOf('sql').map(([name, bytes]) => ({
    ...{ bytes, mediaType: 'application/octet-stream' },
    annotations: { 'org.opencontainers.image.title': name },
  }));
  await registry.push('voices/sql', 'v1', layers);
  const hub = await startFakeHub(onTestFinished);
  hub.commit('motet/dates', 'main', Object.fromEntries(filesOf('dates')));
  hub.repositories.get('motet/dates')!.token = 'hf_secret';

  const auth = Buffer.from(registry.login).toString('base64');
  writeFileSync(join(folder, 'config.json'), JSON.stringify({ auths: { [registry.token]: { auth } } }));
  writeFileSync(join(folder, 'token'), 'hf_secret');
  vi.stubEnv('AWS_ACCESS_KEY_ID', bucket.keys.accessKeyId);
  vi.stubEnv('AWS_SECRET_ACCESS_KEY', bucket.keys.secretAccessKey);
  vi.stubEnv('DOCKER_CONFIG', folder);
  vi.stubEnv('HF_TOKEN_PATH', join(folder, 'token'));
  onTestFinished(() => void vi.unstubAllEnvs());
  const sha256 = execFileSync('sha256sum', [smollm2Path], { encoding: 'utf8' }).slice(0, 64);
  const engine = await startProcess('engine', [
    ...['--model', 's3://models/SmolLM2.gguf', '--model-digest', `sha256:${sha256}`],
    ...['--s3-endpoint', bucket.endpoint, '--hf-endpoint', hub.url, '--oci-plain-http', registry.token],
    ...['--adapter', `sql=oci://${registry.token}/voices/sql:v1`],
    ...['--cache', join(folder, 'remote'), '--port', '0'],
  ]);
  const body = { lora_name: 'dates', lora_path: 'hf://motet/dates@main' };
  expect((await postJson(engine.url + enginePaths.loadAdapter, body)).status).toBe(200);
  for (const model of ['sql', 'dates']) {
    const [item] = evalItems(model);
    const request = { model, messages: item!.messages, temperature: 0, max_tokens: 64 };
    const reply = await postJson(engine.url + enginePaths.chat, request);
    expect(reply.body.choices[0].message.content).toBe(item!.answer);
  }
  const { data } = await getJson<ModelList>(engine.url + enginePaths.models);
  expect(data.map(({ id, root }) => [id, root])).toEqual([
    ['SmolLM2', 's3://models/SmolLM2.gguf'],
    ['dates', 'hf://motet/dates@main'],
    ['sql', `oci://${registry.token}/voices/sql:v1`],
  ]);
  expect(await engine.stop()).toBe(0);
}, 120_000);
