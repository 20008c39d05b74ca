import { describe, expect, test } from 'vitest';
import {
  hfParts,
  nameOf,
  needsDigest,
  ociParts,
  pathOf,
  pvcParts,
  s3Parts,
  schemeOf,
  shownUri,
  uriProblem,
} from '../../engine/source-uri.ts';

const shapes =
  'a path or file:///PATH or pvc://CLAIM/PATH or https://HOST/PATH or s3://BUCKET/KEY or hf://ORG/NAME@REVISION[/PATH] or oci://REGISTRY/REPOSITORY[:TAG|@DIGEST]';

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

  test.each([
    ['s3://bucket/models/Tiny.gguf', 's3', true, 'Tiny'],
    ['s3://bucket/models/tiny/', 's3', true, 'tiny'],
    ['hf://org/Tiny-1B', 'hf', false, 'Tiny-1B'],
    ['hf://org/Tiny-1B@v1.0/gguf/tiny-q4.gguf', 'hf', false, 'tiny-q4'],
    ['oci://ghcr.io/org/tiny:v1', 'oci', false, 'tiny'],
    ['pvc://claim/models/tiny.gguf', 'pvc', false, 'tiny'],
  ])('%s is named by its path or repository', (uri, scheme, needs, name) => {
    expect([uriProblem(uri), schemeOf(uri), needsDigest(uri), nameOf(uri)]).toEqual([
      null,
      scheme,
      needs,
      name,
    ]);
  });

  test('has its parts', () => {
    expect(s3Parts('s3://b-1/a b/c/')).toEqual({ bucket: 'b-1', key: 'a b/c' });
    expect(hfParts('hf://o/n')).toEqual({ repository: 'o/n', revision: 'main', path: '' });
    expect(hfParts('hf://o/n@refs%2Fpr%2F1/a/b')).toEqual({
      repository: 'o/n',
      revision: 'refs/pr/1',
      path: 'a/b',
    });
    const digest = `sha256:${'0'.repeat(64)}`;
    const reference = (uri: string) => ociParts(uri);
    expect(reference('oci://h:5000/a/b')).toEqual({
      registry: 'h:5000',
      repository: 'a/b',
      reference: 'latest',
    });
    expect(reference('oci://h/a:v1').reference).toBe('v1');
    expect(reference(`oci://h/a@${digest}`).reference).toBe(digest);
    expect(pvcParts('pvc://my-claim/x/y')).toEqual({ claim: 'my-claim', path: 'x/y' });
  });

  test('that is a path is shown as it is, whatever is in it', () => {
    expect(shownUri('/models/what?#1')).toBe('/models/what?#1');
  });

  test.each([
    ['gs://bucket/a', shapes, 'gs://'],
    ['constructor://x', shapes, 'constructor://'],
    ['http://host/a', shapes, 'http://'],
    ['https://', shapes, 'something else'],
    ['s3://bucket', 's3://BUCKET/KEY', 'something else'],
    ['s3://bucket/a?versionId=1', 's3://BUCKET/KEY', 'one with ? or # or control characters'],
    ['s3://bucket/a/../b', 's3://BUCKET/KEY', 'one with . or .. as a part'],
    ['hf://name', 'hf://ORG/NAME@REVISION[/PATH]', 'something else'],
    ['hf://org/name@', 'hf://ORG/NAME@REVISION[/PATH]', 'something else'],
    ['hf://org/name@main/../x', 'hf://ORG/NAME@REVISION[/PATH]', 'one with . or .. as a part'],
    ['oci://host/Repo', 'oci://REGISTRY/REPOSITORY[:TAG|@DIGEST]', 'something else'],
    ['oci://user:secret@host/repo', 'oci://REGISTRY/REPOSITORY[:TAG|@DIGEST]', 'something else'],
    ['oci://host/repo@sha256:12', 'oci://REGISTRY/REPOSITORY[:TAG|@DIGEST]', 'something else'],
    ['pvc://claim', 'pvc://CLAIM/PATH', 'something else'],
    ['pvc://claim/../x', 'pvc://CLAIM/PATH', 'one with . or .. as a part'],
    ['https://user@host/a', 'no user and password in it', 'some'],
    ['file://host/a', 'file:///PATH', 'the host host'],
    ['file:///a%2fb', 'a path without encoded slashes and NUL', 'one with them'],
    ['file:///a%00', 'a path without encoded slashes and NUL', 'one with them'],
    ['file:///100%', 'a path without encoded slashes and NUL', 'one with them'],
  ])('%s is refused', (uri, expected, got) => {
    expect(uriProblem(uri)).toEqual({ expected, got });
  });
});
