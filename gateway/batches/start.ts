// Puts the parts of batches together. Wiring only.

import type { Logger } from 'pino';
import { enginePaths, lowestPriority } from '../../engine/protocol.ts';
import { sourceAccess } from '../../engine/sources/access.ts';
import { askWhole, type Forward, type Outcome } from '../forward.ts';
import { whoAnswers } from '../groups/group.ts';
import { countTokens, type Metrics, watchBatches } from '../metrics.ts';
import { askOf } from '../queue/ask.ts';
import { Ending } from '../request/ending.ts';
import { findComposition } from '../request/find-composition.ts';
import { type FindParts, findTarget } from '../request/find-target.ts';
import { Files } from './files.ts';
import { FolderStore } from './folder-store.ts';
import { Gate, roomFor } from './gate.ts';
import { Jobs } from './jobs.ts';
import type { BatchRoutes } from './routes.ts';
import type { AnswerLine } from './run-job.ts';
import { BatchRunner } from './runner.ts';
import { S3Store, type S3StoreOptions } from './s3-store.ts';
import type { Store } from './store.ts';

export type BatchSettings = {
  /** A folder, or `s3://BUCKET/PREFIX`. */
  store: string;
  maxJobs: number;
  linesPerEngine: number;
  maxFileBytes: number;
  maxTenantBytes: number;
  keepSeconds: number;
  leaseMs: number;
};

export type Batches = {
  routes: BatchRoutes;
  /** Leaves jobs to other gateways, after lines in flight had this time. */
  close(timeoutMs: number): Promise<void>;
};

type Around = FindParts & {
  forward: Forward;
  /** A line's request is one as clients send it: it may be as long. */
  maxLineBytes: number;
  metrics: Metrics;
  log: Logger;
};

const endpointsOfLines = [enginePaths.chat, enginePaths.completions, enginePaths.embeddings];

export async function startBatches(settings: BatchSettings, around: Around): Promise<Batches> {
  const { maxFileBytes, maxTenantBytes, keepSeconds, leaseMs, maxJobs } = settings;
  const { forward, maxLineBytes, metrics, log } = around;
  const store = await openStore(settings.store, { access: sourceAccess(process.env) });
  const isFolder = !settings.store.startsWith('s3://');
  const files = new Files(store, { maxFileBytes, maxTenantBytes });
  const jobs = new Jobs(store);
  const gate = new Gate((numLines) => {
    const ready = forward.endpoints.all.filter(({ isReady }) => isReady);
    const numSent = ready.reduce((sum, { inFlight }) => sum + inFlight, 0);
    return roomFor({
      linesPerEngine: settings.linesPerEngine,
      numEngines: ready.length,
      numOnline: Math.max(0, numSent - numLines),
    });
  });
  const runner = new BatchRunner(
    {
      ...{ store, files, jobs, gate, maxLineBytes, nowMs: Date.now },
      answer: answerLine(around),
      onLine: (result) => metrics.batchLines.inc({ result }),
      maxResultBytes: maxTenantBytes,
      // A flush of a disk takes milliseconds; an object costs money.
      recordGapMs: isFolder ? 20 : 500,
      lookMs: Math.min(1_000, leaseMs / 4),
    },
    { maxJobs, leaseMs, scanMs: Math.min(isFolder ? 1_000 : 5_000, leaseMs / 2), keepSeconds },
    log,
  );
  watchBatches(metrics, { runner, gate });
  return {
    routes: {
      ...{ files, jobs, maxFileBytes, keepSeconds },
      endpoints: endpointsOfLines,
      onChange: () => runner.poke(),
    },
    async close(timeoutMs) {
      await runner.close(timeoutMs);
      await store.close();
    },
  };
}

/** @param where  a folder, or `s3://BUCKET/PREFIX` */
export async function openStore(where: string, s3: Pick<S3StoreOptions, 'access'>): Promise<Store> {
  const match = /^s3:\/\/([^/]+)\/?(.*?)\/*$/.exec(where);
  if (match === null) return FolderStore.open(where);
  return new S3Store({ bucket: match[1]!, prefix: match[2]!, ...s3 });
}

/** Sends a line as an online request of its tenant is sent. */
function answerLine(around: Around): AnswerLine {
  const { directory, forward, metrics } = around;
  return async ({ tenant, path, model, adapters, merge, body, requestId, signal }) => {
    const facts: Parameters<typeof findTarget>[1] = { ...(tenant !== null && { tenant }) };
    const asker = { tenant, user: null, header: () => undefined };
    const target = adapters
      ? await findComposition(adapters, merge, facts, around)
      : await findTarget(model, facts, around, asker);
    const headers = {
      ...{ 'content-type': 'application/json', 'x-request-id': requestId },
      ...whoAnswers(model, target),
    };
    const outcome: Outcome = { attempts: 0, responseBytes: 0 };
    const ask = askOf(
      {
        tenant,
        standing: { ...directory.standingOf(tenant), priority: lowestPriority },
        adapter: target.name,
        bodyBytes: body.length,
        maxTokens: null,
        numChoices: 1,
        waitMs: null,
      },
      forward.lengths,
      performance.now(),
    );
    const answer = await askWhole(
      forward,
      { path, target, headers, body, ask, ending: Ending.of(signal) },
      outcome,
    );
    const usage = outcome.usage?.();
    if (usage !== undefined) countTokens(metrics, { tenant: tenant ?? '', model: facts.model ?? '' }, usage);
    return answer;
  };
}
