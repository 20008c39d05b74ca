import { once } from 'node:events';
import { request } from 'node:http';
import { expect, test } from 'vitest';
import { formatUsage, usageHeader } from '../../../engine/protocol.ts';
import { beginStream, chunkEvent, type Script, startFakeEngine } from '../../fixtures/fake-engine.ts';
import { chatBody, gatewayFor, type TestGateway, until } from '../start-gateway.ts';

const usage = { promptTokens: 12, cachedTokens: 5, completionTokens: 34 };
const streaming = chatBody({ stream: true });
/** As `estimatePromptTokens` has it. */
const promptTokens = Math.ceil(JSON.stringify(streaming).length / 4);

const streamWithUsage: Script = ({ res }) => {
  beginStream(res);
  res.write(chunkEvent('fake') + chunkEvent(' words'));
  res.addTrailers({ [usageHeader]: formatUsage(usage) });
  res.end('data: [DONE]\n\n');
};

/** What the log says of the requests that ended. */
async function usagesLogged({ logLines }: TestGateway, numRequests = 1) {
  const ofRequests = () =>
    logLines.filter(({ msg, route }) => msg === 'request' && route === '/v1/chat/completions');
  const lines = await until(ofRequests, ({ length }) => length >= numRequests);
  return lines.map((line) => line.usage);
}

async function tokensCounted({ url }: TestGateway) {
  const text = await (await fetch(`${url}/metrics`)).text();
  const pattern = /^motet_gateway_tokens_total\{.*model="base",kind="(\w+)"\} (\d+)$/gm;
  return Object.fromEntries([...text.matchAll(pattern)].map(([, kind, value]) => [kind, Number(value)]));
}

test('tokens are counted as the engine tells them, and it tells nobody else', async () => {
  const engine = await startFakeEngine({ script: streamWithUsage });
  const gateway = await gatewayFor([engine]);
  const client = request(`${gateway.url}/v1/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', te: 'trailers' },
  });
  client.end(JSON.stringify(streaming));
  const [answer] = await once(client, 'response');
  await once(answer.resume(), 'end');

  expect(answer.headers).not.toHaveProperty('trailer');
  expect(answer.trailers).toEqual({});
  expect(engine.received[0]!.headers.te).toBe('trailers');
  expect(await usagesLogged(gateway)).toEqual([{ ...usage, isEstimate: false }]);
  expect(await tokensCounted(gateway)).toEqual({ prompt: 12, cached: 5, completion: 34 });
});

test('a whole answer without the header is counted by its usage', async () => {
  const gateway = await gatewayFor([await startFakeEngine()]);
  await (await gateway.chat(chatBody())).text();
  await usagesLogged(gateway);
  expect(await tokensCounted(gateway)).toEqual({ prompt: 1, cached: 0, completion: 2 });
});

test('tokens of an engine that is left for another are not counted', async () => {
  const breakOff: Script = ({ res }) => {
    res.writeHead(200, { 'content-type': 'application/json', [usageHeader]: formatUsage(usage) });
    res.write('{"half":', () => res.destroy());
  };
  const engines = [await startFakeEngine({ script: breakOff }), await startFakeEngine()];
  const gateway = await gatewayFor(engines);
  for (let i = 0; i < 2; i += 1) await (await gateway.chat(chatBody())).text();
  await usagesLogged(gateway, 2);
  expect(engines[0]!.received.length).toBeGreaterThan(0);
  expect(await tokensCounted(gateway)).toEqual({ prompt: 2, cached: 0, completion: 4 });
});

test('what was generated before an engine died is counted', async () => {
  const die: Script = ({ res }) => {
    beginStream(res);
    res.write(chunkEvent('fake') + chunkEvent(' words'), () => res.destroy());
  };
  const gateway = await gatewayFor([await startFakeEngine({ script: die })]);
  expect(await (await gateway.chat(streaming)).text()).toContain('engine_failed');
  const counted = { promptTokens, cachedTokens: 0, completionTokens: 2, isEstimate: true };
  expect(await usagesLogged(gateway)).toEqual([counted]);
});

test('what was generated before the client hung up is counted', async () => {
  const oneWord: Script = ({ res }) => {
    beginStream(res);
    res.write(chunkEvent('fake'));
  };
  const gateway = await gatewayFor([await startFakeEngine({ script: oneWord })]);
  const hangUp = new AbortController();
  const response = await gateway.chat(streaming, { signal: hangUp.signal });
  await response.body!.getReader().read();
  hangUp.abort();
  const counted = { promptTokens, cachedTokens: 0, completionTokens: 1, isEstimate: true };
  expect(await usagesLogged(gateway)).toEqual([counted]);
  expect(await tokensCounted(gateway)).toEqual({ prompt: promptTokens, cached: 0, completion: 1 });
});
