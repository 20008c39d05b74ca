/**
 * One request to the API server, with the credentials of a kubeconfig or of the pod. Everything above it (watch.ts, what
 * the operator applies, the statuses that gateway and operator write) is plain objects and paths.
 *
 * Each request is told on the diagnostics channel `motet:api`, so whoever counts them needs no place in between:
 *
 *   apiChannel.subscribe((message) => count(message as ApiCall))
 */
import { channel } from 'node:diagnostics_channel';
import { HttpMethod, type KubeConfig, RequestContext } from '@kubernetes/client-node';
import { type Dispatcher, fetch, type Response } from 'undici';
import { apiVersion, type Kind, plurals } from './types.ts';

export interface ApiRequest {
  method?: 'GET' | 'POST' | 'PUT' | 'PATCH' | 'DELETE';
  /** E.g. `/api/v1/namespaces/default/pods`. */
  path: string;
  query?: Record<string, string>;
  body?: object;
  /** Of the body. Default `application/json`; `application/apply-patch+yaml` is server-side apply. */
  contentType?: string;
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
  { path, query, signal, maxSilenceMs }: WatchRequest,
): Promise<AsyncGenerator<WatchEvent<T>, void>> {
  const silence = new AbortController();
  const timer = setTimeout(
    () => silence.abort(new DOMException(`nothing came for ${maxSilenceMs} ms`, 'TimeoutError')),
    maxSilenceMs,
  );
  try {
    const watch = { path, query: { ...query, watch: 'true' } };
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

/**
 * The connections of each kubeconfig. The library makes new ones for every request, with a TLS handshake each; here they
 * are kept until a request gets no answer or a 401, so that a rotated CA or client certificate is read again.
 */
const dispatchers = new WeakMap<KubeConfig, Dispatcher>();

/** `explain` makes what is thrown while the answer is read into what the caller should see. */
async function send(
  kubeConfig: KubeConfig,
  { method = 'GET', path, query = {}, body, contentType = 'application/json' }: ApiRequest,
  signal: AbortSignal,
): Promise<{ response: Response; explain: (error: unknown) => unknown }> {
  const server = kubeConfig.getCurrentCluster()?.server;
  if (server === undefined) throw new Error('the kubeconfig has no current context with a cluster');
  const url = new URL(server + path);
  for (const [name, value] of Object.entries(query)) url.searchParams.set(name, value);
  const context = new RequestContext(url.href, HttpMethod[method]);
  await kubeConfig.applySecurityAuthentication(context);
  const dispatcher = dispatchers.get(kubeConfig) ?? (context.getDispatcher() as Dispatcher | undefined);
  if (dispatcher) dispatchers.set(kubeConfig, dispatcher);
  const forget = () => {
    if (!dispatcher || dispatchers.get(kubeConfig) !== dispatcher) return;
    dispatchers.delete(kubeConfig);
    // Ends when the last request on it has ended.
    void dispatcher.close().catch(() => undefined);
  };
  const explain = (error: unknown) => {
    if (signal.aborted && signal.reason?.name !== 'TimeoutError') return signal.reason;
    forget();
    const { cause, message } = (signal.aborted ? signal.reason : error) as Error;
    return new Error(
      `no answer from the API server at ${url.origin} to ${method} ${path}: ${(cause as Error | undefined)?.message || message}`,
      { cause: error },
    );
  };

  const started = performance.now();
  const tell = (status: number) => {
    const call: ApiCall = {
      ...verbAndResource(method, path, query),
      status,
      durationMs: performance.now() - started,
    };
    apiChannel.publish(call);
  };
  try {
    const response = await fetch(url, {
      method,
      headers: {
        'user-agent': 'motet',
        ...context.getHeaders(),
        accept: 'application/json',
        ...(body ? { 'content-type': contentType } : {}),
      },
      ...(body ? { body: JSON.stringify(body) } : {}),
      ...(dispatcher ? { dispatcher } : {}),
      signal,
    });
    tell(response.status);
    if (response.status === 401) forget();
    return { response, explain };
  } catch (error) {
    tell(0);
    throw explain(error);
  }
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
