/** One line that says how far the load is: rewritten in place on a terminal, a new one now and then elsewhere. */
import type { LoadOptions } from './options.ts';
import { figure } from './report.ts';
import type { Sample } from './run.ts';

const terminalIntervalMs = 500;
const logIntervalMs = 10_000;

export interface Progress {
  add(sample: Sample): void;
  end(): void;
}

/** Writes to stderr, so that a report on stdout stays alone. */
export function startProgress({
  numRequests,
  durationSeconds,
  conversations,
}: Pick<LoadOptions, 'numRequests' | 'durationSeconds' | 'conversations'>): Progress {
  const { stderr } = process;
  const beginMs = performance.now();
  let numDone = 0;
  let numFailed = 0;
  let outputTokens = 0;
  const line = () => {
    const seconds = (performance.now() - beginMs) / 1000;
    const goal = durationSeconds === null ? ` of ${numRequests * (conversations?.numTurns ?? 1)}` : '';
    const what = conversations === null ? 'requests' : 'turns';
    const end = durationSeconds === null ? '' : ` of ${durationSeconds}`;
    const failed = numFailed > 0 ? `, ${numFailed} failed` : '';
    return `${numDone + numFailed}${goal} ${what}${failed}, ${seconds.toFixed(0)}${end} s, ${figure(outputTokens / seconds)} output tokens/s`;
  };
  const timer = setInterval(
    () => stderr.write(stderr.isTTY ? `\r\x1b[K${line()}` : `${line()}\n`),
    stderr.isTTY ? terminalIntervalMs : logIntervalMs,
  );
  return {
    add({ code, outputTokens: tokens }) {
      if (code === 'ok') numDone++;
      else if (code !== 'cancelled') numFailed++;
      outputTokens += tokens ?? 0;
    },
    end() {
      clearInterval(timer);
      if (stderr.isTTY) stderr.write('\r\x1b[K');
    },
  };
}
