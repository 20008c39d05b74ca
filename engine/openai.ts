/**
 * OpenAI's request bodies, with vLLM's extensions, to plain requests. Parse here, trust inside. Every refusal has one
 * shape: `field: expected …, got …`. Fields that we do not know are ignored; fields that would change the output and
 * are not supported are refused by name.
 */
import type { IncomingHttpHeaders } from 'node:http';
import { z } from 'zod';
import { EngineError, invalidValue } from './errors.ts';
import type { Served } from './generate.ts';
import { type GrammarSource, parseOutputFormat } from './grammar/output-format.ts';
import { parseToolUse, type ToolUse } from './grammar/tool-calls.ts';
import {
  adaptersHeader,
  fieldOf,
  type MergeRule,
  mergeHeader,
  modelHeader,
  type Problem,
  parseAdapters,
  parseMerge,
  readComposed,
  type WeightedName,
} from './protocol.ts';
import { defaultSampling, maxLogprobs, randomSeed, type SamplingParams } from './sampling.ts';
import { isDigest, needsDigest, uriProblem } from './source-uri.ts';

/** Most choices of one prompt, and most sequences of one request. */
const maxChoices = 16;
const maxSequencesOfRequest = 64;
/** Of an embeddings request, as OpenAI has it. */
const maxInputs = 2048;
/** vLLM's and OpenAI's default for completions; chat has none. */
const defaultCompletionTokens = 16;

/** A message as chat templates read it: text parts are joined, other fields kept as they came. */
export interface ChatMessage {
  role: string;
  content: string | null;
  [field: string]: unknown;
}

interface Generation {
  /** null or '': the base model. */
  model: string | null;
  /** In place of the model; null: not given. */
  adapters: readonly WeightedName[] | null;
  /** How they are merged; null: they are a sum. */
  merge: MergeRule | null;
  sampling: SamplingParams;
  /** Choices per prompt. */
  n: number;
  /** Sequences per prompt; the n likeliest are returned. */
  bestOf: number;
  stream: boolean;
  includeUsage: boolean;
  /** What the output must follow; null: nothing. */
  outputFormat: GrammarSource | null;
}

export interface ChatRequest extends Generation {
  messages: ChatMessage[];
  tools: unknown[] | null;
  /** Those that may be called; null: none. */
  toolUse: ToolUse | null;
  addGenerationPrompt: boolean;
  templateVariables: Record<string, unknown>;
}

export interface CompletionRequest extends Generation {
  /** Text or token ids, one a prompt. */
  prompts: (string | number[])[];
  addSpecialTokens: boolean;
}

export interface EmbeddingsRequest {
  model: string | null;
  adapters: readonly WeightedName[] | null;
  merge: MergeRule | null;
  /** Text or token ids. */
  inputs: (string | number[])[];
  /** The first so many of each vector; null: all. */
  dimensions: number | null;
  isBase64: boolean;
}

export type TokenizeRequest =
  | { model: string | null; prompt: string; addSpecialTokens: boolean }
  | { model: string | null; messages: ChatMessage[]; tools: unknown[] | null; addGenerationPrompt: boolean };

const text = z.string({ error: 'expected a string' });
const flag = z.boolean({ error: 'expected true or false' });
const numberIn = (min: number, max: number, error = `expected a number from ${min} to ${max}`) =>
  z.number({ error }).min(min, { error }).max(max, { error });
const integerIn = (min: number, max: number, error = `expected an integer from ${min} to ${max}`) =>
  z.number({ error }).int({ error }).min(min, { error }).max(max, { error });
const listOf = <T extends z.ZodType>(item: T, min: number, max: number, error: string) =>
  z.array(item, { error }).min(min, { error }).max(max, { error });
const record = z.record(z.string(), z.unknown(), { error: 'expected an object' });

const largestId = 2 ** 31 - 1;
const tokenId = integerIn(0, largestId, 'expected a token id');
const stopString = text.min(1, { error: 'expected a stop string that is not empty' }).max(256, {
  error: 'expected a stop string of at most 256 characters',
});

