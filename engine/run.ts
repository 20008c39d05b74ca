/**
 * The engine process: reads its settings, fetches, prepares and opens the base model, loads the adapters named at start,
 * serves, and drains on SIGTERM. Wiring only.
 */
import { once } from 'node:events';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { pino } from 'pino';
import { collectDefaultMetrics } from 'prom-client';
import {
  addonPath,
  compileGrammar,
  openRuntime,
  openVocabulary,
  type WeightStream,
} from '../native/index.ts';
import { readAdapterFile } from './adapters/adapter-file.ts';
import { AdapterTiers } from './adapters/adapter-tiers.ts';
import { Merges } from './adapters/merges.ts';
import { CallerIdentity } from './caller-identity.ts';
import { type Config, ConfigError, parseConfig } from './config.ts';
import { checkDevice } from './device.ts';
import { Engine } from './engine.ts';
import { Grammars } from './grammar/grammars.ts';
import { InputError } from './input-error.ts';
import { arenasOf } from './ladder/arena.ts';
import { modelKeyOf } from './ladder/block-file.ts';
import { BlockPool } from './ladder/block-pool.ts';
import { MeasuredCosts } from './ladder/costs.ts';
import { KvDisk } from './ladder/kv-disk.ts';
import { maxLongTokens } from './ladder/long-context.ts';
import { EngineMetrics } from './metrics.ts';
import { readBaseModel } from './model/base-model.ts';
import { prepareModel } from './model/prepare.ts';
import { openTextModel } from './model/text-model.ts';
import { createServer } from './server.ts';
import { nameOf } from './source-uri.ts';
import { Sources } from './sources.ts';
import { hashFile } from './temporary-files.ts';

/** Bounds that nobody needed to change yet. */
const maxBodyBytes = 4 * 2 ** 20;
const maxBufferedBytes = 2 ** 20;
const maxLoads = 2;
const maxQueuedLoads = 64;
const pageWaitMs = 10_000;
const queueWaitMs = 60_000;

/** Exit statuses: a wrong setting or file is the user's to change, and a restart does not help. */
const exitUsage = 2;
const exitKilled = 143;

/** Takes over what a signal does. */
type TakeSignals = (handler: (signal: NodeJS.Signals) => void) => void;

/** Serves until a signal ends it; what keeps it from serving ends the process. */
export async function run(takeSignals: TakeSignals): Promise<void> {
  try {
    await serve(takeSignals);
  } catch (error) {
    // What the user can change is one line; what we did wrong keeps its stack.
    const { code, message, stack } = error as NodeJS.ErrnoException;
    const isTheirs = error instanceof ConfigError || error instanceof InputError || code !== undefined;
    process.stderr.write(`motet engine: ${isTheirs ? message : stack}\n`);
    process.exit(isTheirs && code !== 'source_unavailable' ? exitUsage : 1);
  }
}

