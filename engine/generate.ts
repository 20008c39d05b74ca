/**
 * From a parsed request to sequences and back: names an adapter, makes tokens, adds all choices at once, and collects
 * or forwards what they say. Knows no HTTP.
 */
import { setImmediate as nextTurn } from 'node:timers/promises';
import type { Grammar } from '../native/index.ts';
import type { AdapterTiers } from './adapters/adapter-tiers.ts';
import { alone, type Composition, compose } from './adapters/composition.ts';
import { type Merges, mergeProblem } from './adapters/merges.ts';
import type {
  Detokenizer,
  Engine,
  SequenceHandle,
  SequenceOutput,
  SequenceRequest,
  TokenLogprobs,
} from './engine.ts';
import { EngineError } from './errors.ts';
import type { Grammars, GrammarTokens } from './grammar/grammars.ts';
import { schemaText } from './grammar/output-format.ts';
import { explainTools, type ToolForm, type ToolUse, toolGrammar } from './grammar/tool-calls.ts';
import type { ChatMessage, ChatRequest, CompletionRequest } from './openai.ts';
import { type Choice, type TokenNames, type Usage, usageOf } from './openai-reply.ts';
import type { MergeRule, Standing, WeightedName } from './protocol.ts';
import { seedOfChoice } from './sampling.ts';
import { defaultStanding } from './sequence.ts';

/** The base model's text side. */
export interface TextModel extends TokenNames, GrammarTokens {
  /** How its chat template writes tool calls, and whether it knows tools at all. */
  readonly toolForm: ToolForm;
  readonly knowsTools: boolean;
  encode(text: string, options: { addSpecialTokens: boolean }): ArrayLike<number>;
  decode(tokenIds: ArrayLike<number>, options: { skipSpecialTokens: boolean }): string;
  createDetokenizer(options: { skipSpecialTokens: boolean }): Detokenizer;
  /** Prompt text of a conversation; throws when the model has no template or the template refuses. */
  renderChat(
    messages: readonly ChatMessage[],
    options: { tools: unknown[] | null; addGenerationPrompt: boolean; variables: Record<string, unknown> },
  ): string;
}

export interface ServedModel {
  baseName: string;
  engine: Engine;
  tiers: AdapterTiers;
  /** null: none are made. */
  merges: Merges | null;
  text: TextModel;
  grammars: Grammars;
}

/** Several that are merged into one. */
export interface MergedNames {
  members: readonly WeightedName[];
  rule: MergeRule;
}

/**
 * Who answers, which may be another than the request's `model`, which the reply carries: a name, null or '' for the base, several, or
 * what is merged of several.
 */
export type Served = string | null | readonly WeightedName[] | MergedNames;

/** Prompts as tokens, and what is asked of them. */
export interface Job {
  served: Served;
  prompts: ArrayLike<number>[];
  request: ChatRequest | CompletionRequest;
  /** What the outputs follow; null: nothing. */
  grammar: Grammar | null;
  /** Which gateway sent it; null, or absent: nobody said. */
  sender?: string | null;
  /** Whose it is. */
  standing?: Standing;
}

/** Text that averages more characters a token than this is not written for a model; encoding it would only hold the thread. */
const maxCharactersPerToken = 16;

export async function chatJob(model: ServedModel, request: ChatRequest, served: Served): Promise<Job> {
  namedBy(model, served);
  const prompts = [chatTokens(model, request)];
  const { sampling, toolUse } = request;
  const grammar = toolUse ? await toolUseGrammar(model, toolUse) : await grammarOf(model, request);
  // The tokens that begin and end a call may be special ones.
  return {
    served,
    prompts,
    request: toolUse ? { ...request, sampling: { ...sampling, skipSpecialTokens: false } } : request,
    grammar,
  };
}

async function grammarOf(
  { grammars }: ServedModel,
  { outputFormat }: Job['request'],
): Promise<Grammar | null> {
  return outputFormat && grammars.get(outputFormat);
}

/** @throws EngineError invalid_value naming the tool whose schema cannot be followed */
async function toolUseGrammar({ grammars, text }: ServedModel, toolUse: ToolUse): Promise<Grammar> {
  const tokenOf = (word: string) => {
    const [id, ...others] = Array.from(text.encode(word, { addSpecialTokens: false }));
    return id !== undefined && others.length === 0 && text.isSpecial(id) ? id : null;
  };
  try {
    return await grammars.get(toolGrammar(toolUse, text.toolForm, tokenOf));
  } catch (error) {
    for (const { parameters, field } of toolUse.tools)
      await grammars.get({ kind: 'json_schema', text: schemaText(parameters, field), field });
    throw error;
  }
}