const samplingFields = {
  temperature: numberIn(0, 2).nullish(),
  top_p: numberIn(Number.MIN_VALUE, 1, 'expected a number above 0 and up to 1').nullish(),
  top_k: integerIn(-1, largestId, 'expected an integer from -1').nullish(),
  min_p: numberIn(0, 1).nullish(),
  repetition_penalty: numberIn(0.01, 10).nullish(),
  presence_penalty: numberIn(-2, 2).nullish(),
  frequency_penalty: numberIn(-2, 2).nullish(),
  seed: integerIn(Number.MIN_SAFE_INTEGER, Number.MAX_SAFE_INTEGER, 'expected an integer').nullish(),
  logit_bias: z
    .record(z.string().regex(/^\d{1,10}$/), numberIn(-100, 100), {
      error: 'expected an object from token id to a number from -100 to 100',
    })
    .nullish(),
  stop: z
    .union([stopString, listOf(stopString, 0, 16, 'expected at most 16 stop strings')], {
      error: 'expected a string, or at most 16 strings, none empty or over 256 characters',
    })
    .nullish(),
  stop_token_ids: listOf(tokenId, 0, 64, 'expected at most 64 token ids').nullish(),
  ignore_eos: flag.nullish(),
  min_tokens: integerIn(0, largestId, 'expected an integer from 0').nullish(),
  max_tokens: integerIn(1, largestId, 'expected an integer from 1').nullish(),
  include_stop_str_in_output: flag.nullish(),
  skip_special_tokens: flag.nullish(),
};

const generationFields = {
  model: text.nullish(),
  adapters: z.unknown().optional(),
  adapters_merge: z.unknown().optional(),
  n: integerIn(1, maxChoices).nullish(),
  stream: flag.nullish(),
  stream_options: z.object({ include_usage: flag.nullish() }, { error: 'expected an object' }).nullish(),
  ...samplingFields,
};

const message = z.looseObject(
  {
    role: text.min(1, { error: 'expected a role' }),
    content: z
      .union([text, z.array(z.looseObject({ type: z.literal('text'), text }))], {
        error: 'expected a string, or a list of parts of type "text"',
      })
      .nullish(),
  },
  { error: 'expected a message object' },
);
const messages = listOf(message, 1, 4096, 'expected a list of 1 to 4096 messages');
const tools = listOf(record, 0, 256, 'expected a list of at most 256 tools').nullish();

const chatBody = z.object({
  ...generationFields,
  messages,
  tools,
  max_completion_tokens: integerIn(1, largestId, 'expected an integer from 1').nullish(),
  logprobs: flag.nullish(),
  top_logprobs: integerIn(0, maxLogprobs).nullish(),
  add_generation_prompt: flag.nullish(),
  chat_template_kwargs: record.nullish(),
});

const promptError = 'expected a string, a list of strings, a list of token ids, or a list of such lists';
const completionBody = z.object({
  ...generationFields,
  prompt: z.union(
    [
      text,
      z.array(text).min(1).max(maxSequencesOfRequest),
      z.array(tokenId).min(1),
      z
        .array(listOf(tokenId, 1, largestId, 'expected at least one token id'))
        .min(1)
        .max(maxSequencesOfRequest),
    ],
    { error: `${promptError}, at most ${maxSequencesOfRequest} prompts, none empty` },
  ),
  best_of: integerIn(1, maxChoices).nullish(),
  logprobs: integerIn(0, maxLogprobs).nullish(),
  add_special_tokens: flag.nullish(),
});

const inputError = `expected text that is not empty, token ids, or a list of either, at most ${maxInputs}`;
const input = text.min(1);
const embeddingsBody = z.object({
  model: text.nullish(),
  adapters: z.unknown().optional(),
  adapters_merge: z.unknown().optional(),
  input: z.union(
    [
      input,
      z.array(input).min(1).max(maxInputs),
      z.array(tokenId).min(1),
      z.array(z.array(tokenId).min(1)).min(1).max(maxInputs),
    ],
    { error: inputError },
  ),
  encoding_format: z.enum(['float', 'base64'], { error: 'expected "float" or "base64"' }).nullish(),
});

