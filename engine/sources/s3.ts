/**
 * Objects of a bucket on S3, or on what speaks as it does. Requests are signed when there are keys (Signature Version 4, by
 * aws4fetch), and anonymous when there are none. A compatible server is asked path style, which all of them know.
 *
 * An adapter and a .gguf file are asked for by name, so that GetObject is all that they need; a folder of safetensors is
 * listed first, which takes ListBucket.
 */
import { AwsV4Signer } from 'aws4fetch';
import { type RequestOptions, readReply, unavailable } from '../download.ts';
import { s3Parts, shownUri } from '../source-uri.ts';
import { type SourceAccess, s3Keys } from './access.ts';
import {
  adapterFiles,
  chooseFiles,
  type RemoteFile,
  type RemoteFiles,
  type SourceKind,
} from './remote-files.ts';

/** Of 1,000 objects each. */
const maxPages = 10;
const maxPageBytes = 4 * 2 ** 20;

export async function listS3(
  uri: string,
  kind: SourceKind,
  access: SourceAccess,
  options: RequestOptions,
): Promise<RemoteFiles> {
  const { bucket, key } = s3Parts(uri);
  const { endpoint, region } = access.s3;
  const root = bucketUrl(bucket, endpoint, region);
  let asked = 'no keys were sent';
  const authorize = async (url: URL) => {
    const keys = await s3Keys(access, options);
    asked = `${keys === null ? 'no keys' : keys.role === undefined ? 'keys' : `keys of ${keys.role}`} were sent`;
    if (keys === null) return {};
    const { accessKeyId, secretAccessKey, sessionToken } = keys;
    const signed = await new AwsV4Signer({
      ...{ url: url.href, method: 'GET', service: 's3', region, accessKeyId, secretAccessKey },
      ...(sessionToken !== undefined && { sessionToken }),
    }).sign();
    return Object.fromEntries(signed.headers);
  };
  const explain = (status: number, _headers: unknown, body: string) => {
    const code = /<Code>(\w{1,64})<\/Code>/.exec(body)?.[1];
    return [...(code ? [code] : []), ...([400, 401, 403].includes(status) ? [asked] : [])].join('; ') || null;
  };
  const request = { ...options, authorize, explain };
  const file = (name: string, sizeBytes: number | null, objectKey = `${key}/${name}`): RemoteFile => ({
    ...{ name, sizeBytes, hash: null, form: 'file' },
    url: new URL(`${root}/${objectKey.split('/').map(encode).join('/')}`),
  });
  if (kind === 'model' && /\.gguf$/i.test(key)) {
    return { version: null, files: [file('model.gguf', null, key)], authorize, explain };
  }
  if (kind === 'adapter') {
    return { version: null, files: adapterFiles.map((name) => file(name, null)), authorize, explain };
  }
  const sizes = await listFolder(root, `${key}/`, shownUri(uri), request);
  const { names } = chooseFiles(kind, [...sizes.keys()], shownUri(uri));
  return { version: null, files: names.map((name) => file(name, sizes.get(name)!)), authorize, explain };
}

function bucketUrl(bucket: string, endpoint: string | null, region: string): string {
  if (endpoint !== null) return `${endpoint}/${bucket}`;
  // A name with dots is more than a wildcard certificate covers.
  return bucket.includes('.') || /[A-Z_]/.test(bucket)
    ? `https://s3.${region}.amazonaws.com/${bucket}`
    : `https://${bucket}.s3.${region}.amazonaws.com`;
}

/** As the signature has it. */
const encode = (text: string) =>
  encodeURIComponent(text).replace(/[!'()*]/g, (char) => `%${char.charCodeAt(0).toString(16).toUpperCase()}`);

/** The objects right below a prefix, with their sizes. */
async function listFolder(
  root: string,
  prefix: string,
  where: string,
  request: RequestOptions,
): Promise<Map<string, number>> {
  const sizes = new Map<string, number>();
  let continuation: string | null = null;
  for (let page = 0; page < maxPages; page++) {
    const query = [
      'list-type=2',
      'encoding-type=url',
      'delimiter=%2F',
      `prefix=${encode(prefix)}`,
      ...(continuation === null ? [] : [`continuation-token=${encode(continuation)}`]),
    ];
    const url = new URL(`${root}?${query.sort().join('&')}`);
    const { status, headers, body } = await readReply(url, { ...request, maxBytes: maxPageBytes });
    const text = body.toString();
    if (status !== 200) {
      const reason = request.explain?.(status, headers, text) ?? null;
      throw unavailable(
        `${where}: listing it, ${url.host} answered ${status}${reason === null ? '' : ` (${reason})`}`,
      );
    }
    const isEncoded = fieldOf(text, 'EncodingType') === 'url';
    for (const [, contents] of text.matchAll(/<Contents>(.*?)<\/Contents>/gs)) {
      const key = decodeKey(fieldOf(contents!, 'Key') ?? '', isEncoded);
      const size = Number(fieldOf(contents!, 'Size'));
      if (key.startsWith(prefix) && key !== prefix && Number.isSafeInteger(size)) {
        sizes.set(key.slice(prefix.length), size);
      }
    }
    continuation = fieldOf(text, 'NextContinuationToken');
    if (continuation === null || fieldOf(text, 'IsTruncated') !== 'true') return sizes;
    continuation = unescapeXml(continuation);
  }
  throw unavailable(`${where}: expected at most ${maxPages * 1000} objects in the folder, got more`);
}

const fieldOf = (xml: string, name: string) =>
  new RegExp(`<${name}>([^<]*)</${name}>`).exec(xml)?.[1] ?? null;

function decodeKey(text: string, isEncoded: boolean): string {
  const plain = unescapeXml(text);
  try {
    return isEncoded ? decodeURIComponent(plain.replaceAll('+', ' ')) : plain;
  } catch {
    return plain;
  }
}

const entities: Record<string, string> = { lt: '<', gt: '>', quot: '"', apos: "'", amp: '&' };

function unescapeXml(text: string): string {
  return text.replace(/&(?:(\w+)|#(\d+)|#x([0-9a-f]+));/gi, (whole, name, decimal, hex) => {
    if (name !== undefined) return entities[name] ?? whole;
    const code = decimal === undefined ? Number.parseInt(hex, 16) : Number(decimal);
    return code <= 0x10ffff ? String.fromCodePoint(code) : whole;
  });
}
