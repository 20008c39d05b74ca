// When a request is not wanted any more.

import type { ServerResponse } from 'node:http';
import { GatewayError } from '../errors.ts';

/** Requests that end with the gateway, by the signal that says so. It has one listener: more are searched one by one. */
const openUntil = new WeakMap<AbortSignal, Set<AbortController>>();

function openRequests(cutOff: AbortSignal): Set<AbortController> {
  let open = openUntil.get(cutOff);
  if (open === undefined) {
    const all = new Set<AbortController>();
    cutOff.addEventListener('abort', () => {
      for (const end of all) end.abort(cutOff.reason);
    });
    openUntil.set(cutOff, all);
    open = all;
  }
  return open;
}

/** Aborted when the client goes away before it has the whole answer, or when the time to drain is over. */
export function endSignal(res: ServerResponse, cutOff: AbortSignal): AbortSignal {
  const end = new AbortController();
  const open = openRequests(cutOff);
  const close = () => {
    open.delete(end);
    if (!res.writableFinished) end.abort(new GatewayError('client_closed_request', 'the client hung up'));
  };
  open.add(end);
  if (cutOff.aborted) end.abort(cutOff.reason);
  if (res.destroyed) close();
  else res.once('close', close);
  return end.signal;
}