/** Fields that would change the output and that we cannot honour, with what is possible instead. */
const unsupported: Record<string, string> = {
  suffix: 'insertion is not supported',
  echo: 'echoing the prompt is not supported; only false is',
  prompt_logprobs: 'logprobs of the prompt are not supported',
  use_beam_search: 'beam search is not supported',
  functions: 'pass tools instead',
  function_call: 'pass tools instead',
  audio: 'only text is generated',
  prediction: 'predicted outputs are not supported',
  prompt_embeds: 'pass text or token ids',
  bad_words: 'pass logit_bias instead',
  allowed_token_ids: 'pass logit_bias instead',
  logits_processors: 'pass logit_bias instead',
  truncate_prompt_tokens: 'shorten the prompt before sending it',
  continue_final_message: 'pass the text so far as a completion prompt',
  chat_template: "the model's own template is used",
  documents: 'put them into the messages',
};

export function parseChat(body: unknown): ChatRequest {
  refuseUnsupported(body);
  const fields = parse(chatBody, body);
  if ((fields.top_logprobs ?? 0) > 0 && fields.logprobs !== true) {
    throw invalidValue('top_logprobs', 'expected logprobs: true beside it', fields.logprobs);
  }
  const sampling = toSampling(fields);
  sampling.maxTokens = fields.max_completion_tokens ?? fields.max_tokens ?? null;
  sampling.numLogprobs = fields.logprobs ? (fields.top_logprobs ?? 0) : null;
  checkMinTokens(sampling);
  const n = fields.n ?? 1;
  const outputFormat = toOutputFormat(body, sampling);
  const toolUse = parseToolUse(body as Record<string, unknown>);
  if (toolUse && outputFormat) {
    throw invalidValue(outputFormat.field, 'expected none beside tools that may be called', 'one');
  }
  if (toolUse) refuseIgnoreEos(sampling, 'tools');
  return {
    ...toGeneration(fields, n),
    sampling,
    outputFormat,
    toolUse,
    bestOf: n,
    messages: fields.messages.map(joinParts),
    tools: fields.tools?.length ? fields.tools : null,
    addGenerationPrompt: fields.add_generation_prompt ?? true,
    templateVariables: fields.chat_template_kwargs ?? {},
  };
}

export function parseCompletion(body: unknown): CompletionRequest {
  refuseUnsupported(body);
  const fields = parse(completionBody, body);
  const sampling = toSampling(fields);
  sampling.maxTokens = fields.max_tokens ?? defaultCompletionTokens;
  sampling.numLogprobs = fields.logprobs ?? null;
  checkMinTokens(sampling);
  const n = fields.n ?? 1;
  const bestOf = fields.best_of ?? n;
  if (bestOf < n) throw invalidValue('best_of', `expected at least n, which is ${n}`, bestOf);
  if (bestOf > n && fields.stream)
    throw invalidValue('best_of', 'expected no more than n when streaming', bestOf);
  const prompts = toPrompts(fields.prompt);
  if (prompts.length * bestOf > maxSequencesOfRequest) {
    const got = `${prompts.length} prompts of ${bestOf} sequences`;
    throw new EngineError(
      'invalid_value',
      `prompt: expected at most ${maxSequencesOfRequest} sequences in a request, got ${got}`,
      { param: 'prompt' },
    );
  }
  const addSpecialTokens = fields.add_special_tokens ?? true;
  const outputFormat = toOutputFormat(body, sampling);
  return { ...toGeneration(fields, n), sampling, outputFormat, bestOf, prompts, addSpecialTokens };
}

