import { describe, expect, test } from 'vitest';
import { defaultSampling } from '../../engine/sampling.ts';
import { StopStrings, stopAtToken } from '../../engine/stop.ts';

/** Pushes pieces until a stop string is found. */
function run(stops: string[], pieces: string[], includeStop = false) {
  const strings = new StopStrings(stops, includeStop);
  const sent: string[] = [];
  for (const piece of pieces) {
    sent.push(strings.push(piece));
    if (strings.found !== null) return { sent, found: strings.found };
  }
  sent.push(strings.flush());
  return { sent, found: null };
}

describe('stop strings', () => {
  test.each([
    ['passes text through when there are none', [], ['a', 'b'], ['a', 'b', ''], null],
    ['finds one inside a piece and drops what follows', ['X'], ['aXb'], ['a'], 'X'],
    ['finds one across two pieces', ['END'], ['aE', 'ND'], ['a', ''], 'END'],
    ['finds one across many pieces', ['STOP'], ['S', 'T', 'O', 'P'], ['', '', '', ''], 'STOP'],
    ['sends held text when it was no stop string', ['END'], ['aE', 'x'], ['a', 'Ex', ''], null],
    ['holds back no more than could begin one', ['aab'], ['xaaa', 'c'], ['xa', 'aac', ''], null],
    ['finds one that begins inside a false start', ['aab'], ['aa', 'ab'], ['', 'a'], 'aab'],
    ['sends held text when the sequence ends', ['END'], ['aEN'], ['a', 'EN'], null],
    ['takes the one that begins first', ['cd', 'bcde'], ['abcde'], ['a'], 'bcde'],
    ['takes the longer of two that begin together', ['b', 'bc'], ['abcd'], ['a'], 'bc'],
    ['holds back for the longest of several', ['xyz', 'zz'], ['axy'], ['a', 'xy'], null],
  ] as const)('%s', (_name, stops, pieces, sent, found) => {
    expect(run([...stops], [...pieces])).toEqual({ sent, found });
  });

  test('keeps the stop string when asked to', () => {
    expect(run(['END'], ['aE', 'NDb'], true)).toEqual({ sent: ['a', 'END'], found: 'END' });
  });
});

describe('stop at a token', () => {
  const eos = new Set([9]);
  const at = (token: number, numOutputTokens: number, params = {}) =>
    stopAtToken(token, numOutputTokens, 4, { ...defaultSampling(), ...params }, eos);

  test.each([
    ['goes on at any other token', 1, 1, {}, null],
    ['ends at the end token', 9, 1, {}, { finishReason: 'stop', stopReason: null }],
    ['goes on at the end token when told to ignore it', 9, 1, { ignoreEos: true }, null],
    [
      'ends at a stop token and names it',
      5,
      1,
      { stopTokenIds: [5] },
      { finishReason: 'stop', stopReason: 5 },
    ],
    ['ends by length at the last token', 1, 4, {}, { finishReason: 'length', stopReason: null }],
    ['reports stop when both happen', 9, 4, {}, { finishReason: 'stop', stopReason: null }],
    ['goes on at the end token before min_tokens', 9, 2, { minTokens: 2 }, null],
    [
      'ends at the end token after min_tokens',
      9,
      3,
      { minTokens: 2 },
      { finishReason: 'stop', stopReason: null },
    ],
  ] as const)('%s', (_name, token, numOutputTokens, params, expected) => {
    expect(at(token, numOutputTokens, params)).toEqual(expected);
  });
});
