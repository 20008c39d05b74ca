/** What a remote source has of a model or an adapter: its files, and which of them are wanted. Reads nothing. */
import { type RequestOptions, unavailable } from '../download.ts';

export type SourceKind = 'model' | 'adapter';

export interface RemoteFile {
  /** Below the model's or adapter's folder. */
  name: string;
  url: URL;
  /** null: the source does not say. */
  sizeBytes: number | null;
  /** What it must be, by the source's own word; null: it has none. */
  hash: { algorithm: 'sha256' | 'git'; hex: string } | null;
  /** A layer is unpacked, and what is wanted of it is looked for then. */
  form: 'file' | LayerForm;
}

export type LayerForm = 'tar' | 'tar+gzip' | 'tar+zstd';

export interface RemoteFiles {
  /** Stands for just these bytes, for ever; null: nothing does. */
  version: string | null;
  files: RemoteFile[];
  authorize?: RequestOptions['authorize'];
  explain?: RequestOptions['explain'];
}

export const adapterFiles = ['adapter_config.json', 'adapter_model.safetensors'];

/** What a base model is read from, apart from its weights. */
const isModelText = (name: string) => /^[^/]+\.(json|jinja)$/.test(name);
/** As transformers names the weights; folders often have the same ones under another name beside them. */
const isModelShard = (name: string) => /^model(-\d+-of-\d+)?\.safetensors$/.test(name);

/** Whether a file of an image may be part of what is looked for. */
export const isWanted = (kind: SourceKind, name: string) =>
  kind === 'adapter'
    ? adapterFiles.includes(name.slice(name.lastIndexOf('/') + 1))
    : /\.(gguf|safetensors|json|jinja)$/i.test(name);

/**
 * The one model or adapter among the files: an adapter is a folder with PEFT's two files; a model is a folder of
 * safetensors with a config.json, or else a GGUF file.
 * @param names with / between folders
 * @returns its folder, '' or with / at its end, and its files there
 * @throws EngineError source_unavailable, when there is none or more than one
 */
export function chooseFiles(
  kind: SourceKind,
  names: readonly string[],
  where: string,
): { folder: string; names: string[] } {
  const has = new Set(names);
  const folders = [...new Set(names.map((name) => name.slice(0, name.lastIndexOf('/') + 1)))];
  const inside = (folder: string) =>
    names.filter((name) => name.startsWith(folder)).map((name) => name.slice(folder.length));
  const isHere = (folder: string) =>
    kind === 'adapter'
      ? adapterFiles.every((name) => has.has(folder + name))
      : has.has(`${folder}config.json`) && inside(folder).some((name) => /^[^/]+\.safetensors$/.test(name));
  const candidates = folders.filter(isHere);
  // What is at the top is meant; what is deeper only when it is alone.
  const [folder] = candidates.includes('') ? [''] : candidates;
  if (folder !== undefined && (folder === '' || candidates.length === 1)) {
    if (kind === 'adapter') return { folder, names: adapterFiles };
    const files = inside(folder).filter((name) => !name.includes('/') && !name.startsWith('adapter_'));
    const weights = files.filter((name) => name.endsWith('.safetensors'));
    const shards = weights.filter(isModelShard);
    return {
      folder,
      names: [...files.filter(isModelText), ...(shards.length > 0 ? shards : weights)].sort(),
    };
  }
  const found = candidates.length > 1 ? candidates : names.filter((name) => /\.gguf$/i.test(name));
  if (kind === 'model' && candidates.length === 0 && found.length === 1) {
    const at = found[0]!.lastIndexOf('/') + 1;
    return { folder: found[0]!.slice(0, at), names: [found[0]!.slice(at)] };
  }
  const expected =
    kind === 'adapter'
      ? `one folder with ${adapterFiles.join(' and ')}`
      : 'one .gguf file, or one folder of safetensors with a config.json';
  const got = found.length > 1 && (kind === 'model' || candidates.length > 1) ? found : names;
  throw unavailable(`${where}: expected ${expected}, got ${listed(got)}; a URI may name the path of one`);
}

function listed(names: readonly string[]): string {
  if (names.length === 0) return 'no files';
  const more = names.length > 5 ? ` and ${names.length - 5} more` : '';
  return [...names].sort().slice(0, 5).join(', ').slice(0, 500) + more;
}

/** A name from afar as a path below a folder; null when it would lead elsewhere. */
export function safeName(name: string): string | null {
  const path = name.replace(/^(\.?\/)+/, '').replace(/\/+$/, '');
  // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is looked for
  if (path === '' || path.length > 1024 || /[\u0000-\u001f\u007f\\]/.test(path)) return null;
  return path.split('/').some((part) => part === '' || part === '.' || part === '..' || part.length > 255)
    ? null
    : path;
}