export function parseEmbeddings(body: unknown, hiddenSize: number): EmbeddingsRequest {
  if (isAsked(asObject(body).truncate_prompt_tokens)) {
    refuse('truncate_prompt_tokens', unsupported.truncate_prompt_tokens!);
  }
  const dimensions = integerIn(1, hiddenSize).nullish();
  const fields = parse(embeddingsBody.extend({ dimensions }), body);
  return {
    model: fields.model ?? null,
    ...toAdapters(fields),
    inputs: toPrompts(fields.input),
    dimensions: fields.dimensions ?? null,
    isBase64: fields.encoding_format === 'base64',
  };
}

export function parseTokenize(body: unknown): TokenizeRequest {
  const hasMessages = typeof body === 'object' && body !== null && 'messages' in body;
  if (hasMessages) {
    const schema = z.object({
      model: text.nullish(),
      messages,
      tools,
      add_generation_prompt: flag.nullish(),
    });
    const fields = parse(schema, body);
    return {
      model: fields.model ?? null,
      messages: fields.messages.map(joinParts),
      tools: fields.tools?.length ? fields.tools : null,
      addGenerationPrompt: fields.add_generation_prompt ?? true,
    };
  }
  const fields = parse(
    z.object({ model: text.nullish(), prompt: text, add_special_tokens: flag.nullish() }),
    body,
  );
  return {
    model: fields.model ?? null,
    prompt: fields.prompt,
    addSpecialTokens: fields.add_special_tokens ?? true,
  };
}

export function parseDetokenize(body: unknown): { tokens: number[] } {
  return parse(z.object({ tokens: z.array(tokenId, { error: 'expected a list of token ids' }) }), body);
}

/**
 * Who answers: whom the headers name, when a gateway has resolved an alias or a composition, else the body. Of a gateway that
 * knows the one header and not the other nobody can say whether it knows the body's adapters: then there must be none.
 */
export function parseServed(
  headers: IncomingHttpHeaders,
  body: {
    model: string | null;
    adapters: readonly WeightedName[] | null;
    merge: MergeRule | null;
  },
): Served {
  const { [adaptersHeader]: adapters, [mergeHeader]: merge, [modelHeader]: model } = headers;
  if (adapters !== undefined) {
    const members = accepted(adaptersHeader, parseAdapters(String(adapters)));
    if (merge !== undefined) return { members, rule: accepted(mergeHeader, parseMerge(String(merge))) };
    if (body.merge !== null)
      throw invalidValue('adapters_merge', `expected ${mergeHeader} beside ${adaptersHeader}`, merge);
    return members;
  }
  if (merge !== undefined) throw invalidValue(mergeHeader, `expected ${adaptersHeader} beside it`, adapters);
  if (model === undefined) return bodyServed(body);
  if (body.adapters !== null)
    throw invalidValue('adapters', `expected none beside ${modelHeader}`, body.adapters);
  return parseModelHeader(String(model));
}

function bodyServed({ model, adapters, merge }: Parameters<typeof parseServed>[1]): Served {
  if (adapters !== null && merge !== null) return { members: adapters, rule: merge };
  return adapters ?? model;
}

function toAdapters(fields: { adapters?: unknown; adapters_merge?: unknown }) {
  const read = readComposed(fields);
  if (read === null) return { adapters: null, merge: null };
  if ('adapters' in read) return read;
  const { at, expected, got } = read;
  throw new EngineError('invalid_value', `${at}: expected ${expected}, got ${got}`, { param: fieldOf(read) });
}

function accepted<T>(field: string, read: T | Problem): T {
  // An array has an `at` that is not its own.
  if (read === null || typeof read !== 'object' || !Object.hasOwn(read, 'at')) return read as T;
  const { at, expected, got } = read as Problem;
  throw new EngineError('invalid_value', `${field}${at}: expected ${expected}, got ${got}`, { param: field });
}

function parseModelHeader(header: string): string {
  if (/^[\x20-\x7e]{1,256}$/.test(header)) return header;
  const expected = 'expected 1 to 256 printable ASCII characters';
  throw new EngineError('invalid_value', `${modelHeader}: ${expected}, got ${header.length} others`, {
    param: modelHeader,
  });
}

