import { setImmediate as nextTurn } from 'node:timers/promises';
import { describe, expect, test } from 'vitest';
import { Turns } from '../../gateway/turns.ts';
import { answer, answerForever, startFakeEngine } from '../fixtures/fake-engine.ts';
import { chatBody, gatewayFor, until } from './start-gateway.ts';

test('few are called at once, many over several turns, and all in their order', async () => {
  const turns = new Turns(3);
  const called: number[] = [];
  const take = (...all: number[]) => {
    for (const i of all) turns.take(() => called.push(i));
  };
  take(1, 2, 3, 4, 5, 6, 7, 8);
  expect(called).toEqual([1, 2, 3]);
  await nextTurn();
  expect(called).toEqual([1, 2, 3, 4, 5, 6]);
  // The last turn had three, so that this one waits behind the two that are left.
  take(9);
  expect(called).toHaveLength(6);
  await nextTurn();
  expect(called).toEqual([1, 2, 3, 4, 5, 6, 7, 8, 9]);
  await nextTurn();
  await nextTurn();
  take(10, 11, 12, 13);
  expect(called).toHaveLength(12);
  turns.flush();
  expect(called.at(-1)).toBe(13);
  expect(called).toHaveLength(13);
  await nextTurn();
  expect(called).toHaveLength(13);
});

describe('many streams that end in one moment', () => {
  const numStreams = 150;

  /** Open streams, and a gateway that has room for no more. */
  async function openStreams() {
    const engine = await startFakeEngine({ script: answerForever });
    const gateway = await gatewayFor([engine], { maxInFlightPerEngine: numStreams });
    const hangUp = new AbortController();
    const open = async () => {
      const response = await gateway.chat(chatBody({ stream: true }), { signal: hangUp.signal });
      const reader = response.body!.getReader();
      await reader.read();
      return reader;
    };
    const readers = await Promise.all(Array.from({ length: numStreams }, open));
    return { engine, gateway, hangUp, readers };
  }

  test.each(['client_closed_request', 'engine_failed'])(
    'have a line each in the log, and give their places back: %s',
    async (errorCode) => {
      const { engine, gateway, hangUp, readers } = await openStreams();
      const ended = readers.map(async (reader) => {
        let text = '';
        for (;;) {
          const { done, value } = await reader.read();
          if (done) return text;
          text += Buffer.from(value);
        }
      });
      if (errorCode === 'client_closed_request') hangUp.abort();
      else await engine.kill();
      for (const { status, ...result } of await Promise.allSettled(ended)) {
        expect(status).toBe(errorCode === 'engine_failed' ? 'fulfilled' : 'rejected');
        if ('value' in result) expect(result.value).toContain('"code":"engine_failed"');
      }
      const lines = await until(
        async () => (await gateway.wholeLog()).filter(({ msg }) => msg === 'request'),
        (lines) => lines.filter(({ route }) => route === '/v1/chat/completions').length >= numStreams,
      );
      const ofStreams = lines.filter(({ route }) => route === '/v1/chat/completions');
      expect(ofStreams).toHaveLength(numStreams);
      for (const line of ofStreams) expect(line).toMatchObject({ errorCode });
      engine.script = answer;
      if (errorCode === 'engine_failed') await engine.revive();
      const again = Array.from({ length: numStreams }, () => gateway.chat(chatBody()));
      for (const response of await Promise.all(again)) expect(response.status).toBe(200);
    },
  );

  test('are all in the log of a gateway that drains', async () => {
    const { gateway, hangUp, readers } = await openStreams();
    hangUp.abort();
    await gateway.drain();
    await Promise.allSettled(readers.map((reader) => reader.read()));
    const lines = gateway.logLines.filter(({ msg }) => msg === 'request');
    expect(lines).toHaveLength(numStreams);
  });
});
