/**
 * One request to the API server, with the credentials of a kubeconfig or of the pod. Everything above it (watch.ts, what
 * the operator applies, the statuses that gateway and operator write) is plain objects and paths.
 *
 * Each request is told on the diagnostics channel `motet:api`, so whoever counts them needs no place in between:
 *
 *   apiChannel.subscribe((message) => count(message as ApiCall))
 */
import { channel } from 'node:diagnostics_channel';
import type { RequestOptions } from 'node:https';
import type { Cluster, KubeConfig } from '@kubernetes/client-node';
import { Agent, type Dispatcher, fetch, ProxyAgent, type Response } from 'undici';
import { apiVersion, type Kind, plurals } from './types.ts';

export interface ApiRequest {
  method?: 'GET' | 'POST' | 'PUT' | 'PATCH' | 'DELETE';
  /** E.g. `/api/v1/namespaces/default/pods`. */
  path: string;
  query?: Record<string, string>;
  body?: object;
  /** Of the body. Default `application/json`; `application/apply-patch+yaml` is server-side apply. */
  contentType?: string;
  /** Form of the answer. Default `application/json`. */
  accept?: string;
  /** Ends the request; beside it every request ends after `timeoutMs`. */
  signal?: AbortSignal;
  /** Default 15 s: a reconcile must not hang on an API server that went away. */
  timeoutMs?: number;
}

export interface WatchRequest {
  /** Of a collection. */
  path: string;
  /** `resourceVersion` says from where on; `timeoutSeconds` when the server ends the watch. */
  query: Record<string, string>;
  /** As for callApi. */
  accept?: string;
  signal: AbortSignal;
  /** Silence after which the other side is taken for gone. */
  maxSilenceMs: number;
}

/** `object` is a Status for ERROR, and has only a resourceVersion for BOOKMARK. */
export interface WatchEvent<T> {
  type: 'ADDED' | 'MODIFIED' | 'DELETED' | 'BOOKMARK' | 'ERROR';
  object: T;
}

/** What `motet:api` tells of a request when its answer has begun, or when none came. */
export interface ApiCall {
  /** As in a Role: `get`, `list`, `watch`, `create`, `update`, `patch` or `delete`. */
  verb: string;
  /** As in a Role, `pods` or `basemodels/status`. */
  resource: string;
  /** HTTP status; 0 when no answer came. */
  status: number;
  durationMs: number;
}

export const apiChannel = channel('motet:api');

/** The API server refused. `status` is its HTTP status, `reason` its word for it (`NotFound`, `Conflict`, `AlreadyExists`, ...). */
export class ApiError extends Error {
  override name = 'ApiError';
  readonly status: number;
  readonly reason: string;
  constructor(status: number, reason: string, message: string) {
    super(message);
    this.status = status;
    this.reason = reason;
  }
}

/**
 * @throws ApiError for an answer that is not 2xx; an Error with the cause when there is none; the reason of
 *   `request.signal` when that ended it
 */
export async function callApi<T>(kubeConfig: KubeConfig, request: ApiRequest): Promise<T> {
  const { timeoutMs = 15_000 } = request;
  const timeout = AbortSignal.timeout(timeoutMs);
  const signal = request.signal ? AbortSignal.any([request.signal, timeout]) : timeout;
  const { response, explain } = await send(kubeConfig, request, signal);
  const text = await response.text().catch((error) => {
    throw explain(error);
  });
  if (!response.ok) throw toApiError(response.status, text);
  return (text === '' ? {} : JSON.parse(text)) as T;
}

/**
 * Resolves when the server has taken the watch; the events end when it ends it.
 * @throws as callApi, while connecting and while reading
 */
