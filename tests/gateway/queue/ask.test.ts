import { expect, test } from 'vitest';
import { lowestPriority } from '../../../engine/protocol.ts';
import { lowered, parseWaitMs } from '../../../gateway/queue/ask.ts';

test('a client may lower its priority and never raise it', () => {
  expect(lowered(3, undefined)).toBe(3);
  expect(lowered(3, '9')).toBe(3);
  expect(lowered(3, ' 1 ')).toBe(1);
  expect(lowered(3, '-999')).toBe(lowestPriority);
});

test('a wait is said in whole milliseconds', () => {
  expect(parseWaitMs(undefined)).toBeNull();
  expect(parseWaitMs('500')).toBe(500);
  expect(parseWaitMs('0')).toBe(1);
});

test.each(['high', '', '1.5', '1e3', '99999999999'])(
  'what is no number is refused by the name of its header: %j',
  (value) => {
    expect(() => lowered(0, value)).toThrow(/^x-motet-priority: expected an integer, got "/);
    expect(() => parseWaitMs(value)).toThrow(
      /^x-llm-d-slo-ttft-ms: expected a whole number of milliseconds, got "/,
    );
  },
);
