/** Files of a plain https server: it lists nothing, so a model is the file that is named, and an adapter is two. */
import type { RemoteFile, RemoteFiles, SourceKind } from './remote-files.ts';
import { adapterFiles } from './remote-files.ts';

export async function listHttps(uri: string, kind: SourceKind): Promise<RemoteFiles> {
  const file = (name: string, url: URL): RemoteFile => ({
    name,
    url,
    sizeBytes: null,
    hash: null,
    form: 'file',
  });
  const files =
    kind === 'model'
      ? [file('model.gguf', new URL(uri))]
      : adapterFiles.map((name) => file(name, fileUrl(uri, name)));
  return { version: null, files };
}

/** `name` in the folder that the URI names; a query stays behind it, as signed URLs need it. */
function fileUrl(uri: string, name: string): URL {
  const url = new URL(uri);
  url.pathname = `${url.pathname.replace(/\/+$/, '')}/${name}`;
  url.hash = '';
  return url;
}
