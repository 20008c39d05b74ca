/** Which names a server knows: the base's and its adapters'. Asked only for what the options leave open. */
import type { Dispatcher } from 'undici';
import { type LoadOptions, OptionError } from './options.ts';

interface Card {
  id: string;
  parent?: string | null;
}

/** A server that has not answered by then is not there. */
const listTimeoutMs = 10_000;

export async function findModels(
  dispatcher: Dispatcher,
  url: string,
  apiKey: string | null,
  { model, adapters, adapterField }: Pick<LoadOptions, 'model' | 'adapters' | 'adapterField'>,
): Promise<{ baseModel: string; adapters: string[] }> {
  const get = (path: string) => getJson(dispatcher, url, path, apiKey);
  let cards: Card[] = [];
  if (model === null || (adapters.kind !== 'named' && adapterField === 'model')) {
    cards = ((await get('/v1/models')) as { data?: Card[] }).data ?? [];
  }
  // An adapter's parent is the base; servers without adapters know no parents.
  const baseModel = model ?? cards.find(({ parent }) => !parent)?.id;
  if (baseModel === undefined) {
    throw new OptionError(`--model: expected a name, since ${url}/v1/models lists no base model`);
  }
  if (adapters.kind === 'named') return { baseModel, adapters: adapters.names };
  const listed =
    adapterField === 'llama'
      ? ((await get('/lora-adapters')) as { id: number }[]).map(({ id }) => String(id))
      : cards.filter(({ parent }) => parent).map(({ id }) => id);
  if (adapters.kind === 'all') return { baseModel, adapters: listed };
  if (listed.length < adapters.count) {
    throw new OptionError(
      `--adapters: expected at most the ${listed.length} that the server lists, got ${adapters.count}`,
    );
  }
  return { baseModel, adapters: listed.slice(0, adapters.count) };
}

async function getJson(
  dispatcher: Dispatcher,
  url: string,
  path: string,
  apiKey: string | null,
): Promise<unknown> {
  const { origin, pathname } = new URL(url);
  const headers = apiKey === null ? {} : { authorization: `Bearer ${apiKey}` };
  let status: number;
  let text: string;
  try {
    const response = await dispatcher.request({
      origin,
      path: pathname.replace(/\/$/, '') + path,
      method: 'GET',
      headers,
      signal: AbortSignal.timeout(listTimeoutMs),
    });
    status = response.statusCode;
    text = await response.body.text();
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    throw new Error(`GET ${url}${path}: expected a list of models, got no answer (${code ?? message})`);
  }
  if (status === 200) {
    try {
      return JSON.parse(text);
    } catch {
      // Told below.
    }
  }
  const key = status === 401 && apiKey === null ? '; MOTET_API_KEY holds the key' : '';
  throw new Error(`GET ${url}${path}: expected a list of models, got status ${status}${key}`);
}