async function serve(takeSignals: TakeSignals): Promise<void> {
  const config = parseConfig(process.argv.slice(2), process.env);
  if ('help' in config) {
    process.stdout.write(config.help);
    return;
  }
  checkDevice(config.device);
  const log = pino({ level: config.logLevel, base: null });
  const baseName = config.servedName ?? nameOf(config.model);
  const metrics = new EngineMetrics(baseName);
  collectDefaultMetrics({ register: metrics.registry });
  const sources = new Sources({
    cacheFolder: config.cacheDir,
    maxAdapterBytes: config.sourceCacheBytes,
    adapterRoot: config.adapterRoot,
    claimRoot: config.claimRoot,
    access: config.access,
    log,
    onFetch: (event) => metrics.observeFetch(event),
  });
  const modelPath = await sources.model(config.model, config.modelDigest);
  const model = await readBaseModel(modelPath, config.quantization);
  const text = await openTextModel(model);
  let shownPercent = -5;
  const prepared = await prepareModel(model, {
    cacheFolder: config.cacheDir,
    onProgress(fraction) {
      const percent = Math.floor(fraction * 100);
      if (percent < shownPercent + 5) return;
      shownPercent = percent;
      log.info({ fraction }, 'preparing');
    },
  });
  const runtime = await openRuntime({
    packedPath: prepared.packedPath,
    dims: prepared.dims,
    tensors: prepared.tensors,
    activations: config.activations,
    kvType: config.kvCacheDtype,
    adapterQuantization: config.adapterQuantization,
    deviceMemoryBytes: config.deviceMemoryBytes,
    hostMemoryBytes: config.hostMemoryBytes,
    weightMemoryBytes: config.weightMemoryBytes,
    numThreads: config.numThreads,
  });
  const stream = runtime.weightStream();
  if (stream) log.info(priceOf(stream, prepared.dims.numLayers), 'weights stream');
  const { arena, hostArena } = arenasOf(runtime, runtime.numPages);
  const longTokens = maxLongTokens({
    numPages: arena.numPages,
    numHostPages: runtime.numHostPages,
    minStagingPages: runtime.minStagingPages,
    blockTokens: runtime.blockTokens,
    maxBatchTokens: config.maxBatchTokens,
  });
  const arenaTokens = Math.max(arena.numPages * runtime.blockTokens, longTokens);
  const maxModelLen = contextLength(config, prepared.dims.maxPositions, arenaTokens);
  const now = () => performance.now();
  const onFatal = (error: unknown) => {
    log.fatal({ err: error }, 'the engine cannot go on');
    process.exit(1);
  };
  const costs = new MeasuredCosts();
  const wallClock = () => Date.now();
  const { blockTokens, pageBytes } = runtime;
  const kvDisk =
    config.kvDiskBytes > 0
      ? await KvDisk.open({
          folder: join(config.cacheDir, 'kv'),
          budgetBytes: config.kvDiskBytes,
          blockBytes: pageBytes,
          modelKey: modelKeyOf({
            weightsSha256: prepared.dataSha256,
            dims: prepared.dims,
            activations: config.activations,
            kvType: config.kvCacheDtype,
            adapterQuantization: config.adapterQuantization,
            pageBytes,
            blockTokens,
            kernelsSha256: (await hashFile(addonPath))!,
          }),
          rule: config.evictionRule,
          restoreSeconds: (depth) => costs.prefillSeconds(blockTokens, depth * blockTokens),
          log,
          now,
          wallClock,
        })
      : null;
  const blocks = new BlockPool({
    arena,
    hostArena,
    copier: runtime,
    disk: kvDisk,
    blockTokens,
    isCaching: config.prefixCache,
    rule: config.evictionRule,
    costs,
    log,
    now,
    onFailed: onFatal,
  });

  const { maxBatchTokens, maxSequences, maxWaiting, maxLoraRank: maxRank } = config;
  const { eosTokenIds, createDetokenizer } = text;
  const limits = { maxModelLen, maxBatchTokens, maxSequences, maxWaiting };
  const engine = new Engine({
    runtime,
    arena,
    hostArena,
    blocks,
    costs,
    limits,
    eosTokenIds,
    createDetokenizer,
    metrics,
    log,
    now,
    onFatal,
  });
  const tiers = new AdapterTiers({
    loader: runtime,
    arena,
    hostArena,
    holders: [blocks],
    hostHolders: blocks.host ? [blocks.host] : [],
    rule: config.evictionRule,
    readFile: (path) => readAdapterFile(path, prepared.dims, { maxRank }),
    numPagesKept: () => engine.numPagesKept(),
    numPagesPromised: () => engine.numPagesPromised(),
    onPagesWanted: () => engine.wake(),
    maxLoads,
    maxQueuedLoads,
    pageWaitMs,
    queueWaitMs,
    now,
    wallClock,
    log,
  });
  const merges =
    config.mergeCacheBytes > 0
      ? await Merges.open({
          tiers,
          folder: join(config.cacheDir, 'merges'),
          maxBytes: config.mergeCacheBytes,
          log,
          now,
        })
      : null;
  metrics.watch({
    arena,
    blocks,
    hostArena,
    tiers,
    engine,
    blockSizeTokens: runtime.blockTokens,
    unixSeconds: () => wallClock() / 1000,
  });
  metrics.watchWeights(runtime);
  metrics.watchMerges(merges);
  engine.start(tiers);

  const grammars = new Grammars({
    library: { openVocabulary, compileGrammar },
    tokens: text,
    now,
    onCompiled: (seconds, isGood) => metrics.observeGrammar(seconds, isGood),
  });
  const callers = config.callers && new CallerIdentity({ ...config.callers, log, wallClock });
  void callers?.warmUp();
  let isReady = false;
  const server = createServer({
    engine,
    tiers,
    merges,
    text,
    grammars,
    arena,
    blocks,
    hostArena,
    pooling: config.pooling,
    hiddenSize: prepared.dims.hiddenSize,
    metrics,
    log,
    baseName,
    modelSource: config.model,
    sources,
    kvKeepers: [blocks],
    apiKeys: config.apiKeys,
    callers,
    maxBodyBytes,
    maxBufferedBytes,
    wallClock,
    isReady: () => isReady,
  });

  const stop = async (signal: string) => {
    log.info({ signal, running: engine.numRunning, waiting: engine.numWaiting }, 'draining');
    await engine.drain(config.drainSeconds * 1000);
    const closed = once(server, 'close');
    server.close();
    await Promise.race([closed, new Promise((resolve) => setTimeout(resolve, 1000))]);
    server.closeAllConnections();
    await Promise.all([engine.close(), tiers.close(), sources.close()]);
    await merges?.close();
    runtime.close();
    log.info('stopped');
    process.exit(0);
  };
  let isStopping = false;
  takeSignals((signal) => {
    if (isStopping) process.exit(exitKilled);
    isStopping = true;
    stop(signal).catch(onFatal);
  });

  server.listen(config.port, config.host);
  await once(server, 'listening');
  for (const { name, path } of config.adapters) {
    const adapter = await tiers.load(name, await sources.adapter(path, null), false);
    log.info({ name, digest: adapter.digest, rank: adapter.file.rank }, 'adapter loaded');
  }
  isReady = true;
  const { port } = server.address() as AddressInfo;
  log.info(
    { port, model: baseName, maxModelLen, pages: arena.numPages, weightBytes: runtime.weightBytes },
    'ready',
  );
}

/** What a step pays for layers that are not in memory: it takes at least the time that reading them takes. */
function priceOf(
  { numStreamedLayers, memoryBytes, stepBytes, readBytes, readSeconds, isDirect }: WeightStream,
  numLayers: number,
): object {
  const bytesPerSecond = Math.round(readBytes / readSeconds);
  const stepSeconds = stepBytes / bytesPerSecond;
  return { numStreamedLayers, numLayers, memoryBytes, stepBytes, stepSeconds, bytesPerSecond, isDirect };
}

/** What one sequence may have: as asked, else the most that the model and the arenas allow. */
function contextLength(config: Config, maxPositions: number, arenaTokens: number): number {
  const most = Math.min(maxPositions, arenaTokens);
  const asked = config.maxModelLen ?? most;
  if (asked <= most) return asked;
  const reason =
    maxPositions < arenaTokens
      ? `the model has ${maxPositions} positions`
      : `--device-memory and --host-memory hold ${arenaTokens} tokens of one request`;
  throw new ConfigError(`--max-model-len: expected at most ${most}, since ${reason}, got ${asked}`);
}
