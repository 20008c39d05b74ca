/** Gateway and engines as processes: who gets a request, as users see it. Engines compute nothing, and keep KV as ever. */
import { setTimeout as sleep } from 'node:timers/promises';
import { Agent } from 'undici';
import { expect, onTestFinished, test } from 'vitest';
import { type AdapterList, enginePaths } from '../../engine/protocol.ts';
import { type PacedEngine, startPacedEngine } from '../fixtures/paced-engine.ts';
import { getJson, startGatewayOver } from '../fixtures/processes.ts';
import { seededRandom } from '../fixtures/seeded-random.ts';
import { askTurn, type Turn, textOf } from '../fixtures/streamed-turn.ts';

const pace = { numPages: 2_000, numAdapters: 0, stepMs: 1, tokenMs: 0, loadMs: 1 };
const outputTokens = 4;

async function startEngine(port = 0): Promise<PacedEngine> {
  const engine = await startPacedEngine({ port, ...pace });
  onTestFinished(() => engine.kill());
  return engine;
}

async function startGateway(engines: PacedEngine[], args: string[] = []) {
  const gateway = await startGatewayOver(
    engines.map(({ url }) => url),
    ['--poll-interval-ms', '50', ...args],
  );
  const agent = new Agent({ connections: 8 });
  onTestFinished(async () => {
    await agent.close();
    await gateway.stop();
  });
  return { gateway, agent };
}

const promptTokensAt = async ({ url }: PacedEngine) =>
  (await getJson<AdapterList>(`${url}${enginePaths.adapters}`)).base!.prefixCache.promptTokens;

test('conversations stay where their KV is, and go on elsewhere when their engine is killed', async () => {
  const engines = [await startEngine(), await startEngine()];
  const { gateway, agent } = await startGateway(engines, ['--slow-start-ms', '0']);
  const random = seededRandom(1);
  const conversations = Array.from({ length: 4 }, () => [{ role: 'system', content: textOf(random, 400) }]);
  const turn = async (messages: object[]): Promise<Turn> => {
    messages.push({ role: 'user', content: textOf(random, 60) });
    const { text, ...told } = await askTurn(agent, gateway.url, 'base', messages, outputTokens);
    messages.push({ role: 'assistant', content: text });
    return told;
  };
  const round = async () => {
    const turns: Turn[] = [];
    for (const messages of conversations) turns.push(await turn(messages));
    return turns;
  };
  const isCached = ({ cachedTokens }: Turn) => cachedTokens >= 400;

  expect((await round()).filter(isCached)).toEqual([]);
  // Each engine got some of them.
  for (const engine of engines) expect(await promptTokensAt(engine)).toBeGreaterThan(400);
  for (let i = 0; i < 3; i++) expect((await round()).every(isCached)).toBe(true);

  await engines[0]!.kill();
  const afterwards = await round();
  expect(afterwards.some(isCached)).toBe(true);
  expect(afterwards.every(isCached)).toBe(false);
  expect((await round()).every(isCached)).toBe(true);
});

test('an engine that comes up gets nothing while one that is up has time', async () => {
  const slowStartMs = 14_000;
  const old = await startEngine();
  const away = await startEngine();
  await away.kill();
  const { gateway, agent } = await startGateway([old, away], ['--slow-start-ms', String(slowStartMs)]);
  // To the gateway all engines are new at first, and a tenth of the time is the least that counts.
  await sleep(slowStartMs / 7);
  const back = await startEngine(away.port);
  const isReady = async () =>
    (await (await fetch(`${gateway.url}/metrics`)).text()).includes(
      'motet_gateway_engines{base_model="",state="ready"} 2',
    );
  await expect.poll(isReady, { timeout: 20_000 }).toBe(true);
  const random = seededRandom(1);
  for (let i = 0; i < 8; i++) {
    const messages = [{ role: 'user', content: textOf(random, 60) }];
    await askTurn(agent, gateway.url, 'base', messages, outputTokens);
  }
  expect(await promptTokensAt(old)).toBeGreaterThan(0);
  expect(await promptTokensAt(back)).toBe(0);
});