/** Encodes the prompts, each in a turn of its own, so that many of them do not hold up the steps. */
export async function completionJob(
  model: ServedModel,
  request: CompletionRequest,
  served: Served,
): Promise<Job> {
  namedBy(model, served);
  const prompts: ArrayLike<number>[] = [];
  for (const prompt of request.prompts) {
    if (prompts.length > 0) await nextTurn();
    if (typeof prompt !== 'string') checkTokens(prompt, model.text.vocabSize, 'prompt');
    prompts.push(typeof prompt === 'string' ? encode(model, prompt, request.addSpecialTokens) : prompt);
  }
  return { served, prompts, request, grammar: await grammarOf(model, request) };
}

/**
 * Waits until there is what the names stand for, which is at once but for a merge.
 * @param signal  aborted: nobody waits for the answer any more
 * @returns lets it go: call it when its sequences are added
 * @throws EngineError model_not_found, invalid_value, and what Merges throws
 */
export async function holdServed(
  model: ServedModel,
  served: Served,
  signal: AbortSignal,
): Promise<() => void> {
  const members = namedBy(model, served);
  if (!isMerged(served) || members.length < 2) return () => {};
  const { letGo } = await mergesOf(model).hold(members, served.rule, signal);
  return letGo;
}

/**
 * Who computes, as the names stand now.
 * @throws EngineError model_not_found; merge_not_ready when holdServed was not waited for
 */
export function adaptersOf(model: ServedModel, served: Served): Composition {
  const members = namedBy(model, served);
  // Of one adapter there is nothing to merge: PEFT takes the sum then, too.
  if (!isMerged(served) || members.length < 2) return members;
  const merged = mergesOf(model).find(members, served.rule);
  if (merged) return alone(merged);
  throw new EngineError('merge_not_ready', 'the merge is not kept any more', { param: 'adapters_merge' });
}

function isMerged(served: Served): served is MergedNames {
  return typeof served === 'object' && served !== null && 'rule' in served;
}

function mergesOf({ merges }: ServedModel): Merges {
  if (merges) return merges;
  const message = 'adapters_merge: expected none, since this engine has no --merge-cache';
  throw new EngineError('invalid_value', message, { param: 'adapters_merge' });
}

/**
 * The adapters that the names point at now; of a merge its members.
 * @throws EngineError model_not_found; invalid_value, when they cannot be merged
 */
export function namedBy({ tiers, baseName }: ServedModel, served: Served): Composition {
  const find = (name: string, param: string) => {
    const adapter = tiers.get(name);
    if (adapter) return adapter;
    throw new EngineError('model_not_found', `The model \`${name}\` does not exist.`, { param });
  };
  if (served === null || served === '' || served === baseName) return alone(null);
  if (typeof served === 'string') return alone(find(served, 'model'));
  const names = isMerged(served) ? served.members : served;
  const members = names.map(({ name, weight }) => ({ name, adapter: find(name, 'adapters'), weight }));
  const problem = isMerged(served) ? mergeProblem(members) : null;
  if (problem === null) return compose(members);
  throw new EngineError('invalid_value', `adapters_merge: ${problem}`, { param: 'adapters_merge' });
}

export function chatTokens(
  model: ServedModel,
  request: {
    messages: ChatMessage[];
    tools: unknown[] | null;
    addGenerationPrompt: boolean;
    templateVariables?: Record<string, unknown>;
  },
): ArrayLike<number> {
  const { knowsTools } = model.text;
  const messages = knowsTools ? request.messages : explainTools(request.messages, request.tools);
  const prompt = model.text.renderChat(messages, {
    tools: knowsTools ? request.tools : null,
    addGenerationPrompt: request.addGenerationPrompt,
    variables: request.templateVariables ?? {},
  });
  // The template has written the special tokens already.
  return encode(model, prompt, false);
}

/** @throws EngineError context_length_exceeded, before encoding, when the text is too long by far */
export function encode(
  { text, engine }: ServedModel,
  prompt: string,
  addSpecialTokens: boolean,
): ArrayLike<number> {
  const { maxModelLen } = engine;
  if (prompt.length > maxModelLen * maxCharactersPerToken) {
    throw new EngineError(
      'context_length_exceeded',
      `This model's maximum context length is ${maxModelLen} tokens, but the prompt has ${prompt.length} characters, ` +
        `more than ${maxCharactersPerToken} for each of them.`,
      { param: 'prompt' },
    );
  }
  return text.encode(prompt, { addSpecialTokens });
}