export interface LoadAdapterRequest {
  name: string;
  /** A path or a URI. */
  path: string;
  /** What the adapter must be; null: whatever is there. */
  digest: string | null;
  isInPlace: boolean;
  /** null: as it was. */
  isPinned: boolean | null;
}

/** vLLM's load body. Names become metric labels in comma lists, so commas and control characters are refused. */
export function parseLoadAdapter(body: unknown): LoadAdapterRequest {
  const { lora_name, lora_path, load_inplace, pinned = null, digest = null } = asObject(body);
  if (!isFilled(lora_name) || !isFilled(lora_path)) {
    throw new EngineError('adapter_name_missing', "Both 'lora_name' and 'lora_path' must be provided.", {
      param: isFilled(lora_name) ? 'lora_path' : 'lora_name',
    });
  }
  // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is looked for
  if (lora_name.length > 256 || /[,\u0000-\u001f\u007f]/.test(lora_name)) {
    throw new EngineError(
      'adapter_name_missing',
      'lora_name: expected at most 256 characters, without commas and control characters',
      { param: 'lora_name' },
    );
  }
  if (load_inplace !== undefined && load_inplace !== null && typeof load_inplace !== 'boolean') {
    throw invalidValue('load_inplace', 'expected true or false', load_inplace);
  }
  if (pinned !== null && typeof pinned !== 'boolean')
    throw invalidValue('pinned', 'expected true or false', pinned);
  const problem = uriProblem(lora_path);
  if (problem !== null) {
    const message = `lora_path: expected ${problem.expected}, got ${problem.got}`;
    throw new EngineError('adapter_path_refused', message, { param: 'lora_path' });
  }
  if (digest !== null && !(typeof digest === 'string' && isDigest(digest))) {
    throw invalidValue('digest', 'expected sha256: and 64 hex digits', digest);
  }
  if (digest === null && needsDigest(lora_path)) {
    throw invalidValue(
      'digest',
      'expected the digest of the adapter beside a lora_path of https or s3',
      undefined,
    );
  }
  return { name: lora_name, path: lora_path, digest, isInPlace: load_inplace === true, isPinned: pinned };
}

export function parseUnloadAdapter(body: unknown): { name: string } {
  const { lora_name } = asObject(body);
  if (!isFilled(lora_name)) {
    throw new EngineError('adapter_name_missing', "'lora_name' must be provided.", { param: 'lora_name' });
  }
  return { name: lora_name };
}

/** Of `DELETE /v1/adapters/{digest}`. */
export function parseRemoveAdapter(digest: string, query: unknown): { isPurge: boolean } {
  if (!isDigest(digest)) throw invalidValue('digest', 'expected sha256: and 64 hex digits', digest);
  const { purge = 'false' } = query as { purge?: unknown };
  if (purge !== 'true' && purge !== 'false') throw invalidValue('purge', 'expected true or false', purge);
  return { isPurge: purge === 'true' };
}

const isFilled = (value: unknown): value is string => typeof value === 'string' && value !== '';

function asObject(body: unknown): Record<string, unknown> {
  if (typeof body !== 'object' || body === null || Array.isArray(body)) {
    throw invalidValue('body', 'expected a JSON object', body);
  }
  return body as Record<string, unknown>;
}

function refuseUnsupported(body: unknown): void {
  const fields = asObject(body);
  for (const [field, instead] of Object.entries(unsupported)) {
    if (isAsked(fields[field])) refuse(field, instead);
  }
  const modalities = fields.modalities;
  if (isAsked(modalities) && !(Array.isArray(modalities) && modalities.every((kind) => kind === 'text'))) {
    refuse('modalities', 'only ["text"] is supported');
  }
  const options = fields.stream_options;
  if (isAsked(options) && fields.stream !== true) {
    throw invalidValue('stream_options', 'expected only beside stream: true', options);
  }
  if (isAsked((options as { continuous_usage_stats?: unknown } | undefined)?.continuous_usage_stats)) {
    refuse('stream_options.continuous_usage_stats', 'only include_usage is supported');
  }
}

