/**
 * One request to the API server, with the credentials of a kubeconfig or of the pod. Everything above it (watch.ts, what
 * the operator applies, the statuses that gateway and operator write) is plain objects and paths.
 */
import { HttpMethod, type KubeConfig, RequestContext } from '@kubernetes/client-node';
import { fetch } from 'undici';
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

/** @throws ApiError for an answer that is not 2xx; whatever fetch throws when there is none */
export async function callApi<T>(kubeConfig: KubeConfig, request: ApiRequest): Promise<T> {
  const {
    method = 'GET',
    path,
    query = {},
    body,
    contentType = 'application/json',
    timeoutMs = 15_000,
  } = request;
  const url = new URL(kubeConfig.getCurrentCluster()!.server + path);
  for (const [name, value] of Object.entries(query)) url.searchParams.set(name, value);
  const context = new RequestContext(url.href, HttpMethod[method]);
  await kubeConfig.applySecurityAuthentication(context);
  const timeout = AbortSignal.timeout(timeoutMs);
  const response = await fetch(url, {
    method,
    headers: {
      ...context.getHeaders(),
      accept: 'application/json',
      ...(body ? { 'content-type': contentType } : {}),
    },
    ...(body ? { body: JSON.stringify(body) } : {}),
    dispatcher: context.getDispatcher() as never,
    signal: request.signal ? AbortSignal.any([request.signal, timeout]) : timeout,
  });
  const text = await response.text();
  if (response.ok) return (text === '' ? {} : JSON.parse(text)) as T;
  throw toApiError(response.status, text);
}

/** Path of the collection of a kind of ours, or of one object in it. */
export function motetPath(kind: Kind, namespace: string, name?: string, subresource?: 'status'): string {
  const parts = ['/apis', apiVersion, 'namespaces', namespace, plurals[kind], name, subresource];
  return parts.filter((part) => part !== undefined).join('/');
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