export async function watchApi<T>(
  kubeConfig: KubeConfig,
  { path, query, accept, signal, maxSilenceMs }: WatchRequest,
): Promise<AsyncGenerator<WatchEvent<T>, void>> {
  const silence = new AbortController();
  const timer = setTimeout(
    () => silence.abort(new DOMException(`nothing came for ${maxSilenceMs} ms`, 'TimeoutError')),
    maxSilenceMs,
  );
  try {
    const watch = { path, query: { ...query, watch: 'true' }, ...(accept && { accept }) };
    const { response, explain } = await send(kubeConfig, watch, AbortSignal.any([signal, silence.signal]));
    if (!response.ok) throw toApiError(response.status, await response.text());
    return readEvents<T>(response, timer, explain);
  } catch (error) {
    clearTimeout(timer);
    throw error;
  }
}

/** Path of the collection of a kind of ours, or of one object in it. */
export function motetPath(kind: Kind, namespace: string, name?: string, subresource?: 'status'): string {
  const parts = ['/apis', apiVersion, 'namespaces', namespace, plurals[kind], name, subresource];
  return parts.filter((part) => part !== undefined).join('/');
}

/** One JSON object a line. */
async function* readEvents<T>(
  response: Response,
  silenceTimer: NodeJS.Timeout,
  explain: (error: unknown) => unknown,
): AsyncGenerator<WatchEvent<T>, void> {
  try {
    const decoder = new TextDecoder();
    let rest = '';
    for await (const bytes of response.body!) {
      silenceTimer.refresh();
      const lines = (rest + decoder.decode(bytes, { stream: true })).split('\n');
      rest = lines.pop()!;
      for (const line of lines) yield JSON.parse(line) as WatchEvent<T>;
    }
  } catch (error) {
    throw explain(error);
  } finally {
    clearTimeout(silenceTimer);
  }
}

/** `explain` makes what is thrown while the answer is read into what the caller should see. */
async function send(
  kubeConfig: KubeConfig,
  {
    method = 'GET',
    path,
    query = {},
    body,
    contentType = 'application/json',
    accept = 'application/json',
  }: ApiRequest,
  signal: AbortSignal,
): Promise<{ response: Response; explain: (error: unknown) => unknown }> {
  const cluster = kubeConfig.getCurrentCluster();
  if (cluster === null) throw new Error('the kubeconfig has no current context with a cluster');
  const url = new URL(cluster.server + path);
  for (const [name, value] of Object.entries(query)) url.searchParams.set(name, value);
  const { headers, dispatcher } = await credentials(kubeConfig, cluster);

  const explain = (error: unknown) => {
    const isTimeout = signal.aborted && (signal.reason as Error | undefined)?.name === 'TimeoutError';
    if (signal.aborted && !isTimeout) return signal.reason;
    // What else waits for this server, a handshake for example, would be waited for by the next request.
    if (isTimeout) forget(kubeConfig, dispatcher);
    const { cause, message } = (isTimeout ? signal.reason : error) as Error;
    const why = (cause as Error | undefined)?.message || message;
    return new Error(`no answer from the API server at ${url.origin} to ${method} ${path}: ${why}`, {
      cause: error,
    });
  };
  const started = performance.now();
  const tell = (status: number) => {
    const durationMs = performance.now() - started;
    const call: ApiCall = { ...verbAndResource(method, path, query), status, durationMs };
    apiChannel.publish(call);
  };
  try {
    const response = await fetch(url, {
      method,
      headers: {
        'user-agent': 'motet',
        ...headers,
        accept,
        ...(body ? { 'content-type': contentType } : {}),
      },
      ...(body ? { body: JSON.stringify(body) } : {}),
      dispatcher,
      signal,
    });
    tell(response.status);
    return { response, explain };
  } catch (error) {
    tell(0);
    throw explain(error);
  }
}

/** A burst waits for connections beyond these. Each watch holds one. */
const maxConnections = 128;
/** Less than the API server keeps an idle connection (90 s), so that it is never the one to close it under a request. */
const keepAliveMs = 30_000;