/** Clients send null, false and empty values for what they do not want. */
function isAsked(value: unknown): boolean {
  if (value === undefined || value === null || value === false || value === '') return false;
  return typeof value !== 'object' || Object.keys(value).length > 0;
}

function refuse(field: string, instead: string): never {
  throw new EngineError('unsupported_parameter', `${field}: ${instead}`, { param: field });
}

function toGeneration(fields: z.infer<z.ZodObject<typeof generationFields>>, n: number) {
  return {
    model: fields.model ?? null,
    ...toAdapters(fields),
    n,
    stream: fields.stream ?? false,
    includeUsage: fields.stream_options?.include_usage ?? false,
  };
}

function toSampling(fields: z.infer<z.ZodObject<typeof samplingFields>>): SamplingParams {
  const defaults = defaultSampling();
  const biases = Object.entries(fields.logit_bias ?? {});
  if (biases.length > 1024) throw invalidValue('logit_bias', 'expected at most 1024 entries', biases.length);
  return {
    ...defaults,
    temperature: fields.temperature ?? defaults.temperature,
    topP: fields.top_p ?? defaults.topP,
    topK: Math.max(0, fields.top_k ?? defaults.topK),
    minP: fields.min_p ?? defaults.minP,
    repetitionPenalty: fields.repetition_penalty ?? defaults.repetitionPenalty,
    presencePenalty: fields.presence_penalty ?? defaults.presencePenalty,
    frequencyPenalty: fields.frequency_penalty ?? defaults.frequencyPenalty,
    seed: fields.seed == null ? randomSeed() : BigInt.asUintN(64, BigInt(fields.seed)),
    biasIds: biases.map(([id]) => Number(id)),
    biasValues: biases.map(([, value]) => value),
    minTokens: fields.min_tokens ?? 0,
    ignoreEos: fields.ignore_eos ?? false,
    stopStrings: fields.stop == null ? [] : [fields.stop].flat(),
    stopTokenIds: fields.stop_token_ids ?? [],
    includeStop: fields.include_stop_str_in_output ?? false,
    skipSpecialTokens: fields.skip_special_tokens ?? true,
  };
}

function toOutputFormat(body: unknown, sampling: SamplingParams): GrammarSource | null {
  const source = parseOutputFormat(body as Record<string, unknown>);
  if (source) refuseIgnoreEos(sampling, source.field);
  return source;
}

/** A grammar says where an output ends, and the end token is how. */
function refuseIgnoreEos({ ignoreEos }: SamplingParams, field: string): void {
  if (ignoreEos) throw invalidValue('ignore_eos', `expected false beside ${field}`, ignoreEos);
}

function checkMinTokens({ minTokens, maxTokens }: SamplingParams): void {
  if (maxTokens !== null && minTokens > maxTokens) {
    throw invalidValue('min_tokens', `expected at most max_tokens, which is ${maxTokens}`, minTokens);
  }
}

function toPrompts(prompt: string | string[] | number[] | number[][]): (string | number[])[] {
  if (typeof prompt === 'string') return [prompt];
  return typeof prompt[0] === 'number' ? [prompt as number[]] : (prompt as string[] | number[][]);
}

function joinParts(message: z.infer<typeof messages>[number]): ChatMessage {
  const { content } = message;
  return {
    ...message,
    content: Array.isArray(content) ? content.map((part) => part.text).join('\n') : (content ?? null),
  };
}

function parse<T extends z.ZodType>(schema: T, body: unknown): z.infer<T> {
  asObject(body);
  const result = schema.safeParse(body);
  if (result.success) return result.data;
  const issue = result.error.issues[0]!;
  let value: unknown = body;
  let field = '';
  for (const key of issue.path) {
    value = (value as Record<PropertyKey, unknown> | undefined)?.[key];
    field += typeof key === 'number' ? `[${key}]` : `${field ? '.' : ''}${String(key)}`;
  }
  throw invalidValue(
    field,
    issue.code === 'invalid_key' ? 'expected token ids as keys' : issue.message,
    value,
  );
}