export function checkTokens(tokenIds: readonly number[], vocabSize: number, field: string): void {
  const wrong = tokenIds.find((id) => id >= vocabSize);
  if (wrong === undefined) return;
  throw new EngineError('invalid_value', `${field}: expected token ids below ${vocabSize}, got ${wrong}`, {
    param: field,
  });
}

/**
 * Adds every sequence of the job: prompt by prompt, bestOf of each. `index` counts through all of them.
 * @returns one handle per sequence
 */
export function addJob(
  model: ServedModel,
  { served, prompts, request, grammar, sender = null, standing = defaultStanding }: Job,
  onOutput: (index: number, output: SequenceOutput) => void,
): SequenceHandle[] {
  const { engine, text } = model;
  // Named anew, in the same turn as the adding: an unload may have come since the job was made.
  const adapters = adaptersOf(model, served);
  checkTokens(request.sampling.stopTokenIds, text.vocabSize, 'stop_token_ids');
  checkTokens(request.sampling.biasIds, text.vocabSize, 'logit_bias');
  const requests: SequenceRequest[] = [];
  for (const promptTokens of prompts) {
    for (let choice = 0; choice < request.bestOf; choice++) {
      const index = requests.length;
      requests.push({
        promptTokens,
        params: { ...request.sampling, seed: seedOfChoice(request.sampling.seed, choice) },
        adapters,
        sender,
        standing,
        grammar,
        onOutput: (output) => onOutput(index, output),
      });
    }
  }
  return engine.add(requests);
}

/** What one sequence has said so far. */
interface Collected {
  text: string;
  logprobs: TokenLogprobs[];
  last: SequenceOutput | null;
}

/**
 * Adds the job's sequences at once and collects them. `choices` settles when all have ended; it rejects with the first
 * error. `cancel` ends them all.
 */
export function collect(
  model: ServedModel,
  job: Job,
): { cancel: () => void; choices: Promise<{ choices: Choice[]; usage: Usage }> } {
  const { request, prompts } = job;
  const { resolve, reject, promise } = Promise.withResolvers<void>();
  const collected: Collected[] = [];
  let numOpen = 0;
  const handles = addJob(model, job, (index, output) => {
    const own = collected[index]!;
    own.text += output.text;
    if (output.logprobs) own.logprobs.push(output.logprobs);
    if (!output.finishReason) return;
    own.last = output;
    if (output.error) reject(output.error);
    if (--numOpen === 0) resolve();
  });
  numOpen = handles.length;
  for (const _ of handles) collected.push({ text: '', logprobs: [], last: null });

  const cancel = () => {
    for (const handle of handles) handle.cancel();
  };
  const choices = promise.then(
    () => {
      const usage = jobUsage(job, handles);
      return { choices: bestChoices(prompts.length, request, handles, collected), usage };
    },
    (error) => {
      cancel();
      throw error;
    },
  );
  return { cancel, choices };
}

export function numTokensOf(prompts: readonly ArrayLike<number>[]): number {
  return prompts.reduce((sum, prompt) => sum + prompt.length, 0);
}

/** Each prompt counts once, and as its first choice found it in the prefix cache. */
export function jobUsage({ prompts, request }: Job, handles: readonly SequenceHandle[]): Usage {
  let numOutput = 0;
  let numCached = 0;
  for (const [index, { sequence }] of handles.entries()) {
    numOutput += sequence.numOutputTokens;
    if (index % request.bestOf === 0) numCached += sequence.numCachedTokens;
  }
  return usageOf(numTokensOf(prompts), numOutput, numCached);
}

/** Of each prompt's bestOf sequences the n with the highest mean logprob, in the order of their numbers when n is all. */
function bestChoices(
  numPrompts: number,
  { n, bestOf, sampling }: Job['request'],
  handles: readonly SequenceHandle[],
  collected: readonly Collected[],
): Choice[] {
  const choices: Choice[] = [];
  for (let prompt = 0; prompt < numPrompts; prompt++) {
    const indices = Array.from({ length: bestOf }, (_, choice) => prompt * bestOf + choice);
    if (bestOf > n) indices.sort((a, b) => handles[b]!.meanLogprob - handles[a]!.meanLogprob);
    for (const index of indices.slice(0, n)) {
      const { text, logprobs, last } = collected[index]!;
      choices.push({
        index: choices.length,
        text,
        numTokens: handles[index]!.sequence.numOutputTokens,
        logprobs: sampling.numLogprobs === null ? null : logprobs,
        finishReason: last!.finishReason!,
        stopReason: last!.stopReason,
      });
    }
  }
  return choices;
}
