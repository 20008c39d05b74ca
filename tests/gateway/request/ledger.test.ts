import { pino } from 'pino';
import { expect, test, vi } from 'vitest';
import { createMetrics } from '../../../gateway/metrics.ts';
import type { Facts } from '../../../gateway/request/arrival.ts';
import { type EndedRequest, Ledger } from '../../../gateway/request/ledger.ts';

function newLedger() {
  const lines: Record<string, unknown>[] = [];
  const log = pino({ level: 'info', base: null }, { write: (line) => void lines.push(JSON.parse(line)) });
  const metrics = createMetrics();
  return { ledger: new Ledger(metrics, log), metrics, lines };
}

function ended(facts: Partial<Facts> = {}, fields: Partial<EndedRequest> = {}): EndedRequest {
  const all = {
    ...{ requestId: 'r', route: '/v1/completions', attempts: 1, requestBytes: 3, responseBytes: 5 },
    ...{ model: 'sql', target: 'sql-2', tenant: 'acme' },
    ...facts,
  };
  const usage = { promptTokens: 7, cachedTokens: 2, completionTokens: 4, isEstimate: false };
  return {
    ...{ facts: all, usage, status: 200, durationMs: 20.4, ttfbMs: 10.4, isUnimportant: false },
    ...fields,
  };
}

test('whoever reads a count gets all that has ended, though none of it was written yet', async () => {
  const { ledger, metrics, lines } = newLedger();
  for (let i = 0; i < 3; i++) ledger.note(ended());
  ledger.note(ended({ model: 'other' }, { status: 500, usage: undefined, ttfbMs: undefined }));
  expect(lines).toHaveLength(0);

  const text = await metrics.registry.metrics();
  const labels = 'route="/v1/completions",model="sql"';
  expect(text).toContain(
    `motet_gateway_requests_total{${labels},target="sql-2",tenant="acme",status="200"} 3`,
  );
  expect(text).toContain('model="other",target="sql-2",tenant="acme",status="500"} 1');
  expect(text).toContain('motet_gateway_tokens_total{tenant="acme",model="sql",kind="prompt"} 21');
  expect(text).toContain('motet_gateway_tokens_total{tenant="acme",model="sql",kind="cached"} 6');
  expect(text).not.toContain('motet_gateway_tokens_total{tenant="acme",model="other"');
  expect(text).toContain(`motet_gateway_request_duration_seconds_count{${labels}} 3`);
  expect(text).toContain(`motet_gateway_time_to_first_byte_seconds_bucket{le="0.025",${labels}} 3`);
  expect(text).not.toContain(
    'motet_gateway_time_to_first_byte_seconds_count{route="/v1/completions",model="other"',
  );
  expect(lines).toHaveLength(4);
});

test.each(['requests', 'tokens', 'durationSeconds', 'firstByteSeconds'] as const)(
  'one who reads `%s` alone gets them too',
  async (name) => {
    const { ledger, metrics } = newLedger();
    ledger.note(ended());
    expect((await metrics[name].get()).values).not.toHaveLength(0);
  },
);

test('a line says what was known when the request ended', () => {
  const { ledger, lines } = newLedger();
  const facts = ended({ hedge: 'won', picked: { reason: 'turn', knownTokens: 0 } }).facts;
  ledger.note(ended(facts));
  facts.errorCode = 'engine_failed';
  ledger.write();
  const { level, time, ...line } = lines[0]!;
  expect(line).toEqual({
    ...{ requestId: 'r', route: '/v1/completions', attempts: 1, requestBytes: 3, responseBytes: 5 },
    ...{ model: 'sql', target: 'sql-2', tenant: 'acme', hedge: 'won' },
    ...{ picked: { reason: 'turn', knownTokens: 0 }, status: 200, durationMs: 20, ttfbMs: 10 },
    usage: { promptTokens: 7, cachedTokens: 2, completionTokens: 4, isEstimate: false },
    msg: 'request',
  });
});

test('no more than 64 are kept, and none for long', () => {
  vi.useFakeTimers();
  try {
    const { ledger, lines } = newLedger();
    for (let i = 0; i < 63; i++) ledger.note(ended());
    expect(lines).toHaveLength(0);
    ledger.note(ended());
    expect(lines).toHaveLength(64);
    ledger.note(ended());
    vi.advanceTimersByTime(10);
    expect(lines).toHaveLength(65);
  } finally {
    vi.useRealTimers();
  }
});

test('what machines ask all the time is not in a log of what matters', () => {
  const { ledger, lines } = newLedger();
  ledger.note(ended({ route: '/readyz' }, { isUnimportant: true }));
  ledger.write();
  expect(lines).toHaveLength(0);
});
