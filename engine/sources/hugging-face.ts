/**
 * Files of a repository on the Hugging Face Hub, or on what speaks as it does. The revision is resolved to a commit first, and
 * all files are that commit's, with the hashes that it names: sha256 of large ones, git's of small ones. Two of the Hub's
 * routes are used, those of huggingface_hub's snapshot_download:
 *
 *   GET /api/models/ORG/NAME/revision/REVISION?blobs=true    the commit and its files
 *   GET /ORG/NAME/resolve/COMMIT/PATH                        a file, often by a redirect to a CDN
 */
import { type RequestOptions, readReply, unavailable } from '../download.ts';
import { hfParts, shownUri } from '../source-uri.ts';
import { hfToken, type SourceAccess } from './access.ts';
import { chooseFiles, type RemoteFile, type RemoteFiles, type SourceKind, safeName } from './remote-files.ts';

/** A repository of 10,000 files has about 2 MiB of them. */
const maxListingBytes = 32 * 2 ** 20;

interface Sibling {
  rfilename?: unknown;
  size?: unknown;
  blobId?: unknown;
  lfs?: { sha256?: unknown; size?: unknown } | null;
}

/** What stands for the URI's content, when that can be told without asking. */
export function hfVersion(uri: string, { hf }: SourceAccess): string | null {
  const { repository, revision, path } = hfParts(uri);
  return isCommit(revision) ? ['hf', hf.endpoint, repository, revision, path].join('\n') : null;
}

const isCommit = (revision: string) => /^[0-9a-f]{40}$/.test(revision);

export async function listHuggingFace(
  uri: string,
  kind: SourceKind,
  access: SourceAccess,
  options: RequestOptions,
): Promise<RemoteFiles> {
  const { repository, revision, path } = hfParts(uri);
  const token = await hfToken(access);
  const authorize = async () => ({ ...(token !== null && { authorization: `Bearer ${token}` }) });
  const explain = (status: number, headers: Record<string, unknown>) => {
    const code = /^\w{1,64}$/.exec(String(headers['x-error-code'] ?? ''))?.[0];
    const asked = token === null ? 'no token was sent' : 'a token was sent';
    return [code, ...(status === 401 || status === 403 || status === 404 ? [asked] : [])].join('; ') || null;
  };
  const where = shownUri(uri);
  const listing = new URL(
    `${access.hf.endpoint}/api/models/${repository}/revision/${encodeURIComponent(revision)}?blobs=true`,
  );
  const reply = await readReply(listing, {
    ...options,
    authorize,
    accept: 'application/json',
    maxBytes: maxListingBytes,
  });
  if (reply.status !== 200) {
    const reason = explain(reply.status, reply.headers);
    throw unavailable(
      `${where}: ${listing.host} answered ${reply.status}${reason === null ? '' : ` (${reason})`}`,
    );
  }
  const { sha, siblings } = parse(reply.body, where);
  const root = path === '' ? '' : `${path}/`;
  const byName = new Map<string, Sibling>();
  for (const sibling of siblings) {
    const name = typeof sibling.rfilename === 'string' ? safeName(sibling.rfilename) : null;
    if (name === null) continue;
    // A path names a file, or a folder.
    if (name === path) byName.set(name.slice(name.lastIndexOf('/') + 1), sibling);
    else if (name.startsWith(root)) byName.set(name.slice(root.length), sibling);
  }
  const { folder, names } = chooseFiles(kind, [...byName.keys()], where);
  const files = names.map((name): RemoteFile => {
    const { rfilename, size, lfs, blobId } = byName.get(folder + name)!;
    const encoded = String(rfilename).split('/').map(encodeURIComponent).join('/');
    const isLarge = typeof lfs?.sha256 === 'string';
    const bytes = lfs?.size ?? size;
    return {
      name,
      url: new URL(`${access.hf.endpoint}/${repository}/resolve/${sha}/${encoded}`),
      sizeBytes: Number.isSafeInteger(bytes) ? (bytes as number) : null,
      hash: isLarge
        ? { algorithm: 'sha256', hex: String(lfs.sha256) }
        : typeof blobId === 'string'
          ? { algorithm: 'git', hex: blobId }
          : null,
      form: 'file',
    };
  });
  const version = ['hf', access.hf.endpoint, repository, sha, path].join('\n');
  return { version, files, authorize, explain };
}

function parse(body: Buffer, where: string): { sha: string; siblings: Sibling[] } {
  let json: { sha?: unknown; siblings?: unknown } | null = null;
  try {
    json = JSON.parse(body.toString());
  } catch {}
  if (typeof json?.sha !== 'string' || !isCommit(json.sha) || !Array.isArray(json.siblings)) {
    throw unavailable(`${where}: expected a commit and its files, as the Hub lists them, got something else`);
  }
  return {
    sha: json.sha,
    siblings: json.siblings.filter((entry) => typeof entry === 'object' && entry !== null),
  };
}
