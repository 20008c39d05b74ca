/**
 * The engine process's first moments. A process without a handler ignores SIGTERM when it is the first of its container,
 * so one is there before anything else is loaded; run.ts is the rest.
 */

/** Nothing is served yet, and what is half done is gone on with or swept up by the next start. */
let onSignal = (_signal: NodeJS.Signals): void => process.exit(0);
process.on('SIGTERM', (signal) => onSignal(signal));
process.on('SIGINT', (signal) => onSignal(signal));

const { run } = await import('./run.ts');
await run((handler) => {
  onSignal = handler;
});