const connections = new WeakMap<KubeConfig, { identity: string; dispatcher: Dispatcher }>();

/**
 * The headers that say who asks, and the connections to ask on. Those are kept as long as CA and certificate are the
 * same and answers come: the library's own requests open one each, with a TLS handshake. HTTP/1.1, since undici's HTTP/2 (8.12) ends the
 * process with an uncaught `socket idle timeout` when an API server comes back.
 */
async function credentials(
  kubeConfig: KubeConfig,
  cluster: Cluster,
): Promise<{ headers: Record<string, string>; dispatcher: Dispatcher }> {
  // Reads the files that the kubeconfig names again; a token's at most once a minute.
  const options: RequestOptions = {};
  await kubeConfig.applyToHTTPSOptions(options);
  const { ca, cert, key, pfx, passphrase, rejectUnauthorized, servername, auth } = options;
  const headers = { ...(options.headers as Record<string, string> | undefined) };
  if (auth) headers.Authorization = `Basic ${Buffer.from(auth).toString('base64')}`;

  const identity = [ca, cert, key, pfx, passphrase, rejectUnauthorized, servername].join();
  const kept = connections.get(kubeConfig);
  if (kept?.identity === identity) return { headers, dispatcher: kept.dispatcher };

  const tls = Object.fromEntries(
    Object.entries({ ca, cert, key, pfx, passphrase, rejectUnauthorized, servername }).filter(
      ([, value]) => value !== undefined && value !== null,
    ),
  );
  const how = kubeConfig.createDispatcherOptions(cluster, tls);
  const common = { allowH2: false, connections: maxConnections, keepAliveTimeout: keepAliveMs };
  let dispatcher: Dispatcher;
  switch (how.type) {
    case 'agent':
      dispatcher = new Agent({ ...common, connect: how.connect as object });
      break;
    case 'proxy':
      dispatcher = new ProxyAgent({ ...common, uri: how.uri, requestTls: how.requestTls as object });
      break;
    case 'none':
      dispatcher = new Agent(common);
      break;
    case 'socks':
      throw new Error(`expected an HTTP proxy in the kubeconfig, got ${how.uri}; SOCKS is not supported`);
  }
  connections.set(kubeConfig, { identity, dispatcher });
  return { headers, dispatcher };
}

/** The next request opens a connection of its own. Requests on the others end as they would; idle ones close by themselves. */
function forget(kubeConfig: KubeConfig, dispatcher: Dispatcher): void {
  if (connections.get(kubeConfig)?.dispatcher === dispatcher) connections.delete(kubeConfig);
}

const verbs = { POST: 'create', PUT: 'update', PATCH: 'patch', DELETE: 'delete' };

/** Paths: `/api/VERSION` or `/apis/GROUP/VERSION`, then maybe `namespaces/NAME`, then `RESOURCE/NAME/SUBRESOURCE`. */
function verbAndResource(
  method: NonNullable<ApiRequest['method']>,
  path: string,
  query: Record<string, string>,
): { verb: string; resource: string } {
  const parts = path.split('/').slice(path.startsWith('/apis/') ? 4 : 3);
  const isNamespaced = parts[0] === 'namespaces' && parts.length > 2;
  const [resource = '', name, subresource] = isNamespaced ? parts.slice(2) : parts;
  const read = query.watch === 'true' ? 'watch' : name === undefined ? 'list' : 'get';
  return {
    verb: method === 'GET' ? read : verbs[method],
    resource: subresource === undefined ? resource : `${resource}/${subresource}`,
  };
}

function toApiError(status: number, text: string): ApiError {
  try {
    const { reason, message } = JSON.parse(text) as { reason?: string; message?: string };
    if (message !== undefined) return new ApiError(status, reason ?? 'Unknown', message);
  } catch {
    // Not a Status object; what came is said as it is.
  }
  return new ApiError(status, 'Unknown', `${status} ${text.slice(0, 500)}`);
}
