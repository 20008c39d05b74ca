// Traces of requests, by OpenTelemetry. Nothing is loaded or sent unless OTEL_EXPORTER_OTLP_ENDPOINT is set; then a
// request's span continues the client's trace and the engine's span continues it. Without it the client's own
// `traceparent` is passed on as it came.

import { context, propagation, type Span, SpanKind, SpanStatusCode, trace } from '@opentelemetry/api';
import type { Outcome } from './forward.ts';

/** Whether anybody is told of spans. */
let isOn = false;

/** Starts exporting if the environment asks for it. Returns what flushes and stops it. */
export async function startTracing(serviceName: string): Promise<() => Promise<void>> {
  if (!process.env.OTEL_EXPORTER_OTLP_ENDPOINT) return async () => {};
  const { NodeSDK } = await import('@opentelemetry/sdk-node');
  const { OTLPTraceExporter } = await import('@opentelemetry/exporter-trace-otlp-http');
  const sdk = new NodeSDK({ serviceName, traceExporter: new OTLPTraceExporter() });
  sdk.start();
  isOn = true;
  return () => sdk.shutdown();
}

/** Names are those of OpenTelemetry's conventions for generative AI. */
const operationOfPath: Record<string, string> = {
  '/v1/chat/completions': 'chat',
  '/v1/completions': 'text_completion',
};

/** A span for one request, child of the client's; null: nobody is told. `headers` gets the trace headers for the engine. */
export function startRequestSpan(path: string, model: string, headers: Record<string, string>): Span | null {
  if (!isOn) return null;
  const operation = operationOfPath[path] ?? path.slice(1);
  const parent = propagation.extract(context.active(), headers);
  const span = trace.getTracer('motet-gateway').startSpan(
    `${operation} ${model}`,
    {
      kind: SpanKind.SERVER,
      attributes: {
        'gen_ai.operation.name': operation,
        'gen_ai.provider.name': 'motet',
        'gen_ai.request.model': model,
        'http.route': path,
      },
    },
    parent,
  );
  propagation.inject(trace.setSpan(parent, span), headers);
  return span;
}

export function endRequestSpan(span: Span, status: number, facts: Outcome & { errorCode?: string }): void {
  const { engine, picked, errorCode } = facts;
  span.setAttribute('http.response.status_code', status);
  if (engine !== undefined) span.setAttribute('motet.engine', engine);
  if (picked !== undefined) span.setAttribute('motet.pick.reason', picked.reason);
  if (errorCode !== undefined) {
    span.setAttribute('error.type', errorCode);
    span.setStatus({ code: SpanStatusCode.ERROR });
  }
  span.end();
}
