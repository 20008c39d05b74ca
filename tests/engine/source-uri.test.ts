import { describe, expect, test } from 'vitest';
import { nameOf, needsDigest, pathOf, schemeOf, shownUri, uriProblem } from '../../engine/source-uri.ts';

describe('a source', () => {
  test.each([
    ['/models/a.gguf', 'file', '/models/a.gguf', 'a'],
    ['models/A.GGUF', 'file', 'models/A.GGUF', 'A'],
    ['file:///models/a', 'file', '/models/a', 'a'],
    ['file:///my%20models/a.gguf', 'file', '/my models/a.gguf', 'a'],
    ['C:/odd but a path', 'file', 'C:/odd but a path', 'odd but a path'],
  ])('%s is a path', (uri, scheme, path, name) => {
    expect([uriProblem(uri), schemeOf(uri), pathOf(uri), nameOf(uri)]).toEqual([null, scheme, path, name]);
    expect(needsDigest(uri)).toBe(false);
  });

  test('https is fetched, and is named by its path', () => {
    const uri = 'HTTPS://host:8443/models/Tiny.gguf?signature=secret#x';
    expect([uriProblem(uri), schemeOf(uri), needsDigest(uri), nameOf(uri)]).toEqual([
      null,
      'https',
      true,
      'Tiny',
    ]);
    expect(shownUri(uri)).toBe('HTTPS://host:8443/models/Tiny.gguf');
  });

  test('that is a path is shown as it is, whatever is in it', () => {
    expect(shownUri('/models/what?#1')).toBe('/models/what?#1');
  });

  test.each([
    ['s3://bucket/a', 'a path or file:///PATH or https://HOST/PATH', 's3://'],
    ['constructor://x', 'a path or file:///PATH or https://HOST/PATH', 'constructor://'],
    ['http://host/a', 'a path or file:///PATH or https://HOST/PATH', 'http://'],
    ['https://', 'a path or file:///PATH or https://HOST/PATH', 'something else'],
    ['https://user@host/a', 'no user and password in it', 'some'],
    ['file://host/a', 'file:///PATH', 'the host host'],
    ['file:///a%2fb', 'a path without encoded slashes and NUL', 'one with them'],
    ['file:///a%00', 'a path without encoded slashes and NUL', 'one with them'],
    ['file:///100%', 'a path without encoded slashes and NUL', 'one with them'],
  ])('%s is refused', (uri, expected, got) => {
    expect(uriProblem(uri)).toEqual({ expected, got });
  });
});
