import { expect, test } from 'vitest';
import { WholeEvents } from '../../gateway/sse.ts';

const pushed = (events: WholeEvents, text: string) => events.push(Buffer.from(text)).toString();

test('holds back the part of an event until its empty line has come', () => {
  const events = new WholeEvents();
  expect(pushed(events, 'data: 1\n\ndata: 2')).toBe('data: 1\n\n');
  expect(pushed(events, '\n')).toBe('');
  expect(pushed(events, '\ndata: 3')).toBe('data: 2\n\n');
  expect(events.takeRest().toString()).toBe('data: 3');
});

test.each([
  ['LF', '\n'],
  ['CR LF', '\r\n'],
  ['CR', '\r'],
])('knows an event by lines that end with %s', (_, end) => {
  const events = new WholeEvents();
  expect(pushed(events, `data: 1${end}${end}data`)).toBe(`data: 1${end}${end}`);
});

test('gives out the same bytes, whatever the borders of the pieces', () => {
  const stream = Buffer.from(`data: {"text":"ä€𝄞"}\r\n\r\n: a comment\n\ndata: [DONE]\n\n`);
  for (let size = 1; size <= stream.length; size += 1) {
    const events = new WholeEvents();
    const out: Buffer[] = [];
    for (let at = 0; at < stream.length; at += size) out.push(events.push(stream.subarray(at, at + size)));
    expect(Buffer.concat(out)).toEqual(stream);
  }
});

test('passes on an event that is too long to hold', () => {
  const events = new WholeEvents();
  const long = Buffer.alloc((1 << 20) + 1, 'x');
  expect(events.push(long).length).toBe(long.length);
});
